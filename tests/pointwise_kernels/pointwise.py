"""What the tests of pointwise kernels share: leaves, layouts, and the comparison with float64."""

import torch

from mien.kernels.dispatch import uses_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NHWC = torch.channels_last


def leaf(*shape, place="cpu", dtype=torch.float32):
    """Normal random numbers that require a gradient."""
    return torch.randn(shape).to(place, dtype).requires_grad_()


def nhwc(tensor):
    """The same leaf in channels_last."""
    return tensor.detach().contiguous(memory_format=NHWC).requires_grad_()


def strided(tensor):
    """The same values, every second column of a wider tensor."""
    wide = torch.full((*tensor.shape[:3], 2 * tensor.shape[3]), torch.nan, device=tensor.device)
    wide[..., ::2] = tensor.detach()
    return wide[..., ::2].requires_grad_()


def transposed(tensor):
    """The same values, columns before rows in memory."""
    return tensor.detach().mT.clone().mT


LAYOUTS = (nhwc, strided, transposed)


def amid_nan(shape, place):
    """A random channels_last leaf with NaN before and after it in memory."""
    room = torch.full((shape[0] + 2, *shape[1:]), torch.nan, device=place)
    room = room.contiguous(memory_format=NHWC)
    room[1:-1] = torch.randn(shape)
    return room[1:-1].detach().requires_grad_()


def bias_amid_nan(channels, place):
    """A bias of ones with NaN before and after it in memory."""
    bias = torch.full((channels + 2,), torch.nan, device=place)
    bias[1:-1] = 1
    return bias[1:-1].requires_grad_()


def compare(function, plain, tensors, options, *, sums_rounded=True):
    """Hold result and gradients to float64, to one rounding (one cut in the interpreter).

    ``sums_rounded``: plain torch adds up a bias's gradient of what it has rounded to x's dtype; the
    kernels add up fp32.
    """
    x, bias = tensors["x_bchw"], tensors["bias_c"]
    y = function(**tensors, **options)
    weight = torch.randn(y.shape).to(y)
    gradients = torch.autograd.grad(y, tensors.values(), weight)
    exact = {key: t.detach().double().cpu().requires_grad_() for key, t in tensors.items()}
    exact_y = plain(**exact, **options)
    exact_gradients = torch.autograd.grad(exact_y, exact.values(), weight.double().cpu())

    assert y.is_contiguous(memory_format=NHWC)
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double().cpu(), exact_y.detach(), rtol=eps, atol=1e-6)
    is_rounded = sums_rounded and not uses_triton(x)
    each = max(torch.finfo(x.dtype).eps / 2 if is_rounded else 0, 1e-6)
    sums_c = exact_gradients[0].abs().sum((0, 2, 3))
    for tensor, gradient, want in zip(tensors.values(), gradients, exact_gradients, strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.dim() == 1 or gradient.is_contiguous(memory_format=NHWC)
        bound = torch.finfo(tensor.dtype).eps * want.abs()
        bound = bound + (each * sums_c if tensor is bias else 5e-7)  # y of an image: eps * weight
        difference = (gradient.double().cpu() - want).abs()
        assert (difference <= bound).all(), (difference - bound).max()
