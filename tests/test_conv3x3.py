"""3x3 convolutions by Winograd's products: values, gradients, threads, refusals, the C border."""

import pytest
import torch
import torch.nn.functional as F

from mien.kernels import conv3x3 as module
from mien.kernels import native, reference
from mien.kernels.conv3x3 import conv3x3
from mien.models import blocks

CASES = [
    # faces, channels in and out, rows, columns, padding: the least sizes, channels that no vector
    # divides, another height than width, no padding
    (1, 1, 1, 2, 2, 1),
    (1, 3, 8, 4, 4, 0),
    (2, 33, 40, 6, 10, 1),
    (3, 64, 64, 8, 8, 1),
    (2, 17, 24, 12, 6, 0),
]


@pytest.fixture(params=["baseline", "avx2"])
def build(request, monkeypatch):
    """The build of the library for one instruction set."""
    monkeypatch.setenv("MIEN_CPU", request.param)


def _pair(faces, inputs, outputs, rows, columns, seed=0):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(faces, inputs, rows, columns, generator=source)
    weight = torch.randn(outputs, inputs, 3, 3, generator=source) / (9 * inputs) ** 0.5
    return x.requires_grad_(), weight.requires_grad_()


def _results(function, x, weight, padding):
    """The result and both gradients, of one and the same gradient of the result."""
    y = function(x, weight, padding)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return (y, *torch.autograd.grad(y, (x, weight), grad))


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_what_torch_computes(case):
    *sizes, padding = case
    x, weight = (tensor.detach().double() for tensor in _pair(*sizes))
    expected = F.conv2d(x, weight, padding=padding)
    torch.testing.assert_close(reference.conv3x3(x, weight, padding), expected)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_float64(build, case):
    *sizes, padding = case
    pair = _pair(*sizes)
    results = _results(conv3x3, *pair, padding)
    exact = [tensor.detach().double().requires_grad_() for tensor in pair]
    for result, expected in zip(results, _results(reference.conv3x3, *exact, padding), strict=True):
        # Transforms and sums of some hundred products of order 1, each rounded to 2^-24.
        tolerance = 2e-6 * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_faces_in_parts_give_the_same(monkeypatch):
    pair = _pair(5, 64, 32, 8, 8)
    whole = _results(conv3x3, *pair, 1)
    monkeypatch.setattr(module, "_ROOM_BYTES", 2 * 16 * 16 * 64 * 4)  # two faces at a time
    for part, expected in zip(_results(conv3x3, *pair, 1), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-4)  # sums of hundreds


def test_training_goes_on_after_inference(monkeypatch):
    monkeypatch.setattr(module, "_rooms", module._Rooms())  # no memory is kept yet
    pair = _pair(2, 16, 16, 8, 8)
    with torch.inference_mode():
        wanted = conv3x3(*pair)
    found, *_ = _results(conv3x3, *pair, 1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_the_caller_do_not_matter(monkeypatch, default):
    pair = _pair(2, 16, 16, 8, 8)
    wanted = _results(conv3x3, *pair, 1)
    monkeypatch.setattr(module, "_rooms", module._Rooms())  # no memory is kept yet
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        y = conv3x3(*pair, 1)
        grads = torch.autograd.grad(y, pair, torch.ones_like(y))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, wanted[0])
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    for grad, expected in zip(
        grads,
        torch.autograd.grad(reference.conv3x3(*pair, 1), pair, torch.ones_like(y)),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)  # sums of hundreds


def test_transforms_do_not_depend_on_threads():
    pair = _pair(3, 40, 24, 8, 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _results(conv3x3, *pair, 1)
        torch.set_num_threads(3)
        together = _results(conv3x3, *pair, 1)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_only_what_is_needed_is_computed(monkeypatch):
    x, weight = _pair(1, 8, 8, 4, 4)
    for needed, name in ((x, "_weight_gradient"), (weight, "_input_gradient")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, None)  # a call of it would be a TypeError
            other = weight if needed is x else x
            pair = (x, other.detach()) if needed is x else (other.detach(), weight)
            torch.autograd.grad(conv3x3(*pair).sum(), needed)


def test_tensors_of_another_layout_are_copied():
    x, weight = (tensor.detach() for tensor in _pair(2, 16, 24, 8, 6))
    turned = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv3x3(x, weight), conv3x3(turned, weight))


@pytest.mark.parametrize(
    ("x", "weight", "padding", "message"),
    [
        ((4, 4, 4), (4, 4, 3, 3), 1, "x and weight must have 4 axes, got 3 and 4"),
        ((1, 4, 4, 4), (4, 4, 3), 1, "x and weight must have 4 axes, got 4 and 3"),
        ((1, 4, 4, 4), (4, 5, 3, 3), 1, r"weight must be \(4, 4, 3, 3\)"),
        ((1, 4, 4, 4), (4, 4, 5, 5), 1, r"weight must be \(4, 4, 3, 3\)"),
        ((1, 4, 5, 4), (4, 4, 3, 3), 1, "rows and columns must be even"),
        ((1, 4, 4, 4), (4, 4, 3, 3), 2, "rows and columns must be even"),
        ((1, 4, 2, 4), (4, 4, 3, 3), 0, "at least 4, got 2x4 and 0"),
        ((0, 4, 4, 4), (4, 4, 3, 3), 1, r"at least 1 face, .* got \(0, 4, 4, 4\)"),
        ((1, 4, 4, 4), (0, 4, 3, 3), 1, r"at least 1 channel, got .* \(0, 4, 3, 3\)"),
        ((1, 0, 4, 4), (4, 0, 3, 3), 1, r"at least 1 channel, got \(1, 0, 4, 4\)"),
    ],
)
def test_other_forms_are_refused(x, weight, padding, message):
    with pytest.raises(ValueError, match=message):
        conv3x3(torch.zeros(x), torch.zeros(weight), padding)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="x must be .* float32, got .* float64"):
        conv3x3(torch.zeros(1, 4, 4, 4).double(), torch.zeros(4, 4, 3, 3).double())


JOB = {
    "count": 1,
    "rows": 4,
    "columns": 4,
    "channels": 1,
    "padding": 1,
    "transform": 0,
    "is_turned": 0,
    "num_threads": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": 5}, "unknown transform 5"),
        ({"count": 0}, "at least 1"),
        ({"channels": -1}, "at least 1"),
        ({"count": 2**60}, "2\\^40"),
        ({"padding": 3}, "padding must be 0..2"),
        ({"rows": 3}, "must be even and at least 2"),
        ({"columns": 2, "padding": 0}, "must be even and at least 4"),
        ({"rows": 2**30, "columns": 2**30, "channels": 2**20}, "count must be at most"),
    ],
)
def test_the_library_refuses_jobs_that_cannot_be(change, message):
    ffi, _ = native.library()
    room = ffi.new("float[256]")
    job = ffi.new("mien_winograd_job *", JOB | {"pixels": room, "tiles": room} | change)
    with pytest.raises(native.NativeError, match=message):
        native.call("winograd_cpu", job)


@pytest.mark.parametrize("name", ["pixels", "tiles"])
def test_the_library_refuses_memory_that_is_not_there_or_not_aligned(name):
    ffi, _ = native.library()
    room = ffi.new("float[256]")
    pointers = {"pixels": room, "tiles": room}
    with pytest.raises(native.NativeError, match="null pointer"):
        native.call(
            "winograd_cpu", ffi.new("mien_winograd_job *", JOB | pointers | {name: ffi.NULL})
        )
    beside = ffi.cast("float *", ffi.cast("char *", room) + 1)
    with pytest.raises(native.NativeError, match=name):
        native.call("winograd_cpu", ffi.new("mien_winograd_job *", JOB | pointers | {name: beside}))


def _uses_products(monkeypatch, layer, x):
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return conv3x3(*arguments)

    monkeypatch.setattr(module, "conv3x3", spy)
    return layer(x), bool(calls)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "edge", "is_used"),
    [
        (96, 3, 1, 8, True),
        (32, 3, 1, 8, False),
        (96, 5, 1, 8, False),
        (96, 3, 2, 8, False),
        (96, 3, 1, 7, False),
    ],
)
@pytest.mark.parametrize("reflect", [False, True])
def test_the_models_use_it_where_it_pays(
    monkeypatch, channels, kernel, stride, edge, is_used, reflect
):
    layer = blocks.SameConv(channels, channels, kernel, stride, reflect=reflect)
    x = torch.randn(2, channels, edge, edge)
    with torch.no_grad():
        layer.conv.weight.normal_()
        y, used = _uses_products(monkeypatch, layer, x)
        assert used is is_used
        framed = blocks._framed(x, layer.border(edge, edge), reflect=reflect)
        expected = F.conv2d(framed, layer.conv.weight, stride=stride, padding=layer.conv.padding)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


def test_low_precision_stays_with_the_library(monkeypatch):
    layer = blocks.SameConv(96, 96, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _uses_products(monkeypatch, layer, torch.zeros(1, 96, 8, 8))[1]
