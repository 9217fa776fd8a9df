"""Faces of both sides, from the folders' names to decoded pictures."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...models.autoencoder import Side
from ..config import DataConfig, EvaluateConfig, LossConfig
from ..faces.face import MAX_OUTSIDE_SHARE, Face, as_settings, usual_of
from ..faces.folder import FaceFolder, Rejected, named, read_folder, uneven
from ..faces.geometry import Crop
from ..faces.listing import list_pictures, overlap
from ..system.paths import expanded
from .held_out import check_held_out, hold_out, is_trained_on
from .landmarks import store_landmarks
from .pipeline import FaceDecoder
from .store import FaceStore, is_decoded, open_store

SIDES: tuple[Side, Side] = ("a", "b")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SideFaces:
    """The faces of one side."""

    folder: FaceFolder
    """Faces of the folder, less those that are held out."""

    store: FaceStore
    crop: Crop
    held_out: FaceFolder
    """Faces to measure on, never trained on."""

    @property
    def trained_on(self) -> list[Face]:
        """The folder's faces less those that the store had to leave out."""
        # A set: there may be 100,000 faces.
        usable = set(self.store.names)
        return [face for face in self.folder.faces if face.path.name in usable]

    @property
    def landmarks_fl2(self) -> np.ndarray:
        """Landmarks of the store's faces in its px, (F, 68, 2) float32."""
        return store_landmarks(self.trained_on, self.crop)

    @property
    def left_out(self) -> list[list[Rejected]]:
        """The files that cannot be used, and why: of each folder that has any."""
        trained_on = self.folder.rejected + self.store.rejected
        return [files for files in (trained_on, self.held_out.rejected) if files]


def warnings_of(faces: dict[str, SideFaces], loss: LossConfig) -> list[str]:
    """What a user should know of both sides' faces before they are trained on, one line each."""
    warnings = []
    for side, opened in faces.items():
        name, store = f"side {side.upper()}", opened.store
        warnings.extend(store.warnings)
        for folder in (opened.folder, opened.held_out):
            if folder.passed_over.notice:
                warnings.append(f"{name}: {folder.path}: {folder.passed_over.notice}")
        if cut_short := _cut_short(opened):
            warnings.append(f"{name}: {cut_short}")
        if store.empty:
            warnings.append(
                f"{name}: {len(store.empty)} of {store.num_faces} faces have an (almost) empty "
                f"mask, and nothing of them is trained: {named(store.empty)}"
            )
        for area, count in store.areas_outside.items():
            # Said only where the setting acts: with a multiplier of 1 nothing is lost.
            if count and loss.penalized_mask_loss and getattr(loss, f"{area}_multiplier") > 1:
                warnings.append(
                    f"{name}: the {area} area of {count} of {store.num_faces} faces lies outside "
                    f"the crop, so loss.{area}_multiplier does nothing for them"
                )
    a, b = (faces[side].store.num_faces for side in SIDES)
    difference = uneven("side A", a, "side B", b)
    return [*warnings, difference] if difference else warnings


def _cut_short(opened: SideFaces) -> str:
    """Words for crops that reach far outside their pictures, and the crop that would not."""
    faces, crop = opened.trained_on, opened.crop
    shares = [face.outside_share(crop) for face in faces]
    count = sum(share > MAX_OUTSIDE_SHARE for share in shares)
    if not count:
        return ""
    shows, usual = usual_of(faces, crop.size_px)
    return (
        f"more than {MAX_OUTSIDE_SHARE:.0%} of the crop of {count} of {len(faces)} faces lies "
        f"outside their pictures (up to {max(shares):.0%}) and is black; what {shows} pictures "
        f"hold is trained with {as_settings(usual)}"
    )


def _refuse_empty_masks(side: str, store: FaceStore) -> None:
    """Refuse, by ValueError, a side of which most would not be trained."""
    if len(store.empty) > store.num_faces / 2:
        raise ValueError(
            f"side {side.upper()}: {len(store.empty)} of {store.num_faces} faces have an (almost) "
            "empty mask, so nothing of them would be trained; mend them, or choose another "
            f"data.mask_type: {named(store.empty)}"
        )


def _no_progress(_title: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda _done, _total: None)


def open_sides(
    data: DataConfig,
    evaluate: EvaluateConfig,
    size_px: int,
    *,
    store_dir: Path | None,
    earlier_dir: Path | None = None,
    device: torch.device,
    progress: Callable[[str], AbstractContextManager[Progress]] = _no_progress,
    num_readers: int = 1,
) -> dict[str, SideFaces]:
    """Open both sides' faces at the processing size; headers are read while faces are decoded.

    Args:
        data: The folders, and how faces are cut out of them.
        evaluate: Settings of the faces that are held out.
        size_px: Processing size: the largest of the model's inputs and outputs.
        store_dir: Folder that keeps the decoded faces; None keeps none.
        earlier_dir: Folder of decoded faces that are read too, and left alone.
        device: Device on which training runs.
        progress: Called with a title; gives a function that takes ``(done, total)``.
        num_readers: Processes of this machine that hold the faces, of which each has its part of
            the memory.

    Raises:
        ValueError: A folder is missing, holds too few faces or such as do not fit the settings, or
            shares faces with another.
    """
    paths = {side: getattr(data, f"input_{side}") for side in SIDES}
    for side, path in paths.items():  # what can be seen at a glance is refused first
        list_pictures(path, side=side)
    # A face on both sides would be trained to look like itself, by both decoders.
    shared = overlap(*paths.values())
    if shared:
        raise ValueError(f"{shared}: give each side a folder of its own")
    check_held_out(data, evaluate)
    crop = Crop(data.centering, data.coverage / 100, data.vertical_offset / 100, size_px)
    opened = {}
    with _reading(paths, data, evaluate, crop, (store_dir, earlier_dir), device) as coming:
        for side, (reading, decoder) in coming.items():
            # Waits for this side's headers only, while the other side's are still to come.
            folder, held_out = hold_out(
                reading.result(), evaluate, side=side, strict=data.strict, centering=data.centering
            )
            with progress(f"Decoding faces of {side.upper()}") as report_progress:
                store = open_store(
                    folder,
                    crop,
                    data,
                    store_dir=store_dir,
                    earlier_dir=earlier_dir,
                    device=device,
                    decoder=decoder,
                    progress=report_progress,
                    num_readers=num_readers,
                )
            # After decoding, which has drawn the masks, and before hours are spent on nothing.
            _refuse_empty_masks(side, store)
            opened[side] = SideFaces(folder, store, crop, held_out)
    return {str(side): faces for side, faces in opened.items()}


@contextlib.contextmanager
def _reading(
    paths: dict[Side, str],
    data: DataConfig,
    evaluate: EvaluateConfig,
    crop: Crop,
    raw_dirs: tuple[Path | None, Path | None],
    device: torch.device,
) -> Iterator[dict[Side, tuple[Future[FaceFolder], FaceDecoder | None]]]:
    """Each side's folder being read, and what decodes its faces meanwhile, one side at a time.

    Nothing is decoded of a folder that was before: its faces may be in a file that fits, which is
    known when all headers are read.
    """

    def read(side: Side, decoder: FaceDecoder | None) -> FaceFolder:
        def on_face(face: Face) -> None:
            # Held-out faces are measured, not trained on, and have no place in the store.
            if decoder and is_trained_on(face.path.name, evaluate):
                decoder.add(face)

        try:
            return read_folder(
                paths[side],
                strict=data.strict,
                side=side,
                centering=data.centering,
                on_face=on_face,
            )
        finally:
            if decoder:
                # Also where the folder is refused: the decoder would else wait for more faces.
                decoder.end()

    with contextlib.ExitStack() as stack:
        # One thread each for both sides, so that A is whole before B takes the cores.
        reader = stack.enter_context(ThreadPoolExecutor(1))
        worker = stack.enter_context(ThreadPoolExecutor(1))
        coming = {}
        for side, path in paths.items():
            decoder = None
            if not is_decoded(expanded(path), *raw_dirs):
                decoder = FaceDecoder(crop, data, device, worker)
                # Before the threads are waited for: a refusal need not wait for all pictures.
                stack.callback(decoder.close)
            coming[side] = reader.submit(read, side, decoder), decoder
        yield coming
