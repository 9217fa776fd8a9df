"""A faceswap train.ini: each of its keys is translated or reported, in both layouts."""

import configparser
import json
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from mien import models
from mien.cli import main
from mien.core.config import from_dict, to_dict
from mien.core.config.faceswap_ini import MAX_BYTES, read_ini

INIS = Path(__file__).parent / "faceswap_ini"
PRESENT = (INIS / "present.ini").read_text()
AUGUST_2023 = (INIS / "august_2023.ini").read_text()
"""Every key of either layout with its default."""


CHANGED = """
global centering            Legacy     data.centering              legacy
global coverage             87.5       data.coverage               87.5
global vertical_offset      -10        data.vertical_offset        -10
global icnr_init            True       model.icnr_init             true
global conv_aware_init      yes        model.conv_aware_init       true
global lr_finder_iterations 500        optimizer.lr_finder_iterations 500
global lr_finder_mode       graph_and_set optimizer.lr_finder_mode graph_and_set
global lr_finder_strength   extreme    optimizer.lr_finder_strength extreme
global reflect_padding      True       model.reflect_padding       true
global mixed_precision      True       precision.mode              auto
global mixed_precision      False      precision.mode              fp32
global nan_protection       False      train.nan_protection        off
global nan_protection       True       train.nan_protection        halt
global autoclip             True       optimizer.gradient_clipping autoclip
global autoclip             False      optimizer.gradient_clipping none
global.optimizer optimizer            adabelief    optimizer.optimizer            adabelief
global.optimizer learning_rate        1e-5         optimizer.learning_rate        1e-5
global.optimizer epsilon_exponent     -16          optimizer.epsilon_exponent     -16
global.optimizer save_optimizer       Never        save.save_optimizer            never
global.optimizer gradient_clipping    global_norm  optimizer.gradient_clipping    global_norm
global.optimizer clipping_value       2            optimizer.clipping_value       2.0
global.optimizer autoclip_history     5000         optimizer.autoclip_history     5000
global.optimizer weight_decay         0.01         optimizer.weight_decay         0.01
global.optimizer gradient_accumulation 4           optimizer.gradient_accumulation 4
global.optimizer ada_beta_1           0.5          optimizer.ada_beta_1           0.5
global.optimizer ada_beta_2           0.99         optimizer.ada_beta_2           0.99
global.optimizer ada_amsgrad          True         optimizer.ada_amsgrad          true
global.loss loss_function       ms_ssim      loss.loss_function       ms_ssim
global.loss loss_function_2     LPIPS_vgg16  loss.loss_function_2     lpips_vgg16
global.loss loss_weight_2       50           loss.loss_weight_2       50
global.loss loss_function_3     ffl          loss.loss_function_3     ffl
global.loss loss_weight_3       25           loss.loss_weight_3       25
global.loss loss_function_4     None         loss.loss_function_4     none
global.loss loss_weight_4       400          loss.loss_weight_4       400
global.loss mask_loss_function  mae          loss.mask_loss_function  mae
global.loss eye_multiplier      1            loss.eye_multiplier      1
global.loss mouth_multiplier    40           loss.mouth_multiplier    40
global.loss penalized_mask_loss False        loss.penalized_mask_loss false
global.loss mask_type           none         data.mask_type           none
global.loss mask_dilation       -2.5         data.mask_dilation       -2.5
global.loss mask_blur_kernel    9            data.mask_blur_kernel    9
global.loss mask_threshold      0            data.mask_threshold      0
global.loss learn_mask          True         loss.learn_mask          true
trainer.augmentation preview_images       4        preview.preview_images       4
trainer.augmentation mask_opacity         100      preview.mask_opacity         100
trainer.augmentation mask_color           #00FF7f  preview.mask_color           #00ff7f
trainer.augmentation zoom_amount          0        augment.zoom_amount          0
trainer.augmentation rotation_range       25       augment.rotation_range       25
trainer.augmentation shift_range          1        augment.shift_range          1
trainer.augmentation flip_chance          75       augment.flip_chance          75
trainer.augmentation color_lightness      0        augment.color_lightness      0
trainer.augmentation color_ab             50       augment.color_ab             50
trainer.augmentation color_clahe_chance   0        augment.color_clahe_chance   0
trainer.augmentation color_clahe_max_size 8        augment.color_clahe_max_size 8
"""
"""Section and key there, what the file says, setting here, its value."""

LEFT_OUT = {
    ("global", "convert_batchsize"): "`mien swap` takes it as --batch-size",
    ("global", "allow_growth"): "GPU memory is taken as it is needed",
    ("trainer.loader", "num_processes"): "threads make the batches; data.num_threads says how many",
    ("trainer.loader", "pre_fetch"): "the next batch is made ahead in any case",
}

OPTIONS = {
    "dfaker": {"output_size": 256},
    "dfl-h128": {"lowmem": True},
    "dfl-sae": {
        "input_size": 80,
        "architecture": "liae",
        "autoencoder_dims": 64,
        "encoder_dims": 21,
        "decoder_dims": 10,
        "multiscale_decoder": True,
    },
    "dlight": {"features": "lowmem", "details": "fast", "output_size": 128},
    "iae": {},
    "lightweight": {},
    "original": {"lowmem": True},
    "phaze-a": {
        "output_size": 256,
        "shared_fc": "half",
        "enable_gblock": False,
        "split_fc": False,
        "split_gblock": True,
        "split_decoders": True,
        "enc_architecture": "mobilenet_v3_small",
        "enc_scaling": 100,
        "enc_load_weights": False,
        "bottleneck_type": "max_pooling",
        "bottleneck_norm": "layer",
        "bottleneck_size": 512,
        "bottleneck_in_encoder": False,
        "fc_depth": 2,
        "fc_min_filters": 512,
        "fc_max_filters": 768,
        "fc_dimensions": 8,
        "fc_filter_slope": 0.25,
        "fc_dropout": 0.1,
        "fc_upsampler": "subpixel",
        "fc_upsamples": 2,
        "fc_upsample_filters": 256,
        "fc_gblock_depth": 1,
        "fc_gblock_min_nodes": 256,
        "fc_gblock_max_nodes": 1024,
        "fc_gblock_filter_slope": 0.5,
        "fc_gblock_dropout": 0.2,
        "dec_upscale_method": "upscale_hybrid",
        "dec_upscales_in_fc": 1,
        "dec_norm": "rms",
        "dec_min_filters": 32,
        "dec_max_filters": 256,
        "dec_slope_mode": "cap_max",
        "dec_filter_slope": 0.3,
        "dec_res_blocks": 2,
        "dec_output_kernel": 3,
        "dec_gaussian": False,
        "dec_skip_last_residual": False,
        "freeze_layers": ["encoder", "fc_both"],
        "load_layers": ["encoder", "fc_a", "decoder_both"],
        "fs_original_depth": 3,
        "fs_original_min_filters": 64,
        "fs_original_max_filters": 512,
        "fs_original_use_alt": True,
        "mobilenet_width": 0.75,
        "mobilenet_depth": 2,
        "mobilenet_dropout": 0.5,
        "mobilenet_minimalistic": True,
    },
    "realface": {
        "input_size": 96,
        "output_size": 192,
        "dense_nodes": 768,
        "complexity_encoder": 96,
        "complexity_decoder": 544,
    },
    "unbalanced": {
        "input_size": 64,
        "lowmem": True,
        "nodes": 512,
        "complexity_encoder": 64,
        "complexity_decoder_a": 128,
        "complexity_decoder_b": 1024,
    },
    "villain": {"lowmem": True},
}
"""Every option that faceswap has, with another value than the default."""


def _changed():
    for line in CHANGED.strip().splitlines():
        section, key, text, place, value = line.split()
        yield section, key, text, place, value


def _pairs(text):
    """Every (section, key) of an ini."""
    file = configparser.ConfigParser(interpolation=None)
    file.read_string(text)
    return [(section, key) for section in file.sections() for key in file[section]]


def _as_typed(value):
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


@pytest.fixture
def ini(tmp_path):
    """Write a train.ini; its path."""

    def write(content):
        path = tmp_path / "train.ini"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def _with_options(trainer, options):
    lines = [f"{key} = {_as_ini(value)}" for key, value in options.items()]
    return "\n".join(["[global]", f"[model.{trainer.replace('-', '_')}]", *lines])


def _as_ini(value):
    return ", ".join(value) if isinstance(value, list) else value


def test_the_tables_hold_every_key():
    translated = {(section, key) for section, key, *_ in _changed()} | LEFT_OUT.keys()
    options = {
        (f"model.{trainer.replace('-', '_')}", key)
        for trainer, options in OPTIONS.items()
        for key in options
    }
    assert options.isdisjoint(translated)
    only_older = {("global", "autoclip"), ("global", "allow_growth")}
    assert set(_pairs(PRESENT)) == (translated - only_older) | options
    assert len(_pairs(PRESENT)) == 125


@pytest.mark.parametrize(("section", "key", "text", "place", "value"), list(_changed()))
def test_a_key_sets_its_setting_alone(ini, section, key, text, place, value):
    settings, _ = read_ini(ini(f"[{section}]\n{key} = {text}\n"), "original")
    mien_section, name = place.split(".")
    assert settings.pop("model") | {"trainer": "original"} == {"trainer": "original"} | (
        {name: _as_typed(value)} if mien_section == "model" else {}
    )
    assert settings == ({} if mien_section == "model" else {mien_section: {name: _as_typed(value)}})


@pytest.mark.parametrize(("place", "reason"), LEFT_OUT.items(), ids=lambda item: item[1])
def test_what_mien_does_not_have_is_reported(ini, place, reason):
    section, key = place
    settings, report = read_ini(ini(f"[{section}]\n{key} = 3\n"), "original")
    assert settings == {"model": {"trainer": "original"}}
    assert report == [f"[{section}] {key}: left out; {reason}"]


@pytest.mark.parametrize("trainer", models.available())
def test_options_of_every_family(ini, trainer):
    """All of them changed, and back through the file that `--print-config` writes."""
    settings, report = read_ini(ini(_with_options(trainer, OPTIONS[trainer])), trainer)
    assert settings["model"].get("options", {}) == OPTIONS[trainer]
    assert not report
    options = models.options_of(trainer, settings["model"].get("options", {}))
    defaults = models.options_of(trainer, {})
    for key in OPTIONS[trainer]:
        assert getattr(options, key) != getattr(defaults, key)
    config = from_dict(settings)
    assert from_dict(tomllib.loads(tomli_w.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("trainer", models.available())
def test_the_defaults_of_faceswap(ini, trainer):
    settings, report = read_ini(ini(PRESENT), trainer)
    options = settings["model"].pop("options", {})
    assert options.keys() == OPTIONS[trainer].keys()
    assert models.options_of(trainer, options) == models.options_of(trainer, {})
    others = {"model": {"trainer": trainer}, "precision": {"mode": "fp32"}}
    assert from_dict(settings) == from_dict(others | {"save": {"save_optimizer": "exit"}})
    assert len(report) == 5  # precision, three keys, other families


def test_the_layout_of_august_2023(ini):
    text = AUGUST_2023.replace("zoom_amount = 5", "zoom_amount = 7")
    text = text.replace("autoclip = False", "autoclip = True")
    text = text.replace("learning_rate = 5e-05", "learning_rate = 3e-05")
    settings, report = read_ini(ini(text), "original")
    config = from_dict(settings)
    assert config.data.coverage == 87.5
    assert config.augment.zoom_amount == 7
    assert config.optimizer.learning_rate == 3e-5
    assert config.optimizer.gradient_clipping == "autoclip"
    assert config.save.save_optimizer == "exit"
    assert [line.split(":")[0] for line in report] == [
        "[global] allow_growth",
        "[global] mixed_precision = False",
        "[global] convert_batchsize",
    ]
    keys = {key for _, key in _pairs(AUGUST_2023)}
    assert {key for _, key in _pairs(PRESENT)} >= keys - {"autoclip", "allow_growth"}


def test_the_present_layout_counts_where_both_are(ini):
    text = "[global.optimizer]\noptimizer = lion\n[global]\noptimizer = nadam\nautoclip = True\n"
    settings, report = read_ini(ini(text), "original")
    assert settings["optimizer"] == {"optimizer": "lion", "gradient_clipping": "autoclip"}
    assert report == ["[global] optimizer: left out; [global.optimizer] optimizer counts"]
    text = "[global.optimizer]\ngradient_clipping = norm\n[global]\nautoclip = True\n"
    settings, report = read_ini(ini(text), "original")
    assert settings["optimizer"] == {"gradient_clipping": "norm"}
    assert report == ["[global] autoclip: left out; [global.optimizer] gradient_clipping counts"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("mixed_precision = True", "precision.mode is auto; bf16 where the GPU has it"),
        ("mixed_precision = False", "precision.mode is fp32; nothing is rounded"),
        ("nan_protection = False", "train.nan_protection is off; a step that is not finite is"),
        ("optimizer = rms-prop", "optimizer.optimizer is rms-prop; its memory of the square"),
    ],
)
def test_what_means_something_else_is_told(ini, line, told):
    _, report = read_ini(ini(f"[global]\n{line}\n"), "original")
    assert len(report) == 1
    assert report[0].startswith(f"[global] {line}: {told}")


def test_unknown_keys_and_sections_are_told(ini):
    text = """[global]\ncoverige = 80\n[model.original]\nlowmen = True\n[convert.mask]\ntype = x
        [model.dfaker]\noutput_size = 999\n[model.villain]\nlowmem = no idea\n[DEFAULT]\nx = 1\n"""
    settings, report = read_ini(ini(text.replace("        ", "")), "original")
    assert settings == {"model": {"trainer": "original"}}
    assert report == [
        "[global] coverige: left out; no such key is known",
        "[model.original] lowmen: left out; original has no such option",
        "[model.dfaker], [model.villain]: left out; the trainer is original",
        "[convert.mask]: left out; no such section is known",
        "[DEFAULT]: left out; no such section is known",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "keras_encoder, fc_a",
        "keras_encoder fc_a",
        "['keras_encoder', \"fc_a\"]",
        "\n    Keras_Encoder\n    fc_a",
    ],
)
def test_a_list_in_every_way_of_writing(ini, text):
    settings, _ = read_ini(ini(f"[global]\n[model.phaze_a]\nfreeze_layers = {text}\n"), "phaze-a")
    assert settings["model"]["options"] == {"freeze_layers": ["keras_encoder", "fc_a"]}
    settings, _ = read_ini(ini("[global]\n[model.phaze_a]\nfreeze_layers =\n"), "phaze-a")
    assert settings["model"]["options"] == {"freeze_layers": []}


def test_a_file_from_windows(ini):
    path = ini(b"\xef\xbb\xbf" + AUGUST_2023.replace("\n", "\r\n").encode())
    assert read_ini(path, "original")[0]["data"]["coverage"] == 87.5


@pytest.mark.parametrize(
    ("trainer", "text", "said"),
    [
        (
            "original",
            "[global]\ncoverage = 40",
            "[global] coverage: data.coverage must be a number from 62.5 to 100, got 40.0",
        ),
        (
            "original",
            "[global]\nvertical_offset = 2.5",
            "[global] vertical_offset: data.vertical_offset must be a whole number from -25 to 25, "
            "got '2.5'",
        ),
        (
            "original",
            "[global]\nicnr_init = perhaps",
            "[global] icnr_init: model.icnr_init must be true or false, got 'perhaps'",
        ),
        (
            "original",
            "[global]\nnan_protection = perhaps",
            "[global] nan_protection: train.nan_protection must be one of halt, rollback, off, got "
            "'perhaps'",
        ),
        (
            "original",
            "[global.loss]\nmask_type = extend",
            "[global.loss] mask_type: data.mask_type must be one of bisenet-fp_face, ",
        ),
        (
            "original",
            "[trainer.augmentation]\nmask_color = red",
            "[trainer.augmentation] mask_color: preview.mask_color must be #rrggbb, got 'red'",
        ),
        (
            "dfaker",
            "[global]\n[model.dfaker]\noutput_size = 200",
            "[model.dfaker]: model.options.output_size of dfaker must be a whole number from "
            "128 to 256 in steps of 128, got 200; the nearest is 256",
        ),
        (
            "original",
            "[global]\n[model.original]\nlowmem = 3",
            "[model.original]: model.options.lowmem of original must be true or false, got '3'",
        ),
        (
            "phaze-a",
            "[global]\n[model.phaze_a]\nfc_min_filters = 512",
            "[model.phaze_a]: model.options.fc_min_filters of phaze-a must be fc_max_filters",
        ),
    ],
)
def test_a_wrong_value_is_one_line_with_file_section_key_and_range(ini, trainer, text, said):
    path = ini(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}, {said}')}") as caught:
        read_ini(path, trainer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"[global]\n" + b"# \n" * MAX_BYTES,
            "must be a train.ini of at most 1 MiB, and is",
        ),
        (
            b"[global]\ncoverage = \xff\xfe",
            "cannot be read: it is not UTF-8 text (invalid start byte); save it as UTF-8",
        ),
        ("[global]".encode("utf-16"), "cannot be read: it is UTF-16 text; save it as UTF-8"),
        ("[global]".encode("utf-16-be"), "cannot be read: it is UTF-16 text; save it as UTF-8"),
        (b"[global]\ncoverage = 8\x000", "is not text: it holds control characters"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read: it is not UTF-8 text (invalid start byte)"),
        (b"coverage = 80\n", "is not a valid ini: File contains no section headers."),
        (b"x" * MAX_BYTES, "is not a valid ini: File contains no section headers."),
        (
            b"[global]\ncoverage\n",
            "is not a valid ini: Source contains parsing errors: ",
        ),
        (b"[global]\ncoverage=80\ncoverage=90\n", "is not a valid ini: While reading from"),
        (b"[train]\nbatch_size = 4\n", "has no section of a faceswap train.ini, such as [global]"),
        (b"", "has no section of a faceswap train.ini, such as [global]"),
    ],
)
def test_another_file_is_refused_in_one_line(ini, content, said):
    path = ini(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {said}')}") as caught:
        read_ini(path, "original")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_no_file_and_no_trainer(ini, tmp_path):
    with pytest.raises(ValueError, match=r"^cannot read .*none.ini: No such file or directory$"):
        read_ini(tmp_path / "none.ini", "original")
    with pytest.raises(ValueError, match=r"^no trainer 'orignal' \(did you mean original\?\)"):
        read_ini(ini(PRESENT), "orignal")


def _given(capsys, *words):
    """The settings of `mien train` with these words, and what it warned of."""
    assert main(["train", *words, "--print-config"]) == 0
    said = capsys.readouterr()
    return tomllib.loads(said.out), said.err.splitlines()


def test_a_run_takes_an_ini_for_a_file_of_settings(ini, tmp_path, capsys):
    path = ini(PRESENT.replace("lowmem = False", "lowmem = True"))
    words = ["-C", str(path), "--set", "data.coverage=75"]
    given, warned = _given(capsys, *words, "-t", "dfl-h128")
    assert given["model"] == given["model"] | {"trainer": "dfl-h128"}
    assert given["model"]["options"] == {"lowmem": True, "width": 128}
    assert given["data"]["coverage"] == 75  # --set beats the file
    assert (
        warned[1]
        == "Note: train.ini: [global] convert_batchsize: left out; "
        + (LEFT_OUT["global", "convert_batchsize"])
    )
    kept = tmp_path / "kept.toml"
    kept.write_text(tomli_w.dumps(given))
    assert _given(capsys, "-C", str(kept)) == (given, [])
    assert _given(capsys, *words)[0]["model"]["trainer"] == "original"
    words += ["--set", 'model.trainer="villain"', "--json"]
    given, warned = _given(capsys, *words)
    assert given["model"]["trainer"] == "villain"
    assert {json.loads(line)["event"] for line in warned} == {"notice"}


def test_the_trainer_of_a_resumed_model(ini, tmp_path, capsys):
    config = from_dict({"model": {"trainer": "dfaker"}})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.toml").write_text(tomli_w.dumps(to_dict(config)))
    words = ["-C", str(ini(PRESENT)), "-m", str(folder)]
    assert _given(capsys, *words)[0]["model"]["trainer"] == "dfaker"
    words[-1] = str(tmp_path / "new")
    assert _given(capsys, *words)[0]["model"]["trainer"] == "original"


def test_a_preset_from_an_ini(ini, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = ini(PRESENT.replace("details = good", "details = fast"))
    assert main(["preset", "save", "mine", "--from", str(path), "-t", "dlight"]) == 0
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 5
    given, warned = _given(capsys, "--preset", "mine")
    assert given["model"]["trainer"] == "dlight"
    assert given["model"]["options"]["details"] == "fast"
    assert given["precision"]["mode"] == "fp32"
    assert not warned


def test_a_mistake_in_an_ini_exits_with_2(ini, capsys):
    path = ini("[global]\ncoverage = 40\n")
    assert main(["train", "-C", str(path), "--print-config"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mien train: {path}, [global] coverage: data.coverage must be")
    assert said.count("\n") == 1
    assert main(["train", "-C", str(path), "--set", "model.trainer=3", "--print-config"]) == 2
    assert capsys.readouterr().err == "mien train: model.trainer must be text, got 3\n"


def test_a_run_without_a_mask_can_be_mended_by_a_setting(ini, capsys):
    words = ["-C", str(ini("[global.loss]\nmask_type = none\n"))]
    assert main(["train", *words, "--print-config"]) == 2
    assert "data.mask_type is none, but" in capsys.readouterr().err
    given, _ = _given(capsys, *words, "--set", "loss.penalized_mask_loss=false")
    assert given["data"]["mask_type"] == "none"
