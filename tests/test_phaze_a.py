"""The parts of phaze-a, each in a small model: wiring, values, gradients, refusals.

Values of whole models are compared with another implementation in `test_models_oracle`.
"""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from mien import models
from mien.models.norms import AdaptiveInstanceNorm
from mien.models.phaze_a import PhazeA
from mien.models.phaze_a.curves import capped, curve, halvings
from mien.models.phaze_a.layers import Noise, ResizeImages

_TINY = dataclasses.asdict(PhazeA.tiny)
_PLAIN = {"enable_gblock": False, "dec_gaussian": False}
_WIDE = {"dec_min_filters": 32, "dec_max_filters": 32}

_UPSCALES = ("subpixel", "resize_images", "upscale_fast", "upscale_hybrid")
_PARTS = (
    {},
    *({"dec_upscale_method": method} for method in (*_UPSCALES, "upscale_dny")),
    *({"dec_upscale_method": m, "dec_gaussian": False} for m in (*_UPSCALES, "upscale_dny")),
    {"dec_upscale_method": "upscale_dny", "dec_res_blocks": 0},
    *({"dec_norm": norm, **_WIDE} for norm in ("batch", "group", "instance", "layer", "rms")),
    {"dec_norm": "batch", "dec_upscale_method": "upscale_hybrid", "split_decoders": True},
    {"dec_norm": "batch", "dec_upscales_in_fc": 1, "shared_fc": "half"},
    *({"fc_upsampler": method, "fc_upsample_filters": 16} for method in _UPSCALES),
    {"fc_upsamples": 0},
    {"fc_upsamples": 2, "fc_dimensions": 2},
    {"fc_upsampler": "subpixel", "fc_upsamples": 2, "fc_dimensions": 2, "fc_upsample_filters": 32},
    *({"bottleneck_type": kind} for kind in ("average_pooling", "max_pooling", "flatten")),
    *({"bottleneck_norm": norm} for norm in ("instance", "layer", "rms")),
    *(
        {"bottleneck_type": kind, "bottleneck_in_encoder": False, "bottleneck_norm": "layer"}
        for kind in ("average_pooling", "dense", "max_pooling", "flatten")
    ),
    *({"shared_fc": shared, "split_fc": split} for shared in ("full", "half") for split in (0, 1)),
    {"split_decoders": True},
    {"split_decoders": True, "split_gblock": True},
    {"split_decoders": True, "split_fc": False},
    {"split_decoders": True, "shared_fc": "full", "dec_norm": "batch"},
    {"split_gblock": True},
    {"split_gblock": True, "split_fc": False},
    *({"dec_slope_mode": mode, "dec_filter_slope": 0.5} for mode in ("cap_min", "cap_max")),
    {"fc_depth": 3, "fc_max_filters": 32, "fc_filter_slope": 0.3},
    {"fc_depth": 0, "fc_max_filters": 32, "fc_dimensions": 2},
    {"fc_depth": 0, "bottleneck_type": "flatten", "fc_max_filters": 32},
    {"fc_gblock_depth": 2, "fc_gblock_max_nodes": 192},
    {"dec_upscales_in_fc": 2},
    {"dec_upscales_in_fc": 1, "dec_upscale_method": "upscale_dny"},
    {"dec_upscales_in_fc": 3, "dec_skip_last_residual": False, "dec_res_blocks": 2},
    {"output_size": 80, "fc_min_filters": 32, "fc_max_filters": 32},
    {"output_size": 64, "fc_dimensions": 16, "fc_upsamples": 3, "enable_gblock": False},
    {"fs_original_use_alt": True, "enc_scaling": 5},
    {"fs_original_min_filters": 12, "fs_original_max_filters": 20},
    {
        "fs_original_min_filters": 12,
        "fs_original_max_filters": 20,
        "bottleneck_type": "flatten",
        "fc_depth": 0,
        "fc_dimensions": 2,
        "fc_max_filters": 80,
    },
)


def _id(options):
    return ",".join(f"{key}={value}" for key, value in options.items()) or "tiny"


def _model(seed=0, learn_mask=False, reflect_padding=False, **options):
    options = {key: bool(v) if key == "split_fc" else v for key, v in options.items()}
    return models.build(
        "phaze-a",
        seed=seed,
        learn_mask=learn_mask,
        reflect_padding=reflect_padding,
        **{**_TINY, **options},
    )


def _faces(model, count=4):
    generator = torch.Generator().manual_seed(3)
    faces = torch.rand(count, 3, model.input_px, model.input_px, generator=generator)
    return faces.contiguous(memory_format=torch.channels_last)


def _differ(model):
    """Give every weight a value of its own: no norm or bias stays as it began."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor += 0.2 * torch.rand(tensor.shape, generator=generator)
    return model


@pytest.mark.parametrize("options", _PARTS, ids=_id)
def test_parts(options):
    model = _differ(_model(learn_mask=True, **options))
    faces, size = _faces(model), model.config.output_size
    outputs_a, outputs_b = model(faces)
    for face, mask in (outputs_a, outputs_b):
        assert (*face.shape,) == (2, 3, size, size)
        assert (*mask.shape,) == (2, 1, size, size)
    # All that a side uses learns, all else does not. (A bias before a norm of each channel has a
    # gradient all the same, of roundings.)
    for outputs, other in ((outputs_a, "b"), (outputs_b, "a")):
        of_side = torch.autograd.grad(
            sum(out.square().mean() for out in outputs),
            [*model.parameters()],
            retain_graph=True,
            allow_unused=True,
        )
        for (name, _), gradient in zip(model.named_parameters(), of_side, strict=True):
            network = name.split(".")[0]
            is_shared_half = network == "fc_a" and model.config.shared_fc == "half"
            if not network.endswith(f"_{other}") or is_shared_half:
                assert gradient is not None, name
                assert gradient.isfinite().all(), name
            else:
                assert gradient is None or not gradient.any(), name

    # Sums in another order: 1e-5 was seen.
    model.eval()
    with torch.no_grad():
        outputs = model(faces)
        for side, given, half in zip("ab", outputs, faces.split(2), strict=True):
            for count in (1, 2):
                for out, wanted in zip(model.swap(half[:count], side), given, strict=True):
                    torch.testing.assert_close(out, wanted[:count], rtol=0, atol=3e-5)
        model.align(8)
        for given, aligned in zip(outputs, model(faces), strict=True):
            for out, wanted in zip(aligned, given, strict=True):
                torch.testing.assert_close(out, wanted, rtol=0, atol=3e-5)


@pytest.mark.parametrize("options", [{}, {"dec_norm": "batch", "dec_upscales_in_fc": 1}], ids=_id)
def test_reflection_changes_the_borders(options):
    zeros, mirrors = (
        _model(reflect_padding=reflect, enc_scaling=5, **options).eval() for reflect in (0, 1)
    )
    faces = _faces(zeros)
    with torch.no_grad():
        one, other = zeros(faces)[0][0], mirrors(faces)[0][0]
    assert one.shape == other.shape
    assert not torch.allclose(one, other, atol=1e-4)


def test_alternative_encoder_keeps_its_size_by_reflection():
    options = {"fs_original_use_alt": True, "bottleneck_type": "flatten"}
    found = [_model(reflect_padding=r, **options).encoder.backbone.output_px for r in (0, 1)]
    assert found == [5, 8]


def test_shared_parts_are_one_batch():
    """Nothing of both sides runs twice, and each batch norm of both keeps them apart."""
    model = _model(split_decoders=True, shared_fc="half")
    calls = []
    for name, network in model.named_children():
        network.register_forward_hook(
            lambda _, given, __, name=name: calls.append((name, len(given[0])))
        )
    model(_faces(model))
    assert sorted(calls) == [
        ("decoder_a", 2),
        ("decoder_b", 2),
        ("encoder", 4),
        ("fc_a", 4),
        ("fc_b", 2),
        ("fc_gblock", 4),
        ("g_block_both", 4),
    ]


@pytest.mark.parametrize("options", [{}, {"split_decoders": True, "shared_fc": "full"}], ids=_id)
def test_the_side_of_a_face_leaves_the_other_side_alone(options):
    model = _model(dec_norm="batch", **_WIDE, **_PLAIN, **options)
    faces = _faces(model)
    others = torch.cat((faces[:2], 1 - faces[2:]))
    torch.testing.assert_close(model(faces)[0][0], model(others)[0][0])


def test_noise_acts_in_training_alone_and_comes_from_the_seed():
    model = _model(enable_gblock=False)
    assert model.is_noisy
    faces, found = _faces(model), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(faces)[0][0])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-4)
    model.eval()
    assert torch.equal(model(faces)[0][0], model(faces)[0][0])
    assert not _model(**_PLAIN).is_noisy
    assert _model(dec_gaussian=False).is_noisy
    assert _model(fc_dropout=0.2, **_PLAIN).is_noisy
    assert _model(fc_gblock_dropout=0.2, dec_gaussian=False).is_noisy


def test_a_rate_of_dropout_renames_no_weight():
    names = [[*_model(fc_dropout=rate).state_dict()] for rate in (0.0, 0.5)]
    assert names[0] == names[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["none", "batch", "instance", "layer"])
def test_half_types(norm, dtype):
    model = _model(learn_mask=True, dec_norm=norm, dec_upscale_method="resize_images").to(dtype)
    outputs = model(_faces(model).to(dtype))
    assert all(out.dtype is torch.float32 for side in outputs for out in side)
    sum(out.square().mean() for side in outputs for out in side).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_noise_is_standard_normal():
    noise = Noise((8,), slope=0.5)
    torch.manual_seed(0)
    x = torch.full((4, 8, 32, 32), 0.25).contiguous(memory_format=torch.channels_last)
    bias = torch.full((8,), 0.5)
    out = noise(x, bias)
    drawn = torch.where(out > 0, out, out / 0.5) - 0.75
    assert abs(drawn.mean()) < 0.02  # 32,768 values: four deviations of the mean
    assert abs(drawn.std() - 1) < 0.02
    torch.testing.assert_close(noise.eval()(x - 1, bias), torch.full_like(x, -0.125))


def test_adaptive_norm():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64) * 3 + 1
    gain, bias = torch.randn(2, 2, 3, 1, 1, dtype=torch.float64)
    deviation, mean = torch.std_mean(x, dim=(2, 3), correction=0, keepdim=True)
    wanted = gain * (x - mean) / (deviation + 1e-3) + bias
    torch.testing.assert_close(AdaptiveInstanceNorm()(x, gain, bias), wanted)


def test_resize_images():
    layer = ResizeImages((4,), 6, after=0.1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    enlarged = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    wanted = layer.enlarged.conv(enlarged) + layer.transposed.conv(x)
    torch.testing.assert_close(layer(x), F.leaky_relu(wanted, 0.02), rtol=0, atol=2e-5)


def test_curves():
    assert curve(512, 64, 4, -0.45) == (512, 256, 128, 64)
    assert curve(100, 20, 1, 0.5) == (96,)
    assert curve(8, 80, 4, 0.0) == (8, 32, 56, 80)
    assert curve(512, 64, 0, 0.0) == ()
    assert capped(512, 64, 5, 0.5, at_end=True) == (512, 256, 128, 64, 64)
    assert capped(512, 64, 5, -0.5, at_end=False) == (512, 512, 256, 128, 64)
    assert capped(512, 64, 2, 0.5, at_end=True) == (512, 256)
    assert capped(512, 64, 0, 0.5, at_end=True) == ()
    assert halvings(128, 8) == (128, 64, 32, 16, 8)
    assert halvings(80, 8) == (80, 40, 20, 10, 5)
    assert halvings(64, 100) == (64,)


def test_every_model_has_its_own_widths():
    filters = [PhazeA.Config(output_size=size).dec_filters for size in (64, 256, 64)]
    assert [len(widths) for widths in filters] == [3, 5, 3]


def test_frozen_and_loaded_networks_are_those_that_there_are():
    names = "encoder keras_encoder fc_a fc_both g_block_both decoder_a"
    model = _model(freeze_layers=names, load_layers=["encoder", "fc_b", "decoder_b"])
    assert model.freeze_layers == ("encoder", "fc_a", "g_block_both")
    assert model.load_layers == ("encoder", "fc_b")
    assert models.meta_model("phaze-a").freeze_layers == ()
    known = models.meta_model("phaze-a", enc_architecture="mobilenet_v2", enc_scaling=20)
    assert known.freeze_layers == ("encoder.backbone",)
    assert sum(p.numel() for p in known.get_submodule("encoder.backbone").parameters())


@pytest.mark.parametrize("name", ["mobilenet_v2", "clipv_vit-b-32"])
def test_known_encoders(name):
    options = {"enc_architecture": name, "enc_scaling": 20, "enc_load_weights": False}
    kind = "flatten" if name.startswith("clip") else "max_pooling"
    model = models.meta_model("phaze-a", **{**_TINY, **options, "bottleneck_type": kind})
    (face,), _ = model(torch.empty(4, 3, model.input_px, model.input_px, device="meta"))
    assert (*face.shape,) == (2, 3, 64, 64)
    assert model.encoder.backbone.normalize == "reference"


def test_pretrained_weights_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("MIEN_BACKBONES", str(tmp_path))
    options = {**_TINY, "enc_architecture": "mobilenet_v2", "enc_scaling": 20}
    assert models.meta_model("phaze-a", **options).encoder.backbone.normalize == "pretrained"
    with pytest.raises(ValueError, match=rf"no pretrained weights of mobilenet_v2.*{tmp_path}"):
        models.build("phaze-a", **options)
    with pytest.raises(ValueError, match="elsewhere"):
        models.build("phaze-a", **{**options, "enc_weights": "elsewhere"})
    manner = {"enc_normalize": "reference"}
    made = models.meta_model("phaze-a", **{**options, **manner})
    assert made.encoder.backbone.normalize == "reference"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"output_size": 100}, "output_size must be a whole number from 64 to 2048 in steps of "),
        (
            {"output_size": 2032},
            "output_size must be one for which fc_max_filters is 127^2 or",
        ),
        (
            {"fc_max_filters": 512},
            "fc_min_filters must be fc_max_filters (512) where fc_depth is 1, got 1024; the "
            "nearest is 512",
        ),
        (
            {"output_size": 112, "fc_dimensions": 5, "fc_min_filters": 640, "fc_max_filters": 640},
            "fc_max_filters must be of a multiple of 8 values, not 637 x 5^2 (fitted to "
            "output_size 112), got 640; the nearest is 784",
        ),
        (
            {"fc_depth": 2, "fc_min_filters": 16, "output_size": 80},
            "output_size must be one for which fc_min_filters is 5^2 or more, got 80",
        ),
        (
            {"fc_depth": 0},
            "fc_depth must be 1 or more where the bottleneck gives 1024 values and fc_max_filters "
            "and fc_dimensions ask for 16384, got 0; the nearest is 1",
        ),
        (
            {"fc_upsamples": 2, "output_size": 96},
            "output_size must be one to which 16 x 16 x 1024 values double",
        ),
        (
            {"dec_upscales_in_fc": 5},
            "dec_upscales_in_fc must be 0 to 4, the upscales that there are, got 5; the "
            "nearest is 4",
        ),
        (
            {"dec_norm": "group", "dec_min_filters": 16},
            "dec_norm must be another where upscales have not multiples of 32 filters",
        ),
        (
            {"fs_original_use_alt": True, "fs_original_depth": 6},
            "fs_original_depth must be 2 to 5 with fs_original_use_alt at 64 px (enc_scaling 7), "
            "got 6; the nearest is 5",
        ),
        ({"enc_architecture": "resnet5"}, "enc_architecture must be one of fs_original, clipv_"),
        ({"freeze_layers": ["encodr"]}, "freeze_layers must be one of encoder, "),
        (
            {"dec_output_kernel": 4},
            "dec_output_kernel must be a whole number from 1 to 9 in steps of",
        ),
    ],
)
def test_refusals(options, text):
    with pytest.raises(
        ValueError,
        match=re.escape(f"model.options.{text}".replace(" must be", " of phaze-a must be", 1)),
    ):
        models.meta_model("phaze-a", **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"fs_original_depth": 7},
            "fs_original_depth must be 2 to 5 with reflect_padding at 64",
        ),
        (
            {"fc_dimensions": 1, "fc_upsampler": "subpixel", "output_size": 64},
            "fc_dimensions must be 2 or more with reflect_padding, got 1; the nearest is 2",
        ),
        (
            {"fc_dimensions": 1, "dec_upscale_method": "upscale_dny"},
            "fc_dimensions must be such that the decoder begins with 3 px or more",
        ),
    ],
)
def test_refusals_of_reflection(options, text):
    with pytest.raises(
        ValueError,
        match=re.escape(f"model.options.{text}".replace(" must be", " of phaze-a must be", 1)),
    ):
        models.meta_model("phaze-a", reflect_padding=True, **options)
    models.meta_model("phaze-a", **options)
