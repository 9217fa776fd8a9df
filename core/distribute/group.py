"""What the ranks of a run say to one another: sums of tensors, numbers, and why one of them ended.

Tensors of a CPU go through gloo, those of a GPU through NCCL. Texts are bytes of UTF-8: nothing
that another process sends is ever run.
"""

import functools
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..system.printable import plural
from .failure import Failure, Members, RankLost
from .ranks import Ranks

_OPENING = timedelta(minutes=5)
"""Wait for the other ranks to be there: a cold start of several machines; chosen, unmeasured."""

_SILENCE_S = 8.0
"""Seconds of waiting for the other ranks after which it is said: a mistake in their addresses shows
no sooner, and ranks of one machine are there by then. Chosen."""

_PATIENCE = timedelta(minutes=30)
"""Wait for the other ranks in a collective: they may be decoding faces; chosen, unmeasured."""

_CLOSING_S = 10.0
"""Seconds for the ranks to take leave of one another."""

_LOOK_S = 0.5
"""Seconds between two looks for an announcement: how late it is heard. Chosen."""

_NUM_GROUPS = "groups"

# By their names since PyTorch 2.13, which warns of the ones before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """The ranks of a run, connected.

    A collective must be called by all ranks, in the same order. It raises `RankLost` where another
    rank has ended.

    Args:
        ranks: Place of this process.
        store: Keys and values that all ranks see.
    """

    def __init__(self, ranks: Ranks, store: dist.Store):
        self.ranks, self.store = ranks, store
        self.members = Members(ranks, store)
        self.exchanged_s = 0.0
        """Seconds for which the host was busy with sums, or waited for the others with theirs; a
        GPU sums by itself."""

        self.is_broken = False
        """Whether this rank has failed or another is lost, so that no connection can be left in
        order."""

        self._gpus: dist.ProcessGroup | None = None
        self._num_announced = 0

    def use_gpu(self, device: torch.device) -> None:
        """Connect the GPUs of the ranks too; a graph may capture what they say from then on.

        Raises:
            ValueError: Two ranks have the same GPU, NCCL cannot connect them, or PyTorch's memory
                is set to what a captured exchange does not go with.
        """
        if self._gpus is not None:
            return
        check_allocator(os.environ)
        self.members.claim(str(torch.cuda.get_device_properties(device).uuid))
        try:
            with self.watched():
                torch.cuda.set_device(device)
                self._gpus = dist.new_group(backend="nccl", timeout=_PATIENCE, device_id=device)
            # The connection is made by its first use.
            self.all_reduce(torch.zeros(1, device=device))
        except torch.OutOfMemoryError:
            # A RuntimeError, too, but one of which the start says what helps.
            raise
        except RuntimeError as error:
            raise ValueError(
                f"NCCL cannot connect the GPUs of {self.ranks.size} "
                f"{plural(self.ranks.size, 'rank')} ({_first_line(error)}); "
                "NCCL_DEBUG=INFO has it say why. "
                f"{_shared_memory()}{_interfaces(self.ranks)}"
            ) from error

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Sum a tensor over the ranks in place; all then hold the same bits."""
        with self._timed(), self.watched():
            dist.all_reduce(tensor, op, self._of(tensor))

    def reduce_scatter(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, each rank its own slice, in place; the rest is of no use."""
        with self._timed(), self.watched():
            # In place: NCCL takes a slice that lies where it belongs in the whole.
            _reduce_scatter(self.slice_of(tensor), tensor, group=self._of(tensor))

    def all_gather(self, tensor: Tensor) -> None:
        """Overwrite a tensor, in place, by each rank's own slice of it."""
        with self._timed(), self.watched():
            _all_gather(tensor, self.slice_of(tensor), group=self._of(tensor))

    def swap(self, sent: Tensor, received: Tensor, rank: int) -> None:
        """Exchange tensors of one size with another rank, which calls it with this one's number."""
        connection = self._of(sent)
        with self._timed(), self.watched():
            # Both at once: two ranks that each send first would wait for each other.
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, sent, rank, connection),
                    dist.P2POp(dist.irecv, received, rank, connection),
                ]
            )
            for work in works:
                work.wait()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, on the CPU; of all but the first rank: none."""
        # Not on a GPU, which may have no room for the slices of all.
        own = tensor.to("cpu")
        gathered = [torch.empty_like(own) for _ in range(self.ranks.size * self.ranks.is_first)]
        with self.watched():
            # None: torch refuses a list of a rank that receives nothing.
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
            with self.watched():
                dist.broadcast(sent, 0, self._of(tensor))
            if not self.ranks.is_first and sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)

    def max(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over the ranks."""
        # On the CPU in any case: to read a number of a GPU waits for all that is queued there.
        largest = torch.tensor(numbers, dtype=torch.int64)
        self.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def min(self, numbers: Sequence[int]) -> list[int]:
        """The smallest of each number over the ranks."""
        smallest = torch.tensor(numbers, dtype=torch.int64)
        self.all_reduce(smallest, dist.ReduceOp.MIN)
        return smallest.tolist()

    def agree(self, is_so: bool) -> bool:
        """Whether something is so on all ranks."""
        return self.min([int(is_so)]) == [1]

    def text(self, text: str = "") -> str:
        """The text of the first rank."""
        # One byte at least: there is no tensor of an empty buffer.
        sent = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())])
        # Its length before it: the others make room for it.
        self.broadcast([length])
        if not self.ranks.is_first:
            sent = torch.empty(max(int(length), 1), dtype=torch.uint8)
        self.broadcast([sent])
        return sent.numpy().tobytes()[: int(length)].decode()

    def announce(self, text: str) -> None:
        """Leave a text for the others, who are in `await_announcement` or will be; for the first
        rank."""
        self._num_announced += 1
        with self.watched():
            self.store.set(_announcement(self._num_announced), text)

    def await_announcement(self) -> str:
        """The next text that the first rank announces; the wait for it may take days, which that
        in a collective may not."""
        self._num_announced += 1
        key = _announcement(self._num_announced)
        with self.watched():
            # Not `get`, whose wait has an end, and which sees no rank that is lost.
            while not self.store.check([key]):
                lost = self.members.lost()
                if lost is not None:
                    raise lost
                time.sleep(_LOOK_S)
            return self.store.get(key).decode()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.max([0])

    def leave_failure(self, text: str, exit_code: int) -> None:
        """Leave the reason for which this rank ends, for the others; the first reason stays."""
        self.is_broken = True
        rank = self.ranks.rank
        self.members.leave_failure(Failure(f"rank {rank}: {text}", rank, exit_code, True))

    def pass_on(self, lost: RankLost) -> None:
        """Leave word of how another rank was lost, where that left none."""
        self.is_broken = True
        self.members.leave_failure(lost.failure)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise `RankLost` where what is done inside fails because another rank has ended."""
        try:
            yield
        except RuntimeError as error:  # of gloo, NCCL or the store; none has a class of its own
            # A capture runs nothing, so it fails for other reasons than a lost rank.
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise
            # With a wait: a broken connection is seen before the end of the process that had it.
            lost = self.members.lost(wait=True)
            if lost is None and torch.cuda.is_available():
                raise  # a fault of the GPU, or a graph that cannot be captured
            if lost is None:
                text = (
                    f"the ranks have lost one another ({_first_line(error)})"
                    f"{_interfaces(self.ranks)}"
                )
                raise RankLost(Failure(text, None)) from error
            raise lost from error

    def close(self) -> None:
        """Leave the others, who leave too; where they do not answer, after 10 s.

        Where a rank has failed or is lost, nobody is waited for: who waits for this one sees that
        it has left. Connections of GPUs are then ended by the end of this process, which can join
        no other group.
        """
        if self.is_broken and self._gpus is not None:
            return  # it may wait for ever for what is under way on a GPU

        def leave() -> None:
            try:
                if not self.is_broken:
                    # The first rank's process may end now, and with it the store that all use.
                    self.barrier()
                dist.destroy_process_group()
            except (RankLost, RuntimeError):  # the others have gone already
                return

        # A thread, since nothing else bounds it; a daemon, or the process would wait for it, too.
        thread = threading.Thread(target=leave, name="mien-leave", daemon=True)
        thread.start()
        thread.join(_CLOSING_S)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time of what is done inside as that of exchange."""
        began_at = time.perf_counter()
        yield
        self.exchanged_s += time.perf_counter() - began_at

    def _of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """The connection for a tensor; None: that of the CPUs."""
        return self._gpus if tensor.is_cuda else None


def open_group(
    ranks: Ranks,
    device: torch.device | None = None,
    when_slow: Callable[[str], None] = lambda text: None,
) -> Group:
    """Connect with the other ranks, by MASTER_ADDR and MASTER_PORT.

    Args:
        ranks: Place of this process.
        device: Device that it trains on, where that is known; the GPUs are then connected too.
        when_slow: Called, in a thread, with what is waited for, where the others are late.

    Raises:
        ValueError: The address is of no use, the others have not come within 5 minutes, or this
            process is in a group already.
    """
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed has a process group in this process already, of the program or of "
            "a run that failed on GPUs; destroy that of the program before it trains, and after "
            "such a run start the program anew"
        )
    host, port = _address(ranks)
    num_others = ranks.size - 1
    waiting = f"{num_others} other {plural(num_others, 'rank')} at {host}:{port}"
    if ranks.local_size == ranks.size:
        # Else gloo asks which address the machine's name has, which may be none.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    slow = threading.Timer(
        _SILENCE_S,
        when_slow,
        [f"rank {ranks.rank} waits for the {waiting}, for 5 minutes at most{_interfaces(ranks)}"],
    )
    slow.daemon = True
    slow.start()
    try:
        store = _next_group(ranks, host, port)
        # The CPUs alone at first: ranks compare their settings before any of them takes a GPU.
        dist.init_process_group(
            "gloo", store=store, rank=ranks.rank, world_size=ranks.size, timeout=_OPENING
        )
        assert dist.group.WORLD is not None
        # All are here now, and have more to do between two collectives.
        dist.group.WORLD.set_timeout(_PATIENCE)
    except RuntimeError as error:
        if not ranks.is_first:
            _served.cache_clear()  # the first rank may be another process at the next try
        raise ValueError(
            f"rank {ranks.rank} cannot connect with the {waiting} ({_first_line(error)}); see "
            "whether all were started, with the same "
            f"MASTER_ADDR and MASTER_PORT{_interfaces(ranks)}"
        ) from error
    finally:
        slow.cancel()
    group = Group(ranks, store)
    if device is not None and device.type == "cuda":
        group.use_gpu(device)
    return group


def _next_group(ranks: Ranks, host: str, port: int) -> dist.Store:
    """Keys and values of the next group, once all ranks are there for it.

    Groups are counted in the store and not by each rank: one that gives up alone stays in step with
    the others. Each has keys of its own, or it would read the addresses of ranks that are gone.
    """
    began_at = time.monotonic()
    # An agent of torchrun keeps the store alive over restarts, which is not to be read again.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    served = dist.PrefixStore(f"mien/{restarts}", _served(host, port, ranks.is_first and not agent))
    # None added: to get it would wait for a first group.
    number = served.add(_NUM_GROUPS, 0)
    store = dist.PrefixStore(f"group {number}", served)
    store.set(_arrival(ranks.rank), "")
    left = _OPENING - timedelta(seconds=time.monotonic() - began_at)
    try:
        store.wait([_arrival(rank) for rank in range(ranks.size)], max(left, timedelta(0)))
    except dist.DistStoreError:
        # Who comes later is to wait for this rank's next try.
        store.delete_key(_arrival(ranks.rank))
        raise
    # By all, so that each finds it done at its next try; the first one counts.
    served.compare_set(_NUM_GROUPS, str(number), str(number + 1))
    return store


@functools.cache
def _served(host: str, port: int, serves: bool) -> dist.TCPStore:
    """The store of this process, once for all its groups: a rank that is early for the next one
    must not meet one that is about to go."""
    # Multi-tenant: the program may use torch.distributed by itself, at the same port.
    return dist.TCPStore(
        host,
        port,
        is_master=serves,
        timeout=_OPENING,
        wait_for_workers=False,
        multi_tenant=True,
    )


def check_allocator(environment: Mapping[str, str]) -> None:
    """Refuse, by ValueError, PyTorch's memory where a captured exchange goes wrong with it.

    NCCL registers the buffers of a graph, and segments that grow move under it (PyTorch #158029).
    """
    if environment.get("NCCL_GRAPH_REGISTER") == "0":
        return
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(name, "").lower().replace(" ", ""):
            raise ValueError(
                f"{name} has expandable_segments, with which NCCL in a CUDA graph goes wrong; "
                "unset it, or set NCCL_GRAPH_REGISTER=0"
            )


def _arrival(rank: int) -> str:
    return f"arrival/{rank}"


def _announcement(number: int) -> str:
    return f"announcement/{number}"


def _address(ranks: Ranks) -> tuple[str, int]:
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
    host = os.environ["MASTER_ADDR"]
    # Only of one machine: the name of another may become known while it starts.
    if ranks.local_size == ranks.size:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise ValueError(
                f"MASTER_ADDR is {host}, which this machine does not know ({error.strerror}); all "
                "ranks are here, so set it to 127.0.0.1"
            ) from error
    return host, int(port)


def _shared_memory() -> str:
    """Sentence about /dev/shm, which is small in containers, and by which NCCL connects GPUs."""
    try:
        room = f"has {shutil.disk_usage('/dev/shm').free / 2**20:,.0f} MiB free"
    except OSError:
        room = "is not there"
    return (
        f"/dev/shm {room}; where that is little, start the container with more "
        "(--shm-size=1g), or set NCCL_SHM_DISABLE=1"
    )


def _interfaces(ranks: Ranks) -> str:
    """Clause about network interfaces, where ranks of other machines are to be reached."""
    if ranks.local_size == ranks.size:
        return ""
    return (
        "; where machines have several network interfaces, set GLOO_SOCKET_IFNAME, and with GPUs "
        "NCCL_SOCKET_IFNAME, to the one between them"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
