"""Products of matrices in fp32 on a CPU, by the library that has the wider vectors there.

PyTorch asks MKL, which on a CPU of another maker than Intel computes with vectors of 256 bits.
oneDNN, which computes PyTorch's convolutions, has those of 512 bits there, too: on one thread of a
Zen 5, 2,048 x 512 by 512 x 1,024 numbers 107 -> 240 GFLOP/s, a dense layer of 16 faces 50 -> 100.

Shape letters: B products, M rows, N columns, K numbers that are summed.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_LEAST_MULTIPLICATIONS = 2**20
"""Size from which a call of oneDNN is worth its 10 us; measured on a Zen 5."""


def _maker() -> str:
    """Maker of this CPU, as it names itself; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[-1] for line in lines if line.startswith("vendor_id")), "")


def has_wider_library() -> bool:
    """Whether oneDNN has wider vectors here than what PyTorch asks; not where nothing tells."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _maker() not in ("", "GenuineIntel")
    )


_is_wider = has_wider_library()


@contextlib.contextmanager
def by_pytorch() -> Iterator[None]:
    """Products inside are those that PyTorch chooses, as on a GPU."""
    global _is_wider
    before, _is_wider = _is_wider, False
    try:
        yield
    finally:
        _is_wider = before


def is_chosen(first_mk: Tensor, second: Tensor) -> bool:
    """Whether oneDNN multiplies these: fp32 on a CPU, outside autocast, and not too small.

    The second may be [K, N], or [N, K] as the weight of a dense layer is.
    """
    return (
        _is_wider
        and len(first_mk) * second.numel() >= _LEAST_MULTIPLICATIONS
        and first_mk.dtype == second.dtype == torch.float32
        and first_mk.device.type == second.device.type == "cpu"
        # It would turn into 16 bits what PyTorch multiplies, and does not reach what others do.
        and not torch.is_autocast_enabled("cpu")
    )


def _by_onednn(first_mk: Tensor, second_kn: Tensor, bias_n: Tensor | None = None) -> Tensor:
    # An operation that PyTorch's compiler makes. It takes matrices of any strides, but reads a bias
    # as if its numbers lay side by side.
    bias_n = None if bias_n is None else bias_n.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(
        first_mk, second_kn.t(), bias_n, "none", [], ""
    )


def multiply(first_mk: Tensor, second_kn: Tensor, bias_n: Tensor | None = None) -> Tensor:
    """[M, K] times [K, N], plus the bias of each column; no gradient goes through it."""
    if is_chosen(first_mk, second_kn):
        return _by_onednn(first_mk, second_kn, bias_n)
    if bias_n is None:
        return first_mk @ second_kn
    return torch.addmm(bias_n, first_mk, second_kn)


def multiply_all(
    first_bmk: Tensor, second_bkn: Tensor, out_bmn: Tensor, *, adds: bool = False
) -> None:
    """Each [M, K] times its [K, N], written to ``out_bmn``, or with ``adds`` added to it."""
    if not is_chosen(first_bmk[0], second_bkn[0]):
        if adds:
            torch.baddbmm(out_bmn, first_bmk, second_bkn, out=out_bmn)
        else:
            torch.bmm(first_bmk, second_bkn, out=out_bmn)
        return
    for first_mk, second_kn, out_mn in zip(first_bmk, second_bkn, out_bmn, strict=True):
        product_mn = _by_onednn(first_mk, second_kn)
        out_mn.add_(product_mn) if adds else out_mn.copy_(product_mn)
