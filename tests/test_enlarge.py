"""Bilinear enlargement: values and gradients against float64, the same bits, every refusal."""

import pytest
import torch
import torch.nn.functional as F

from mien.kernels import enlarge as module
from mien.kernels import reference
from mien.kernels.enlarge import enlarge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    # shape of x, factor: one pixel, a lone line, ragged channels, odd factors, a large one
    ((1, 1, 1, 1), 2),
    ((2, 64, 4, 4), 2),
    ((1, 130, 5, 3), 2),
    ((2, 8, 1, 6), 3),
    ((1, 3, 4, 2), 5),
    ((2, 40, 3, 3), 4),
    ((1, 8, 2, 2), 8),
]


@pytest.fixture(params=["plain", "triton"])
def place(request) -> str:
    return "cpu" if request.param == "plain" else request.getfixturevalue("triton_device")


def _random(*shape, place="cpu", dtype=torch.float32):
    return torch.randn(shape).to(place, dtype).requires_grad_()


@pytest.mark.parametrize(("shape", "factor"), CASES)
def test_the_reference_is_what_torch_computes(shape, factor):
    x = torch.randn(shape, dtype=torch.float64)
    wanted = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(reference.enlarge(x, factor), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "factor"), CASES)
def test_values_and_gradients_equal_float64(place, shape, factor, dtype):
    x = _random(*shape, place=place, dtype=dtype)
    y = enlarge(x, factor)
    weight = torch.randn(y.shape).to(y)
    (found,) = torch.autograd.grad(y, x, weight)
    exact = x.detach().double().cpu().requires_grad_()
    wanted = reference.enlarge(exact, factor)
    (wanted_found,) = torch.autograd.grad(wanted, exact, weight.double().cpu())
    eps = torch.finfo(dtype).eps
    # Shares are fp32: of factors that are no power of two they are rounded themselves.
    torch.testing.assert_close(y.double().cpu(), wanted.detach(), rtol=eps, atol=4e-6)
    # Plain torch adds up gradients in x's type on a CPU: one rounding each of (2 R)^2 numbers.
    atol = 4e-6 * factor + (eps * factor**2 if place == "cpu" and dtype != torch.float32 else 0)
    torch.testing.assert_close(found.double().cpu(), wanted_found, rtol=2 * eps, atol=atol)
    for tensor in (y, found):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_gradients_have_the_same_bits_twice(triton_device):
    x = _random(2, 16, 5, 6, place=triton_device, dtype=torch.bfloat16)
    weight = torch.randn(2, 16, 10, 12).to(triton_device, torch.bfloat16)
    first, second = (torch.autograd.grad(enlarge(x), x, weight)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_any_memory_format_and_no_faces(place):
    x = torch.randn(2, 5, 7, 8, device=place).transpose(2, 3)
    torch.testing.assert_close(enlarge(x).cpu(), reference.enlarge(x.cpu()), rtol=1e-5, atol=1e-6)
    assert enlarge(x[:0]).shape == (0, 5, 16, 14)


def test_opcheck(place):
    x = _random(2, 8, 3, 4, place=place)
    torch.library.opcheck(module._enlarge, (x, 2))
    torch.library.opcheck(module._enlarge_backward, (torch.randn(2, 8, 6, 8, device=place), 2))


@pytest.mark.parametrize(
    ("x", "factor", "message"),
    [
        (torch.zeros(2, 3, 4), 2, "x must be .B, C, H, W. of float32, .*, got .2, 3, 4. float32"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int32), 2, "got .2, 3, 4, 4. int32"),
        (torch.zeros(2, 3, 0, 4), 2, "x must have a pixel at least, got .2, 3, 0, 4."),
        (torch.zeros(2, 3, 4, 4), 1, "factor must be 2 to 16, got 1"),
        (torch.zeros(2, 3, 4, 4), 17, "factor must be 2 to 16, got 17"),
    ],
)
def test_refusals(x, factor, message):
    with pytest.raises(ValueError, match=message):
        enlarge(x, factor)
