"""`mien swap`: frames a second from PNG to PNG, and where a frame's time goes.

Frames of 1920 x 1080 px, each with a face of about 256 px, which the model gives back at 256 px;
one in four has none and is copied. The model is a narrow one, or a CPU would do little else. Parts
are told in CPU time, one after the other; the whole, which overlaps them, by the clock.

Run: ``mien bench swap``.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from .. import models
from ..core import precision
from ..core.blend import FEATHER_SHARE, BlendOptions, face_mask, matched
from ..core.convert.convert import Converter
from ..core.convert.frames import PictureFolder, read_picture
from ..core.convert.output import PictureOutput, encoded_png
from ..core.convert.patch import cut_patch, paste
from ..core.convert.placement import Faces, read_faces
from ..core.faces.geometry import rescaled
from ..core.faces.synthetic.film import draw_film
from ..core.swapping import BatchDecoder, SwapModel
from ..core.system.threads import thread_count
from .harness import rounded

NUM_FRAMES, BARE_EVERY, BATCH_SIZE = 16, 4, 4
HEIGHT_PX, WIDTH_PX = 1080, 1920
FAMILY, OUTPUT_PX = "dlight", 256
_NETWORK: dict[str, Any] = {
    "output_size": OUTPUT_PX,
    "features": "lowmem",
    "details": "fast",
    "width": 8,
}
_HEAD_PX = 400
"""Edge of a head's picture, of which the model sees 256 px."""

_OPTIONS = BlendOptions(
    mask="extended", feather_px=OUTPUT_PX * FEATHER_SHARE, erode_px=0.0, color="mean"
)
_REPEATS = 3


def rows() -> Iterator[dict[str, Any]]:
    """One row a precision and number of threads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="mien-bench-") as scratch:
        place = Path(scratch)
        faces = _film(place)
        try:
            for mode in ("bf16",) if device.type == "cuda" else ("fp32", "bf16"):
                for threads in sorted({1, 2, thread_count(0)}):
                    torch.set_num_threads(threads)
                    yield _row(place, faces, mode, threads, device)
        finally:
            torch.set_num_threads(before)


def _film(place: Path) -> Faces:
    """Draw the film; faces of those frames that have one."""
    draw_film(place / "drawn", place / "faces", identity="a", count=NUM_FRAMES, size_px=_HEAD_PX)
    (place / "frames").mkdir()
    for path in (place / "drawn").iterdir():
        drawn = read_picture(path)
        # Mirrored, so that the PNG is as hard to pack as the drawn part.
        below_px, right_px = HEIGHT_PX - len(drawn), WIDTH_PX - drawn.shape[1]
        frame = cv2.copyMakeBorder(drawn, 0, below_px, 0, right_px, cv2.BORDER_REFLECT)
        cv2.imwrite(str(place / "frames" / path.name), frame)
    stems = PictureFolder(place / "frames").stems
    faces = read_faces(place / "faces", _OPTIONS.mask, warn=print)
    return {
        stem: [
            dataclasses.replace(placed, frame_px=(HEIGHT_PX, WIDTH_PX)) for placed in faces[stem]
        ]
        for number, stem in enumerate(stems)
        if number % BARE_EVERY
    }


def _row(
    place: Path, faces: Faces, mode: str, threads: int, device: torch.device
) -> dict[str, Any]:
    compute = precision.resolve(mode, device)
    compute.apply()
    model = _model(device)
    decode = BatchDecoder(model, "b", BATCH_SIZE, compute.compute)
    frames = PictureFolder(place / "frames")
    parts = _parts(frames, faces, model, decode)
    converter = Converter(model, decode, BATCH_SIZE, _OPTIONS, faces)

    def convert() -> None:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            with closing(PictureOutput(Path(folder), {}, "synthetic face")) as output:
                for _ in converter.convert(frames.frames(), output, threads):
                    pass

    convert()  # once, for what is loaded and chosen at the first call
    before_cpu_s, before_s = time.process_time(), time.perf_counter()
    convert()
    cpu_s, wall_s = time.process_time() - before_cpu_s, time.perf_counter() - before_s
    return {
        "kind": "swap",
        "model": FAMILY,
        "output_px": OUTPUT_PX,
        "batch_size": BATCH_SIZE,
        "precision": mode,
        "threads": threads,
        "frames_per_s": rounded(NUM_FRAMES / wall_s),
        "frames_per_cpu_s": rounded(NUM_FRAMES / cpu_s),
        **parts,
    }


def _model(device: torch.device) -> SwapModel:
    network = models.build(FAMILY, seed=0, **_NETWORK).to(device)
    return SwapModel(
        network=network.eval().requires_grad_(False),
        sides=("a", "b"),
        centering="face",
        coverage=87.5,
        vertical_offset=0,
        run_id="bench",
        iterations=1,
    )


def _parts(
    frames: PictureFolder, faces: Faces, model: SwapModel, decode: BatchDecoder
) -> dict[str, float]:
    """CPU milliseconds of each part of a frame with one face."""
    stem, (placed,) = next(iter(faces.items()))
    path = frames.frame(stem).path
    assert path is not None  # of a folder
    image_hwc, input_23 = read_picture(path), placed.face.frame_matrix(model.crop)
    output_23 = rescaled(input_23, OUTPUT_PX / model.input_px)
    patch_ssc = cut_patch(image_hwc, input_23, model.input_px)
    batch_nssc = np.stack([patch_ssc] * BATCH_SIZE)
    decoded_ssc = decode(batch_nssc)[0][0]

    def blend() -> None:
        mask_ss = face_mask(_OPTIONS, placed.face, output_23, OUTPUT_PX, None)
        paste(image_hwc, matched(decoded_ssc, patch_ssc, mask_ss, "mean"), mask_ss, output_23)

    parts = {
        "read_ms": _best(lambda: read_picture(path)),
        "cut_ms": _best(lambda: cut_patch(image_hwc, input_23, model.input_px)),
        "model_ms": _best(lambda: decode(batch_nssc)) / BATCH_SIZE,
        "blend_ms": _best(blend),
        "write_ms": _best(lambda: encoded_png(image_hwc, "synthetic face")),
    }
    return {name: rounded(1e3 * seconds) for name, seconds in parts.items()}


def _best(run: Callable[[], object]) -> float:
    """CPU seconds of the quickest of some calls: what else the machine does only ever adds."""
    times = []
    for _ in range(_REPEATS):
        began_at = time.process_time()
        run()
        times.append(time.process_time() - began_at)
    return min(times)
