"""The batch size: as set, or the one that auto chooses, and why that."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import Config
from ..distribute.group import Group
from ..precision import Precision
from . import memory


@dataclass(frozen=True)
class BatchSize:
    """Faces of each side in one iteration."""

    size: int
    bound: str | None = None
    """What kept auto from a larger one: faces, limit or memory; None where the size is set."""

    why: str = "as set"


def choose(
    config: Config,
    num_faces: dict[str, int],
    precision: Precision,
    free_bytes: Callable[[], int],
    group: Group | None = None,
) -> BatchSize:
    """The batch size of a run; where several ranks train, of all of them together.

    Args:
        config: All settings.
        num_faces: Number of faces of each side.
        precision: What `precision.mode` was resolved to.
        free_bytes: Called for the memory that is there for training, in bytes.
        group: Ranks that train together; None: this process alone.

    Raises:
        ValueError: A side has fewer faces than are set, or no batch size fits.
    """
    check(config, num_faces)
    if config.train.batch_size:
        return BatchSize(config.train.batch_size)
    num_ranks = group.ranks.size if group else 1
    size = _fitting(config, num_faces, precision, free_bytes, num_ranks)
    if group is None:
        return size
    # The least of all: ranks of unequal GPUs still have equal shares.
    [least] = group.min([size.size])
    return _for_all(size, least, num_faces, num_ranks)


def planned(
    config: Config,
    num_faces: dict[str, int],
    precision: Precision,
    free_bytes: Callable[[], int],
    num_ranks: int,
) -> BatchSize:
    """The batch size that auto would choose for ranks that are not there, each with as much room
    as this process.

    Arguments are as of `choose`, but for the number of ranks in place of their group. A set batch
    size is not looked at, and a side that cannot fill it is not refused.

    Raises:
        ValueError: No batch size fits.
    """
    size = _fitting(config, num_faces, precision, free_bytes, num_ranks)
    return _for_all(size, size.size, num_faces, num_ranks)


def _for_all(size: BatchSize, least: int, num_faces: dict[str, int], num_ranks: int) -> BatchSize:
    """The batch of all ranks, each of which takes as much as fits on the one with least room."""
    # A side may have fewer faces than the ranks have room for together.
    total = min(num_ranks * least, *num_faces.values())
    why = f"auto: {least} for each of {num_ranks} GPUs"
    return BatchSize(total, size.bound if total == num_ranks * least else "faces", why)


def _fitting(
    config: Config,
    num_faces: dict[str, int],
    precision: Precision,
    free_bytes: Callable[[], int],
    num_ranks: int,
) -> BatchSize:
    """The batch size that auto chooses for this process."""
    limit, free = config.train.auto_batch_limit, free_bytes()
    need = memory.footprint(config, precision, num_ranks=num_ranks)
    fits = need.largest_batch(free, limit)
    # Even the smallest is too much: the advice is of that one.
    if not fits:
        smallest = with_batch_size(config, num_ranks * memory.batch_sizes()[0])
        raise ValueError(memory.advice(smallest, precision, free, num_ranks=num_ranks))
    side = min(num_faces, key=num_faces.__getitem__)
    # A batch larger than a side is refused, so the smaller side bounds it.
    if num_faces[side] <= fits:
        why = f"auto: all faces of side {side.upper()}"
        return BatchSize(num_faces[side], "faces", why)
    # By the sizes there are: a limit between two of them would never be met exactly.
    if fits == max(size for size in memory.batch_sizes() if size <= limit):
        # At the usual limit only: a user who has set a larger one knows of it.
        wider = f"; -b auto:{4 * limit} would allow more" if limit <= 64 else ""
        return BatchSize(fits, "limit", f"auto: it goes no further than {limit}{wider}")
    room = f"{memory.USABLE_SHARE:.0%} of {free / memory.MIB:,.0f} MiB free"
    return BatchSize(fits, "memory", f"auto: the most that fits in {room}")


def check(config: Config, num_faces: dict[str, int]) -> None:
    """Refuse, by ValueError, a batch that a side cannot fill."""
    batch_size = config.train.batch_size
    for side, count in num_faces.items():
        if batch_size > count:
            raise ValueError(
                f"train.batch_size is {batch_size}, but side {side.upper()} has {count} faces; "
                f"use --batch-size {count} or less, or add faces"
            )


def with_batch_size(config: Config, batch_size: int) -> Config:
    """The same settings with another batch size."""
    return replace(config, train=replace(config.train, batch_size=batch_size))
