"""What stands between two convolutions: values and gradients against float64, in any layout.

A test with ``place`` runs twice: in plain torch on the CPU, and through the Triton kernels.
"""

import re
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pointwise import (
    DTYPES,
    LAYOUTS,
    amid_nan,
    bias_amid_nan,
    compare,
    leaf,
    nhwc,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mien.kernels import bias_act as module
from mien.kernels import channels_last, reference
from mien.kernels.bias_act import bias_act, bias_act_depth_to_space
from mien.kernels.to_image import to_image

_compare_bias_act = partial(compare, bias_act, reference.bias_act)
_compare_depth_to_space = partial(
    compare, bias_act_depth_to_space, reference.bias_act_depth_to_space
)

BIAS_ACT = [
    # shape of x, slope, border; a tile is 32 pixels of 64 channels, or more pixels of fewer
    ((1, 8, 1, 1), 0.1, (0, 0, 0, 0)),
    ((2, 64, 4, 4), 0.1, (0, 0, 0, 0)),
    ((2, 40, 5, 3), 0.2, (1, 2, 1, 2)),
    ((1, 130, 7, 9), 0.1, (0, 1, 2, 0)),
    ((3, 1, 9, 2), 0.0, (3, 0, 0, 0)),
    ((2, 3, 6, 5), 1.0, (0, 0, 0, 1)),
    ((1, 72, 8, 6), 1.0, (0, 0, 0, 0)),
]
REFLECTED = [
    # shape of x, slope, border: within the picture, up to all of it, of one side, of a lone line
    ((2, 40, 5, 4), 0.2, (1, 2, 1, 2)),
    ((1, 130, 7, 9), 0.1, (0, 1, 2, 0)),
    ((3, 3, 3, 4), 0.0, (3, 3, 2, 2)),
    ((2, 64, 2, 2), 1.0, (1, 1, 1, 1)),
    ((1, 8, 1, 5), 0.1, (4, 2, 0, 0)),
]
DEPTH_TO_SPACE = [
    # shape of x, slope, factor
    ((1, 4, 1, 1), 0.1, 2),
    ((2, 256, 4, 4), 0.1, 2),
    ((2, 72, 3, 5), 0.2, 3),
    ((1, 400, 3, 2), 0.0, 4),
    ((2, 25, 2, 3), 1.0, 5),
    ((1, 144, 5, 1), 0.1, 6),
]


@pytest.fixture(params=["plain", "triton"])
def place(request) -> str:
    return "cpu" if request.param == "plain" else request.getfixturevalue("triton_device")


def _inputs(place, shape, with_residual, dtype):
    """What `bias_act` takes: a picture, a bias and, where one is asked for, a residual."""
    tensors = {
        "x_bchw": leaf(*shape, place=place, dtype=dtype),
        "bias_c": leaf(shape[1], place=place, dtype=dtype),
    }
    if with_residual:
        tensors["residual_bchw"] = leaf(*shape, place=place, dtype=dtype)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "slope", "border"), BIAS_ACT)
def test_bias_act_equals_float64(place, shape, slope, border, with_residual, dtype):
    tensors = _inputs(place, shape, with_residual, dtype)
    _compare_bias_act(tensors, {"negative_slope": slope, "border": border})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "slope", "border"), REFLECTED)
def test_reflections_equal_float64(place, shape, slope, border, with_residual, dtype):
    """A pixel's gradient is the sum over all places that show it."""
    tensors = _inputs(place, shape, with_residual, dtype)
    _compare_bias_act(tensors, {"negative_slope": slope, "border": border, "reflect": True})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "slope", "factor"), DEPTH_TO_SPACE)
def test_depth_to_space_equals_float64(place, shape, slope, factor, dtype):
    x = leaf(*shape, place=place, dtype=dtype)
    bias = leaf(shape[1], place=place, dtype=dtype)
    _compare_depth_to_space(
        {"x_bchw": x, "bias_c": bias}, {"negative_slope": slope, "factor": factor}
    )


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_bias_in_fp32_gets_a_gradient_in_fp32(place, dtype):
    x = leaf(4, 24, 16, 16, place=place, dtype=dtype)
    bias = leaf(24, place=place)
    for compare_to_float64 in (_compare_bias_act, _compare_depth_to_space):
        compare_to_float64({"x_bchw": x, "bias_c": bias}, {"negative_slope": 0.1})


def test_without_a_bias(place):
    x = leaf(2, 24, 3, 5, place=place)
    zero = torch.zeros(24, device=place)
    for function, options in (
        (bias_act, {"negative_slope": 0.1, "border": (1, 2, 1, 2)}),
        (bias_act_depth_to_space, {"negative_slope": 0.1}),
    ):
        y, other = function(x, None, **options), function(x, zero, **options)
        assert torch.equal(y, other)
        weight = torch.randn(y.shape, device=place)
        (found,) = torch.autograd.grad(y, x, weight)
        (wanted,) = torch.autograd.grad(other, x, weight)
        assert torch.equal(found, wanted)


def test_float64_on_the_cpu():
    x, bias = leaf(2, 16, 3, 5, dtype=torch.float64), leaf(16, dtype=torch.float64)
    residual = leaf(2, 16, 3, 5, dtype=torch.float64)
    for function in (
        lambda x, b, r: bias_act(x, b, negative_slope=0.1, residual_bchw=r, border=(1, 2, 0, 1)),
        lambda x, b, r: bias_act_depth_to_space(x, b, negative_slope=0.1),
    ):
        assert function(x, bias, residual).dtype == torch.float64
        assert torch.autograd.gradcheck(function, (x, bias, residual))


def test_a_frame_changes_nothing_inside_it(place):
    x, bias = leaf(2, 16, 5, 4, place=place), leaf(16, place=place)
    residual = leaf(2, 16, 5, 4, place=place)
    weight = torch.randn(2, 16, 9, 9, device=place)
    framed = bias_act(x, bias, negative_slope=0.1, residual_bchw=residual, border=(3, 2, 1, 3))
    padded = F.pad(bias_act(x, bias, negative_slope=0.1, residual_bchw=residual), (3, 2, 1, 3))
    assert torch.equal(framed, padded)
    found = torch.autograd.grad(framed, (x, bias, residual), weight)
    wanted = torch.autograd.grad(padded, (x, bias, residual), weight)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 6])
def test_depth_to_space_moves_each_channel_to_its_pixel(place, factor):
    x = leaf(2, 2 * factor**2, 3, 4, place=place)
    y = bias_act_depth_to_space(x, None, negative_slope=1, factor=factor)
    for i in range(factor):
        for j in range(factor):
            first = (i * factor + j) * 2
            assert torch.equal(y[:, :, i::factor, j::factor], x[:, first : first + 2])


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_a_value_of_zero_takes_the_slope(place, slope):
    """As torch's leaky_relu, which asks for z > 0."""
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0], device=place).view(1, 4, 1, 1).requires_grad_()
    bias = torch.tensor([1.0, -0.0, -1.0, -1.0], device=place)
    y = bias_act(x, bias, negative_slope=slope)
    assert y.flatten().tolist() == [0, 0, 0, 1]
    y.sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([slope, slope, slope, 1])


def test_nan_is_passed_on(place):
    x = torch.full((1, 8, 2, 2), torch.nan, device=place)
    for slope in (0.0, 0.1, 1.0):
        assert bias_act(x, None, negative_slope=slope).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(place, layout):
    x, bias = leaf(2, 16, 5, 4, place=place), leaf(16, place=place)
    for function in (
        lambda x: bias_act(x, bias, negative_slope=0.1, residual_bchw=x, border=(1, 2, 1, 2)),
        lambda x: bias_act_depth_to_space(x, bias, negative_slope=0.1),
    ):
        y = function(x)
        weight = torch.randn(y.shape, device=place)
        found = torch.autograd.grad(y, (x, bias), weight)
        other_x = layout(x).requires_grad_()
        other = function(other_x)
        assert torch.equal(y, other)
        wanted = torch.autograd.grad(other, (other_x, bias), layout(weight))
        assert all(map(torch.equal, found, wanted))


def test_an_expanded_gradient(place):
    x, bias = leaf(2, 16, 3, 4, place=place), leaf(16, place=place)
    for function, options in (
        (bias_act, {"negative_slope": 1, "border": (1, 2, 1, 2)}),
        (bias_act_depth_to_space, {"negative_slope": 1}),
    ):
        grad_x, grad_bias = torch.autograd.grad(function(x, bias, **options).sum(), (x, bias))
        assert (grad_x == 1).all()
        assert (grad_bias == 24).all()


def test_nothing_outside_the_tensors_is_read(place):
    """x and the gradient lie amid NaN."""
    x, bias = amid_nan((1, 36, 5, 3), place), bias_amid_nan(36, place)
    for function, options in (
        (bias_act, {"negative_slope": 0.1, "border": (1, 2, 1, 2)}),
        (bias_act, {"negative_slope": 0.1, "residual_bchw": x}),
        (bias_act_depth_to_space, {"negative_slope": 0.1, "factor": 3}),
    ):
        y = function(x, bias, **options)
        assert y.isfinite().all()
        for gradient in torch.autograd.grad(y, (x, bias), amid_nan(y.shape, place).detach()):
            assert gradient.isfinite().all()


def test_no_faces(place):
    x = torch.empty(0, 8, 4, 4, device=place, requires_grad=True)
    bias = leaf(8, place=place)
    for y in (
        bias_act(x, bias, negative_slope=0.1, border=(1, 2, 1, 2)),
        bias_act_depth_to_space(x, bias, negative_slope=0.1),
    ):
        grad_x, grad_bias = torch.autograd.grad(y.sum(), (x, bias))
        assert grad_x.shape == x.shape
        assert (grad_bias == 0).all()


def test_the_same_bits_twice(place):
    x, bias = leaf(3, 36, 7, 5, place=place), leaf(36, place=place)
    for function, options in (
        (bias_act, {"negative_slope": 0.1, "border": (1, 2, 1, 2)}),
        (bias_act_depth_to_space, {"negative_slope": 0.1}),
    ):
        weight = torch.randn(function(x, bias, **options).shape, device=place)
        first, second = (
            torch.autograd.grad(function(x, bias, **options), (x, bias), weight) for _ in range(2)
        )
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_with_several_tiles(triton_device, monkeypatch, programs):
    """As large tensors have them, the last tile beyond the end."""
    monkeypatch.setattr(channels_last, "MAX_PROGRAMS", programs)
    x, bias = leaf(1, 64, 14, 15, place=triton_device), leaf(64, place=triton_device)
    tensors = {"x_bchw": x, "bias_c": bias}
    _compare_bias_act(tensors, {"negative_slope": 0.1, "border": (1, 2, 1, 2)})
    _compare_depth_to_space(tensors, {"negative_slope": 0.1})


def test_more_partial_sums_than_one_block(triton_device):
    """Sums that the program which ends last adds up: 50 of 32 pixels here, 32 at a time."""
    x, bias = leaf(1, 64, 40, 40, place=triton_device), leaf(64, place=triton_device)
    _compare_bias_act({"x_bchw": x, "bias_c": bias}, {"negative_slope": 0.1})


def test_counters_of_programs_are_zero_between_two_kernels(triton_device):
    """A stream's kernels share them, and each leaves them as it found them."""
    x = leaf(2, 96, 9, 9, place=triton_device).requires_grad_()
    for channels, options in (
        (96, {"negative_slope": 0.1}),
        (96, {"negative_slope": 0.1, "border": (1, 1, 1, 1)}),
    ):
        bias = leaf(channels, place=triton_device).requires_grad_()
        bias_act(x, bias, **options).sum().backward()
    assert channels_last._arrived
    assert all(not counters.any() for counters in channels_last._arrived.values())


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
    for function, options in (
        (bias_act, {"negative_slope": 0.1}),
        (bias_act_depth_to_space, {"negative_slope": 0.1}),
    ):
        for given in (None, bias):
            launched.clear()
            y = function(x, given, **options)
            assert launched["kernels"] == module.LAUNCHES["mien::bias_act"]
            launched.clear()
            y.sum().backward()
            assert launched["kernels"] == module.LAUNCHES["mien::bias_act_backward"]


def test_one_operation_each_way(place):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    x, bias = nhwc(leaf(1, 16, 2, 2, place=place)), leaf(16, place=place)
    for function, options in (
        (bias_act, {"negative_slope": 0.1, "residual_bchw": x.detach(), "border": (1, 2, 1, 2)}),
        (bias_act_depth_to_space, {"negative_slope": 0.1}),
    ):
        weight = torch.ones_like(function(x, bias, **options))
        names = []
        with Names():
            torch.autograd.grad(function(x, bias, **options), (x, bias), weight)
        assert [name for name in names if "detach" not in name] == [
            "mien.bias_act.default",
            "mien.bias_act_backward.default",
        ]


def test_only_the_result_is_kept_and_nothing_of_a_linear_one(place):
    x, bias = leaf(1, 16, 4, 4, place=place), leaf(16, place=place)
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for function in (bias_act, bias_act_depth_to_space):
            kept.clear()
            y = function(x, bias, negative_slope=0.1)
            assert kept == [y.data_ptr()]
            kept.clear()
            function(x, bias, negative_slope=1)
            assert kept == []


def test_opcheck(place):
    x, bias = nhwc(leaf(2, 16, 3, 2, place=place)), leaf(16, place=place)
    half = x.detach().bfloat16()
    y = bias_act(x, bias, negative_slope=0.1, border=(1, 2, 1, 2)).detach()
    shown = bias_act(x, bias, negative_slope=0.1, border=(1, 1, 1, 2), reflect=True).detach()
    backward = module._bias_act_backward
    for operation, args in (
        (module._bias_act, (x, bias, nhwc(x), 0.1, 1, [1, 2, 1, 2], False)),
        (module._bias_act, (x, bias, nhwc(x), 0.1, 1, [1, 1, 1, 2], True)),
        (module._bias_act, (x, bias, None, 1.0, 2, [0, 0, 0, 0], False)),
        (module._bias_act, (half, None, None, 0.0, 1, [0, 0, 0, 0], False)),
        (backward, (y, y, 0.1, 1, [1, 2, 1, 2], False, torch.float32)),
        (backward, (shown, shown, 0.1, 1, [1, 1, 1, 2], True, torch.float32)),
        (backward, (y.contiguous(), None, 1.0, 1, [0, 0, 0, 0], False, None)),
    ):
        torch.library.opcheck(operation, args)


def test_compiles_as_one_graph(place):
    def block(x, bias):
        y = bias_act(x, bias, negative_slope=0.1, border=(1, 2, 1, 2))
        return to_image(bias_act_depth_to_space(y, bias, negative_slope=0.2), bias[:4], channels=3)

    x, bias = nhwc(leaf(1, 16, 3, 2, place=place)), leaf(16, place=place)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y, other = block(x, bias), compiled(x, bias)
    assert torch.equal(y, other)
    found = torch.autograd.grad(y.sum(), (x, bias))
    wanted = torch.autograd.grad(other.sum(), (x, bias))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, b: bias_act(x[0], b, negative_slope=1),
            "x must be (B, C, H, W) of float32, bfloat16, ",
        ),
        (lambda x, b: bias_act(x.int(), b, negative_slope=1), "got (2, 8, 3, 3) int32"),
        (
            lambda x, b: bias_act_depth_to_space(x, b, negative_slope=1.5),
            "negative_slope must be 0 to 1, got 1.5",
        ),
        (
            lambda x, b: bias_act(x, b, negative_slope=-0.1),
            "negative_slope must be 0 to 1, got -0.1",
        ),
        (
            lambda x, b: bias_act(x, b, negative_slope=1, border=(0, 3, 0, 0), reflect=True),
            "border must be smaller than the 3 rows and 3 columns that it reflects, got (0, 3, 0",
        ),
        (
            lambda x, b: bias_act_depth_to_space(x, b[:4], negative_slope=1),
            "bias must be (8,) float32, got (4,) float32",
        ),
        (
            lambda x, b: bias_act(x.half(), b.bfloat16(), negative_slope=1),
            "bias must be (8,) float16 or float32, got (8,) bfloat16",
        ),
        (
            lambda x, b: bias_act(x, b, negative_slope=1, residual_bchw=x[:1]),
            "residual must be (2, 8, 3, 3) float32, got (1, 8, 3, 3) float32",
        ),
        (
            lambda x, b: bias_act(x, b, negative_slope=1, residual_bchw=x.half()),
            "residual must be (2, 8, 3, 3) float32, got (2, 8, 3, 3) float16",
        ),
        (
            lambda x, b: bias_act(x, b, negative_slope=1, border=(1, 2)),
            "border must be four numbers >= 0 (left, right, top, bottom), got (1, 2)",
        ),
        (lambda x, b: bias_act(x, b, negative_slope=1, border=(0, -1, 0, 0)), "got (0, -1, 0, 0)"),
        (
            lambda x, b: bias_act_depth_to_space(x, b, negative_slope=1, factor=1),
            "factor must be 2 to 6, got 1",
        ),
        (
            lambda x, b: bias_act_depth_to_space(x, b, negative_slope=1, factor=7),
            "factor must be 2 to 6, got 7",
        ),
        (
            lambda x, b: bias_act_depth_to_space(x, b, negative_slope=1, factor=3),
            "channels must be a multiple of factor^2 = 9, got 8",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(2, 8, 3, 3), torch.zeros(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: bias_act(x, None, negative_slope=1, border=(0, 0, 1, 0)),
            "pixels of the result must be",
        ),
        (
            lambda x: bias_act_depth_to_space(x, None, negative_slope=1),
            "pixels of x must be at most 2^30, got 1073774592: ",
        ),
    ],
)
def test_more_pixels_than_the_kernels_count_are_refused(call, message):
    x = torch.empty(1, 4, 2**15, 2**15 + 1, device="meta")
    with pytest.raises(ValueError, match=re.escape(message)):
        call(x)


def test_float64_is_refused_by_the_kernels(triton_device):
    x = torch.zeros(1, 4, 2, 2, dtype=torch.float64, device=triton_device)
    with pytest.raises(ValueError, match="float16, got .* float64"):
        bias_act(x, None, negative_slope=1)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_values():
    """Offsets are 64 bits wide; 4.3 GB a tensor."""
    x = torch.zeros(1, 16400, 16400, 8, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    x[0, :, -1, -1] = 1
    bias = torch.zeros(8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = bias_act_depth_to_space(x.requires_grad_(), bias, negative_slope=0.1)
    assert (y[0, :, -2:, -2:] == 1).all()
    y.backward(y.detach())
    assert (x.grad[0, :, -1, -1] == 1).all()
    assert (bias.grad == 1).all()
