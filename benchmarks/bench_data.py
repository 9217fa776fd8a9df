"""The data path: batches from the store in each place that it can be in, and the first start-up.

Without a GPU the figure to read is faces per CPU second of one core.

Run: ``mien bench data``.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import from_dict
from ..core.data.feed import Feed
from ..core.data.sides import SIDES
from ..core.data.store import FaceStore
from .bench_augment import draw_store
from .bench_store import first_start
from .harness import Pace, measure, rounded

SIZES = [(64, 64), (128, 128), (128, 256), (256, 256)]
BATCH_SIZE = 16
NUM_FACES, PNG_PX = 1000, 512


def rows() -> Iterator[dict[str, Any]]:
    """One row a size of batches and place of the faces; then the first start-up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for input_px, output_px in SIZES:
        for placement in ("gpu", "host") if device.type == "cuda" else ("host", "file"):
            yield _batches(input_px, output_px, placement, device)
    yield first_start(NUM_FACES, PNG_PX, 64)


def _batches(input_px: int, output_px: int, placement: str, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    how = Pace(7, 0.3, 20 if on_gpu else 1)
    with tempfile.TemporaryDirectory(prefix="mien-bench-") as scratch:
        next_batch, close = _feed(input_px, output_px, placement, device, Path(scratch))
        try:
            timed = measure(next_batch, how, device_type=device.type, capture=16 if on_gpu else 0)
        finally:
            close()
    faces = len(SIDES) * BATCH_SIZE
    return {
        "kind": "data",
        "name": "batches",
        "input_px": input_px,
        "output_px": output_px,
        "batch_size": BATCH_SIZE,
        "placement": placement,
        "faces_per_wall_s": rounded(faces / timed["median_s"]),
        "faces_per_wall_s_low": rounded(faces / timed["p90_s"]),
        "faces_per_wall_s_high": rounded(faces / timed["p10_s"]),
        "faces_per_cpu_s": rounded(faces / timed["cpu_s"]) if timed["cpu_s"] else None,
    }


def _feed(
    input_px: int, output_px: int, placement: str, device: torch.device, scratch: Path
) -> tuple[Callable[[], object], Callable[[], None]]:
    """A function that makes the next batch, on a CPU with one thread, and one that ends it all."""
    size_px = max(input_px, output_px)
    stores: dict[str, FaceStore] = {
        side: FaceStore(
            faces_fssc=_placed(draw_store(size_px), placement, scratch / side),
            placement=placement,
            names=[],
            rejected=[],
            why="drawn",
            backend="none",
            reused=False,
            seconds=0.0,
        )
        for side in SIDES
    }
    feed = Feed(
        stores,
        from_dict({"train": {"batch_size": BATCH_SIZE}}),
        input_px=input_px,
        output_px=(output_px,),
        device=device,
        dtype=torch.bfloat16,
        num_threads=1,
    )
    if device.type == "cuda":
        return feed.batch, feed.close  # as the training graph has it; counts the faces by itself
    seen: dict[str, int] = dict.fromkeys(SIDES, 0)

    def next_batch() -> None:
        feed.next(dict(seen))
        for side in SIDES:
            seen[side] += BATCH_SIZE

    return next_batch, feed.close


def _placed(faces_fssc: Tensor, placement: str, path: Path) -> Tensor:
    if placement == "file":
        faces_fssc.numpy().tofile(path)
        # Copied on write: torch warns of an array that cannot be written to.
        return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=tuple(faces_fssc.shape)))
    if placement == "gpu":
        return faces_fssc.cuda()
    # A GPU's kernel reads host memory only where it is page-locked.
    return faces_fssc.pin_memory() if torch.cuda.is_available() else faces_fssc
