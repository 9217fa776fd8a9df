"""Crops and masks of one side's faces, made on all cores while its headers are still being read.

One thread reads the headers of both sides, since aligning a face is mostly Python's own work;
decoding and drawing are libmien's, OpenCV's and DALI's, which run beside it. What is ready waits in
a queue of bounded size, since only the last header shows how many faces there are, whether they are
to be used, and where to put them. DALI's own pipeline is made in `decode`.

Letters: s = edge of the crop at the processing size, px; c = 3.
"""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch

from ..config import DataConfig
from ..faces import masks
from ..faces.folder import Face
from ..faces.geometry import Crop, crop_landmarks
from ..faces.png import FaceFileError
from ..system.threads import thread_count, working_threads
from .decode import Result, choose_backend, decode_crops

AHEAD_BYTES = 128 * 1024**2
"""Decoded faces that wait. Chosen on the CPU: 5,400 of 64 px, 340 of 256 px."""

MASKS_IN_TASK = 8
TASKS_AHEAD = 6
"""Masks that a thread makes in one task, which share its cost, and tasks that wait. Chosen,
unmeasured."""

DECODERS_PER_MASKS = 4
"""Threads that decode for one that makes masks. A mask is many short calls of OpenCV, between which
threads wait for Python's lock: two threads made masks of 64 px more slowly than one, which takes an
eighth of the time that decoding a face of 512 px takes. Measured on 2 cores."""

# Three of the crop and three masks.
_BYTES_PER_PIXEL = 6


class Masks(NamedTuple):
    """A face's masks, (s, s, 3) uint8; why the first is empty, if it is; areas outside the crop."""

    masks_ssc: np.ndarray
    why_empty: str
    areas_outside: list[str]


class Decoded(NamedTuple):
    """A face's crop, (s, s, 3) uint8 BGR, and its masks; an error in place of what there is not."""

    crop_bgr: Result
    masks: Masks | FaceFileError


class FaceDecoder:
    """Faces being decoded by a thread, from the first one that is added.

    Iterating it, once, gives a `Decoded` for each, in order; it ends after `end`. warnings: what
    went wrong without stopping anything.
    """

    def __init__(
        self, crop: Crop, data: DataConfig, device: torch.device, worker: ThreadPoolExecutor
    ) -> None:
        self.warnings: list[str] = []
        # No bound here: a face that waits is its header, and only pictures take room.
        self._faces: SimpleQueue[Face | None] = SimpleQueue()
        self._decoded: SimpleQueue[Decoded | None] = SimpleQueue()
        face_bytes = _BYTES_PER_PIXEL * crop.size_px**2
        # No bounded queue: `close` could not let go of a thread that waits for room in one.
        self._room = threading.Semaphore(max(1, AHEAD_BYTES // face_bytes))
        self._is_closed = threading.Event()
        self._work = worker.submit(self._decode, crop, data, device)

    def add(self, face: Face) -> None:
        """Decode this face, too."""
        self._faces.put(face)

    def end(self) -> None:
        """Say that there are no more faces."""
        self._faces.put(None)

    def close(self) -> None:
        """Let the thread end early, as soon as it has what it is at, and `end` was called."""
        # The flag before the room: the thread that gets it looks at the flag next.
        self._is_closed.set()
        # Has it never begun, it never will; has it, the flag ends it at the next face.
        self._work.cancel()
        self._room.release()

    def __iter__(self) -> Iterator[Decoded]:
        while decoded := self._decoded.get():
            self._room.release()
            yield decoded
        # Behind the last face: what ended the thread is raised where its faces are awaited.
        self._work.result()

    def _decode(self, crop: Crop, data: DataConfig, device: torch.device) -> None:
        faces = iter(self._faces.get, None)
        decoding = _decoded(faces, crop, data, str(device), self.warnings.append)
        try:
            with contextlib.closing(decoding):
                for decoded in decoding:
                    # Room is taken before the face is handed on, so the queue never holds more.
                    self._room.acquire()
                    if self._is_closed.is_set():
                        return
                    self._decoded.put(decoded)
        finally:
            # Also after an error: the reader would else wait for ever.
            self._decoded.put(None)


@contextlib.contextmanager
def decoding(
    faces: Iterable[Face], crop: Crop, data: DataConfig, device: torch.device
) -> Iterator[FaceDecoder]:
    """A decoder of faces that are all known."""
    with ThreadPoolExecutor(1) as worker:
        with contextlib.closing(FaceDecoder(crop, data, device, worker)) as decoder:
            for face in faces:
                decoder.add(face)
            decoder.end()
            yield decoder


def configured_masks(face: Face, crop: Crop, data: DataConfig) -> np.ndarray:
    """(s, s, 3) uint8: the face mask, eyes and mouth, as the settings want them.

    Raises FaceFileError where the face lacks the mask that is set.
    """
    return masks.training_masks(
        face,
        crop,
        mask_type=data.mask_type,
        dilation=data.mask_dilation,
        blur_kernel=data.mask_blur_kernel,
        threshold=data.mask_threshold,
    )


def _decoded(
    faces: Iterator[Face],
    crop: Crop,
    data: DataConfig,
    device: str,
    warn: Callable[[str], None],
) -> Generator[Decoded, None, None]:
    """Each face's crop and masks. Masks are made in threads, a little ahead of the decoding."""
    threads = thread_count(data.num_threads)
    # Crops and masks are made at their own pace, from one and the same sequence of faces.
    # `tee` is for one thread: both are taken by the one that asks for the results.
    for_crops, for_masks = itertools.tee(faces)
    crops = decode_crops(
        for_crops,
        crop,
        backend=choose_backend(data.decoder, device)[0],
        num_threads=threads,
        device=device,
        warn=warn,
    )
    # Closed even where the caller stops early, so that no thread goes on decoding.
    num_makers = -(-threads // DECODERS_PER_MASKS)
    with contextlib.closing(crops), working_threads(num_makers) as pool:
        masks_ahead = _masks_ahead(pool, for_masks, crop, data)
        for (_, crop_bgr), face_masks in zip(crops, masks_ahead, strict=True):
            yield Decoded(crop_bgr, face_masks)


def _masks_ahead(
    pool: ThreadPoolExecutor, faces: Iterator[Face], crop: Crop, data: DataConfig
) -> Iterator[Masks | FaceFileError]:
    """Each face's masks, or why there are none."""

    def make_all(part: list[Face]) -> list[Masks | FaceFileError]:
        return [_masks_of(face, crop, data) for face in part]

    waiting: deque[Future[list[Masks | FaceFileError]]] = deque()
    while part := list(itertools.islice(faces, MASKS_IN_TASK)):
        waiting.append(pool.submit(make_all, part))
        # Masks wait in order: the oldest task is the one whose faces are due.
        if len(waiting) > TASKS_AHEAD:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _masks_of(face: Face, crop: Crop, data: DataConfig) -> Masks | FaceFileError:
    try:
        masks_ssc = configured_masks(face, crop, data)
        # The face mask alone: eyes or mouth may well lie outside a crop.
        is_empty = masks.is_empty(masks_ssc[..., 0])
        reason = masks.why_empty(face, data.mask_type) if is_empty else ""
    except FaceFileError as error:
        # Without its frames, which hold the file's content until the face is reported.
        return error.alone()
    landmarks_l2 = crop_landmarks(face.landmarks_l2, face.alignment, crop)
    return Masks(masks_ssc, reason, masks.areas_outside(landmarks_l2, crop.size_px))
