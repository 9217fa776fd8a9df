"""What an argument must be before a kernel takes it; one line says what it is instead.

Every refusal that more than one kernel makes stands here. All raise ValueError that names the
argument, the rule and what was given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import uses_triton

WIDEST_ACCESS = 16
"""Bytes that a thread of a GPU reads or writes at once, at most."""

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that kernels read and write; the place of each is its number in mien.h."""

_MOST = 2**30  # kernels count pixels and values in 32 bits, and step past the last by a tile


def check_tensor(
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    *,
    remedy: str = "",
) -> None:
    """Refuse a tensor of another shape, type or, where one is given, device.

    Raises:
        ValueError: Names the tensor, the rule and what was given, then the remedy.
    """
    remedy = f": {remedy}" if remedy else ""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        rule = " or ".join(dict.fromkeys(map(_name, dtypes)))
        raise ValueError(
            f"{name} must be {shape} {rule}, got {tuple(tensor.shape)} {_name(tensor.dtype)}"
            f"{remedy}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}{remedy}")


def is_reachable(tensor: Tensor, device: torch.device) -> bool:
    """Whether kernels on a device can read and write a tensor at its address: it lies there or, for
    a GPU, in page-locked host memory, which has one address for both."""
    return tensor.device == device or (
        device.type == "cuda" and tensor.device.type == "cpu" and tensor.is_pinned()
    )


def check_image(x_bchw: Tensor, bias_c: Tensor | None = None) -> None:
    """Refuse what is no batch of images in a type that pointwise kernels take, and a bias that is
    not one number a channel of it, in its dtype or fp32.

    Raises:
        ValueError: Names the tensor, the rule and what was given.
    """
    # Triton's kernels compute in fp32; plain PyTorch takes float64 too, for exact references.
    dtypes = FLOAT_DTYPES if uses_triton(x_bchw) else (*FLOAT_DTYPES, torch.float64)
    if x_bchw.ndim != 4 or x_bchw.dtype not in dtypes:
        raise ValueError(
            f"x must be (B, C, H, W) of {', '.join(map(_name, dtypes))}, got "
            f"{tuple(x_bchw.shape)} {_name(x_bchw.dtype)}"
        )
    if bias_c is not None:
        bias_dtypes = (x_bchw.dtype, torch.float32)
        check_tensor(bias_c, "bias", (x_bchw.shape[1],), bias_dtypes, x_bchw.device)


def check_count(count: int, name: str) -> None:
    """Refuse more pixels or values than kernels can count.

    Raises:
        ValueError: Names what is counted, the most, the count and the remedy.
    """
    if count > _MOST:
        raise ValueError(f"{name} must be at most 2^30, got {count}: use a smaller batch")


def check_range(value: float, name: str, low: float, high: float) -> None:
    """Refuse a number that is not ``low`` to ``high``; NaN is not.

    Raises:
        ValueError: Names the number, its range and what was given.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high}, got {value}")


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        ValueError: Names the word's kind, the choices and what was given.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def are_aligned(*tensors: Tensor) -> bool:
    """Whether a kernel may read all of them in its widest accesses from the first element on."""
    return not any(address % WIDEST_ACCESS for address in map(Tensor.data_ptr, tensors))


def check_alignment(tensor: Tensor, name: str, alignment: int | None = None) -> None:
    """Refuse a tensor whose address is no multiple of ``alignment`` bytes (None: an element's).

    Raises:
        ValueError: Names the tensor, the rule and what was given.
    """
    alignment = alignment or tensor.itemsize
    bytes_past = tensor.data_ptr() % alignment
    if bytes_past:
        raise ValueError(
            f"{name} must start at a multiple of {alignment} bytes, got one that starts "
            f"{bytes_past} after: clone it"
        )


def check_memory(
    tensor: Tensor, name: str, *, alignment: int | None = None, channels_last: bool = False
) -> None:
    """Refuse a tensor with gaps, one in another order, or one that `check_alignment` refuses.

    Raises:
        ValueError: Names the tensor, the rule and what was given.
    """
    in_order = tensor.permute(0, 2, 3, 1) if channels_last else tensor
    if not in_order.is_contiguous():
        layout = "channels_last" if channels_last else "contiguous"
        raise ValueError(f"{name} must be {layout}, got strides {tensor.stride()}")
    check_alignment(tensor, name, alignment)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
