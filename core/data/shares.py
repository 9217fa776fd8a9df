"""Shares of the draws of a side that come from each of its folders, where any has a number.

Faces are drawn by serial number: of every S draws in a row each is one of the slots 0 to S - 1, in
an order that `kernels.draw` makes. Without shares a slot is a face. With them each folder has a
number of slots in proportion to its share, and takes its faces in turn: slot j of the s slots of a
folder of F faces stands, in round r, for the face number (r * s + j) mod F of that folder. So every
face of a folder comes equally often, a draw stays a function of its serial number alone, and the
shares are exact to one slot in S, at least 2,000.

    FOLDER:0.3    three of ten draws; folders without a number have what is left, all faces alike

Where all folders have numbers, these are relative to their sum.

Letters: s = slot, f = face, n = a face of the batch; 4 = (first face of the folder, its faces,
number of the slot in it, its slots).
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...models.fields import shown
from ..faces.listing import name_of, overlap
from ..system.paths import expanded, split_share

MIN_SHARE = 0.001
"""Least share of a folder: two of the fewest slots."""

_LEAST_SLOTS = 2000


@dataclass(frozen=True)
class Source:
    """A folder of one side, and its share of the draws as it was given; None: none was."""

    folder: str
    share: float | None


def source_of(text: str, side: str) -> Source:
    """The folder that one text of a setting names, and its share.

    Raises:
        ValueError: What stands behind the colon of a folder is no number.
    """
    source = Source(*split_share(text))
    folder, _, share = text.rpartition(":")
    # Else a slip in the number would be told as a folder that does not exist.
    is_folder = folder and os.path.isdir(expanded(folder))
    is_meant = source.share is None and is_folder and not os.path.lexists(expanded(text))
    # Digits without end make a float that is infinite.
    if is_meant or not math.isfinite(source.share or 0.0):
        raise ValueError(
            f"{name_of(folder, side)}: the share of draws behind the colon must be a number such "
            f"as 0.3, got {shown(share)}"
        )
    return source


def sources_of(texts: Sequence[str], *, side: str, sub_folders: bool) -> list[Source]:
    """The folders that a setting names.

    Raises:
        ValueError: Two of them share faces, a share is no number, or the shares leave a folder
            without any.
    """
    sources = [source_of(text, side) for text in texts]
    for number, source in enumerate(sources):
        for other in sources[:number]:
            shared = overlap(other.folder, source.folder, sub_folders=sub_folders, may_nest=True)
            if shared:
                raise ValueError(f"side {side.upper()}: {shared}: give each face once")
    given = [source.share for source in sources if source.share is not None]
    least, total = min(given, default=1.0), sum(given)
    is_whole = len(given) == len(sources)
    if len(sources) > 1 and (not least or least < MIN_SHARE * (total if is_whole else 1.0)):
        raise ValueError(
            f"side {side.upper()}: the share of a folder must be at least {MIN_SHARE:g} of all, "
            f"got {least:g}; give more, or leave that folder out"
        )
    if given and not is_whole and total > 1 - MIN_SHARE:
        left = next(source.folder for source in sources if source.share is None)
        raise ValueError(
            f"{name_of(left, side)} has no share, and those of the other folders make "
            f"{total:g}, which leaves it nothing: give it one, as {left}:0.5, or less to them"
        )
    return sources


def shares_of(sources: Sequence[Source], num_faces: Sequence[int]) -> list[float]:
    """The share of all draws that each folder has, by its share as given and its faces; their sum
    is 1."""
    given = sum(source.share or 0.0 for source in sources)
    # Faces of the folders that have what is left.
    others = sum(
        count for source, count in zip(sources, num_faces, strict=True) if source.share is None
    )
    if not others:
        return [(source.share or 0.0) / given for source in sources]
    return [
        (1 - given) * count / others if source.share is None else source.share
        for source, count in zip(sources, num_faces, strict=True)
    ]


class DrawTable:
    """The faces that the slots of a side stand for.

    Args:
        folder_f: Number of the folder of each face, (F,) int64.
        names: Name of each face, which decides the order in which a folder takes them.
        shares: Share of each folder.
    """

    def __init__(
        self,
        folder_f: np.ndarray,
        names: Sequence[str],
        shares: Sequence[float],
    ) -> None:
        num_faces = len(names)
        # By a hash: neighbours in a film look alike, and would follow each other.
        order = sorted(range(num_faces), key=lambda face: (folder_f[face], _digest(names[face])))
        counts = np.bincount(folder_f, minlength=len(shares))
        self.num_slots = num_faces * -(-_LEAST_SLOTS // num_faces)
        # Rounded where folders meet, not each for itself: so the slots add up to their number.
        ends = np.floor(np.cumsum(shares) * self.num_slots + 0.5).astype(np.int64)
        slots = np.diff(ends, prepend=0)
        firsts = np.cumsum(counts) - counts
        rows = [
            np.stack([np.full(n, first), np.full(n, count), np.arange(n), np.full(n, n)], axis=1)
            for first, count, n in zip(firsts, counts, slots, strict=True)
        ]
        self._slots_s4 = torch.from_numpy(np.concatenate(rows))
        self._faces_f = torch.tensor(order, dtype=torch.int64)

    def move_to(self, device: torch.device) -> None:
        """Have it on the device on which parameters are drawn."""
        self._slots_s4, self._faces_f = self._slots_s4.to(device), self._faces_f.to(device)

    def choose(self, params_nx: Tensor, first: int | Tensor) -> None:
        """Put faces in the place of the slots in drawn parameters.

        Args:
            params_nx: Parameters as `kernels.draw` makes them for `num_slots` faces.
            first: Serial number of the first one; a tensor of one on the device.
        """
        index_n = params_nx.view(torch.int64)[:, _INDEX]
        first_face, num_faces, number, num_slots = self._slots_s4[index_n].unbind(1)
        # On the device from first to last: a captured step cannot ask the host whom it draws.
        serial_n = torch.arange(len(index_n), device=index_n.device) + first
        turn_n = (serial_n // self.num_slots * num_slots + number) % num_faces
        index_n.copy_(self._faces_f[first_face + turn_n])


_INDEX = 0
"""Place of the index among the 8-byte words of a record: it begins it."""


def _digest(name: str) -> bytes:
    # Not Python's hash: a resumed run must draw in the order in which it has begun.
    return hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
