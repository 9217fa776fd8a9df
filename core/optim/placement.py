"""Place of the optimizer's state: the GPU's memory, or host memory that the GPU reads and writes.

With `optimizer.placement = host` the fp32 master weights and the moments lie in page-locked host
memory, and the same kernel moves them through their addresses, to the same bits. The GPU's memory
is left to the network; the link between GPU and host bounds the update, since every number goes
both ways. An iteration that only accumulates its gradient touches none of it. A network in fp32
computes with the master weights themselves, so of that one the moments alone lie on the host.

On a CPU all memory is the host's, and nothing differs. Unmeasured on a GPU.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...kernels.optimizer_rules import Rule
from ..config import OptimizerConfig
from ..data.store import available_host_bytes, page_locked_bytes
from ..estimate.links import Link

_LINK_SHARE = 0.75
"""Share of a link that each direction reaches while both are in use. Chosen, unmeasured."""

_MIB = 2**20


def is_on_host(config: OptimizerConfig, device: torch.device) -> bool:
    """Whether a GPU's optimizer keeps its state in host memory."""
    return config.placement == "host" and device.type == "cuda"


def num_kinds(rule: Rule, compute: torch.dtype) -> int:
    """Count of fp32 numbers of a parameter that lie in host memory where the state does.

    Args:
        rule: How the weights are moved.
        compute: Type that the network computes in.
    """
    # In fp32 the network's own weights are the masters, and stay where it computes.
    has_master_weights = compute is not torch.float32
    return len(rule.moments) + has_master_weights


def host_bytes(rule: Rule, compute: torch.dtype) -> int:
    """Bytes of a parameter that lie in host memory where the state does, as for `num_kinds`."""
    return 4 * num_kinds(rule, compute)


def locked_bytes(sizes: Iterable[int], kinds: int = 1) -> int:
    """Bytes of host memory that fp32 tensors take, of so many numbers each, one of each kind."""
    return kinds * sum(page_locked_bytes(4 * size) for size in sizes)


def update_s(num_bytes: int, link: Link, accumulation: int = 1) -> float:
    """Predicted seconds of an iteration that go into updates of a state in host memory.

    Args:
        num_bytes: Bytes of the state; each is read and written by an update.
        link: Link between the GPU and the host.
        accumulation: Iterations that make one update.
    """
    return num_bytes / (_LINK_SHARE * 1e9 * link.gb_s) / accumulation


def described(num_bytes: int, link: Link, accumulation: int = 1) -> str:
    """Clause about the memory that this saves and the time that it costs."""
    cost_ms = 1e3 * update_s(num_bytes, link, accumulation)
    return (
        f"{num_bytes / _MIB:,.0f} MiB less on the GPU, and some {cost_ms:,.1f} ms an iteration for "
        f"the way over {link}; predicted"
    )


def page_locked(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of fp32 tensors, with their strides, in host memory that a GPU can address."""
    return [copy.copy_(tensor) for copy, tensor in zip(_empty(tensors), tensors, strict=True)]


def page_locked_zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in fp32 of the shapes and strides of these, in host memory that a GPU can address."""
    return [zeros.zero_() for zeros in _empty(tensors)]


def check_room(num_bytes: int, room_bytes: int) -> None:
    """Refuse, by ValueError, what does not fit in the host memory that this process may take."""
    if num_bytes > room_bytes:
        raise ValueError(
            f"optimizer.placement is host, but {num_bytes / _MIB:,.0f} MiB do not fit in host "
            f"memory ({room_bytes / _MIB:,.0f} MiB free for this process); set it to gpu"
        )


def _empty(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Memory for so many numbers.

    Raises:
        ValueError: The host has too little.
    """
    # Asked first: page-locked memory cannot be swapped out, and the kernel would end processes.
    check_room(locked_bytes(tensor.numel() for tensor in tensors), available_host_bytes())
    return [
        torch.empty_like(tensor, dtype=torch.float32, device="cpu", pin_memory=True)
        for tensor in tensors
    ]
