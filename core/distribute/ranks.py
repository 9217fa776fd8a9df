"""Ranks of a run: the processes that train it together, and each one's share of a batch.

torchrun, srun and `mien train --gpus` name them in the environment.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..system.printable import plural

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Share:
    """Faces of a side and batch that one rank trains on."""

    first: int
    """Faces of the batch before them, which other ranks train on."""

    count: int

    def weight(self, batch_size: int) -> float:
        """Factor by which the mean over these faces counts in the mean over the batch."""
        return self.count / batch_size


@dataclass(frozen=True)
class Ranks:
    """Place of this process among those that train one run."""

    rank: int = 0
    size: int = 1
    """Processes of the run, on all machines."""

    local_rank: int = 0
    local_size: int = 1
    """Processes of the run on this machine."""

    def __post_init__(self) -> None:
        # Refused here: a wrong place would else show as ranks that wait for one another.
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise ValueError(
                f"rank {self.rank} of {self.size} with local rank {self.local_rank} of "
                f"{self.local_size} is no place in a run; start the ranks by `mien train --gpus`, "
                "torchrun or srun"
            )

    @property
    def is_first(self) -> bool:
        """Whether this rank decides, reports and writes."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this rank does what is done once a machine."""
        return self.local_rank == 0

    def share(self, batch_size: int, rank: int | None = None) -> Share:
        """The faces of a side that a rank, or this one, takes of a batch.

        Where the batch does not divide evenly, the first ranks take one face more.

        Raises:
            ValueError: There are fewer faces than ranks.
        """
        if batch_size < self.size:
            raise ValueError(
                f"train.batch_size must be at least {self.size}, a face of a side for each of the "
                f"{self.size} ranks, got {batch_size}; raise it, or train on fewer GPUs"
            )
        rank = self.rank if rank is None else rank
        count, remainder = divmod(batch_size, self.size)
        # Each of the ranks before this one that has a face more moves it by one.
        return Share(rank * count + min(rank, remainder), count + (rank < remainder))


ALONE = Ranks()
"""One process that trains by itself."""


def from_environment(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Place of this process in the run, as its launcher says; None: no launcher started it.

    Raises:
        ValueError: The environment names a rank, but not all of its place, or no possible one.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return Ranks(*(_number(environment, name) for name in _TORCHRUN))
    # The script of sbatch has a rank too, and starts what trains: only srun's steps are ranks.
    if "SLURM_STEP_NUM_TASKS" in environment or (
        "SLURM_PROCID" in environment and "MASTER_ADDR" in environment
    ):
        return _of_slurm(environment)
    return None


def _of_slurm(environment: Mapping[str, str]) -> Ranks:
    """The place that srun gave this process."""
    step, job = "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"
    # A step may have fewer tasks than its job.
    size = _number(environment, step if step in environment else job)
    return Ranks(
        _number(environment, "SLURM_PROCID"),
        size,
        _number(environment, "SLURM_LOCALID"),
        _tasks_here(environment, size),
    )


def _tasks_here(environment: Mapping[str, str], size: int) -> int:
    """Tasks on this machine, of a list such as ``4(x2),3``: 4 on two machines, 3 on a third."""
    step, job = "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
    listed = environment.get(step) or environment.get(job) or str(size)
    counts: list[int] = []
    for part in listed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(
                f"{step} must be numbers such as 4(x2),3, got {listed!r}; start the ranks by srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    if node >= len(counts):
        machines = plural(len(counts), "machine")
        raise ValueError(f"SLURM_NODEID is {node}, but {step} names {len(counts)} {machines}")
    return counts[node]


def _number(environment: Mapping[str, str], name: str) -> int:
    """A count of the environment."""
    value = environment.get(name)
    if value is None:
        raise ValueError(
            f"the environment names a rank, but {name} is not set; start the ranks by "
            "`mien train --gpus`, torchrun or srun, or unset RANK and WORLD_SIZE to train alone"
        )
    # Bounded, since it is a number of processes; `int` would take signs, spaces and `_` as well.
    if not re.fullmatch(r"[0-9]{1,6}", value):
        raise ValueError(f"{name} must be a whole number from 0, got {value!r}")
    return int(value)
