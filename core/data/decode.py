"""Crops of face files at the processing size, the same bytes by either backend.

*dali* is a DALI graph: read the file, decode the part of the picture that the crop needs. *opencv*
decodes in threads and stands in where DALI cannot be installed. What follows is the same code for
both, run in threads while the next batch is decoded: zeros where the crop leaves the picture, and
the resize to the processing size, area where the crop shrinks and cubic where it grows. The resize
is not in the graph because DALI has no area filter and another cubic, so the pixels would differ;
over DALI's own output, shared and not copied, it costs 3 % of the decoding. PNG being lossless, the
bound on the difference between the backends is 0 grey levels.

DALI's decoder that knows the part is faster than its decoder of whole pictures, and its RGB output
faster than BGR; channels are swapped after the resize, where there are fewest pixels. With a GPU it
is the "mixed" decoder. That changes where, not what: no decoder inflates PNG on a GPU, nvImageCodec
does it with CPU threads there, too.

A damaged file fails DALI's whole batch without being named, so that batch is decoded again file by
file, and the pipeline goes on with the next one. A picture that a batch has no room for is left to
OpenCV, which bounds what is decoded at a time (`core.faces.picture`).

Letters: s = edge of the crop at the processing size, px; c = 3 colours.
"""

import importlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..faces import geometry
from ..faces.folder import Face
from ..faces.geometry import CropBox
from ..faces.picture import decoding_bytes, open_picture
from ..faces.png import FaceFileError

BACKENDS = ("dali", "opencv")
BATCH_SIZE = 16
MAX_BATCH_BYTES = 256 * 1024**2
PREFETCH_BATCHES = 2
MAX_UNEXPLAINED_FAILURES = 3

Result = np.ndarray | FaceFileError


class _Part(NamedTuple):
    """A rectangle inside a picture, px."""

    left: int
    top: int
    width: int
    height: int


def thread_count(setting: int) -> int:
    """Threads to use: the setting, or for 0 as many as the process may use cores."""
    return setting or len(os.sched_getaffinity(0))


def choose_backend(setting: str) -> tuple[str, str]:
    """Name of the backend that a setting (auto, dali, opencv) leads to, and why, as a sentence.

    Raises ValueError where DALI is asked for by name and cannot be loaded.
    """
    if setting == "opencv":
        return "opencv", "faces are decoded by OpenCV, as set by data.decoder"
    if setting not in ("auto", "dali"):
        raise ValueError(f"data.decoder must be one of auto, dali, opencv, got {setting!r}")
    try:
        version = importlib.import_module("nvidia.dali").__version__
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if setting == "dali":
            raise ValueError(
                f"data.decoder is dali, but DALI cannot be loaded ({reason}); "
                "pip install nvidia-dali-cuda130, or set data.decoder to auto or opencv"
            ) from None
        return "opencv", f"faces are decoded by OpenCV, since DALI cannot be loaded ({reason})"
    return "dali", f"faces are decoded by DALI {version}"


def decode_crops(
    faces: list[Face],
    crop: geometry.Crop,
    *,
    backend: str,
    num_threads: int,
    device: str = "cpu",
    warn: Callable[[str], None] | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Number of each face and its crop, in order; an error in place of a crop that there is not.

    Each crop is (s, s, 3) uint8 BGR and the caller's own. num_threads: 0 for as many as there are
    cores. device: "cuda" (or "cuda:1") lets DALI decode on the GPU. warn: told, in one line, where
    the rest is decoded by OpenCV because DALI fails on files that are sound.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    threads = thread_count(num_threads)
    decode = _decode_dali if backend == "dali" else _decode_opencv
    return decode(faces, crop, threads, device, warn or (lambda line: None))


def decode_one(face: Face, crop: geometry.Crop) -> Result:
    """One face's crop, (s, s, 3) uint8 BGR, by OpenCV; or why there is none."""
    try:
        with open_picture(face.path, face.edge_px) as image_bgr:
            crop_bgr = geometry.resize(geometry.cut(image_bgr, face.crop_box(crop)), crop.size_px)
            return np.ascontiguousarray(crop_bgr)  # no part of a picture that would stay whole
    except FaceFileError as error:
        return error.alone()


def _decode_opencv(
    faces: list[Face],
    crop: geometry.Crop,
    threads: int,
    device: str,
    warn: Callable[[str], None],
    first: int = 0,
) -> Generator[tuple[int, Result], None, None]:
    """Crops from face number `first` on; a few more than there are threads are under way."""
    waiting: deque[tuple[int, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number in range(first, len(faces)):
            waiting.append((number, pool.submit(decode_one, faces[number], crop)))
            if len(waiting) > 4 * threads:
                number, future = waiting.popleft()
                yield number, future.result()
        for number, future in waiting:
            yield number, future.result()


def _decode_dali(
    faces: list[Face],
    crop: geometry.Crop,
    threads: int,
    device: str,
    warn: Callable[[str], None],
) -> Generator[tuple[int, Result], None, None]:
    """Crops of all faces. DALI decodes the next batches while the last one is resized."""
    boxes = [face.crop_box(crop) for face in faces]
    parts = [_inside(box, face.edge_px) for box, face in zip(boxes, faces, strict=True)]

    batches, for_opencv = _batches(faces)
    try:
        for_dali = [batch for batch in batches if batch.start not in for_opencv]
        pipeline = _pipeline(faces, parts, for_dali, threads, device)
    except RuntimeError as error:
        warn(f"DALI cannot start, OpenCV decodes the faces: {_cause(error)}")
        yield from _decode_opencv(faces, crop, threads, device, warn)
        return
    failures = 0
    on_gpu = device.startswith("cuda")
    decoded = on_host = None
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            if batch.start in for_opencv:
                yield batch.start, decode_one(faces[batch.start], crop)
                continue
            try:
                pipeline.schedule_run()
                (decoded,) = pipeline.share_outputs()
            except RuntimeError as error:
                crops = list(pool.map(lambda number: decode_one(faces[number], crop), batch))
                yield from zip(batch, crops, strict=True)
                failures += not any(isinstance(result, FaceFileError) for result in crops)
                if failures == MAX_UNEXPLAINED_FAILURES:
                    warn(f"DALI fails on sound files, OpenCV decodes the rest: {_cause(error)}")
                    yield from _decode_opencv(faces, crop, threads, device, warn, batch.stop)
                    return
                continue
            on_host = decoded.as_cpu() if on_gpu else decoded
            # One task a thread: a task for each face would cost as much as the face's resize.
            step = -(-len(batch) // threads)
            tasks = [
                pool.submit(_cut_out, on_host, boxes, parts, batch, part, crop.size_px)
                for part in (batch[first : first + step] for first in range(0, len(batch), step))
            ]
            finished = [crop_bgr for task in tasks for crop_bgr in task.result()]
            pipeline.release_outputs()
            yield from zip(batch, finished, strict=True)
    if on_gpu:
        pipeline = decoded = on_host = None
        importlib.import_module("nvidia.dali.backend").ReleaseUnusedMemory()


def _cut_out(
    decoded: Any,
    boxes: list[CropBox],
    parts: list[_Part],
    batch: range,
    numbers: range,
    size_px: int,
) -> list[np.ndarray]:
    """Crops of some faces of a batch, BGR, from what DALI has decoded of it."""
    crops = []
    for number in numbers:
        box, part = boxes[number], parts[number]
        square = CropBox(box.left - part.left, box.top - part.top, box.side)
        cut_rgb = geometry.cut(decoded.at(number - batch.start), square)
        crops.append(cv2.cvtColor(geometry.resize(cut_rgb, size_px), cv2.COLOR_RGB2BGR))
    return crops


def _inside(box: CropBox, edge_px: int) -> _Part:
    """The part of a square that lies in the picture; one pixel where none does."""
    left, top = (min(max(corner, 0), edge_px - 1) for corner in (box.left, box.top))
    right, bottom = (min(corner + box.side, edge_px) for corner in (box.left, box.top))
    return _Part(left, top, max(right - left, 1), max(bottom - top, 1))


def _batches(faces: list[Face]) -> tuple[list[range], set[int]]:
    """Runs of faces: at most BATCH_SIZE, fewer where the pictures are large; and the faces that
    are a batch of their own because a batch has no room for them."""
    batches = []
    too_large = set()
    first, num_bytes = 0, 0
    for number, face in enumerate(faces):
        picture_bytes = _bytes_of(face)
        full = number - first == BATCH_SIZE or num_bytes + picture_bytes > MAX_BATCH_BYTES
        if number > first and full:
            batches.append(range(first, number))
            first, num_bytes = number, 0
        num_bytes += picture_bytes
        if picture_bytes > MAX_BATCH_BYTES:
            too_large.add(number)
    return ([*batches, range(first, len(faces))] if faces else []), too_large


def _bytes_of(face: Face) -> int:
    """Bytes that decoding the face takes; none where its file is gone, which decoding tells of."""
    try:
        return decoding_bytes(face.path, face.edge_px)
    except OSError:
        return 0


def _pipeline(
    faces: list[Face],
    parts: list[_Part],
    batches: list[range],
    threads: int,
    device: str,
) -> Any:
    """The DALI graph that gives each batch's parts, (height, width, 3) RGB, in order."""
    dali = importlib.import_module("nvidia.dali")
    on_gpu = device.startswith("cuda")

    def source() -> Iterator[tuple[list[np.ndarray], ...]]:
        for batch in batches:
            chosen = parts[batch.start : batch.stop]
            yield (
                [np.frombuffer(os.fsencode(faces[number].path), np.uint8) for number in batch],
                [np.array([part.top, part.left], np.int32) for part in chosen],
                [np.array([part.height, part.width], np.int32) for part in chosen],
            )

    pipeline = dali.Pipeline(
        batch_size=BATCH_SIZE,
        num_threads=threads,
        device_id=int(device.partition(":")[2] or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH_BATCHES,
    )
    with pipeline:
        path, corner, shape = dali.fn.external_source(source=source(), num_outputs=3)
        pipeline.set_outputs(
            dali.fn.decoders.image_slice(
                dali.fn.io.file.read(path),
                corner,
                shape,
                axes=(0, 1),
                device="mixed" if on_gpu else "cpu",
                output_type=dali.types.RGB,
                adjust_orientation=False,
            )
        )
    pipeline.build()
    return pipeline


def _cause(error: RuntimeError) -> str:
    """The line of a DALI error that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[found] if found < len(lines) else "no reason given"
