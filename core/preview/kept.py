"""The previews that are kept of past saves, to be compared: `previews/<iteration>.jpg`.

Each file holds the tiles of `tiles.Tiles` and nothing else, a face in each row, its kinds of tiles
of A and then of B in the columns; a comment says what they are, as JSON. Tiles of more than 256 px
are shrunk to that.

A bounded number is kept: the first, the newest, and between them the fewer, the older they are.
With ages a, b, c of three that follow each other, it is the one in the middle that goes where a / c
is least, so what stays is spread over the logarithm of the age.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sides import SIDES
from ..faces.geometry import resize
from ..system.durable_files import discard_leftovers
from .files import read_jpeg, save_jpeg
from .tiles import Tiles

SCHEMA = "mien.preview/1"
LARGEST_TILE_PX = 256
_NAME = re.compile(r"(\d{1,12})\.jpg")
_FEWEST_KINDS, _MOST_KINDS = 3, 4


class KeptPreviews:
    """The previews kept in one folder.

    Args:
        folder: The folder, which is made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, iteration: int) -> Path:
        """File of the preview of a total iteration."""
        return self.folder / f"{iteration}.jpg"

    def iterations(self) -> list[int]:
        """Total iterations of which there is one, in order."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in os.scandir(self.folder))
        return sorted(int(name[1]) for name in names if name)

    def keep(self, tiles: Tiles, description: str, most: int) -> None:
        """Keep the tiles of a save, and thin out the earlier ones.

        Those of later iterations leave: the run has gone back behind them.

        Args:
            tiles: Tiles of both sides.
            description: What the file says that it shows.
            most: Number that may be kept, 1 or more.

        Raises:
            OSError: The disk refuses.
        """
        self.folder.mkdir(exist_ok=True)
        discard_leftovers(self.folder)  # of a kill: the run alone writes here
        small = _shrunk(tiles.images)
        _, num_faces, _, tile_px = small.shape[:4]
        about = {
            "schema": SCHEMA,
            "description": description,
            "iteration": tiles.iteration,
            "tile_px": tile_px,
            "faces": num_faces,
            "faces_digest": tiles.faces_digest,
            "weights": tiles.weights,
        }
        # Tiles without gaps or text: what is read back must be cut at multiples of the edge.
        rows = small.transpose(1, 3, 0, 2, 4, 5).reshape(num_faces * tile_px, -1, 3)
        # Before any earlier one goes: a full disk must not cost those.
        save_jpeg(self.path(tiles.iteration), rows, json.dumps(about))
        earlier = [each for each in self.iterations() if each <= tiles.iteration]
        for iteration in set(self.iterations()).difference(thinned(earlier, most)):
            with suppress(FileNotFoundError):
                os.unlink(self.path(iteration))

    def read(self, iteration: int) -> Tiles:
        """The tiles of an iteration; ValueError where there are none, or the file is damaged."""
        path = self.path(iteration)
        read = read_jpeg(path)
        about = _about(read[1]) if read else None
        if read is None or about is None:
            raise ValueError(f"{path} is no preview of a save; compare others, or remove it")
        image, tile_px, num_faces = read[0], about["tile_px"], about["faces"]
        # Held against the picture itself: the comment is a stranger's word.
        columns, rest = divmod(image.shape[1], tile_px * len(SIDES))
        is_whole = not rest and image.shape[0] == num_faces * tile_px
        if not is_whole or not _FEWEST_KINDS <= columns <= _MOST_KINDS:
            raise ValueError(f"{path} is damaged: its picture has another size than it says")
        tiles = image.reshape(num_faces, tile_px, len(SIDES), columns, tile_px, 3)
        images = tiles.transpose(2, 0, 3, 1, 4, 5)
        # Files of older versions do not say by which.
        weights = about.get("weights")
        weights = weights if weights in ("ema", "raw") else ""
        return Tiles(iteration, SIDES, images, None, tile_px, about["faces_digest"], weights)


def thinned(iterations: list[int], most: int) -> list[int]:
    """Choose which of these to keep: at most so many, spread over the logarithm of their age."""
    kept = sorted(iterations)
    while len(kept) > max(most, 1):
        # The newest is 1 old, since one divides by it.
        # Chosen again after each removal, for a gap that one leaves widens those of its neighbours.
        ages = [kept[-1] - iteration + 1 for iteration in kept]
        inner = range(1, len(kept) - 1)
        # With room for one alone it is the newest.
        least = min(inner, key=lambda i: ages[i - 1] / ages[i + 1]) if inner else 0
        del kept[least if most > 1 else 0]
    return kept


def _shrunk(images: np.ndarray) -> np.ndarray:
    """Tiles of at most 256 px."""
    if images.shape[-2] <= LARGEST_TILE_PX:
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    small = np.stack([resize(tile, LARGEST_TILE_PX) for tile in flat])
    return small.reshape(*images.shape[:-3], *small.shape[1:])


def _about(comment: str) -> dict[str, Any] | None:
    """What a file says of its tiles; None where it is none of these files."""
    try:
        about = json.loads(comment)
    # Some thousand brackets in a row are no fault of syntax, and more than the parser's stack.
    except (ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        return None
    sizes = (about.get("tile_px"), about.get("faces"))
    # By `type`: to Python, JSON's true is an int as well.
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    return about if isinstance(about.get("faces_digest"), str) else None
