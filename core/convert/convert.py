"""The conversion of a film: decode a frame, cut out its faces, swap them, blend them back, encode.

The stages overlap. Threads decode frames and cut out patches, a few frames ahead; the thread that
called swaps them in batches, which hold faces of several frames; threads blend and encode. Each
works on the part of the frame that its face takes, in OpenCV and NumPy, which let other threads run
meanwhile. Frames come out in their order.

Letters: n = face of a frame, S edge of a patch in px, s = row or column of it, c = B, G, R.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from ..blend import BlendOptions, face_mask, matched
from ..faces.geometry import Crop, rescaled
from ..faces.png import FaceFileError
from ..swapping import BatchDecoder, SwapModel
from ..system.threads import working_threads
from .frames import Frame
from .patch import cut_patch, paste
from .placement import Faces, PlacedFace

_MOST_WAITING = 32
"""Frames that wait for a batch to be filled by the faces of later ones; bounds the memory where
faces are rare. Chosen, unmeasured."""

_PREFETCHED = 4
"""Frames that a video's decoder is ahead. Chosen, unmeasured."""

# Chosen by eye.
TILE_PX = 192
"""Edge of a head on a contact sheet."""

_CAPTION_LETTERS = 20
"""Letters that have room above it; names of frames differ at their ends."""

Item = TypeVar("Item")
Made = TypeVar("Made")
# A mark of its own: inside a generator the StopIteration of a future would be an error.
_END = object()


class Output(Protocol):
    """Place of the frames that are written: a folder, or a video."""

    def is_done(self, frame: Frame, has_faces: bool) -> bool:
        """Whether the frame is there already."""

    def encode(self, frame: Frame, image_hwc: np.ndarray | None) -> Any:
        """A frame ready to be written; None: as it was. Called from any thread."""

    def put(self, encoded: Any) -> None:
        """Write the next frame."""


@dataclass
class _Work:
    """A frame on its way, and what has become of its faces so far.

    patches: (S, S, 3) float32 of each face, at the input size. decoded: face and learned mask.
    """

    frame: Frame
    faces: list[PlacedFace]
    # None until it is read, and for good where it has no face: such a frame is never decoded here.
    image_hwc: np.ndarray | None = None
    patches: list[np.ndarray] = field(default_factory=list)
    decoded: list[tuple[np.ndarray, np.ndarray | None]] = field(default_factory=list)

    @property
    def is_decoded(self) -> bool:
        return len(self.decoded) == len(self.patches)


@dataclass(frozen=True)
class Done:
    """A frame that is written. tiles: (before, after) of each face, where they were asked for."""

    stem: str
    num_faces: int
    tiles: list[tuple[np.ndarray, np.ndarray]]
    was_there: bool = False

    @property
    def captioned_tiles(self) -> list[tuple[str, np.ndarray]]:
        """The tiles in a row, each with its caption."""
        captions = (self.stem[-_CAPTION_LETTERS:], "swapped")
        return [each for pair in self.tiles for each in zip(captions, pair, strict=True)]


class Converter:
    """Swaps the faces of frames.

    Args:
        model: Model from `load_model`.
        decode: Decoder of its faces.
        batch_size: Faces that it takes at a time.
        options: How faces are blended.
        faces: Faces by the stem of their frame.
        shown: Stems of frames whose faces are wanted before and after.
    """

    def __init__(
        self,
        model: SwapModel,
        decode: BatchDecoder,
        batch_size: int,
        options: BlendOptions,
        faces: Faces,
        shown: frozenset[str] = frozenset(),
    ) -> None:
        self._decode, self._batch_size = decode, batch_size
        self._options, self._faces, self._shown = options, faces, shown
        self._output_px = model.output_px
        self._crop = model.crop

    def convert(
        self, frames: Iterable[Frame], output: Output, num_threads: int
    ) -> Generator[Done, None, None]:
        """Write frames as they are taken, in order; one that is there already is passed over.

        Raises:
            ValueError: A frame or face cannot be read, or they do not fit each other.
        """
        # Lazily: the frames of a video hold their pixels, and a film does not fit into memory.
        due = (_Work(frame, self._faces.get(frame.stem, [])) for frame in frames)
        with working_threads(num_threads) as pool:

            def opened(work: _Work) -> _Work:
                return work if self._is_done(work, output) else self._open(work)

            def written(work: _Work) -> tuple[Any, Done]:
                if self._is_done(work, output):
                    return None, Done(work.frame.stem, len(work.faces), [], was_there=True)
                return self._encode(work, output)

            # One more than there are threads: none waits while this one takes what is ready.
            ready = ahead(pool, opened, prefetched(due, _PREFETCHED), num_threads + 1)
            for encoded, done in ahead(pool, written, self._swapped(ready), num_threads + 1):
                # On the caller's thread: an encoder of video takes frames one after the other.
                if not done.was_there:
                    output.put(encoded)
                yield done

    def _is_done(self, work: _Work, output: Output) -> bool:
        is_shown = work.frame.stem in self._shown and bool(work.faces)
        # A frame of the sheet is made again: its tiles come of the conversion.
        return not is_shown and output.is_done(work.frame, bool(work.faces))

    def _open(self, work: _Work) -> _Work:
        """Read a frame that has faces, and cut them out."""
        if work.faces:
            work.image_hwc = work.frame.read()
            for placed in work.faces:
                # Of every frame: those of a folder may differ.
                placed.check_size(work.image_hwc.shape[:2])
                matrix_23 = placed.face.frame_matrix(self._crop)
                work.patches.append(cut_patch(work.image_hwc, matrix_23, self._crop.size_px))
        return work

    def _swapped(self, works: Iterator[_Work]) -> Iterator[_Work]:
        """The frames with their faces decoded, in batches over all frames."""
        waiting: deque[_Work] = deque()
        undecoded: deque[tuple[_Work, np.ndarray]] = deque()
        for work in itertools.chain(works, [None]):
            if work is not None:
                waiting.append(work)
                undecoded.extend((work, patch_ssc) for patch_ssc in work.patches)
            # Where faces are rare, a batch that is not full is cheaper than frames held in memory.
            must = work is None or len(waiting) >= _MOST_WAITING
            while len(undecoded) >= self._batch_size or (must and undecoded):
                count = min(self._batch_size, len(undecoded))
                self._decode_batch([undecoded.popleft() for _ in range(count)])
            # Only from the front: a later frame without faces must not overtake one that waits.
            while waiting and waiting[0].is_decoded:
                yield waiting.popleft()

    def _decode_batch(self, batch: list[tuple[_Work, np.ndarray]]) -> None:
        # Never padded here: the decoder's graph has its own full batch.
        faces_nssc, masks_nss = self._decode(np.stack([patch_ssc for _, patch_ssc in batch]))
        for number, (work, _) in enumerate(batch):
            work.decoded.append(
                (faces_nssc[number], None if masks_nss is None else masks_nss[number])
            )

    def _encode(self, work: _Work, output: Output) -> tuple[Any, Done]:
        """The frame with its faces in it, encoded."""
        tiles = []
        if work.image_hwc is not None:
            # Faces are blended into the frame itself, so the sheet needs a copy from before.
            before = work.image_hwc.copy() if work.frame.stem in self._shown else None
            for placed, patch_ssc, decoded in zip(
                work.faces, work.patches, work.decoded, strict=True
            ):
                self._blend(work.image_hwc, placed, patch_ssc, *decoded)
            if before is not None:
                tiles = [
                    (_tile(before, placed), _tile(work.image_hwc, placed)) for placed in work.faces
                ]
        encoded = output.encode(work.frame, work.image_hwc)
        return encoded, Done(work.frame.stem, len(work.faces), tiles)

    def _blend(
        self,
        image_hwc: np.ndarray,
        placed: PlacedFace,
        original_ssc: np.ndarray,
        decoded_ssc: np.ndarray,
        learned_ss: np.ndarray | None,
    ) -> None:
        """Put one decoded face into its frame."""
        input_23 = placed.face.frame_matrix(self._crop)
        matrix_23 = rescaled(input_23, self._output_px / self._crop.size_px)
        try:
            mask_ss = face_mask(self._options, placed.face, matrix_23, self._output_px, learned_ss)
        except FaceFileError as error:
            raise ValueError(f"{placed.face.path}: {error}") from None
        face_ssc = matched(decoded_ssc, original_ssc, mask_ss, self._options.color)
        paste(image_hwc, face_ssc, mask_ss, matrix_23)


def _tile(image_hwc: np.ndarray, placed: PlacedFace) -> np.ndarray:
    """The head in a frame, upright, (192, 192, 3) uint8."""
    matrix_23 = placed.face.frame_matrix(Crop("head", 1.0, 0.0, TILE_PX))
    tile_ssc = cut_patch(image_hwc, matrix_23, TILE_PX)
    return np.rint(tile_ssc.clip(0, 1) * 255).astype(np.uint8)


def ahead(
    pool: ThreadPoolExecutor, make: Callable[[Item], Made], items: Iterable[Item], depth: int
) -> Iterator[Made]:
    """What a function makes of items, in their order; threads make a few ahead."""
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            # After the submit, so that as many as `depth` are under way while the caller works.
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            # The caller has stopped, or failed: what has not begun is not to be waited for.
            future.cancel()


def prefetched(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, taken by a thread, a few ahead."""
    waiting: deque[Future[Any]] = deque()
    # One thread, since a video is decoded in order.
    with ThreadPoolExecutor(1) as thread:
        waiting.extend(thread.submit(next, items, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, items, _END))
            yield item
