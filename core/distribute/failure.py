"""Ends of ranks: the reason that one leaves before it ends, and what is seen of one that is killed.

A rank that fails leaves its reason in the store, where the others find it when they can no longer
reach it. Of a rank that was killed the others see, on the same machine, that its process has ended.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass

import torch.distributed as dist

from ..system.processes import process_space, stat_of
from .ranks import Ranks

_FAILURE = "failure"

_SEARCH_S = 2.0
"""Seconds in which a process that has broken a connection is seen to end; chosen, unmeasured."""

_PAUSE_S = 0.05


@dataclass(frozen=True)
class Failure:
    """The end of a rank that ends the run."""

    text: str
    """Sentence that names the rank."""

    rank: int | None
    """Number of the rank; None: it is not known which one has ended."""

    exit_code: int = 3
    """Exit code of the run, by default that of a halt."""

    has_reason: bool = False
    """Whether the rank has left its reason; else it was killed, or is out of reach."""


class RankLost(Exception):
    """Another rank has ended, so that this one cannot go on."""

    def __init__(self, failure: Failure):
        super().__init__(failure.text)
        self.failure = failure


@dataclass(frozen=True)
class _Member:
    """The process of a rank."""

    host: str
    space: str
    """Space of process numbers in which its number means it."""

    pid: int
    gpu: int | None

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, and in no other container."""
        return self.space == process_space()

    def end(self) -> str | None:
        """How it has ended; None: it runs, or cannot be seen from this machine."""
        if not self.is_here:
            return None
        stat = stat_of(self.pid)
        if stat is None:
            # Reaped by whoever started it, so there is no way to tell how.
            return "has ended"
        # A zombie stays until it is reaped, and tells meanwhile how it has ended.
        if stat[0] not in "ZX":
            return None
        status = int(stat[-1])
        if os.WIFSIGNALED(status):
            return f"ended with signal {os.WTERMSIG(status)}"
        return f"ended with exit code {os.WEXITSTATUS(status)}"

    def __str__(self) -> str:
        gpu = "" if self.gpu is None else f"GPU {self.gpu}, "
        machine = "" if self.is_here else f" on {self.host}"
        return f"({gpu}pid {self.pid}{machine})"


class Members:
    """The processes of all ranks, as far as they can be seen.

    Args:
        ranks: Place of this process.
        store: Keys and values that all ranks see.
    """

    def __init__(self, ranks: Ranks, store: dist.Store):
        self.ranks, self.store = ranks, store
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        # None for a UUID, which is no number to be told.
        numbers = [int(each) if each.isdecimal() else None for each in visible]
        # One for each task is how srun shows them.
        index = 0 if len(numbers) == 1 else ranks.local_rank
        gpu = numbers[index] if index < len(numbers) else None
        own = _Member(socket.gethostname(), process_space(), os.getpid(), gpu)
        # Written before any is read: `get` waits for a key, and so for the rank that sets it.
        store.set(_key(ranks.rank), json.dumps(asdict(own)))
        self.members = [_Member(**json.loads(store.get(_key(rank)))) for rank in range(ranks.size)]

    @property
    def is_speaker(self) -> bool:
        """Whether no rank before this one is left on this machine, to say what has happened."""
        before = self.members[: self.ranks.rank]
        return not any(each.is_here and each.end() is None for each in before)

    def claim(self, gpu: str) -> None:
        """Claim the GPU of a name for this rank alone.

        Raises:
            ValueError: Another rank has claimed it before.
        """
        own = str(self.ranks.rank)
        # Compared and set in one step: two ranks may claim the same GPU at once.
        holder = self.store.compare_set(f"gpu/{gpu}", "", own).decode()
        if holder != own:
            raise ValueError(
                f"rank {holder} trains on the same GPU as rank {own}; show each rank another by "
                "CUDA_VISIBLE_DEVICES, or start no more ranks than there are GPUs"
            )

    def leave_failure(self, failure: Failure) -> None:
        """Leave the reason for which this rank ends; the first reason of all ranks stays."""
        try:
            self.store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))
        except RuntimeError:  # the store went with the first rank, and nobody is left to read it
            return

    def failure(self) -> Failure | None:
        """The reason that a rank left before it ended; None: there is none to be had."""
        try:
            if not self.store.check([_FAILURE]):
                return None
            return Failure(**json.loads(self.store.get(_FAILURE)))
        except RuntimeError:  # the store went with the first rank
            return None

    def lost(self, *, wait: bool = False) -> RankLost | None:
        """The rank that has ended, and why; None: none is seen to have.

        Args:
            wait: Whether one must have, which may be seen a moment later.
        """
        until = time.monotonic() + (_SEARCH_S if wait else 0)
        while True:
            failure = self.failure()
            if failure is not None:
                return RankLost(failure)
            ends = self._ends()
            if ends:
                # One that ended by itself may have lost one that was killed.
                return RankLost(min(ends, key=lambda end: "signal" not in end.text))
            if time.monotonic() >= until:
                return None
            time.sleep(_PAUSE_S)

    def _ends(self) -> list[Failure]:
        """The other ranks that are seen to have ended, and how."""
        others = ((rank, each) for rank, each in enumerate(self.members) if rank != self.ranks.rank)
        ends = ((rank, each, each.end()) for rank, each in others)
        return [Failure(f"rank {rank} {each} {end}", rank) for rank, each, end in ends if end]


def _key(rank: int) -> str:
    return f"member/{rank}"
