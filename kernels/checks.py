"""What a tensor must be before a kernel reads or writes it; one line says what it is instead."""

import torch
from torch import Tensor


def check_tensor(
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Refuse a tensor of another shape, type or, where one is given, device.

    Raises:
        ValueError: Names the tensor, the rule and what was given.
    """
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be {shape} {wanted}, got {tuple(tensor.shape)} {tensor.dtype}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


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
    dense = tensor.permute(0, 2, 3, 1) if channels_last else tensor
    if not dense.is_contiguous():
        layout = "channels_last" if channels_last else "contiguous"
        raise ValueError(f"{name} must be {layout}, got strides {tensor.stride()}")
    check_alignment(tensor, name, alignment)
