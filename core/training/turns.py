"""Work that one rank does for all of its machine."""

from collections.abc import Callable

from ..data.sides import SideFaces
from ..distribute.group import Group


def in_turn(
    group: Group, opened: Callable[[], dict[str, SideFaces]], warn: Callable[[str], None]
) -> dict[str, SideFaces]:
    """The faces of both sides, decoded once: by the first rank, then by the first of each other
    machine, which may see the same file; the others read what was decoded.

    Where no file could be kept, each of the others decodes them for itself.

    Args:
        group: Ranks of the run.
        opened: Opens the faces on this rank.
        warn: Called with what the ranks of this machine do for want of a file.
    """
    ranks, faces = group.ranks, None
    turns = (ranks.is_first, ranks.is_first_here and not ranks.is_first, not ranks.is_first_here)
    for is_own_turn in turns:
        if is_own_turn:
            faces = opened()
            if ranks.is_first_here and ranks.local_size > 1:
                _warn_of_copies(faces, ranks.local_size, warn)
        # At every turn and of every rank: a barrier waits for all of them.
        group.barrier()
    assert faces is not None  # every rank has a turn
    return faces


def _warn_of_copies(
    faces: dict[str, SideFaces], num_ranks: int, warn: Callable[[str], None]
) -> None:
    for side, opened in faces.items():
        if opened.store.path is None:
            warn(
                f"the decoded faces of side {side.upper()} are in no file that the {num_ranks} "
                f"ranks of this machine could share ({opened.store.why}), so each of them decodes "
                "and keeps all of them; free space, or set data.store_dir to a folder with room"
            )
