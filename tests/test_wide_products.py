"""Products in 16 bits on a CPU without units for them: values, gradients, what is kept, choice."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mien.kernels import wide_products as module
from mien.kernels.dense import dense, low_rank_of
from mien.kernels.wide_products import convolution, linear, product, unwidened
from mien.models import blocks
from mien.models.phaze_a.backbones import backbone
from mien.models.phaze_a.layers import TransposedConv

TYPES = [torch.bfloat16, torch.float16]

CONVOLUTIONS = {
    "5x5 of stride 2": ((2, 5, 9, 7), (6, 5, 5, 5), {"stride": 2}),
    "1x1": ((2, 5, 4, 6), (3, 5, 1, 1), {}),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "3x3 by Winograd's products": ((2, 96, 6, 4), (96, 96, 3, 3), {"padding": 1}),
    "depthwise": ((2, 6, 9, 9), (6, 1, 5, 5), {"stride": 2, "groups": 6}),
    "transposed": (
        (2, 6, 4, 5),
        (6, 3, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "is_transposed": True},
    ),
}


@pytest.fixture(params=TYPES, ids=str)
def dtype(request, monkeypatch):
    """A type for which the CPU counts as one without units."""
    monkeypatch.setattr(module, "_to_widen", frozenset(TYPES))
    return request.param


def _drawn(*shape, dtype):
    """Numbers of a type, about 1 after a sum of products."""
    source = torch.Generator().manual_seed(sum(shape))
    inner = torch.Size(shape[1:]).numel()
    return (torch.randn(shape, generator=source) / inner**0.25).to(dtype)


def _exactly(x, weight, stride=1, padding=0, *, output_padding=0, is_transposed=False, groups=1):
    """`convolution` by PyTorch."""
    if is_transposed:
        return F.conv_transpose2d(x, weight, None, stride, padding, output_padding, groups)
    return F.conv2d(x, weight, None, stride, padding, groups=groups)


def _results(function, *operands):
    """The result and the gradient of every operand, of one and the same gradient of the result."""
    operands = [each.detach().requires_grad_() for each in operands]
    y = function(*operands)
    grad = _drawn(*y.shape, dtype=torch.bfloat16).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, operands, grad)


def _assert_rounded_once(found, exact):
    """Each number is one of the two of its type beside the exact one.

    What fp32 adds to it is a small part of the distance of these two, unless the sum is near 0.
    """
    assert found.dtype in TYPES
    near = 4e-6 * float(exact.abs().max())
    step = torch.finfo(found.dtype).eps * exact.abs()
    least = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    assert ((found.double() - exact).abs() <= 0.51 * step + near + least).all()


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_float64_rounded_once(dtype, case):
    x, weight, settings = CONVOLUTIONS[case]
    operands = _drawn(*x, dtype=dtype), _drawn(*weight, dtype=dtype)
    found = _results(lambda *each: convolution(*each, **settings), *operands)
    exact = _results(
        lambda *each: _exactly(*each, **settings), *(each.double() for each in operands)
    )
    for ours, theirs in zip(found, exact, strict=True):
        _assert_rounded_once(ours, theirs)


@pytest.mark.parametrize("sizes", [(3, 33, 17), (1, 1, 1), (16, 512, 64)])
@pytest.mark.parametrize("biased", [True, False])
def test_dense_layers_equal_float64_rounded_once(dtype, sizes, biased):
    faces, inputs, outputs = sizes
    operands = [_drawn(faces, inputs, dtype=dtype), _drawn(outputs, inputs, dtype=dtype)]
    operands += [_drawn(outputs, dtype=dtype)] * biased
    found = _results(lambda x, weight, bias=None: linear(x, weight, bias), *operands)
    exact = _results(F.linear, *(each.double() for each in operands))
    for ours, theirs in zip(found, exact, strict=True):
        _assert_rounded_once(ours, theirs)


def test_a_gradient_of_factors_takes_the_same_way(dtype):
    x, weight = _drawn(3, 40, dtype=dtype), _drawn(24, 40, dtype=dtype)
    y, of_x, of_weight = _results(lambda *each: dense(*each, None), x, weight)
    assert low_rank_of(of_weight) is not None
    wide = _results(lambda *each: linear(*each, None), x, weight)
    assert torch.equal(y, wide[0])
    assert torch.equal(of_x, wide[1])


def test_what_waits_for_the_backward_pass_stays_in_16_bits(dtype):
    x = _drawn(2, 64, 4, 4, dtype=dtype).requires_grad_()
    weight, dense_weight = (
        _drawn(*size, dtype=dtype).requires_grad_() for size in ((64, 64, 3, 3), (8, 64))
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each), lambda _: None):
        convolution(x, weight, 1, 1)
        linear(x[:, :, 0, 0], dense_weight, None)
    assert [each.dtype for each in kept] == [dtype] * 4


def test_only_what_is_needed_is_computed(dtype):
    x, weight = _drawn(2, 5, 6, 6, dtype=dtype), _drawn(4, 5, 3, 3, dtype=dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(convolution(x, weight).sum(), weight)
    assert gradient.dtype == dtype
    rows, factor = _drawn(2, 5, dtype=dtype).requires_grad_(), _drawn(4, 5, dtype=dtype)
    (gradient,) = torch.autograd.grad(linear(rows, factor, None).sum(), rows)
    assert gradient.shape == rows.shape


def test_the_layout_of_a_face_stays(dtype):
    x = _drawn(2, 8, 6, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = _drawn(8, 8, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    y, of_x, _ = _results(lambda *each: convolution(*each, padding=1), x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert of_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_everything_else_is_pytorchs(monkeypatch, device):
    """Types that the CPU has units for, fp32, and devices that are none."""
    monkeypatch.setattr(module, "_to_widen", frozenset({torch.float16}))
    monkeypatch.setattr(torch.Tensor, "float", lambda _: pytest.fail("widened"))
    for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else TYPES:
        x, weight = (torch.ones(1, 2, 2, 2, dtype=dtype, device=device) for _ in range(2))
        assert convolution(x, weight).dtype == dtype
        assert linear(x[0, 0], weight[0, 0], None).dtype == dtype
        assert product(x[0, 0], weight[0, 0]).dtype == dtype


def test_operands_of_two_types_are_refused_as_by_pytorch(dtype):
    x, weight = torch.ones(1, 1, 2, 2, dtype=dtype), torch.ones(1, 1, 2, 2)
    with pytest.raises(RuntimeError):
        convolution(x, weight)


def test_a_cpu_without_onednn_has_no_units(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert module.types_without_units() == frozenset(TYPES)


@pytest.mark.parametrize("has_units", [True, False])
def test_the_library_is_asked_for_each_type(monkeypatch, has_units):
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(
            torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: has_units, raising=True
        )
    assert module.types_without_units() == (frozenset() if has_units else frozenset(TYPES))


def test_it_can_be_switched_off(dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda _: pytest.fail("widened"))
    rows = torch.ones(1, 2, dtype=dtype)
    with unwidened():
        assert linear(rows, rows, None).item() == 2
    monkeypatch.undo()
    monkeypatch.setattr(module, "_to_widen", frozenset())
    with unwidened():
        assert linear(rows, rows, None).item() == 2
    assert module._to_widen == frozenset()


@pytest.mark.parametrize("kind", ["convolution", "dense"])
def test_a_layer_of_another_library_is_rounded_once(dtype, kind):
    layer = torch.nn.Conv2d(5, 6, 3) if kind == "convolution" else torch.nn.Linear(33, 6)
    x = _drawn(*((2, 5, 7, 7) if kind == "convolution" else (3, 33)), dtype=dtype)
    layer = layer.to(dtype)
    exact = copy.deepcopy(layer).double()
    module.widen(layer)
    parameters = [*layer.parameters()], [*exact.parameters()]

    def results(layer, x, parameters):
        y = layer(x.requires_grad_())
        grad = _drawn(*y.shape, dtype=torch.bfloat16).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)

    found = results(layer, x.clone(), parameters[0])
    wanted = results(exact, x.double(), parameters[1])
    for ours, theirs in zip(found, wanted, strict=True):
        _assert_rounded_once(ours, theirs)


def test_a_copy_of_a_widened_layer_has_weights_of_its_own(dtype):
    layer = torch.nn.Linear(2, 2, bias=False).to(dtype)
    module.widen(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
        layer.weight.fill_(1)
        x = torch.ones(1, 2, dtype=dtype)
        assert (layer(x).sum(), other(x).sum()) == (4, 0)


def test_no_layer_of_a_trunk_multiplies_in_16_bits(dtype, monkeypatch):
    trunk = backbone("mobilenet_v2", 64).to_empty(device="cpu").to(dtype).eval()
    with torch.no_grad():
        for tensor in trunk.state_dict().values():
            tensor.fill_(1e-2)
        for called in ("conv2d", "linear"):
            monkeypatch.setattr(F, called, _refusing_16_bits(getattr(F, called)))
        trunk(torch.ones(1, 3, 64, 64, dtype=dtype))


LAYERS = {
    "convolution": (lambda: blocks.SameConv(4, 6, 5, 2), (2, 4, 6, 6)),
    "separable convolution": (lambda: blocks.SeparableConv(4, 6), (2, 4, 6, 6)),
    "transposed convolution": (lambda: TransposedConv((4,), 6), (2, 4, 6, 6)),
    "dense": (lambda: blocks.Dense(4, 6), (2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_takes_this_way(dtype, monkeypatch, name):
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(_drawn(*parameter.shape, dtype=dtype))
    for library in (F, torch):  # with 16 bits it would be asked for products that are slow
        for called in ("conv2d", "conv_transpose2d", "linear"):
            theirs = getattr(library, called, None)
            if theirs is not None:
                monkeypatch.setattr(library, called, _refusing_16_bits(theirs))
    assert layer(_drawn(*shape, dtype=dtype)).dtype == dtype


def _refusing_16_bits(function):
    def refuse(x, *others, **more):
        assert x.dtype == torch.float32
        return function(x, *others, **more)

    return refuse
