"""The last step of a decoder: forward, and forward with backward, of models' layers.

Against the same in separate operations of torch, as `bench_bias_act` does it.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ..kernels import reference
from ..kernels.to_image import to_image
from .bench_bias_act import Layer, cases_of

LAYERS: tuple[Layer, ...] = (
    ("original decoder", "to_image", 8, 64, {"channels": 3}),
    ("dfl_h128 decoder", "to_image", 8, 128, {"channels": 3}),
)


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time)."""
    return cases_of(LAYERS, {"to_image": (to_image, reference.to_image)})
