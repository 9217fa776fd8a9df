"""Description of every family as a graph: what it computes equals what the model computes."""

import dataclasses
import itertools

import pytest
import torch

from mien import models
from mien.models.graph import Network
from mien.models.graph_evaluation import evaluate

TOLERANCE = 2e-5
"""Rounding of the model, in fp32; 8e-6 measured with unbalanced."""

PHAZE_A = [
    {"split_fc": False, "enable_gblock": False},
    {"shared_fc": "full"},
    {"shared_fc": "half", "fc_upsamples": 2, "fc_min_filters": 64, "fc_max_filters": 64},
    {"shared_fc": "half", "split_fc": False},
    {"shared_fc": "full", "split_fc": False, "split_gblock": True, "split_decoders": True},
    {"bottleneck_in_encoder": False, "bottleneck_norm": "layer", "fc_dropout": 0.5},
    {"bottleneck_type": "average_pooling", "bottleneck_norm": "instance", "fc_upsamples": 0},
    {"bottleneck_type": "max_pooling", "bottleneck_norm": "rms"},
    {"bottleneck_type": "flatten", "fc_depth": 2, "fc_min_filters": 32},
    {"dec_upscale_method": "resize_images", "dec_norm": "batch", "fc_upsampler": "resize_images"},
    {"dec_upscale_method": "upscale_fast", "dec_norm": "layer", "fc_upsampler": "upscale_fast"},
    {"dec_upscale_method": "upscale_hybrid", "dec_norm": "rms", "fc_upsampler": "upscale_hybrid"},
    {"dec_upscale_method": "upscale_dny", "dec_norm": "instance", "fc_upsampler": "subpixel"},
    {"dec_norm": "group", "dec_min_filters": 32, "dec_max_filters": 32, "dec_gaussian": False},
    {"dec_upscales_in_fc": 1, "dec_res_blocks": 2, "dec_skip_last_residual": False},
    {"fs_original_use_alt": True, "enc_scaling": 0, "split_decoders": True},
    {"output_size": 96, "fc_dimensions": 4, "fc_upsamples": 1, "fc_max_filters": 144}
    | {"fc_min_filters": 144},
]
OPTIONS = [
    *((name, {}) for name in models.available()),
    ("original", {"lowmem": True}),
    ("dfaker", {"output_size": 256}),
    ("dfl-h128", {"lowmem": True}),
    ("dfl-sae", {"multiscale_decoder": True}),
    ("dfl-sae", {"architecture": "liae", "input_size": 80}),
    ("villain", {"lowmem": False}),
    ("dlight", {"details": "good"}),
    ("dlight", {"details": "good", "output_size": 256, "features": "fair"}),
    *(("phaze-a", options) for options in PHAZE_A),
]


def _model(name, options, **build):
    settings = dataclasses.asdict(models.family(name).tiny) | options | build
    model = models.build(name, seed=1, **settings).eval()
    torch.manual_seed(0)
    for tensor in model.state_dict().values():  # also biases, gains and running estimates
        if tensor.dim() < 2:
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def _differences(model, graph):
    """Largest difference of each output of each side."""
    torch.manual_seed(2)
    faces = {f"face_in_{side}": torch.rand(2, 3, *(model.input_px,) * 2) for side in "ab"}
    found = evaluate(graph, graph.outputs, faces)
    with torch.no_grad():
        wanted = [*model.swap(faces["face_in_a"], "a"), *model.swap(faces["face_in_b"], "b")]
    assert [tuple(one.shape) for one in found] == [tuple(one.shape) for one in wanted]
    return [(one - other).abs().max().item() for one, other in zip(found, wanted, strict=True)]


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=lambda o: o if isinstance(o, str) else "-".join(o) or "tiny"
)
def test_graph_computes_what_the_model_computes(name, options):
    model = _model(name, options, learn_mask="dec_upscales_in_fc" not in options)
    graph = model.graph()
    assert max(_differences(model, graph)) <= TOLERANCE
    *_, height, width, _ = [*graph.outputs[-1].shape]
    assert (height, width) == (model.output_px[-1],) * 2


@pytest.mark.parametrize("name", models.available())
def test_graph_mirrors_where_the_model_does(name):
    options = {"fs_original_depth": 2} if name == "phaze-a" else {}
    model = _model(name, options, reflect_padding=True, learn_mask=True)
    graph = model.graph()
    assert max(_differences(model, graph)) <= TOLERANCE
    assert "ReflectionPadding2D" in {layer.kind for layer in graph.layers()}


@pytest.mark.parametrize("name", models.available())
def test_names_of_layers_are_unique_and_shapes_those_of_the_weights(name):
    settings = dataclasses.asdict(models.family(name).tiny)
    graph = models.meta_model(name, learn_mask=True, **settings).graph()
    names = [layer.name for layer in graph.layers()]
    assert len(names) == len(set(names))
    assert not any("." in name for name in names)
    model = models.build(name, seed=0, learn_mask=True, **settings)
    for layer, filled in zip(graph.layers(), model.graph().layers(), strict=True):
        assert [entry.shape for entry in layer.weights] == [e.read().shape for e in filled.weights]


def test_every_shared_network_is_called_for_a_then_for_b():
    for name, options in itertools.chain(OPTIONS):
        settings = dataclasses.asdict(models.family(name).tiny) | options
        graph = models.meta_model(name, **settings).graph()
        for network in graph.networks():
            numbers = [call.number for call in graph.calls if call.layer is network]
            assert numbers in ([0], [0, 1]) or "half" in options.values(), (name, network.name)


def test_a_weight_without_a_place_is_named():
    model = models.meta_model("original", width=8)
    model.encoder.register_parameter("stray", torch.nn.Parameter(torch.empty(1, device="meta")))
    with pytest.raises(ValueError, match=r"^encoder\.stray of original has no place in a graph$"):
        model.graph()


def test_a_known_network_is_refused_by_name():
    settings = dataclasses.asdict(models.family("phaze-a").tiny)
    settings |= {"enc_architecture": "mobilenet_v2", "enc_scaling": 29, "enc_load_weights": False}
    with pytest.raises(ValueError, match=r"encoder mobilenet_v2 can only be exported as safet"):
        models.meta_model("phaze-a", **settings).graph()


def test_a_module_without_a_description_is_named():
    network = Network("net")
    x = network.input((2, 2, 3))
    with pytest.raises(ValueError, match="Softmax of model cannot be written as a graph"):
        Network("model").run("model", torch.nn.Softmax(1), x)


@pytest.mark.parametrize(
    ("kind", "attributes", "text"),
    [
        ("Lambda", {}, "no layer of kind 'Lambda'"),
        ("Dense", {"units": 3}, "Dense takes a vector"),
        ("Reshape", {"target_shape": (5,)}, "Reshape cannot make"),
        ("PixelShuffler", {"size": 2}, "cannot divide 3 channels by 4"),
        ("AveragePooling2D", {"pool_size": 3}, "would put out"),
    ],
)
def test_layers_that_do_not_fit_are_refused(kind, attributes, text):
    network = Network("net")
    with pytest.raises(ValueError, match=text):
        network.add(kind, network.input((2, 2, 3)), **attributes)
