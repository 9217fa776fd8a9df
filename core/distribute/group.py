"""What the ranks of a run say to one another: sums of tensors, numbers, and why one of them ended.

Tensors of a CPU go through gloo, those of a GPU through NCCL. Texts are bytes of UTF-8: nothing
that another process sends is ever run.
"""

import os
import socket
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks

_OPENING = timedelta(minutes=5)
"""Wait for the other ranks to be there: a cold start of several machines; chosen, unmeasured."""

_PATIENCE = timedelta(minutes=30)
"""Wait for the other ranks in a collective: they may be decoding faces; chosen, unmeasured."""

_CLOSING_S = 10.0
"""Seconds for the ranks to take leave of one another."""

_FAILURE = "failure"


# By their names since PyTorch 2.13, which warns of the ones before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class RankLost(Exception):
    """The other ranks cannot be reached any more; says which has ended, as far as is known."""


class Group:
    """The ranks of a run, connected.

    A collective must be called by all ranks, in the same order.

    Args:
        ranks: Place of this process.
        device: Device that it trains on.
        store: Keys and values that all ranks see.
    """

    def __init__(self, ranks: Ranks, device: torch.device, store: dist.Store):
        self.ranks, self.device, self.store = ranks, device, store

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Sum a tensor over the ranks in place; all then hold the same bits."""
        dist.all_reduce(tensor, op)

    def reduce_scatter(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, each rank its own slice, in place; the rest is of no use."""
        _reduce_scatter(self.slice_of(tensor), tensor)

    def all_gather(self, tensor: Tensor) -> None:
        """Overwrite a tensor, in place, by each rank's own slice of it."""
        _all_gather(tensor, self.slice_of(tensor))

    def swap(self, sent: Tensor, received: Tensor, rank: int) -> None:
        """Exchange tensors of one size with another rank, which calls it with this one's number."""
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, rank), dist.P2POp(dist.irecv, received, rank)]
        )
        for work in works:
            work.wait()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, on the CPU; of all but the first rank: none."""
        own = tensor.to("cpu")
        gathered = [torch.empty_like(own) for _ in range(self.ranks.size * self.ranks.is_first)]
        dist.gather(own, gathered or None)
        return gathered

    def slice_of(self, tensor: Tensor) -> Tensor:
        """The rank's slice of a flat tensor whose length the number of ranks divides."""
        return tensor.view(self.ranks.size, -1)[self.ranks.rank]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors of all ranks by those of the first."""
        for tensor in tensors:
            # A copy where it has gaps: backends send memory as it lies.
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            if not self.ranks.is_first and sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)

    def max(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over the ranks."""
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def min(self, numbers: Sequence[int]) -> list[int]:
        """The smallest of each number over the ranks."""
        smallest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return smallest.tolist()

    def text(self, text: str = "") -> str:
        """The text of the first rank."""
        sent = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())])
        dist.broadcast(length, 0)
        if not self.ranks.is_first:
            sent = torch.empty(max(int(length), 1), dtype=torch.uint8)
        dist.broadcast(sent, 0)
        return bytes(sent[: int(length)].tolist()).decode()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.max([0])

    def tell_failure(self, text: str) -> None:
        """Leave the reason for which this rank ends, for the others; the first reason stays."""
        self.store.compare_set(_FAILURE, "", text)

    def failure(self) -> str | None:
        """The reason that a rank left before it ended; None: there is none to be had."""
        try:
            return self.store.get(_FAILURE).decode() if self.store.check([_FAILURE]) else None
        except dist.DistError:  # it went with the first rank, which may hold it
            return None

    def close(self, *, in_order: bool = True) -> None:
        """Leave the others; where they do not answer, after 10 s.

        Args:
            in_order: Whether the others leave too, and are waited for.
        """

        def leave() -> None:
            try:
                if in_order:
                    self.barrier()
                dist.destroy_process_group()
            except RuntimeError:  # the others have gone already
                return

        thread = threading.Thread(target=leave, name="mien-leave", daemon=True)
        thread.start()
        thread.join(_CLOSING_S)


def open_group(ranks: Ranks, device: torch.device) -> Group:
    """Connect with the other ranks, by MASTER_ADDR and MASTER_PORT.

    Args:
        ranks: Place of this process.
        device: Device that it trains on; CUDA's is made the current one.

    Raises:
        ValueError: The address is not set, or the others have not come within 5 minutes.
    """
    host, port = _address()
    # An agent of torchrun keeps the store alive over restarts, which is not to be read again.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if ranks.local_size == ranks.size:
        # Else gloo asks which address the machine's name has, which may be none.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    on_gpu = device.type == "cuda"
    try:
        served = dist.TCPStore(
            host, port, ranks.size, is_master=ranks.is_first and not agent, timeout=_OPENING
        )
        store = dist.PrefixStore(f"mien/{restarts}", served)
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=_PATIENCE,
            # Now, not at the first collective, which a graph may be capturing.
            device_id=device if on_gpu else None,
        )
    except (dist.DistError, RuntimeError, socket.gaierror) as error:
        raise ValueError(
            f"rank {ranks.rank} cannot connect with the {ranks.size - 1} other ranks at "
            f"{host}:{port} ({_first_line(error)}); see whether all were started, with the same "
            "MASTER_ADDR and MASTER_PORT"
        ) from error
    return Group(ranks, device, store)


def _address() -> tuple[str, int]:
    """Address at which the ranks meet: MASTER_ADDR and MASTER_PORT."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(
                f"the environment names a rank, but {name} is not set; set it to the first rank's "
                "machine (MASTER_ADDR) and a free port of it (MASTER_PORT)"
            )
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"MASTER_PORT must be a number from 1 to 65535, got {port!r}")
    return os.environ["MASTER_ADDR"], int(port)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
