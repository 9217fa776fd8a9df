"""Number format in which the network computes. Weights, statistics and losses stay fp32."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.wide_products import types_without_units


@dataclass(frozen=True)
class Precision:
    """A precision policy, resolved for one device."""

    name: str
    compute: torch.dtype
    """Format of activations and of the weights that a layer sees."""

    why: str
    """How it was chosen, for the start-up line."""

    warning: str = ""
    """Sentence for a user who would train faster in another one; empty: there is none to be told
    of."""

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need loss scaling to stay in range: fp16 alone."""
        return self.name == "fp16"

    def apply(self) -> None:
        """Let CUDA round the inputs of fp32 products to 10 bits, or forbid it, in this process."""
        # Forbidden, too, and not left as it is: an earlier run of this process may have allowed it.
        round_products(self.name == "tf32")


def round_products(is_allowed: bool) -> None:
    """Let CUDA round the inputs of fp32 products to 10 bits in this process, or forbid it."""
    for switch in _switches():
        switch.fp32_precision = "tf32" if is_allowed else "ieee"


@contextmanager
def restoring_products() -> Iterator[None]:
    """Have CUDA round fp32 products afterwards as before, whatever is applied inside the
    context."""
    before = [switch.fp32_precision for switch in _switches()]
    try:
        yield
    finally:
        for switch, precision in zip(_switches(), before, strict=True):
            # One that read so because of PyTorch's switch for all goes on following that.
            switch.fp32_precision = "none"
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


def _switches() -> tuple[Any, ...]:
    """PyTorch's switches for the fp32 products of CUDA.

    Not `allow_tf32`, which is the older way: reading that raises in a program that has set these.
    """
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn  # type: ignore[attr-defined]


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute fp32 products inside the context without rounding their inputs, in every
    precision."""
    with restoring_products():
        round_products(False)
        yield


_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
_COMPUTE = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


def resolve(mode: str, device: torch.device) -> Precision:
    """The policy for ``mode`` (`precision.mode`) on a device.

    Raises:
        ValueError: The device cannot compute so.
    """
    if mode == "auto":
        name, why = _choose(device)
    else:
        name, why = mode, "as set"
    if name == "tf32" and device.type != "cuda":
        raise ValueError("precision tf32 needs an Nvidia GPU; use fp32 or bf16 on the CPU")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("this GPU has no bf16; use --precision fp16, tf32 or fp32")
    return Precision(name, _COMPUTE[name], why, _warning(name, device))


def _warning(name: str, device: torch.device) -> str:
    """What is to be said of 16 bits on a CPU that has no units for them."""
    if device.type != "cpu" or _COMPUTE[name] not in types_without_units():
        return ""
    # Measured on a Zen 3, by model and batch size.
    return (
        f"this CPU has no units for {name}, in which a step takes 1 to 1.5 times as long as in "
        "fp32; set precision.mode to fp32, as by --precision fp32"
    )


def expected(mode: str) -> Precision:
    """The policy for ``mode`` on a GPU that is not here; a recent one has bf16."""
    name = "bf16" if mode == "auto" else mode
    return Precision(name, _COMPUTE[name], "expected of a GPU")


def _choose(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        than_it = "faster, which this CPU has" if cpu_has_bf16() else "slower, as this CPU lacks it"
        return "fp32", f"the default on a CPU; bf16 is {than_it}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "this GPU has it"
    return "tf32", "this GPU has no bf16"


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; by one that does not, bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not _BF16_FLAGS.isdisjoint(flags)
