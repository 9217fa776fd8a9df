"""ONNX files of every family: contract, values against the model, squares, masks, refusals."""

import copy
import sys

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import tiny_options

from mien import models
from mien.core.exchange import onnx_graph
from mien.core.exchange.dfm import (
    MASKS,
    DfmPlan,
    constant_mask,
    dfm_file,
    dfm_plan,
    plain_file,
)
from mien.core.exchange.dfm_crops import PROGRAMS, Placement
from mien.core.exchange.onnx_check import (
    expected_of_dfm,
    expected_of_plain,
    verify,
)
from mien.core.exchange.trained_model import sample_pictures
from mien.core.faces.geometry import MEAN_FACE_L2, Crop, transform
from mien.models.graph_evaluation import evaluate

METADATA = {"kind": "synthetic face model", "run_id": "17"}
FACEFUSION = Crop("face", 1.0, -0.08, 64)
"""Crop that facefusion cuts, too."""

LEGACY = Crop("legacy", 0.8, 0.0, 64)
TOLERANCE = 2e-5  # fp32, other orders of summation; up to 1.3e-5 measured
DFM_OUTPUTS = ["out_face_mask:0", "out_celeb_face:0", "out_celeb_face_mask:0"]

HEAVY = ("dfl-sae", "unbalanced")
"""Families whose smallest model has many megabytes: one test is enough."""

FAMILIES = [
    *((name, {"learn_mask": name in HEAVY}) for name in models.available()),
    *((name, {"learn_mask": True}) for name in models.available() if name not in HEAVY),
    ("dfl-sae", {"multiscale_decoder": True, "architecture": "liae"}),
    ("dlight", {"details": "good", "output_size": 256}),
    ("dfaker", {"output_size": 256}),
    ("realface", {"input_size": 96, "output_size": 64}),
    ("realface", {"input_size": 80, "output_size": 96}),
    ("phaze-a", {"dec_upscale_method": "resize_images", "dec_norm": "layer"}),
    ("phaze-a", {"dec_upscale_method": "upscale_hybrid", "dec_norm": "instance"}),
    ("phaze-a", {"dec_upscale_method": "upscale_fast", "dec_norm": "rms"}),
    ("phaze-a", {"dec_upscale_method": "upscale_dny", "dec_norm": "batch"}),
    ("phaze-a", {"dec_norm": "group", "dec_min_filters": 32, "dec_max_filters": 32}),
    ("phaze-a", {"shared_fc": "half", "split_decoders": True, "split_gblock": True}),
    ("phaze-a", {"shared_fc": "full", "bottleneck_type": "max_pooling"}),
    ("phaze-a", {"fs_original_use_alt": True, "enc_scaling": 5}),
]


def label(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


def network_of(name, *, learn_mask=False, reflect_padding=False, **options):
    """A tiny model in evaluation mode; no bias, gain or running estimate is as it began."""
    settings = tiny_options(name) | options
    shape = {"learn_mask": learn_mask, "reflect_padding": reflect_padding}
    network = models.build(name, seed=5, **shape, **settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dim() == 1:
                tensor += 0.2 * torch.rand(tensor.shape, generator=generator)
    return network.eval().requires_grad_(False)


def dfm_of(network, crop=FACEFUSION, target="facefusion", mask=None):
    plan = dfm_plan(network, crop, target, mask)
    return plan, dfm_file(network, plan).content(METADATA)


def exact(network):
    """The network in fp64; itself it stays as it is."""
    return copy.deepcopy(network).double()


def ports(values):
    return [
        (each.name, [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim])
        for each in values
    ]


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=label)
def test_files_compute_what_the_model_computes(name, options):
    settings = {"learn_mask": True} | options
    network = network_of(name, **settings, reflect_padding=settings["learn_mask"])
    pictures = sample_pictures(network.input_px)
    content = plain_file(network).content(METADATA)
    verdict = verify(content, pictures, expected_of_plain(exact(network)))
    assert verdict.runtime == "onnxruntime"
    assert verdict.num_pictures == len(pictures)
    assert verdict.difference <= TOLERANCE
    assert (
        min(output.std() for output in expected_of_plain(exact(network))(pictures[0][None])) > 1e-3
    )
    plan, content = dfm_of(network, LEGACY)
    expected = expected_of_dfm(exact(network), plan)
    assert verify(content, sample_pictures(plan.size_px), expected).difference <= TOLERANCE


@pytest.mark.parametrize("learn_mask", [False, True], ids=["face", "mask"])
def test_dfm_has_the_names_order_and_sizes_of_the_contract(learn_mask):
    network = network_of("dfaker", learn_mask=learn_mask)  # 64 px in, 128 out
    _, content = dfm_of(network)
    model = onnx.load_model_from_string(content)
    assert ports(model.graph.input) == [("in_face:0", ["N", 128, 128, 3])]
    channels = dict(zip(DFM_OUTPUTS, (1, 3, 1), strict=True))
    assert ports(model.graph.output) == [(n, ["N", 128, 128, c]) for n, c in channels.items()]
    assert model.ir_version <= 8
    assert [(each.domain, 12 <= each.version <= 17) for each in model.opset_import] == [("", True)]
    assert not any(each.external_data for each in model.graph.initializer)
    assert {each.key: each.value for each in model.metadata_props} == METADATA
    assert model.producer_name == "mien"


def test_plain_file_names_every_output():
    network = network_of("dfl-sae", learn_mask=True, multiscale_decoder=True)
    model = onnx.load_model_from_string(plain_file(network).content(METADATA))
    assert ports(model.graph.input) == [("face", ["N", 64, 64, 3])]
    sizes = {
        "face_{}_16px": (16, 3),
        "face_{}_32px": (32, 3),
        "face_{}": (64, 3),
        "mask_{}": (64, 1),
    }
    assert ports(model.graph.output) == [
        (name.format(side), ["N", edge, edge, channels])
        for side in "ab"
        for name, (edge, channels) in sizes.items()
    ]


def test_files_take_any_number_of_faces():
    network = network_of("lightweight")
    plan, content = dfm_of(network)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    faces_nssc = np.random.default_rng(1).random((3, plan.size_px, plan.size_px, 3), np.float32)
    together = session.run(None, {"in_face:0": faces_nssc})
    for number, face_ssc in enumerate(faces_nssc):
        alone = expected_of_dfm(exact(network), plan)(face_ssc[None])
        for found, wanted in zip(together, alone, strict=True):
            assert np.allclose(found[number], wanted[0], rtol=0, atol=TOLERANCE)


def test_swapped_face_is_b_and_the_film_mask_is_a():
    network = network_of("original", learn_mask=True)
    plan, content = dfm_of(network)
    face = sample_pictures(64)[0]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    film_mask, swapped, mask = session.run(None, {"in_face:0": face[None]})
    face_1chw = torch.from_numpy(face).permute(2, 0, 1)[None]
    (_, mask_a), (face_b, mask_b) = (network.swap(face_1chw, side) for side in "ab")
    wanted = [each.permute(0, 2, 3, 1).numpy() for each in (mask_a, face_b, mask_b)]
    for found, each in zip((film_mask, swapped, mask), wanted, strict=True):
        assert np.allclose(found, each, rtol=0, atol=TOLERANCE)
    assert plan.mask == "learned"
    assert abs(film_mask - mask).max() > 0.01


def test_face_of_a_is_left_out():
    network = network_of("original", learn_mask=True)
    face_a = {"decoder_a.face", "decoder_a.mask"}
    numbers = {
        part: sum(p.numel() for p in network.get_submodule(part).parameters()) for part in face_a
    }
    everything = sum(p.numel() for p in network.parameters())
    stored = {
        mask: sum(
            int(np.prod(each.dims))
            for each in onnx.load_model_from_string(dfm_of(network, mask=mask)[1]).graph.initializer
            if "." in each.name
        )
        for mask in ("learned", "mean")
    }
    assert stored["learned"] == everything - numbers["decoder_a.face"]
    of_b = sum(p.numel() for p in network.decoder_b.mask.parameters())
    assert stored["mean"] == everything - sum(numbers.values()) - of_b


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("target", PROGRAMS)
@pytest.mark.parametrize("crop", [FACEFUSION, LEGACY, Crop("head", 1.0, -0.1, 64)])
def test_every_target_and_mask(crop, target, mask):
    network = network_of("lightweight", learn_mask=True)
    plan, content = dfm_of(network, crop, target, mask)
    pictures = sample_pictures(plan.size_px)
    assert verify(content, pictures, expected_of_dfm(exact(network), plan)).difference <= TOLERANCE


def test_outside_of_its_square_a_model_changes_nothing():
    network = network_of("lightweight", learn_mask=True)
    plan, content = dfm_of(network, LEGACY)
    placement = plan.placement
    rows, columns = (slice(at, at + placement.side_px) for at in placement.corner)
    outside = np.ones((plan.size_px,) * 2, bool)
    outside[rows, columns] = False
    picture = sample_pictures(plan.size_px)[0]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    film_mask, swapped, mask = session.run(None, {"in_face:0": picture[None]})
    assert np.array_equal(swapped[0][outside], picture[outside])
    assert not film_mask[0][outside].any()
    assert not mask[0][outside].any()
    inside = torch.from_numpy(picture[rows, columns]).permute(2, 0, 1)[None]
    face = network.swap(inside, "b")[0][0].permute(1, 2, 0).numpy()
    assert np.allclose(swapped[0, rows, columns], face, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("target", PROGRAMS)
def test_mean_mask_covers_the_mean_face_with_a_soft_edge(target):
    plan = DfmPlan(target, "mean", Placement(224, 0, 0, 224))
    mask = constant_mask(plan)
    landmarks_l2 = transform(MEAN_FACE_L2, 224 * PROGRAMS[target].matrix(MEAN_FACE_L2))
    columns, rows = landmarks_l2[17:].round().astype(int).T
    assert mask[rows, columns].min() > 0.9  # all that is inside the jaw
    columns, rows = landmarks_l2[[0, 8, 16]].round().astype(int).T
    assert abs(mask[rows, columns] - 0.5).max() < 0.3  # the jaw is the edge
    assert mask[[0, -1]].max() < 1e-3
    assert mask[:, [0, -1]].max() < 1e-3
    assert abs(np.diff(mask)).max() < 0.25
    assert mask.max() == 1


def test_mean_mask_fades_where_the_square_of_the_model_ends():
    plan = DfmPlan("facefusion", "mean", Placement(224, 75, 75, 80))
    mask = constant_mask(plan)
    assert mask[115, 115] == pytest.approx(1)
    assert not mask[:75].any()
    assert not mask[155:].any()
    assert abs(np.diff(mask)).max() < 0.25


def test_ones_are_ones_in_the_square_of_the_model():
    mask = constant_mask(DfmPlan("facefusion", "ones", Placement(10, -2, 3, 6)))
    assert mask[3:9, :4].all()
    assert mask.sum() == 24


def test_model_without_a_mask_gets_the_mean_face():
    assert dfm_plan(network_of("lightweight"), FACEFUSION, "facefusion", None).mask == "mean"
    with pytest.raises(ValueError, match="mask must be mean or ones .* got learned"):
        dfm_plan(network_of("lightweight"), FACEFUSION, "facefusion", "learned")


def test_file_that_differs_is_refused():
    network, other = network_of("lightweight"), network_of("lightweight")
    with torch.no_grad():
        other.decoder_b.face[-1].conv.conv.bias += 0.01
    plan, content = dfm_of(other)
    with pytest.raises(ValueError, match="differs from the model by .*nothing was written"):
        verify(content, sample_pictures(plan.size_px), expected_of_dfm(exact(network), plan))


def test_what_a_file_is_to_give_is_exact():
    """Rounding of the model in fp32 would be taken for the file's, and refuse a large model."""
    network = network_of("lightweight", learn_mask=True)
    faces_1ssc = sample_pictures(64)[0][None]
    graph, faces_1chw = network.graph(), torch.from_numpy(faces_1ssc).permute(0, 3, 1, 2)
    names = (value.call.layer.name for value in graph.inputs)
    wanted = evaluate(graph, graph.outputs, dict.fromkeys(names, faces_1chw))
    found = expected_of_plain(exact(network))(faces_1ssc)
    for one, other in zip(found, wanted, strict=True):
        assert abs(one - other.permute(0, 2, 3, 1).numpy()).max() <= 1e-12


def test_file_of_another_size_is_refused():
    network = network_of("lightweight")
    plan, content = dfm_of(network)
    larger = DfmPlan(plan.target, plan.mask, Placement(70, 3, 3, 64))
    with pytest.raises(ValueError, match="differs from the model by inf"):
        verify(
            content,
            sample_pictures(64),
            lambda p: expected_of_dfm(exact(network), larger)(cv2.resize(p[0], (70, 70))[None]),
        )


def test_file_that_breaks_a_rule_is_refused():
    network = network_of("lightweight")
    file = plain_file(network)
    file.graph.add("Transpose", "nowhere", output="mask_a", perm=[0, 3, 1, 2])
    wrong = onnx_graph.Port("mask_a", (64, 64, 1))
    content = file.graph.content([file.input], [*file.outputs, wrong], METADATA, "wrong")
    with pytest.raises(ValueError, match="breaks a rule of ONNX"):
        verify(content, sample_pictures(64), expected_of_plain(exact(network)))


def test_file_without_onnxruntime_is_run_by_onnx(monkeypatch):
    network = network_of("lightweight", learn_mask=True)
    plan, content = dfm_of(network, LEGACY)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    verdict = verify(content, sample_pictures(plan.size_px), expected_of_dfm(exact(network), plan))
    assert verdict.runtime == "onnx.reference"
    assert verdict.difference <= TOLERANCE


def test_missing_onnx_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"need onnx, .* pip install 'mien\[exchange\]'"):
        plain_file(network_of("lightweight"))


def test_model_above_the_limit_of_a_file_is_refused(monkeypatch):
    monkeypatch.setattr(onnx_graph, "MAX_FILE_BYTES", 100_000)
    with pytest.raises(ValueError, match="at most 100,000 bytes, this model has .*safetensors"):
        plain_file(network_of("lightweight")).content(METADATA)


def test_known_encoder_is_refused_by_name():
    options = {"enc_architecture": "mobilenet_v2", "enc_scaling": 20, "enc_load_weights": False}
    network = models.build("phaze-a", seed=None, **tiny_options("phaze-a") | options)
    with pytest.raises(
        ValueError, match="encoder mobilenet_v2 can only be exported as safetensors"
    ):
        plain_file(network)
