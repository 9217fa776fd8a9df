"""mien from Python: train a model, and swap faces with it.

    from mien.core import load_model, read_crops, swap, train

    train({"data": {"input_a": "faces/a", "input_b": "faces/b"}, "save": {"model_dir": "out"}})
    model = load_model("out")
    faces_of_b, masks = swap(model, read_crops(model, ["faces/a/0001.png"]))

What is named here is loaded when it is first used, so that the import costs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config
    from .console.outcome import Outcome
    from .swapping import SwapModel, load_model, read_crops, swap
    from .training.fit import train

__all__ = ["Config", "Outcome", "SwapModel", "load_model", "read_crops", "swap", "train"]

_PLACES = {
    "Config": ".config",
    "Outcome": ".console.outcome",
    "SwapModel": ".swapping",
    "load_model": ".swapping",
    "read_crops": ".swapping",
    "swap": ".swapping",
    "train": ".training.fit",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
