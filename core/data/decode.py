"""Crops of face files at the processing size, the same bytes by either backend.

*dali* is a DALI graph: read the file, decode the part of the picture that the crop needs. *opencv*
decodes in threads, what extraction writes by `core.faces.png_pixels`, all else by OpenCV. It is the
choice without a GPU, where a whole first start takes 0.8 of the CPU time in which DALI decodes the
pictures and does no more; with a GPU it stands in where DALI cannot be installed, and which is
faster is unmeasured. What follows is the same for
both, run in threads while the next batch is decoded: zeros where the crop leaves the picture, and
the resize to the processing size, area where the crop shrinks and cubic where it grows. The resize
is not in the graph because DALI has no area filter and another cubic, so the pixels would differ;
over DALI's own output, shared and not copied, it costs 2 to 5 % of the decoding. PNG being
lossless, the bound on the difference between the backends is 0 grey levels.

DALI's decoder that knows the part is faster than its decoder of whole pictures, and its RGB output
faster than BGR; channels are swapped after the resize, where there are fewest pixels. With a GPU it
is the "mixed" decoder. That changes where, not what: no decoder inflates PNG on a GPU, nvImageCodec
does it with CPU threads there, too.

A damaged file fails DALI's whole batch without being named, so that batch is decoded again file by
file, and the pipeline goes on with the next one. A picture that a batch has no room for is left to
OpenCV, which bounds what is decoded at a time (`core.faces.picture`); so are faces that are turned
in their pictures, whose crop is a warp of all of it.

Letters: s = edge of the crop at the processing size, px; c = 3 colours.
"""

import importlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..faces import geometry
from ..faces.face import Face
from ..faces.geometry import CropBox
from ..faces.png import FaceFileError
from ..system.output import silent_libraries
from ..system.requirements import DALI, install_command, requirement
from ..system.threads import thread_count, working_threads

BACKENDS = ("dali", "opencv")
BATCH_SIZE = 16
MAX_BATCH_BYTES = 256 * 1024**2
PREFETCH_BATCHES = 2
"""Faces and bytes of pictures that DALI decodes at a time, and batches that it is ahead. Chosen,
unmeasured on a GPU."""

MAX_UNEXPLAINED_FAILURES = 3
"""Batches of sound files that DALI may fail on before OpenCV takes over. Chosen, unmeasured."""

Result = np.ndarray | FaceFileError


class _Part(NamedTuple):
    """A rectangle inside a picture, px."""

    left: int
    top: int
    width: int
    height: int


def choose_backend(setting: str, device: str = "cpu") -> tuple[str, str]:
    """Name of the backend that a setting (auto, dali, opencv) leads to, and why, as a sentence.

    Raises ValueError where DALI is asked for by name and cannot be loaded.
    """
    if setting == "opencv":
        return "opencv", "faces are decoded in threads, as set by data.decoder"
    if setting == "auto" and not device.startswith("cuda"):
        return "opencv", "faces are decoded in threads, which is faster without a GPU"
    if setting not in ("auto", "dali"):
        raise ValueError(f"data.decoder must be one of auto, dali, opencv, got {setting!r}")
    try:
        # Only where it is wanted: DALI is an extra, and to import it takes a third of a second.
        version = importlib.import_module("nvidia.dali").__version__
    except (ImportError, OSError) as error:
        # Its first line: the rest lists the paths that the loader has tried.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if setting == "dali":
            raise ValueError(
                f"data.decoder is dali, but DALI cannot be loaded ({reason}); "
                f"`{install_command(requirement(DALI))}`, or set data.decoder to auto or opencv"
            ) from None
        return "opencv", f"faces are decoded in threads, since DALI cannot be loaded ({reason})"
    return "dali", f"faces are decoded by DALI {version}"


def decode_crops(
    faces: Iterable[Face],
    crop: geometry.Crop,
    *,
    backend: str,
    num_threads: int,
    device: str = "cpu",
    warn: Callable[[str], None] | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Number of each face and its crop, in order; an error in place of a crop that there is not.

    faces: taken as there is work for them, a few batches ahead. Each crop is (s, s, 3) uint8 BGR
    and the caller's own. num_threads: 0 for as many as there are cores. device: "cuda" (or
    "cuda:1") lets DALI decode on the GPU. warn: called with one line where the rest is decoded by
    OpenCV because DALI fails on files that are sound.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    threads = thread_count(num_threads)
    decode = _decode_dali if backend == "dali" else _decode_opencv
    return decode(faces, crop, threads, device, warn or (lambda line: None))


def decoded_by(faces: list[Face], setting: str, device: str) -> str:
    """What decodes these faces with that setting, as a sentence."""
    if faces and not faces[0].is_upright:
        return "faces are warped out of JPEGs of DeepFaceLab by OpenCV"
    return choose_backend(setting, device)[1]


def decode_one(face: Face, crop: geometry.Crop) -> Result:
    """One face's crop, (s, s, 3) uint8 BGR, without DALI; or why there is none."""
    try:
        with face.open_picture() as image_bgr:
            # A copy: a part of a picture would keep all of it.
            return np.ascontiguousarray(face.cut_out(image_bgr, crop))
    except FaceFileError as error:
        # Kept until its turn: with its frames it would hold the file's content as long.
        return error.alone()


def _decode_opencv(
    faces: Iterable[Face],
    crop: geometry.Crop,
    threads: int,
    device: str,
    warn: Callable[[str], None],
    first: int = 0,
) -> Generator[tuple[int, Result], None, None]:
    """Crops numbered from `first` on; a few more than there are threads are under way."""
    # In order, whichever is done first: the store's rows, and so the batches, depend on it.
    waiting: deque[tuple[int, Future[Result]]] = deque()
    with working_threads(threads) as pool:
        for number, face in enumerate(faces, first):
            waiting.append((number, pool.submit(decode_one, face, crop)))
            # A few more than threads, so that one large picture idles none, and no more for memory.
            if len(waiting) > 4 * threads:
                number, future = waiting.popleft()
                yield number, future.result()
        for number, future in waiting:
            yield number, future.result()


def _decode_dali(
    faces: Iterable[Face],
    crop: geometry.Crop,
    threads: int,
    device: str,
    warn: Callable[[str], None],
) -> Generator[tuple[int, Result], None, None]:
    """Crops of all faces. DALI decodes the next batches while the last one is resized."""
    schedule = _Schedule(_batches(faces), crop)
    try:
        pipeline = _pipeline(schedule, threads, device)
    except RuntimeError as error:
        warn(f"DALI cannot start, OpenCV decodes the faces: {_cause(error)}")
        yield from _decode_opencv(schedule.rest(), crop, threads, device, warn)
        return
    failures = 0
    on_gpu = device.startswith("cuda")
    decoded = on_host = None
    # DALI prints lines of its own about a damaged file, besides the error that it raises.
    with silent_libraries(), working_threads(threads) as pool:
        while batch := schedule.next():
            # Its place among the batches stays, so the crops come in the order of the faces.
            if not batch.is_for_dali:
                crops = list(pool.map(lambda face: decode_one(face, crop), batch.faces))
                yield from enumerate(crops, batch.first)
                continue
            try:
                pipeline.schedule_run()
                (decoded,) = pipeline.share_outputs()
            except RuntimeError as error:
                crops = list(pool.map(lambda face: decode_one(face, crop), batch.faces))
                yield from enumerate(crops, batch.first)
                # Not counted where OpenCV finds a damaged file, too: that is no fault of DALI's.
                failures += not any(isinstance(result, FaceFileError) for result in crops)
                if failures == MAX_UNEXPLAINED_FAILURES:
                    warn(f"DALI fails on sound files, OpenCV decodes the rest: {_cause(error)}")
                    first = batch.first + len(crops)
                    yield from _decode_opencv(schedule.rest(), crop, threads, device, warn, first)
                    return
                continue
            # The resize is OpenCV's with a GPU, too, so that the pixels are the same everywhere.
            on_host = decoded.as_cpu() if on_gpu else decoded
            # One task a thread: a task for each face would cost as much as the face's resize.
            places = list(enumerate(batch.places))
            step = -(-len(places) // threads)
            tasks = [
                pool.submit(_cut_out, on_host, places[first : first + step], crop.size_px)
                for first in range(0, len(places), step)
            ]
            finished = [crop_bgr for task in tasks for crop_bgr in task.result()]
            # Only now: what was cut reads DALI's own memory, which the next batch is decoded into.
            pipeline.release_outputs()
            yield from enumerate(finished, batch.first)
    if on_gpu:
        # DALI keeps its pool until nothing refers to it; training wants that memory.
        pipeline = decoded = on_host = None
        importlib.import_module("nvidia.dali.backend").ReleaseUnusedMemory()


def _cut_out(
    decoded: Any, places: list[tuple[int, tuple[CropBox, _Part]]], size_px: int
) -> list[np.ndarray]:
    """Crops of some faces of a batch, BGR, from what DALI has decoded of it."""
    crops = []
    for number, (box, part) in places:
        # DALI has decoded the part alone, so the square is moved to its corner.
        square = CropBox(box.left - part.left, box.top - part.top, box.side)
        cut_rgb = geometry.cut(decoded.at(number), square)
        crops.append(cv2.cvtColor(geometry.resize(cut_rgb, size_px), cv2.COLOR_RGB2BGR))
    return crops


def _inside(box: CropBox, edge_px: int) -> _Part:
    """The part of a square that lies in the picture; one pixel where none does."""
    left, top = (min(max(corner, 0), edge_px - 1) for corner in (box.left, box.top))
    right, bottom = (min(corner + box.side, edge_px) for corner in (box.left, box.top))
    return _Part(left, top, max(right - left, 1), max(bottom - top, 1))


class _Batch(NamedTuple):
    """Faces that are decoded together.

    first: number of the first among all. is_for_dali: false for a single face that a batch has no
    room for, and for faces that are turned in their pictures. places: square and decoded part of
    each face, once DALI has been handed them.
    """

    first: int
    faces: list[Face]
    is_for_dali: bool
    places: list[tuple[CropBox, _Part]]


def _batches(faces: Iterable[Face]) -> Iterator[_Batch]:
    """Runs of faces: at most BATCH_SIZE, fewer where the pictures are large."""
    first, num_bytes = 0, 0
    batch: list[Face] = []
    for face in faces:
        picture_bytes = _bytes_of(face)
        is_full = len(batch) == BATCH_SIZE or num_bytes + picture_bytes > MAX_BATCH_BYTES
        # Turned and upright ones apart, since only the upright are for DALI.
        if batch and (is_full or face.is_upright != batch[0].is_upright):
            yield _batch_of(first, batch, num_bytes)
            first, num_bytes, batch = first + len(batch), 0, []
        batch.append(face)
        num_bytes += picture_bytes
    if batch:
        yield _batch_of(first, batch, num_bytes)


def _batch_of(first: int, faces: list[Face], num_bytes: int) -> _Batch:
    return _Batch(first, faces, faces[0].is_upright and num_bytes <= MAX_BATCH_BYTES, [])


class _Schedule:
    """Batches in their order: DALI is handed each some time before its crops are asked for."""

    def __init__(self, batches: Iterator[_Batch], crop: geometry.Crop) -> None:
        self._batches = batches
        self._crop = crop
        self._due: deque[_Batch] = deque()
        self._for_dali: deque[_Batch] = deque()

    def next(self) -> _Batch | None:
        """The batch whose crops come next; None behind the last one."""
        return self._due.popleft() if self._due or self._take() else None

    def rest(self) -> Iterator[Face]:
        """The faces of all batches that are still to come."""
        while batch := self.next():
            yield from batch.faces

    def source(self) -> Iterator[tuple[list[np.ndarray], ...]]:
        """Names, corners and shapes of each batch, as DALI takes them."""
        while self._for_dali or self._take():
            # A batch that is not for DALI was taken: on to the next one.
            if not self._for_dali:
                continue
            batch = self._for_dali.popleft()
            for face in batch.faces:
                box = face.crop_box(self._crop)
                batch.places.append((box, _inside(box, face.edge_px)))
            parts = [part for _, part in batch.places]
            yield (
                # As bytes: a name on disk need be no valid text.
                [np.frombuffer(os.fsencode(face.path), np.uint8) for face in batch.faces],
                [np.array([part.top, part.left], np.int32) for part in parts],
                [np.array([part.height, part.width], np.int32) for part in parts],
            )

    def _take(self) -> bool:
        """Whether there is one more batch; it is put where it is due."""
        batch = next(self._batches, None)
        if batch is None:
            return False
        self._due.append(batch)
        if batch.is_for_dali:
            self._for_dali.append(batch)
        return True


def _bytes_of(face: Face) -> int:
    """Bytes that decoding the face takes; none where its file is gone, which decoding reports."""
    try:
        return face.decoding_bytes
    except OSError:
        return 0


def _pipeline(schedule: _Schedule, threads: int, device: str) -> Any:
    """The DALI graph that gives each batch's parts, (height, width, 3) RGB, in order."""
    dali = importlib.import_module("nvidia.dali")
    on_gpu = device.startswith("cuda")
    pipeline = dali.Pipeline(
        batch_size=BATCH_SIZE,
        num_threads=threads,
        # None and not 0: with a number DALI would begin a context on a GPU that is not used.
        device_id=int(device.partition(":")[2] or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH_BATCHES,
    )
    with pipeline:
        path, corner, shape = dali.fn.external_source(source=schedule.source(), num_outputs=3)
        pipeline.set_outputs(
            # By paths and not by bytes, or by DALI's own reader: of the three this was the fastest
            # on the CPU, and a face keeps its number.
            dali.fn.decoders.image_slice(
                dali.fn.io.file.read(path),
                corner,
                shape,
                axes=(0, 1),
                device="mixed" if on_gpu else "cpu",
                output_type=dali.types.RGB,
                # The landmarks know nothing of a note that the picture is to be shown turned.
                adjust_orientation=False,
            )
        )
    pipeline.build()
    return pipeline


def _cause(error: RuntimeError) -> str:
    """The line of a DALI error that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[first] if first < len(lines) else "no reason given"
