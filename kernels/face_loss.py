"""The losses of the decoded faces of both sides, and their gradients, in two launches.

    face_loss(pred_a, pred_b, target_nchw, weight_n1hw, losses=[("ssim", 1.0), ("mse", 1.0)])
        .means_2k             mean of weight * map_k(pred, target) over all pixels and channels
        .gradient_a, _b       d(scale * sum_k share_k * means[side, k]) / d pred

The maps, with d = pred - target (x the prediction, y the target, G the blur with an 11 x 11
Gaussian of sigma 1.5 and reflected borders):

    mae          |d|
    mse          d^2
    logcosh      log cosh d
    smooth_loss  c (sqrt((d / c)^2 + 1) - 1), c = 1/255           (Barron 2019, equation 1, times c)
    ssim         1 - l s                                          (Wang et al. 2004, equation 13)
                 l = (2 Gx Gy + C1) / ((Gx)^2 + (Gy)^2 + C1)
                 s = (2 (Gxy - Gx Gy) + C2) / (max(G(x^2 + y^2) - (Gx)^2 - (Gy)^2, 0) + C2)

The first launch filters a tile of both pictures in fast memory, adds up every loss and leaves the
weighted derivatives of the SSIM map by Gx, Gxy and G(x^2 + y^2); the second filters these with the
transpose of G and writes the whole gradient. Operations of PyTorch pass over the pictures some
dozens of times, most of them in autograd. The gradient is a result, not a formula of autograd: hand
it to ``torch.autograd.backward`` together with the predictions. Sums are taken in a fixed order, so
the bits are the same on every run.

Shape letters: B faces of a side, N = 2 B faces, A's first, C channels, H rows, W columns, K losses.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, native
from .checks import FLOAT_DTYPES, check_alignment, check_choice, check_tensor

LOSSES = ("mae", "mse", "logcosh", "smooth_loss", "ssim")
"""Names of the losses; a name's place is its number in mien.h."""

LAUNCHES: dict[str, int] = {"mien::face_loss": 2}
"""Kernels that each operation launches on a GPU."""

MAX_LOSSES = 8
# The blur of 11 px reflects 5 px at a border, which needs 6.
MIN_SSIM_PX = 6


class FaceLoss(NamedTuple):
    """What `face_loss` returns."""

    means_2k: Tensor
    """fp32 (2, K): of each side (a, b) and loss, in the order of ``losses``; without shares."""
    gradient_a: Tensor
    """Gradient by ``pred_a``, with its shape and dtype, channels_last."""
    gradient_b: Tensor


# Without a formula of autograd: the gradient is one of its results.
@torch.library.custom_op("mien::face_loss", mutates_args=())
def _op(
    pred_a: Tensor,
    pred_b: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    kinds: Sequence[int],
    shares: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = pred_a.shape
    device = pred_a.device
    pictures = {"pred_a": pred_a, "pred_b": pred_b, "target": target}
    for name, tensor in (pictures | {"weight": weight, "scale": scale}).items():
        if tensor is not None:
            # A view of bytes may begin within an element, and is contiguous all the same.
            check_alignment(tensor, name)
    means = torch.empty((2, len(kinds)), dtype=torch.float32, device=device)
    gradient_a, gradient_b = _room_for_gradient(pred_a), _room_for_gradient(pred_b)
    ffi, lib = native.library()

    def pointer(tensor: Tensor | None, kind: str = "void *") -> Any:
        return ffi.cast(kind, 0 if tensor is None else tensor.data_ptr())

    job = ffi.new(
        "mien_face_loss_job *",
        {
            "preds": [pointer(pred_a), pointer(pred_b)],
            "target": pointer(target),
            "weight": pointer(weight, "float *"),
            "scale": pointer(scale, "float *"),
            "batch": batch,
            "height": height,
            "width": width,
            "channels": channels,
            "pred_type": FLOAT_DTYPES.index(pred_a.dtype),
            "target_type": FLOAT_DTYPES.index(target.dtype),
            "num_losses": len(kinds),
            "kinds": list(kinds),
            "shares": list(shares),
            "means": pointer(means, "float *"),
            "gradients": [pointer(gradient_a), pointer(gradient_b)],
        },
    )
    num_bytes = lib.mien_face_loss_workspace_bytes(job)
    # PyTorch's memory, which a CUDA graph keeps where one is captured. Named, as a temporary in the
    # call's arguments would be freed before the library reads it.
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    room = pointer(workspace), num_bytes
    if dispatch.uses_cuda(device):
        native.launch("face_loss", device, job, *room)
    else:
        # What PyTorch was told holds here too; 0 threads would mean every core.
        native.call("face_loss_cpu", job, *room, torch.get_num_threads())
    return means, gradient_a, gradient_b


@_op.register_fake
def _(pred_a, pred_b, target, weight, scale, kinds, shares):
    means = pred_a.new_empty((2, len(kinds)), dtype=torch.float32)
    return means, _room_for_gradient(pred_a), _room_for_gradient(pred_b)


def _room_for_gradient(pred_bchw: Tensor) -> Tensor:
    return torch.empty_like(pred_bchw, memory_format=torch.channels_last)


def face_loss(
    pred_a: Tensor,
    pred_b: Tensor,
    target_nchw: Tensor,
    weight_n1hw: Tensor | None,
    *,
    losses: Sequence[tuple[str, float]],
    scale: Tensor | None = None,
) -> FaceLoss:
    """The weighted mean of every loss, by side, and the gradients of their shared sums.

    A picture that is not channels_last, or a weight that is not contiguous, is copied first.

    Args:
        pred_a: Decoded faces of side a, (B, C, H, W) with 1 or 3 channels, channels_last, 0..1;
            fp32, bf16 or fp16. Whether it requires a gradient is all the same here.
        pred_b: The same of side b; shape and dtype of ``pred_a``.
        target_nchw: Faces to match, a's and then b's: (2 B, C, H, W), channels_last, 0..1; fp32,
            bf16 or fp16.
        weight_n1hw: Weight of each pixel, (2 B, 1, H, W) fp32; None: all are 1.
        losses: Name (of `LOSSES`) and share of each.
        scale: Factor of the gradients, such as the loss scale of fp16; fp32, one element, read on
            the device. None: 1.

    Raises:
        ValueError: On tensors that do not fit, an unknown loss, or SSIM of less than 6 px.
    """
    kinds, shares = _checked_losses(losses)
    _check(pred_a, pred_b, target_nchw, weight_n1hw, scale)
    smallest = min(pred_a.shape[2:])
    if LOSSES.index("ssim") in kinds and smallest < MIN_SSIM_PX:
        raise ValueError(f"SSIM needs pictures of at least {MIN_SSIM_PX} px, got {smallest}")
    results = _op(
        pred_a.detach().contiguous(memory_format=torch.channels_last),
        pred_b.detach().contiguous(memory_format=torch.channels_last),
        target_nchw.detach().contiguous(memory_format=torch.channels_last),
        None if weight_n1hw is None else weight_n1hw.detach().contiguous(),
        None if scale is None else scale.detach(),
        kinds,
        shares,
    )
    return FaceLoss(*results)


def _checked_losses(losses: Sequence[tuple[str, float]]) -> tuple[list[int], list[float]]:
    """Numbers and shares of the losses."""
    if not 1 <= len(losses) <= MAX_LOSSES:
        raise ValueError(f"losses must be 1 to {MAX_LOSSES}, got {len(losses)}")
    for name, _ in losses:
        check_choice(name, "loss", LOSSES)
    return [LOSSES.index(name) for name, _ in losses], [float(share) for _, share in losses]


def _check(
    pred_a: Tensor,
    pred_b: Tensor,
    target_nchw: Tensor,
    weight_n1hw: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Refuse tensors that the kernels would misread."""
    shape = tuple(pred_a.shape)
    if len(shape) != 4 or 0 in shape or shape[1] not in (1, 3):
        raise ValueError(f"pred_a must be (B, 1 or 3, H, W) and not empty, got {shape}")
    both = (2 * shape[0], *shape[1:])
    device = pred_a.device
    check_tensor(pred_a, "pred_a", shape, FLOAT_DTYPES, device)
    check_tensor(pred_b, "pred_b", shape, (pred_a.dtype,), device)
    check_tensor(target_nchw, "target", both, FLOAT_DTYPES, device)
    if weight_n1hw is not None:
        weight_shape = (both[0], 1, *shape[2:])
        check_tensor(weight_n1hw, "weight", weight_shape, (torch.float32,), device)
    if scale is not None:
        shape = tuple(scale.shape) if scale.numel() == 1 else ()
        check_tensor(scale, "scale", shape, (torch.float32,), device)
