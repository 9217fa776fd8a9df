"""Both sides' faces, from the folders' names to decoded pictures."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...models.autoencoder import Side
from ..config import DataConfig, EvaluateConfig
from ..faces.folder import Face, FaceFolder, Rejected, list_pictures, overlap, read_folder
from ..faces.geometry import Crop
from .held_out import check_held_out, hold_out
from .landmarks import store_landmarks
from .store import FaceStore, open_store

SIDES: tuple[Side, Side] = ("a", "b")

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class SideFaces:
    """The faces of one side."""

    folder: FaceFolder
    """Less those that are held out."""

    store: FaceStore
    crop: Crop
    held_out: FaceFolder
    """Faces to measure on, never trained on."""

    @property
    def trained_on(self) -> list[Face]:
        """The folder's faces less those that the store had to leave out."""
        kept = set(self.store.names)
        return [face for face in self.folder.faces if face.path.name in kept]

    @property
    def landmarks_fl2(self) -> np.ndarray:
        """Landmarks of the store's faces in its px, (F, 68, 2) float32."""
        return store_landmarks(self.trained_on, self.crop)

    @property
    def left_out(self) -> list[Rejected]:
        """Every file that cannot be used, and why."""
        return self.folder.rejected + self.held_out.rejected + self.store.rejected


def _no_progress(_title: str) -> AbstractContextManager[Tell]:
    return nullcontext(lambda _done, _total: None)


def open_sides(
    data: DataConfig,
    evaluate: EvaluateConfig,
    size_px: int,
    *,
    store_dir: Path | None,
    device: torch.device,
    progress: Callable[[str], AbstractContextManager[Tell]] = _no_progress,
) -> dict[str, SideFaces]:
    """Both sides' faces at the processing size; B's headers are read while A is decoded.

    Args:
        data: The folders, and how faces are cut out of them.
        evaluate: Which faces are held out.
        size_px: Processing size: the largest of the model's inputs and outputs.
        store_dir: Folder that keeps the decoded faces; None keeps none.
        device: Where training runs.
        progress: Called with a title; gives what is to be told ``(done, total)``.

    Raises:
        ValueError: A folder is missing, holds too few faces, or shares faces with another.
    """
    paths = {side: getattr(data, f"input_{side}") for side in SIDES}
    for side, path in paths.items():  # what can be seen at a glance is told first
        list_pictures(path, side=side)
    shared = overlap(*paths.values())
    if shared:
        raise ValueError(f"{shared}: give each side a folder of its own")
    check_held_out(data, evaluate)
    crop = Crop(data.centering, data.coverage / 100, data.vertical_offset / 100, size_px)
    opened = {}
    with ThreadPoolExecutor(1) as reader:
        coming = {
            side: reader.submit(read_folder, path, strict=data.strict, side=side)
            for side, path in paths.items()
        }
        for side in SIDES:
            folder, held_out = hold_out(
                coming[side].result(), evaluate, side=side, strict=data.strict
            )
            with progress(f"Decoding faces of {side.upper()}") as tell:
                store = open_store(
                    folder, crop, data, store_dir=store_dir, device=device, progress=tell
                )
            opened[side] = SideFaces(folder, store, crop, held_out)
    return {str(side): faces for side, faces in opened.items()}
