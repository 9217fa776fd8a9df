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
from ..faces.folder import FaceFolder, Rejected, named, read_folders, uneven
from ..faces.geometry import Crop
from ..faces.listing import list_pictures, name_of, overlap_of_sides
from ..system.paths import expanded
from ..system.printable import plural
from .held_out import check_held_out, hold_out, is_trained_on
from .landmarks import store_landmarks
from .pipeline import FaceDecoder
from .shares import DrawTable, Source, shares_of, source_of, sources_of
from .store import FaceStore, is_decoded, open_store

SIDES: tuple[Side, Side] = ("a", "b")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SideFaces:
    """The faces of one side."""

    folder: FaceFolder
    """Faces of the folders, less those that are held out."""

    sources: list[Source]
    """The folders as they were given."""

    store: FaceStore
    crop: Crop
    held_out: FaceFolder
    """Faces to measure on, never trained on."""

    @property
    def trained_on(self) -> list[Face]:
        """The folder's faces less those that the store had to leave out."""
        # A set: there may be 100,000 faces.
        usable = set(self.store.names)
        return [face for face in self.folder.faces if self.folder.name_of(face.path) in usable]

    @property
    def folder_f(self) -> np.ndarray:
        """Number of the folder that each face of the store is from, (F,) int64."""
        numbers = [self.folder.folder_of(face.path) for face in self.trained_on]
        return np.array(numbers, dtype=np.int64)

    @property
    def shares(self) -> list[float] | None:
        """Share of the draws of each folder; None where all faces are drawn alike."""
        if len(self.sources) == 1 or all(source.share is None for source in self.sources):
            return None
        return shares_of(self.sources, self._num_faces)

    @property
    def draw_table(self) -> DrawTable | None:
        """The faces that are drawn where folders have shares; None where all are drawn alike."""
        shares = self.shares
        if shares is None:
            return None
        return DrawTable(self.folder_f, self.store.names, shares)

    @property
    def described(self) -> str:
        """The folders with the number of their faces, and their shares, in words."""
        if len(self.sources) == 1:
            return f"{self.store.num_faces} of {self.folder.path}"
        counts = zip(self.sources, self._num_faces, strict=True)
        parts = [f"{count} of {source.folder}" for source, count in counts]
        if self.shares is not None:
            shares = zip(parts, self.shares, strict=True)
            parts = [f"{part} ({share:.1%} of draws)" for part, share in shares]
        return ", ".join(parts)

    @property
    def _num_faces(self) -> list[int]:
        """Number of the faces of each folder."""
        return np.bincount(self.folder_f, minlength=len(self.sources)).tolist()

    @property
    def landmarks_fl2(self) -> np.ndarray:
        """Landmarks of the store's faces in its px, (F, 68, 2) float32."""
        return store_landmarks(self.trained_on, self.crop)

    @property
    def left_out(self) -> list[list[Rejected]]:
        """The files that cannot be used, and why: of each folder that has any."""
        by_folder: dict[Path, list[Rejected]] = {}
        for file in self.folder.rejected + self.store.rejected:
            by_folder.setdefault(file.path.parent, []).append(file)
        return [files for files in (*by_folder.values(), self.held_out.rejected) if files]


def warnings_of(faces: dict[str, SideFaces], loss: LossConfig) -> list[str]:
    """What a user should know of both sides' faces before they are trained on, one line each."""
    warnings = []
    for side, opened in faces.items():
        name, store = f"side {side.upper()}", opened.store
        warnings.extend(store.warnings)
        for path, others in (opened.folder.passed_over | opened.held_out.passed_over).items():
            if notice := others.notice(has_flag=True):
                warnings.append(f"{name}: {path}: {notice}")
        if cut_short := _cut_short(opened):
            warnings.append(f"{name}: {cut_short}")
        if store.empty:
            count = len(store.empty)
            warnings.append(
                f"{name}: {count} of {store.num_faces} faces {plural(count, 'has', 'have')} an "
                f"(almost) empty mask, and nothing of {plural(count, 'it', 'them')} is trained: "
                f"{named(store.empty)}"
            )
        for area, count in store.areas_outside.items():
            # Said only where the setting acts: with a multiplier of 1 nothing is lost.
            if count and loss.penalized_mask_loss and getattr(loss, f"{area}_multiplier") > 1:
                warnings.append(
                    f"{name}: the {area} area of {count} of {store.num_faces} faces lies outside "
                    f"the crop, so loss.{area}_multiplier does nothing for "
                    f"{plural(count, 'it', 'them')}"
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
        f"outside {plural(count, 'its picture', 'their pictures')} (up to {max(shares):.0%}) "
        f"and is black; what {shows} pictures hold is trained with {as_settings(usual)}"
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
    num_kept: int = 1,
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
        num_kept: Files of decoded faces of each side that `store_dir` keeps.

    Raises:
        ValueError: A folder is missing, holds too few faces or such as do not fit the settings, or
            shares faces with another.
    """
    sources = _sources(data)
    check_held_out(data, evaluate)
    crop = Crop(data.centering, data.coverage / 100, data.vertical_offset / 100, size_px)
    opened = {}
    with _reading(sources, data, evaluate, crop, (store_dir, earlier_dir), device) as coming:
        for side, (reading, decoder) in coming.items():
            # Waits for this side's headers only, while the other side's are still to come.
            folder, held_out = hold_out(reading.result(), evaluate, side=side, data=data)
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
                    num_kept=num_kept,
                )
            # After decoding, which has drawn the masks, and before hours are spent on nothing.
            _refuse_empty_masks(side, store)
            opened[side] = SideFaces(folder, sources[side], store, crop, held_out)
            _refuse_empty_folders(side, opened[side])
    return {str(side): faces for side, faces in opened.items()}


def _sources(data: DataConfig) -> dict[Side, list[Source]]:
    """The folders of both sides; refused, by ValueError, is what can be seen at a glance."""
    texts: dict[Side, tuple[str, ...]] = {"a": data.input_a, "b": data.input_b}
    sources = {}
    for side in SIDES:
        for text in texts[side]:
            list_pictures(source_of(text, side).folder, side=side, sub_folders=data.sub_folders)
        sources[side] = sources_of(texts[side], side=side, sub_folders=data.sub_folders)
    a, b = ([source.folder for source in sources[side]] for side in SIDES)
    # A face on both sides would be trained to look like itself, by both decoders.
    shared = overlap_of_sides(a, b, sub_folders=data.sub_folders)
    if shared:
        raise ValueError(f"{shared}: give each side a folder of its own")
    return sources


def _refuse_empty_folders(side: str, opened: SideFaces) -> None:
    """Refuse, by ValueError, a folder that has a share of the draws and nothing to draw."""
    for number, source in enumerate(opened.sources):
        if opened.shares and source.share and number not in opened.folder_f:
            raise ValueError(
                f"{name_of(source.folder, side)} has a share of the draws, but no face of it is "
                "trained on; leave it out, or add faces"
            )


@contextlib.contextmanager
def _reading(
    sources: dict[Side, list[Source]],
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
            return read_folders(
                [source.folder for source in sources[side]],
                strict=data.strict,
                side=side,
                centering=data.centering,
                sub_folders=data.sub_folders,
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
        for side in sources:
            decoder = None
            folders = [expanded(source.folder) for source in sources[side]]
            if not is_decoded(folders, *raw_dirs):
                decoder = FaceDecoder(crop, data, device, worker)
                # Before the threads are waited for: a refusal need not wait for all pictures.
                stack.callback(decoder.close)
            coming[side] = reader.submit(read, side, decoder), decoder
        yield coming
