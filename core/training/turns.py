"""Work that one rank does for all of its machine."""

from collections.abc import Callable

from ..data.sides import SideFaces
from ..distribute.group import Group


def in_turn(group: Group, opened: Callable[[], dict[str, SideFaces]]) -> dict[str, SideFaces]:
    """The faces of both sides, decoded once: by the first rank, then by the first of each other
    machine, which may see the same file; the others read what was decoded.

    Args:
        group: Ranks of the run.
        opened: Opens the faces on this rank.

    Raises:
        ValueError: The faces that were decoded are in no file that other ranks could read.
    """
    ranks, faces = group.ranks, None
    turns = (ranks.is_first, ranks.is_first_here and not ranks.is_first, not ranks.is_first_here)
    for is_own_turn in turns:
        if is_own_turn:
            faces = opened()
            # Before the barrier: a refusal here ends those that wait.
            _check_kept(faces, ranks.local_size)
        group.barrier()
    assert faces is not None  # every rank has a turn
    return faces


def _check_kept(faces: dict[str, SideFaces], num_readers: int) -> None:
    for side, opened in faces.items():
        if opened.store.path is None and num_readers > 1:
            raise ValueError(
                f"the decoded faces of side {side.upper()} are in no file, from which the "
                f"{num_readers} ranks of this machine could read them ({opened.store.why}); free "
                "space, or set data.store_dir to a folder with room, such as one in /dev/shm"
            )
