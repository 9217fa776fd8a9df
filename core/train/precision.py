"""In which number format the network computes. Weights, statistics and losses stay fp32."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """A precision policy, resolved for one device."""

    name: str
    device_type: str
    compute: torch.dtype
    """Format of activations and of the weights that a layer sees."""

    why: str
    """How it was chosen, for the start-up line."""

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need loss scaling to stay in range: fp16 alone."""
        return self.name == "fp16"

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The network's forward pass runs inside; the losses run outside."""
        lowered = self.compute is not torch.float32
        with (
            torch.autocast(self.device_type, self.compute, enabled=lowered),
            _tensor_float32(self.name == "tf32"),
        ):
            yield

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """The backward pass runs inside."""
        with _tensor_float32(self.name == "tf32"):
            yield


@contextlib.contextmanager
def _tensor_float32(allowed: bool) -> Iterator[None]:
    """Whether CUDA may round the inputs of fp32 products to 10 bits."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


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
    return Precision(name, device.type, _COMPUTE[name], why)


def _choose(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "fp32", "the default on a CPU; bf16 is faster where the CPU has it"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "this GPU has it"
    return "tf32", "this GPU has no bf16"
