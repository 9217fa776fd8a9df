"""Previews that a run has kept, drawn for the page: one save, or the swaps of two."""

import os
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...core.checkpoint.model_folder import PREVIEWS, ModelFolder
from ...core.preview.compare import comparison
from ...core.preview.files import encoded_png
from ...core.preview.image import description
from ...core.preview.kept import LARGEST_TILE_PX, KeptPreviews
from ...core.preview.sheet import MASKS, SheetStyle, preview_sheet
from ...core.preview.tiles import MASK, Tiles

ENLARGE = ("lanczos", "nearest")
"""Ways to enlarge small tiles."""

# Bounds of what a stranger's folder costs the page; chosen, unmeasured.
_MOST_LISTED = 1000
_MOST_FACES = 64


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn of the kept previews."""

    iteration: int
    other: int | None = None
    """Save whose swaps stand beside those of the first; None: the sheet of one save."""

    mask: str = "off"
    enlarge: str = "lanczos"

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {self.mask[:20]!r}")
        if self.enlarge not in ENLARGE:
            allowed = ", ".join(ENLARGE)
            raise ValueError(f"enlarge must be one of {allowed}, got {self.enlarge[:20]!r}")


class Pictures:
    """The kept previews of a model folder; may be used by several threads.

    Args:
        model_dir: The model folder; it may lack previews, or be made later.
    """

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._kept = KeptPreviews(model_dir / PREVIEWS)
        self._listed: tuple[int, list[int]] = (0, [])
        # One at a time: each takes up to some hundred MiB.
        self._drawing = threading.Lock()

    def iterations(self) -> list[int]:
        """Total iterations of which a preview is kept, in order; of very many, some of them."""
        try:
            facts = self._kept.folder.lstat()
        except OSError:
            return []
        if not stat.S_ISDIR(facts.st_mode):  # a link would lead out of the model folder
            return []
        # A preview that comes or goes changes the time of its folder.
        if self._listed[0] != facts.st_mtime_ns:
            found = self._kept.iterations()
            places = np.linspace(0, len(found) - 1, min(len(found), _MOST_LISTED)).astype(int)
            self._listed = (facts.st_mtime_ns, [found[place] for place in places])
        return self._listed[1]

    def tag(self, drawing: Drawing) -> str:
        """What changes where the drawing would.

        Raises:
            ValueError: No preview of a save that is to be drawn is kept.
        """
        parts = [repr(drawing)]
        for iteration in (drawing.iteration, drawing.other):
            if iteration is not None:
                parts.append(self._facts(iteration))
        return " ".join(parts)

    def _facts(self, iteration: int) -> str:
        if iteration in self.iterations():
            with suppress(OSError):  # thinned out at this moment
                # Those of the link, if it is one: reading refuses it.
                facts = os.lstat(self._kept.path(iteration))
                return f"{facts.st_mtime_ns} {facts.st_size}"
        raise ValueError(f"no preview of iteration {iteration} is kept")

    def draw(self, drawing: Drawing) -> bytes:
        """The drawing as PNG, which says of itself that its faces are synthetic.

        Raises:
            ValueError: The file of a save is damaged, or none of mien's.
        """
        with self._drawing:
            tiles = self._tiles(drawing.iteration)
            weights = [tiles.weights]
            if drawing.other is None:
                image = preview_sheet(
                    _with_masks(tiles),
                    SheetStyle(enlarge=drawing.enlarge, mask=drawing.mask),
                    f"iteration {tiles.iteration:,}, as it was kept",
                )
            else:
                other = self._tiles(drawing.other)
                weights.append(other.weights)
                image = comparison(tiles, other, drawing.enlarge)
            newest = max(drawing.iteration, drawing.other or 0)
            return encoded_png(image, description(self._run_id(), newest, weights))

    def _tiles(self, iteration: int) -> Tiles:
        tiles = self._kept.read(iteration)
        tile_px = tiles.images.shape[-2]
        if tile_px > LARGEST_TILE_PX:
            raise ValueError(
                f"tiles of a kept preview must be at most {LARGEST_TILE_PX} px, got those of "
                f"iteration {iteration} with {tile_px}"
            )
        return tiles.first(_MOST_FACES)

    def _run_id(self) -> str:
        try:
            with ModelFolder(self._model_dir, read_only=True) as folder:
                state = folder.newest_state()
        except ValueError:  # damaged or not saved yet, which the sessions' table tells
            return "unknown"
        return str(state["run_id"]) if state else "unknown"


def _with_masks(tiles: Tiles) -> Tiles:
    """The tiles with the mask of the swap as that of both pictures it is shown on, if it is kept.

    The masks of these pictures themselves are not kept; the swap's says what it takes the place of.
    """
    if tiles.images.shape[2] <= MASK:
        return tiles
    swap_snff = tiles.images[:, :, MASK, :, :, 0]
    return replace(tiles, masks=np.stack([swap_snff, swap_snff], axis=2))
