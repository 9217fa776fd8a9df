"""Encoders made by timm: their shapes, sides, weights of the reference and pretrained weights."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle_numbers import oracle_face, oracle_models, oracle_weight
from safetensors.torch import save_file

from mien.models.phaze_a import backbones
from mien.models.phaze_a.backbones import BACKBONES, NAMES, Spec, backbone, input_size
from mien.models.phaze_a.pretrained import load_pretrained

# name: size at 100 %, channels, edge of the output, numbers of the reference's network
_TABLE = {
    "clipv_farl-b-16-16": (224, 512, 1, 86_192_640),
    "clipv_farl-b-16-64": (224, 512, 1, 86_192_640),
    "clipv_vit-b-16": (224, 512, 1, 86_192_640),
    "clipv_vit-b-32": (224, 512, 1, 87_849_216),
    "clipv_vit-l-14": (224, 768, 1, 303_966_208),
    "clipv_vit-l-14-336px": (336, 768, 1, 304_293_888),
    "convnext_tiny": (224, 768, 7, 27_820_128),
    "convnext_small": (224, 768, 7, 49_454_688),
    "convnext_base": (224, 1024, 7, 87_566_464),
    "convnext_large": (224, 1536, 7, 196_230_336),
    "convnext_extra_large": (224, 2048, 7, 348_147_968),
    "densenet121": (224, 1024, 7, 7_037_504),
    "densenet169": (224, 1664, 7, 12_642_880),
    "densenet201": (224, 1920, 7, 18_321_984),
    "efficientnet_b0": (224, 1280, 7, 4_049_571),
    "efficientnet_b1": (240, 1280, 8, 6_575_239),
    "efficientnet_b2": (256, 1408, 8, 7_768_569),
    "efficientnet_b3": (288, 1536, 9, 10_783_535),
    "efficientnet_b4": (368, 1792, 12, 17_673_823),
    "efficientnet_b5": (448, 2048, 14, 28_513_527),
    "efficientnet_b6": (528, 2304, 17, 40_960_143),
    "efficientnet_b7": (592, 2560, 19, 64_097_687),
    "efficientnet_v2_b0": (224, 1280, 7, 5_919_312),
    "efficientnet_v2_b1": (240, 1280, 8, 6_931_124),
    "efficientnet_v2_b2": (256, 1408, 8, 8_769_374),
    "efficientnet_v2_b3": (288, 1536, 9, 12_930_622),
    "efficientnet_v2_s": (384, 1280, 12, 20_331_360),
    "efficientnet_v2_m": (480, 1280, 15, 53_150_388),
    "efficientnet_v2_l": (480, 1280, 15, 117_746_848),
    "inception_resnet_v2": (288, 1536, 7, 54_336_736),
    "inception_v3": (288, 2048, 7, 21_802_784),
    "mobilenet": (224, 1024, 7, 3_228_864),
    "mobilenet_v2": (224, 1280, 7, 2_257_984),
    "mobilenet_v3_large": (224, 960, 7, 2_996_352),
    "mobilenet_v3_small": (224, 576, 7, 939_120),
    "nasnet_large": (320, 4032, 10, 84_916_818),
    "nasnet_mobile": (224, 1056, 7, 4_269_716),
    "resnet50": (224, 2048, 7, 23_587_712),
    "resnet101": (224, 2048, 7, 42_658_176),
    "resnet152": (224, 2048, 7, 58_370_944),
    "resnet50_v2": (224, 2048, 7, 23_564_800),
    "resnet101_v2": (224, 2048, 7, 42_626_560),
    "resnet152_v2": (224, 2048, 7, 58_331_648),
    "vgg16": (224, 512, 7, 14_714_688),
    "vgg19": (224, 512, 7, 20_024_384),
    "xception": (288, 2048, 9, 20_861_480),
}

# Numbers that only the network here has (a gain in each of inception's batch norms), or only the
# reference's (biases of ResNet's convolutions; mean, variance and count of EfficientNet's input).
_MORE = {"inception_resnet_v2": 30_272, "inception_v3": 17_216}
_MORE |= {"resnet50": -26_560, "resnet101": -52_672, "resnet152": -75_712}
_MORE |= {"resnet50_v2": -19_008, "resnet101_v2": -36_416, "resnet152_v2": -51_776}
_MORE |= {f"efficientnet_b{n}": -7 for n in range(8)}

# Weights of the reference do not fit these, nor resnet*_v2.
_UNREADABLE = ("convnext", "inception", "mobilenet_v3", "nasnet", "xception")

_SMALL = ["convnext_tiny", "densenet121", "efficientnet_b0", "mobilenet", "mobilenet_v2"]
_SMALL += ["mobilenet_v3_small", "nasnet_mobile", "resnet50", "resnet50_v2", "vgg16"]


def _on_meta(name, size_px, **options):
    with torch.device("meta"):
        return backbone(name, size_px, **options)


def _numbers(network):
    return sum(t.numel() for t in (*network.trunk.parameters(), *network.trunk.buffers()))


def _drawn(name, size_px, seed=0, **options):
    network = backbone(name, size_px, **options)
    network.draw_weights(torch.Generator().manual_seed(seed))
    return network.to(memory_format=torch.channels_last)


def test_every_encoder_is_there():
    assert set(BACKBONES) == set(_TABLE)
    assert len(NAMES) == len(set(NAMES)) == 47


@pytest.mark.parametrize("name", BACKBONES)
def test_shapes_and_numbers_equal_the_reference(name):
    size_px, channels, output_px, numbers = _TABLE[name]
    assert input_size(name, 100) == size_px
    network = _on_meta(name, size_px)
    assert (network.channels, network.output_px) == (channels, output_px)
    assert _numbers(network) == numbers + _MORE.get(name, 0)
    kinds = {key.rsplit(".", 1)[1] for key, _ in network.named_parameters()}
    assert kinds <= {"weight", "bias", "gamma", "pos_embed", "cls_token"}  # all are drawn
    if not name.startswith(_UNREADABLE) and not re.fullmatch(r"resnet\d+_v2", name):
        shapes = [entry.shape for entry in network.keras_entries()]
        assert sum(int(np.prod(shape)) for shape in shapes) == numbers
    least_px = input_size(name, 0)
    assert least_px == BACKBONES[name].min_px
    assert _on_meta(name, least_px).channels == channels


def test_input_sizes():
    assert input_size("fs_original", 7) == 64
    assert input_size("fs_original", 0) == 32
    assert input_size("efficientnet_b4", 60) == 224
    assert input_size("inception_v3", 10) == 75
    assert input_size("nasnet_large", 100) == 320
    assert input_size("nasnet_large", 50, pretrained=True) == 331
    assert input_size("resnet50", 50, pretrained=True) == 112


@pytest.mark.parametrize("name", _SMALL)
def test_outputs_and_gradients_are_finite(name):
    network = _drawn(name, 32)
    faces = torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    out = network(faces)
    assert out.shape == (4, network.channels, network.output_px, network.output_px)
    out.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert out.isfinite().all()
    with torch.no_grad():
        assert network.eval()(faces).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_16_bits(dtype):
    network = _drawn("mobilenet_v2", 32)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    faces = torch.rand(4, 3, 32, 32, dtype=dtype)
    out = network(faces)
    assert out.dtype is dtype
    assert out.isfinite().all()
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}


def test_the_sides_do_not_meet():
    faces = torch.rand(6, 3, 64, 64)
    for name in ("mobilenet_v2", "resnet50_v2"):
        network = _drawn(name, 64)
        with torch.no_grad():
            together = network(faces)[:3]
            alone = network(faces[:3].repeat(2, 1, 1, 1))[:3]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_channels_that_fill_up_are_dropped():
    network = _drawn("vgg16", 32).eval()
    faces = torch.rand(2, 3, 32, 32)
    filled = torch.cat([faces, torch.full((2, 5, 32, 32), 9.0)], 1)
    with torch.no_grad():
        assert torch.equal(network(filled), network(faces))


def test_weights_are_a_function_of_the_generator():
    first, again, other = (_drawn("mobilenet_v3_small", 32, seed) for seed in (5, 5, 6))
    for (key, one), two in zip(
        first.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key
    kernels = zip(first.parameters(), other.parameters(), strict=True)
    assert not any(torch.equal(one, two) for one, two in kernels if one.dim() > 1)


def test_a_clip_tower_is_drawn_by_its_rules(monkeypatch):
    _tiny_clip(monkeypatch, 256)
    tower = _drawn("clipv_vit-b-16", 224).trunk
    for table in (tower.pos_embed, tower.head.weight):
        assert table.std().item() == pytest.approx(256**-0.5, rel=0.03)
    bound = (6 / 512) ** 0.5
    for part in tower.blocks[0].attn.qkv.weight.chunk(3):
        assert part.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_pictures_are_scaled():
    def scaled(name, normalize):
        network = _on_meta(name, 32, normalize=normalize)
        made = backbones.Backbone(name, "", normalize, network.trunk)
        made._features = lambda faces: faces
        colors = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
        return made(colors).flatten().tolist()

    assert scaled("vgg16", "reference") == pytest.approx([0, 127.5, 255])
    assert scaled("resnet50", "reference") == pytest.approx([-1, 0, 1])
    assert scaled("mobilenet_v3_small", "reference") == pytest.approx([-1, 0, 1])
    assert scaled("efficientnet_b0", "reference") == pytest.approx([0, 0.5, 1])
    imagenet = [-0.406 / 0.225, (0.5 - 0.456) / 0.224, (1 - 0.485) / 0.229]
    assert scaled("convnext_tiny", "reference") == pytest.approx(imagenet)
    assert scaled("resnet50", "pretrained") == pytest.approx(imagenet)


def test_the_two_manners_differ_where_the_networks_do():
    reference, pretrained = (
        _on_meta("resnet50", 64, normalize=how).trunk.layer2[0]
        for how in ("reference", "pretrained")
    )
    assert (reference.conv1.stride, reference.conv2.stride) == ((2, 2), (1, 1))
    assert (pretrained.conv1.stride, pretrained.conv2.stride) == ((1, 1), (2, 2))
    assert (reference.bn1.eps, pretrained.bn1.eps) == (1.001e-5, 1e-5)


def test_mobilenet_pads_as_the_reference():
    """112 px: 7 before the last stride; padded behind only, 8 = 3 * 2 + 2 gives 3."""
    assert _on_meta("mobilenet", 112).output_px == 3
    assert _on_meta("mobilenet", 112, normalize="pretrained").output_px == 4
    strided = _drawn("mobilenet", 32).trunk.blocks[1][0].conv_dw
    picture = torch.rand(1, 64, 7, 7)
    weight = strided.weight.double()
    with torch.no_grad():
        wanted = F.conv2d(F.pad(picture.double(), (0, 1, 0, 1)), weight, None, 2, groups=64)
        torch.testing.assert_close(strided(picture).double(), wanted, rtol=1e-5, atol=1e-5)


def test_mobilenets_widen_and_deepen():
    plain = _on_meta("mobilenet", 64)
    assert _on_meta("mobilenet", 64, mobilenet_width=0.5).channels == 512
    deep = _on_meta("mobilenet", 64, mobilenet_depth=2)
    assert deep.channels == plain.channels
    assert deep.trunk.blocks[0][0].conv_dw.weight.shape == (64, 1, 3, 3)
    assert deep.trunk.blocks[0][0].conv_pw.weight.shape == (64, 64, 1, 1)
    assert _drawn("mobilenet", 32, mobilenet_depth=2)(torch.rand(2, 3, 32, 32)).isfinite().all()
    assert _on_meta("mobilenet_v2", 64, mobilenet_width=1.5).channels == 1920
    assert _on_meta("mobilenet_v2", 64, mobilenet_width=0.5).channels == 1280
    assert _on_meta("mobilenet_v3_large", 64, mobilenet_width=0.5).channels == 480
    small = _on_meta("mobilenet_v3_small", 64, mobilenet_minimalistic=True)
    assert small.channels == 576
    assert not any("se." in key for key in small.state_dict())


def test_refusals():
    with pytest.raises(ValueError, match=r"no backbone 'resnet5' \(did you mean resnet50\?\); the"):
        backbone("resnet5", 224)
    with pytest.raises(ValueError, match="xception takes pictures of 71 px or more, got 64"):
        backbone("xception", 64)
    for name in ("xception", "resnet50_v2", "mobilenet_v3_large", "nasnet_large", "convnext_tiny"):
        network = _on_meta(name, 96)
        with pytest.raises(ValueError, match=f"weights of the reference's {name} cannot be read"):
            network.keras_entries()
    network = _on_meta("vgg16", 96, normalize="pretrained")
    with pytest.raises(ValueError, match="need a vgg16 made with normalize='reference'"):
        network.keras_entries()


def test_timm_loads_only_when_asked_for():
    code = "import sys, mien.models.phaze_a.pretrained; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- weights of the reference


def _each_with_a_backbone(name, list_name, begin=""):
    cases = [
        case
        for case in oracle_models(name, list_name)
        if (architecture := case["changed"].get("enc_architecture", "")) in BACKBONES
        and architecture.startswith(begin)
    ]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


@pytest.mark.oracle
@_each_with_a_backbone("oracle.json", "configs")
def test_ordered_shapes_equal_the_oracle(case):
    encoder = next(subnet for subnet in case["subnets"] if subnet["name"] == "encoder")
    network = _on_meta(case["changed"]["enc_architecture"], case["input_shape"][0])
    shapes = [entry.shape for entry in network.keras_entries()]
    assert shapes == [tuple(row[3]) for row in encoder["weights"][: len(shapes)]]
    bottleneck = encoder["weights"][len(shapes) :]
    if bottleneck and case["options"]["bottleneck_type"] == "dense":  # of the flattened output
        kernel = next(row[3] for row in bottleneck if len(row[3]) == 2)
        assert kernel[0] == network.channels * network.output_px**2
    rest = sum(int(np.prod(row[3])) for row in bottleneck)
    assert sum(int(np.prod(shape)) for shape in shapes) == encoder["params"] - rest


@pytest.mark.oracle
@_each_with_a_backbone("forward.json", "cases", begin="clip")
def test_a_clip_tower_equals_the_oracle(case):
    size_px = case["input_shape"][0]
    network = backbone(case["changed"]["enc_architecture"], size_px).eval()
    rows = [row for row in case["weights"] if row[1] == "encoder"]
    for entry, row in zip(network.keras_entries(), rows, strict=True):
        weight = oracle_weight(row)
        assert entry.shape == weight.shape
        entry.load(weight)
    faces = torch.stack([oracle_face(size_px, phase) for phase in (0.0, 1.0)])
    with torch.no_grad():
        codes = network(faces)[..., 0, 0].numpy()
    calls = [row for row in case["intermediates"] if row["subnet"] == "encoder"]
    assert {row["call"] for row in calls} == {0, 1}
    for row in calls:
        code = codes[row["call"]]
        np.testing.assert_allclose(code[:8], row["first8"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(code.mean(), row["mean"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(code.std(), row["std"], rtol=0, atol=1e-5)


def test_a_bias_before_a_norm_is_folded_in():
    network = _drawn("resnet50", 32).eval()
    generator = np.random.default_rng(0)
    arrays = []
    for entry in network.keras_entries():
        arrays.append(generator.uniform(0.5, 1.5, entry.shape).astype(np.float32))
    for _ in range(2):  # loading twice is loading once
        for entry, array in zip(network.keras_entries(), arrays, strict=True):
            entry.load(array)
    kernel, bias, gain, offset, mean, variance = (torch.from_numpy(a) for a in arrays[:6])
    faces = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours = network.trunk.bn1(network.trunk.conv1(faces))
    theirs = F.conv2d(faces, kernel.permute(3, 2, 0, 1), bias, 2, 3)
    theirs = F.batch_norm(theirs, mean, variance, gain, offset, False, 0.0, 1.001e-5)
    torch.testing.assert_close(ours, theirs)
    # The first block's shortcut comes before its own layers, each with its bias.
    shortcut = network.trunk.layer1[0].downsample
    assert torch.equal(shortcut[0].weight.detach(), torch.from_numpy(arrays[6]).permute(3, 2, 0, 1))
    assert torch.equal(shortcut[1].running_mean, torch.from_numpy(arrays[10] - arrays[7]))


def test_the_reference_normalises_pictures_for_efficientnet():
    network = _drawn("efficientnet_b0", 32)
    mean, variance, _count = list(network.keras_entries())[:3]
    mean.load(np.array([0.1, 0.2, 0.3], np.float32))
    variance.load(np.array([0.25, 1, 4], np.float32))
    network._features = lambda faces: faces
    out = network(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(out, torch.tensor([0.9 / 0.5, 0.8, 0.7 / 2]))
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    variance.load(deviation**2)
    out = network(torch.ones(1, 3, 1, 1)).flatten()
    wanted = np.array([0.9, 0.8, 0.7]) / deviation / np.sqrt(deviation)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-5)


def test_a_depthwise_kernel_finds_its_channels():
    network = _drawn("mobilenet", 32, mobilenet_depth=2)
    depthwise = next(e for e in network.keras_entries() if e.shape == (3, 3, 32, 2))
    array = np.random.default_rng(0).standard_normal(depthwise.shape).astype(np.float32)
    depthwise.load(array)
    weight = network.trunk.blocks[0][0].conv_dw.weight.detach().numpy()
    for channel, multiple in ((0, 0), (0, 1), (5, 1)):
        np.testing.assert_array_equal(
            weight[channel * 2 + multiple, 0], array[:, :, channel, multiple]
        )


# --- pretrained weights


def _tiny_clip(monkeypatch, width=64):
    """CLIP's ViT-B/16 with two layers, under its name."""
    arguments = {"num_classes": 32, "embed_dim": width, "depth": 2, "num_heads": width // 32}
    row = BACKBONES["clipv_vit-b-16"]
    tiny = Spec(
        timm_name=row.timm_name,
        default_px=224,
        scaling="0..1",
        arguments=arguments,
        weights=row.weights,
    )
    monkeypatch.setitem(BACKBONES, "clipv_vit-b-16", tiny)


def _in_rgb(network, first):
    """State as timm would save it, of a network that was trained on RGB."""
    state = {name: tensor.clone() for name, tensor in network.trunk.state_dict().items()}
    state[first] = state[first].flip(1).contiguous()
    state["fc.weight"] = torch.zeros(10, 10)  # of a classifier
    return {name: tensor.contiguous() for name, tensor in state.items()}


@pytest.mark.parametrize("how", ["file", "folder", "cache"])
@pytest.mark.parametrize(
    ("name", "timm_name", "first"),
    [
        ("mobilenet_v3_small", "tf_mobilenetv3_small_100", "conv_stem.weight"),
        ("densenet121", "densenet121", "features.conv0.weight"),
    ],
)
def test_pretrained_weights_come_from_a_file(tmp_path, name, timm_name, first, how):
    theirs, ours = _drawn(name, 32, seed=1).eval(), _drawn(name, 32, seed=2).eval()
    file = {
        "file": tmp_path / "any.safetensors",
        "folder": tmp_path / f"{timm_name}.safetensors",
        "cache": tmp_path / f"models--timm--{timm_name}.tag/snapshots/1/model.safetensors",
    }[how]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(_in_rgb(theirs, first), file)
    assert load_pretrained(ours, file if how == "file" else tmp_path) == file
    faces = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(faces), theirs(faces))


def test_convnext_brings_its_last_norm(tmp_path):
    theirs, ours = (_drawn("convnext_tiny", 32, seed) for seed in (1, 2))
    with torch.no_grad():
        theirs.trunk.norm_pre.weight.uniform_(0.5, 1.5)
    state = {
        name.replace("norm_pre", "head.norm"): tensor
        for name, tensor in _in_rgb(theirs, "stem.0.weight").items()
    }
    torch.save(state, tmp_path / "convnext_tiny.pth")
    load_pretrained(ours, tmp_path)
    for (key, one), two in zip(
        theirs.state_dict().items(), ours.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key


def test_a_clip_tower_takes_openai_names_and_another_size(tmp_path, monkeypatch):
    _tiny_clip(monkeypatch)
    theirs, ours = _drawn("clipv_vit-b-16", 64, seed=1), _drawn("clipv_vit-b-16", 96, seed=2)
    tower = theirs.trunk
    with torch.no_grad():
        tower.pos_embed[:, 1:] = 0.25  # a constant stays one when it is resized
    swaps = {"patch_embed.proj": "conv1", "blocks.": "transformer.resblocks.", "norm_pre": "ln_pre"}
    swaps |= {"norm1": "ln_1", "norm2": "ln_2", "qkv.": "in_proj_", "attn.proj": "attn.out_proj"}
    swaps |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    state = {}
    for name, tensor in _in_rgb(theirs, "patch_embed.proj.weight").items():
        for one, two in swaps.items():
            name = name.replace(one, two)
        state[f"visual.{name.replace('norm.', 'ln_post.')}"] = tensor
    state["visual.class_embedding"] = state.pop("visual.cls_token")[0, 0]
    state["visual.positional_embedding"] = state.pop("visual.pos_embed")[0]
    state["visual.proj"] = state.pop("visual.head.weight").t().contiguous()
    state["transformer.text"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "vit_base_patch16_clip_224.openai.pt")
    load_pretrained(ours, tmp_path)
    wanted = tower.state_dict()
    table = ours.trunk.state_dict()["pos_embed"]
    assert table.shape == (1, 37, 64)
    torch.testing.assert_close(table[:, 1:], torch.full((1, 36, 64), 0.25))
    torch.testing.assert_close(table[:, 0], wanted["pos_embed"][:, 0])
    for name, tensor in ours.trunk.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(tensor, wanted[name]), name


def test_pretrained_refusals(tmp_path):
    network = _drawn("mobilenet_v3_small", 32)
    advice = (
        "no pretrained weights of mobilenet_v3_small: looked for "
        "tf_mobilenetv3_small_100.safetensors in .*; name a file or a folder by "
        "model.options.enc_weights or by MIEN_BACKBONES, or set enc_load_weights = false"
    )
    for path in (None, "", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=advice):
            load_pretrained(network, path)
    for tag in ("one", "two"):
        file = tmp_path / f"models--timm--tf_mobilenetv3_small_100.{tag}/snapshots/1"
        file.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, file / "model.safetensors")
    with pytest.raises(
        ValueError, match="several weights of mobilenet_v3_small, name one: .*one.*"
    ):
        load_pretrained(network, tmp_path)
    with pytest.raises(
        ValueError, match="not of mobilenet_v3_small: it has no tensor conv_stem.we"
    ):
        load_pretrained(network, file / "model.safetensors")
    state = _in_rgb(network, "conv_stem.weight")
    state["bn1.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "other.safetensors")
    before = network.trunk.conv_stem.weight.clone()
    with pytest.raises(ValueError, match=r"bn1.bias must have shape \(16,\), got \(3,\)"):
        load_pretrained(network, tmp_path / "other.safetensors")
    assert torch.equal(network.trunk.conv_stem.weight, before)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.pth", b"no weights"), ("a.safetensors", b"no weights"), ("a.bin", b"")],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read weights from .*a\.\w+: "):
        load_pretrained(_on_meta("resnet50", 64), tmp_path / name)
    torch.save({"weight": Path("x")}, tmp_path / "object.pth")  # an object, which is not unpickled
    with pytest.raises(ValueError, match=r"cannot read weights from .*object\.pth: "):
        load_pretrained(_on_meta("resnet50", 64), tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no weights by name"):
        load_pretrained(_on_meta("resnet50", 64), tmp_path / "list.pth")
