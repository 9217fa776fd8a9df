"""What stands between two convolutions: values and gradients against float64, in any layout.

A test with ``place`` runs twice: in plain torch on the CPU, and through the Triton kernels.
"""

import importlib
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mien.kernels import activate, reference, to_image, upscale
from mien.kernels.dispatch import uses_triton

module = importlib.import_module("mien.kernels.upscale")  # mien.kernels.upscale is the function

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NHWC = torch.channels_last

ACTIVATE = [
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
UPSCALE = [
    # shape of x, slope, factor
    ((1, 4, 1, 1), 0.1, 2),
    ((2, 256, 4, 4), 0.1, 2),
    ((2, 72, 3, 5), 0.2, 3),
    ((1, 400, 3, 2), 0.0, 4),
    ((2, 25, 2, 3), 1.0, 5),
    ((1, 144, 5, 1), 0.1, 6),
]
TO_IMAGE = [((1, 1, 1, 1), 1), ((2, 8, 5, 7), 3), ((1, 8, 4, 4), 1), ((2, 3, 9, 4), 3)]


@pytest.fixture(params=["plain", "triton"])
def place(request) -> str:
    return "cpu" if request.param == "plain" else request.getfixturevalue("triton_device")


def _random(*shape, place="cpu", dtype=torch.float32):
    return torch.randn(shape).to(place, dtype).requires_grad_()


def _nhwc(tensor):
    """The same leaf in channels_last."""
    return tensor.detach().contiguous(memory_format=NHWC).requires_grad_()


def _compare(name, tensors, options):
    """Result and gradients against float64, to one rounding (one cut in the interpreter)."""
    x, bias = tensors["x_bchw"], tensors["bias_c"]
    y = globals()[name](**tensors, **options)
    weight = torch.randn(y.shape).to(y)
    found = torch.autograd.grad(y, tensors.values(), weight)
    exact = {key: t.detach().double().cpu().requires_grad_() for key, t in tensors.items()}
    wanted = getattr(reference, name)(**exact, **options)
    wanted_found = torch.autograd.grad(wanted, exact.values(), weight.double().cpu())

    assert y.is_contiguous(memory_format=NHWC)
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double().cpu(), wanted.detach(), rtol=eps, atol=1e-6)
    # The kernels add up fp32, plain torch what it has rounded to x's dtype.
    rounds = name != "to_image" and not uses_triton(x)
    each = max(torch.finfo(x.dtype).eps / 2 if rounds else 0, 1e-6)
    sums_c = wanted_found[0].abs().sum((0, 2, 3))
    for tensor, gradient, want in zip(tensors.values(), found, wanted_found, strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.dim() == 1 or gradient.is_contiguous(memory_format=NHWC)
        bound = torch.finfo(tensor.dtype).eps * want.abs()
        bound = bound + (each * sums_c if tensor is bias else 5e-7)  # y of an image: eps * weight
        difference = (gradient.double().cpu() - want).abs()
        assert (difference <= bound).all(), (difference - bound).max()


def _inputs(place, shape, with_residual, dtype):
    """What `activate` takes: a picture, a bias and, where one is asked for, a residual."""
    tensors = {
        "x_bchw": _random(*shape, place=place, dtype=dtype),
        "bias_c": _random(shape[1], place=place, dtype=dtype),
    }
    if with_residual:
        tensors["residual_bchw"] = _random(*shape, place=place, dtype=dtype)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "slope", "border"), ACTIVATE)
def test_activate_equals_float64(place, shape, slope, border, with_residual, dtype):
    tensors = _inputs(place, shape, with_residual, dtype)
    _compare("activate", tensors, {"slope": slope, "border": border})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "slope", "border"), REFLECTED)
def test_reflections_equal_float64(place, shape, slope, border, with_residual, dtype):
    """A pixel's gradient is the sum over all places that show it."""
    tensors = _inputs(place, shape, with_residual, dtype)
    _compare("activate", tensors, {"slope": slope, "border": border, "reflect": True})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "slope", "factor"), UPSCALE)
def test_upscale_equals_float64(place, shape, slope, factor, dtype):
    x = _random(*shape, place=place, dtype=dtype)
    bias = _random(shape[1], place=place, dtype=dtype)
    _compare("upscale", {"x_bchw": x, "bias_c": bias}, {"slope": slope, "factor": factor})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels"), TO_IMAGE)
def test_to_image_equals_float64(place, shape, channels, dtype):
    x = _random(*shape, place=place, dtype=dtype)
    bias = _random(shape[1], place=place, dtype=dtype)
    _compare("to_image", {"x_bchw": x, "bias_c": bias}, {"channels": channels})


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_bias_in_fp32_gets_a_gradient_in_fp32(place, dtype):
    x = _random(4, 24, 16, 16, place=place, dtype=dtype)
    bias = _random(24, place=place)
    for name, options in (
        ("activate", {"slope": 0.1}),
        ("upscale", {"slope": 0.1}),
        ("to_image", {"channels": 3}),
    ):
        _compare(name, {"x_bchw": x, "bias_c": bias}, options)


def test_without_a_bias(place):
    x = _random(2, 24, 3, 5, place=place)
    zero = torch.zeros(24, device=place)
    for function, options in (
        (activate, {"slope": 0.1, "border": (1, 2, 1, 2)}),
        (upscale, {"slope": 0.1}),
        (to_image, {"channels": 3}),
    ):
        y, other = function(x, None, **options), function(x, zero, **options)
        assert torch.equal(y, other)
        weight = torch.randn(y.shape, device=place)
        (found,) = torch.autograd.grad(y, x, weight)
        (wanted,) = torch.autograd.grad(other, x, weight)
        assert torch.equal(found, wanted)


def test_float64_on_the_cpu():
    x, bias = _random(2, 16, 3, 5, dtype=torch.float64), _random(16, dtype=torch.float64)
    residual = _random(2, 16, 3, 5, dtype=torch.float64)
    for function in (
        lambda x, b, r: activate(x, b, slope=0.1, residual_bchw=r, border=(1, 2, 0, 1)),
        lambda x, b, r: upscale(x, b, slope=0.1),
        lambda x, b, r: to_image(x, b, channels=3),
    ):
        assert function(x, bias, residual).dtype == torch.float64
        assert torch.autograd.gradcheck(function, (x, bias, residual))


def test_a_frame_changes_nothing_inside_it(place):
    x, bias = _random(2, 16, 5, 4, place=place), _random(16, place=place)
    residual = _random(2, 16, 5, 4, place=place)
    weight = torch.randn(2, 16, 9, 9, device=place)
    framed = activate(x, bias, slope=0.1, residual_bchw=residual, border=(3, 2, 1, 3))
    padded = F.pad(activate(x, bias, slope=0.1, residual_bchw=residual), (3, 2, 1, 3))
    assert torch.equal(framed, padded)
    found = torch.autograd.grad(framed, (x, bias, residual), weight)
    wanted = torch.autograd.grad(padded, (x, bias, residual), weight)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 6])
def test_upscale_moves_each_channel_to_its_pixel(place, factor):
    x = _random(2, 2 * factor**2, 3, 4, place=place)
    y = upscale(x, None, slope=1, factor=factor)
    for i in range(factor):
        for j in range(factor):
            first = (i * factor + j) * 2
            assert torch.equal(y[:, :, i::factor, j::factor], x[:, first : first + 2])


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_a_value_of_zero_takes_the_slope(place, slope):
    """As torch's leaky_relu, which asks for z > 0."""
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0], device=place).view(1, 4, 1, 1).requires_grad_()
    bias = torch.tensor([1.0, -0.0, -1.0, -1.0], device=place)
    y = activate(x, bias, slope=slope)
    assert y.flatten().tolist() == [0, 0, 0, 1]
    y.sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([slope, slope, slope, 1])


def test_nan_is_passed_on(place):
    x = torch.full((1, 8, 2, 2), torch.nan, device=place)
    for slope in (0.0, 0.1, 1.0):
        assert activate(x, None, slope=slope).isnan().all()
    assert to_image(x, None, channels=3).isnan().all()


def _strided(tensor):
    """The same values, every second column of a wider tensor."""
    wide = torch.full((*tensor.shape[:3], 2 * tensor.shape[3]), torch.nan, device=tensor.device)
    wide[..., ::2] = tensor.detach()
    return wide[..., ::2].requires_grad_()


@pytest.mark.parametrize("layout", [_nhwc, _strided, lambda t: t.detach().mT.clone().mT])
def test_any_layout_gives_the_same_bits(place, layout):
    x, bias = _random(2, 16, 5, 4, place=place), _random(16, place=place)
    for function in (
        lambda x: activate(x, bias, slope=0.1, residual_bchw=x, border=(1, 2, 1, 2)),
        lambda x: upscale(x, bias, slope=0.1),
        lambda x: to_image(x, bias, channels=3),
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
    x, bias = _random(2, 16, 3, 4, place=place), _random(16, place=place)
    for function, options in (
        (activate, {"slope": 1, "border": (1, 2, 1, 2)}),
        (upscale, {"slope": 1}),
    ):
        grad_x, grad_bias = torch.autograd.grad(function(x, bias, **options).sum(), (x, bias))
        assert (grad_x == 1).all()
        assert (grad_bias == 24).all()


def test_nothing_outside_the_tensors_is_read(place):
    """x and the gradient lie amid NaN."""

    def amid_nan(shape):
        room = torch.full((shape[0] + 2, *shape[1:]), torch.nan, device=place)
        room = room.contiguous(memory_format=NHWC)
        room[1:-1] = torch.randn(shape)
        return room[1:-1].detach().requires_grad_()

    x = amid_nan((1, 36, 5, 3))
    bias = torch.full((38,), torch.nan, device=place)
    bias[1:-1] = 1
    bias = bias[1:-1].requires_grad_()
    for function, options in (
        (activate, {"slope": 0.1, "border": (1, 2, 1, 2)}),
        (activate, {"slope": 0.1, "residual_bchw": x}),
        (upscale, {"slope": 0.1, "factor": 3}),
        (to_image, {"channels": 3}),
    ):
        y = function(x, bias, **options)
        assert y.isfinite().all()
        for gradient in torch.autograd.grad(y, (x, bias), amid_nan(y.shape).detach()):
            assert gradient.isfinite().all()


def test_no_faces(place):
    x = torch.empty(0, 8, 4, 4, device=place, requires_grad=True)
    bias = _random(8, place=place)
    for y in (
        activate(x, bias, slope=0.1, border=(1, 2, 1, 2)),
        upscale(x, bias, slope=0.1),
        to_image(x, bias, channels=3),
    ):
        grad_x, grad_bias = torch.autograd.grad(y.sum(), (x, bias))
        assert grad_x.shape == x.shape
        assert (grad_bias == 0).all()


def test_the_same_bits_twice(place):
    x, bias = _random(3, 36, 7, 5, place=place), _random(36, place=place)
    for function, options in (
        (activate, {"slope": 0.1, "border": (1, 2, 1, 2)}),
        (upscale, {"slope": 0.1}),
        (to_image, {"channels": 3}),
    ):
        weight = torch.randn(function(x, bias, **options).shape, device=place)
        first, second = (
            torch.autograd.grad(function(x, bias, **options), (x, bias), weight) for _ in range(2)
        )
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_with_several_tiles(triton_device, monkeypatch, programs):
    """As large tensors have them, the last tile beyond the end."""
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    x, bias = _random(1, 64, 14, 15, place=triton_device), _random(64, place=triton_device)
    tensors = {"x_bchw": x, "bias_c": bias}
    _compare("activate", tensors, {"slope": 0.1, "border": (1, 2, 1, 2)})
    _compare("upscale", tensors, {"slope": 0.1})
    monkeypatch.setattr(module, "_TILE", 512)
    _compare("to_image", tensors, {"channels": 3})


def test_more_partial_sums_than_one_block(triton_device):
    """That the program which ends last adds up: 50 of 32 pixels here, 32 at a time."""
    x, bias = _random(1, 64, 40, 40, place=triton_device), _random(64, place=triton_device)
    _compare("activate", {"x_bchw": x, "bias_c": bias}, {"slope": 0.1})


def test_counters_of_programs_are_zero_between_two_kernels(triton_device):
    """A stream's kernels share them, and each leaves them as it found them."""
    x = _random(2, 96, 9, 9, place=triton_device).requires_grad_()
    for channels, options in ((96, {"slope": 0.1}), (96, {"slope": 0.1, "border": (1, 1, 1, 1)})):
        bias = _random(channels, place=triton_device).requires_grad_()
        activate(x, bias, **options).sum().backward()
    assert module._arrived
    assert all(not counters.any() for counters in module._arrived.values())


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
    x, bias = _random(1, 8, 2, 2, place=triton_device), _random(8, place=triton_device)
    for function, options in (
        (activate, {"slope": 0.1}),
        (upscale, {"slope": 0.1}),
        (to_image, {"channels": 3}),
    ):
        operation = "to_image" if function is to_image else "activate"
        for given in (None, bias):
            launched.clear()
            y = function(x, given, **options)
            assert launched["kernels"] == module.LAUNCHES[f"mien::{operation}"]
            launched.clear()
            y.sum().backward()
            assert launched["kernels"] == module.LAUNCHES[f"mien::{operation}_backward"]


def test_one_operation_each_way(place):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    x, bias = _nhwc(_random(1, 16, 2, 2, place=place)), _random(16, place=place)
    for function, options in (
        (activate, {"slope": 0.1, "residual_bchw": x.detach(), "border": (1, 2, 1, 2)}),
        (upscale, {"slope": 0.1}),
        (to_image, {"channels": 3}),
    ):
        weight = torch.ones_like(function(x, bias, **options))
        names = []
        with Names():
            torch.autograd.grad(function(x, bias, **options), (x, bias), weight)
        operation = "to_image" if function is to_image else "activate"
        assert [name for name in names if "detach" not in name] == [
            f"mien.{operation}.default",
            f"mien.{operation}_backward.default",
        ]


def test_only_the_result_is_kept_and_nothing_of_a_linear_one(place):
    x, bias = _random(1, 16, 4, 4, place=place), _random(16, place=place)
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for function, options in ((activate, {}), (upscale, {})):
            kept.clear()
            y = function(x, bias, slope=0.1, **options)
            assert kept == [y.data_ptr()]
            kept.clear()
            function(x, bias, slope=1, **options)
            assert kept == []
        y = to_image(x, bias, channels=3)
        assert kept == [y.data_ptr()]


def test_opcheck(place):
    x, bias = _nhwc(_random(2, 16, 3, 2, place=place)), _random(16, place=place)
    half, image = x.detach().bfloat16(), torch.rand(2, 3, 3, 2, device=place)
    y = activate(x, bias, slope=0.1, border=(1, 2, 1, 2)).detach()
    shown = activate(x, bias, slope=0.1, border=(1, 1, 1, 2), reflect=True).detach()
    backward = module._activate_backward
    for operation, args in (
        (module._activate, (x, bias, _nhwc(x), 0.1, 1, [1, 2, 1, 2], False)),
        (module._activate, (x, bias, _nhwc(x), 0.1, 1, [1, 1, 1, 2], True)),
        (module._activate, (x, bias, None, 1.0, 2, [0, 0, 0, 0], False)),
        (module._activate, (half, None, None, 0.0, 1, [0, 0, 0, 0], False)),
        (backward, (y, y, 0.1, 1, [1, 2, 1, 2], False, torch.float32)),
        (backward, (shown, shown, 0.1, 1, [1, 1, 1, 2], True, torch.float32)),
        (backward, (y.contiguous(), None, 1.0, 1, [0, 0, 0, 0], False, None)),
        (module._to_image, (x, bias, 3)),
        (module._to_image, (half, None, 1)),
        (module._to_image_backward, (image, image, 16, torch.bfloat16, torch.bfloat16)),
        (module._to_image_backward, (image, image, 3, torch.float32, None)),
    ):
        torch.library.opcheck(operation, args)


def test_compiles_as_one_graph(place):
    def block(x, bias):
        y = activate(x, bias, slope=0.1, border=(1, 2, 1, 2))
        return to_image(upscale(y, bias, slope=0.2), bias[:4], channels=3)

    x, bias = _nhwc(_random(1, 16, 3, 2, place=place)), _random(16, place=place)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y, other = block(x, bias), compiled(x, bias)
    assert torch.equal(y, other)
    found = torch.autograd.grad(y.sum(), (x, bias))
    wanted = torch.autograd.grad(other.sum(), (x, bias))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, b: activate(x[0], b, slope=1), "x must be (B, C, H, W) of float32, bfloat16, "),
        (lambda x, b: activate(x.int(), b, slope=1), "got (2, 8, 3, 3) int32"),
        (lambda x, b: upscale(x, b, slope=1.5), "slope must be 0 to 1, got 1.5"),
        (lambda x, b: activate(x, b, slope=-0.1), "slope must be 0 to 1, got -0.1"),
        (
            lambda x, b: activate(x, b, slope=1, border=(0, 3, 0, 0), reflect=True),
            "border must be smaller than the 3 rows and 3 columns that it reflects, got (0, 3, 0",
        ),
        (
            lambda x, b: upscale(x, b[:4], slope=1),
            "bias must be (8,) of float32 or float32, got (4,) float32",
        ),
        (
            lambda x, b: activate(x.half(), b.bfloat16(), slope=1),
            "bias must be (8,) of float16 or float32, got (8,) bfloat16",
        ),
        (lambda x, b: to_image(x, b.to("meta"), channels=3), "bias must be on cpu, got meta"),
        (
            lambda x, b: activate(x, b, slope=1, residual_bchw=x[:1]),
            "residual must be like x, (2, 8, 3, 3) float32 cpu, got (1, 8, 3, 3) float32 cpu",
        ),
        (
            lambda x, b: activate(x, b, slope=1, residual_bchw=x.half()),
            "residual must be like x, (2, 8, 3, 3) float32 cpu, got (2, 8, 3, 3) float16 cpu",
        ),
        (
            lambda x, b: activate(x, b, slope=1, border=(1, 2)),
            "border must be four numbers >= 0 (left, right, top, bottom), got (1, 2)",
        ),
        (lambda x, b: activate(x, b, slope=1, border=(0, -1, 0, 0)), "got (0, -1, 0, 0)"),
        (lambda x, b: upscale(x, b, slope=1, factor=1), "factor must be 2 to 6, got 1"),
        (lambda x, b: upscale(x, b, slope=1, factor=7), "factor must be 2 to 6, got 7"),
        (
            lambda x, b: upscale(x, b, slope=1, factor=3),
            "channels must be a multiple of factor^2 = 9, got 8",
        ),
        (lambda x, b: to_image(x, b, channels=2), "channels must be 1 or 3 and at most x's 8, got"),
        (lambda x, b: to_image(x[:, :1], b[:1], channels=3), "at most x's 1, got 3"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(2, 8, 3, 3), torch.zeros(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: activate(x, None, slope=1, border=(0, 0, 1, 0)), "pixels of the result must be"),
        (lambda x: upscale(x, None, slope=1), "pixels of x must be at most 2^30, got 1073774592: "),
        (lambda x: to_image(x, None, channels=3), "values of the result must be at most 2^30, got"),
    ],
)
def test_more_pixels_than_the_kernels_count_are_refused(call, message):
    x = torch.empty(1, 4, 2**15, 2**15 + 1, device="meta")
    with pytest.raises(ValueError, match=re.escape(message)):
        call(x)


def test_float64_is_refused_by_the_kernels(triton_device):
    x = torch.zeros(1, 4, 2, 2, dtype=torch.float64, device=triton_device)
    with pytest.raises(ValueError, match="float16, got .* float64"):
        activate(x, None, slope=1)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_values():
    """Offsets are 64 bits wide; 4.3 GB a tensor."""
    x = torch.zeros(1, 16400, 16400, 8, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    x[0, :, -1, -1] = 1
    bias = torch.zeros(8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = upscale(x.requires_grad_(), bias, slope=0.1)
    assert (y[0, :, -2:, -2:] == 1).all()
    y.backward(y.detach())
    assert (x.grad[0, :, -1, -1] == 1).all()
    assert (bias.grad == 1).all()
