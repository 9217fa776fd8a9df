"""The last step of a decoder: values and gradients against float64, in any layout.

A test with ``place`` runs twice: in plain torch on the CPU, and through the Triton kernels.
"""

import re
from collections import Counter
from functools import partial

import pytest
import torch
from pointwise import DTYPES, LAYOUTS, amid_nan, bias_amid_nan, compare, leaf, nhwc
from torch.utils._python_dispatch import TorchDispatchMode

from mien.kernels import channels_last, reference
from mien.kernels import to_image as module
from mien.kernels.to_image import to_image

SHAPES = [((1, 1, 1, 1), 1), ((2, 8, 5, 7), 3), ((1, 8, 4, 4), 1), ((2, 3, 9, 4), 3)]

_compare = partial(compare, to_image, reference.to_image, sums_rounded=False)


@pytest.fixture(params=["plain", "triton"])
def place(request) -> str:
    return "cpu" if request.param == "plain" else request.getfixturevalue("triton_device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_it_equals_float64(place, shape, channels, dtype):
    x = leaf(*shape, place=place, dtype=dtype)
    bias = leaf(shape[1], place=place, dtype=dtype)
    _compare({"x_bchw": x, "bias_c": bias}, {"channels": channels})


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_bias_in_fp32_gets_a_gradient_in_fp32(place, dtype):
    x = leaf(4, 24, 16, 16, place=place, dtype=dtype)
    _compare({"x_bchw": x, "bias_c": leaf(24, place=place)}, {"channels": 3})


def test_without_a_bias(place):
    x = leaf(2, 24, 3, 5, place=place)
    y = to_image(x, None, channels=3)
    with_zeros = to_image(x, torch.zeros(24, device=place), channels=3)
    assert torch.equal(y, with_zeros)
    weight = torch.randn(y.shape, device=place)
    (gradient,) = torch.autograd.grad(y, x, weight)
    (gradient_with_zeros,) = torch.autograd.grad(with_zeros, x, weight)
    assert torch.equal(gradient, gradient_with_zeros)


def test_float64_on_the_cpu():
    x, bias = leaf(2, 16, 3, 5, dtype=torch.float64), leaf(16, dtype=torch.float64)
    function = partial(to_image, channels=3)
    assert function(x, bias).dtype == torch.float64
    assert torch.autograd.gradcheck(function, (x, bias))


def test_nan_is_passed_on(place):
    x = torch.full((1, 8, 2, 2), torch.nan, device=place)
    assert to_image(x, None, channels=3).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(place, layout):
    x, bias = leaf(2, 16, 5, 4, place=place), leaf(16, place=place)
    y = to_image(x, bias, channels=3)
    weight = torch.randn(y.shape, device=place)
    gradients = torch.autograd.grad(y, (x, bias), weight)
    other_x = layout(x).requires_grad_()
    other = to_image(other_x, bias, channels=3)
    assert torch.equal(y, other)
    other_gradients = torch.autograd.grad(other, (other_x, bias), layout(weight))
    assert all(map(torch.equal, gradients, other_gradients))


def test_nothing_outside_the_tensors_is_read(place):
    """x and the gradient lie amid NaN."""
    x, bias = amid_nan((1, 36, 5, 3), place), bias_amid_nan(36, place)
    y = to_image(x, bias, channels=3)
    assert y.isfinite().all()
    for gradient in torch.autograd.grad(y, (x, bias), amid_nan(y.shape, place).detach()):
        assert gradient.isfinite().all()


def test_no_faces(place):
    x = torch.empty(0, 8, 4, 4, device=place, requires_grad=True)
    y = to_image(x, bias := leaf(8, place=place), channels=3)
    grad_x, grad_bias = torch.autograd.grad(y.sum(), (x, bias))
    assert grad_x.shape == x.shape
    assert (grad_bias == 0).all()


def test_the_same_bits_twice(place):
    x, bias = leaf(3, 36, 7, 5, place=place), leaf(36, place=place)
    weight = torch.randn(3, 3, 7, 5, device=place)
    first, second = (
        torch.autograd.grad(to_image(x, bias, channels=3), (x, bias), weight) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_with_several_tiles(triton_device, monkeypatch, programs):
    """As large tensors have them, the last tile beyond the end."""
    monkeypatch.setattr(channels_last, "MAX_PROGRAMS", programs)
    monkeypatch.setattr(module, "TILE", 512)
    x, bias = leaf(1, 64, 14, 15, place=triton_device), leaf(64, place=triton_device)
    _compare({"x_bchw": x, "bias_c": bias}, {"channels": 3})


def test_launches_are_as_listed(triton_device, monkeypatch):
    launched = Counter()

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched["kernels"] += 1
            return self.kernel[grid]

    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    x, bias = leaf(1, 8, 2, 2, place=triton_device), leaf(8, place=triton_device)
    for given in (None, bias):
        launched.clear()
        y = to_image(x, given, channels=3)
        assert launched["kernels"] == module.LAUNCHES["mien::to_image"]
        launched.clear()
        y.sum().backward()
        assert launched["kernels"] == module.LAUNCHES["mien::to_image_backward"]


def test_one_operation_each_way(place):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    x, bias = nhwc(leaf(1, 16, 2, 2, place=place)), leaf(16, place=place)
    weight = torch.ones_like(to_image(x, bias, channels=3))
    names = []
    with Names():
        torch.autograd.grad(to_image(x, bias, channels=3), (x, bias), weight)
    assert [name for name in names if "detach" not in name] == [
        "mien.to_image.default",
        "mien.to_image_backward.default",
    ]


def test_only_the_result_is_kept(place):
    x, bias = leaf(1, 16, 4, 4, place=place), leaf(16, place=place)
    addresses = []

    def keep(tensor):
        addresses.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = to_image(x, bias, channels=3)
    assert addresses == [y.data_ptr()]


def test_opcheck(place):
    x, bias = nhwc(leaf(2, 16, 3, 2, place=place)), leaf(16, place=place)
    half, image = x.detach().bfloat16(), torch.rand(2, 3, 3, 2, device=place)
    for operation, args in (
        (module._to_image, (x, bias, 3)),
        (module._to_image, (half, None, 1)),
        (module._to_image_backward, (image, image, 16, torch.bfloat16, torch.bfloat16)),
        (module._to_image_backward, (image, image, 3, torch.float32, None)),
    ):
        torch.library.opcheck(operation, args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, b: to_image(x[0], b, channels=3),
            "x must be (B, C, H, W) of float32, bfloat16, float16, float64, got (8, 3, 3) float32",
        ),
        (
            lambda x, b: to_image(x, b[:4], channels=3),
            "bias must be (8,) float32, got (4,) float32",
        ),
        (lambda x, b: to_image(x, b.to("meta"), channels=3), "bias must be on cpu, got meta"),
        (lambda x, b: to_image(x, b, channels=2), "channels must be 1 or 3 and at most x's 8, got"),
        (lambda x, b: to_image(x[:, :1], b[:1], channels=3), "at most x's 1, got 3"),
        (
            lambda x, b: to_image(
                torch.empty(1, 4, 2**15, 2**15 + 1, device="meta"), None, channels=3
            ),
            "values of the result must be at most 2^30, got",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(2, 8, 3, 3), torch.zeros(8))


def test_float64_is_refused_by_the_kernels(triton_device):
    x = torch.zeros(1, 4, 2, 2, dtype=torch.float64, device=triton_device)
    with pytest.raises(ValueError, match="float16, got .* float64"):
        to_image(x, None, channels=3)
