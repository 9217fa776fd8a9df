"""The data path: batches from the store, and the first start-up.

Without a GPU the figure to read is faces per CPU second of one core.

Run: ``mien bench data``.
"""

from collections.abc import Iterator
from typing import Any

from .bench_augment import faces_per_second
from .bench_store import first_start

SIZES = [(64, 64), (128, 128), (128, 256), (256, 256)]
NUM_FACES, PNG_PX = 1000, 512


def rows() -> Iterator[dict[str, Any]]:
    """One row a size of batches, then the first start-up for 1,000 faces of 512 px."""
    for input_px, output_px in SIZES:
        figures = faces_per_second(input_px, output_px, batch=32, num_threads=1)
        yield {
            "kind": "data",
            "name": "batches",
            "input_px": input_px,
            "output_px": output_px,
            **{k: round(v, 1) if isinstance(v, float) else v for k, v in figures.items()},
        }
    yield first_start(NUM_FACES, PNG_PX, 64)
