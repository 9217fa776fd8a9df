"""Numbers of another implementation, in the folder that MIEN_ORACLE names: what tests are given.

A test takes its cases, sizes and names from here, so that any folder of the same form will do.
"""

import ast
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mien.core.faces.geometry import Crop
from mien.core.losses import lpips

TESTS = Path(__file__).parent
ROOT = TESTS.parent
_IN_CACHE = 1 << 15
"""Numbers of a weight that are made at once: models of 300 million take a tenth of the time."""


def named_folder(variable: str, *fallbacks: Path) -> Path | None:
    """The folder that a variable names, else the first fallback there is."""
    given = os.environ.get(variable)
    if given:
        folder = Path(given).expanduser()
        folder = folder if folder.is_absolute() else ROOT / folder
        if not folder.is_dir():
            raise pytest.UsageError(f"{variable} names {folder}, which is no folder")
        return folder
    return next((folder for folder in fallbacks if folder.is_dir()), None)


ORACLE = named_folder("MIEN_ORACLE", ROOT.parent / "shared/oracle", TESTS / "oracle")


def is_picture_of(expected: np.ndarray, found: np.ndarray) -> bool:
    """Whether pixels are the oracle's, which was made by a processor with AVX-512.

    On others OpenCV's cubic filter rounds otherwise here and there when it enlarges: 5 of 36,864
    values of one of the oracle's pictures at most, by one level, on a Zen 3.
    """
    if np.array_equal(expected, found):
        return True
    # A question mark stands behind what OpenCV was built for and the processor lacks.
    if expected.shape != found.shape or "*AVX512-SKX" in cv2.getCPUFeaturesLine().split():
        return False
    difference = np.abs(expected.astype(int) - found)
    return difference.max() <= 1 and np.count_nonzero(difference) <= difference.size / 1000


def oracle_files(pattern: str) -> list[Path]:
    """Files of the oracle that match, sorted; a list to parametrise a test with."""
    return sorted(ORACLE.glob(pattern)) if ORACLE else []


def oracle_cases(name: str) -> list[int]:
    """Numbers of the cases in a file of the oracle, "<number>:<what>"; to parametrise a test with.

    One that there is not where the folder or the file is missing, so that the test is skipped.
    """
    path = ORACLE / name if ORACLE else None
    if path is None or not path.is_file():
        return [0]
    with np.load(path) as arrays:
        return sorted({int(key.partition(":")[0]) for key in arrays if key[:1].isdigit()})


def oracle_keys(name: str, prefix: str) -> list[str]:
    """Ends of the keys of a file of the oracle that begin so; to parametrise a test with."""
    path = ORACLE / name if ORACLE else None
    if path is None or not path.is_file():
        return []
    with np.load(path) as arrays:
        return [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]


def oracle_models(name: str, list_name: str) -> list[dict[str, Any]]:
    """Models in a list of a file of the oracle; to parametrise a test with.

    The reference lets an option of one family reach into another; those models ("leak") are left
    out, for mien does not copy it.
    """
    path = ORACLE / "models" / name if ORACLE else None
    if path is None or not path.is_file():
        return []
    cases = json.loads(path.read_text())[list_name]
    return [case for case in cases if not case["id"].endswith("leak")]


@dataclass(frozen=True)
class Combination:
    """Losses that the oracle has added up, and what it was given."""

    functions: list[str]
    """Names of the losses."""

    weights: list[float]
    """What each loss is multiplied by."""

    outputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Prediction and target (B, 3, S, S), weights of the pixels (B, 1, S, S) of each output."""

    data: dict[str, np.ndarray]
    """All arrays of the file."""


def oracle_combination(path: Path) -> Combination:
    """Read one file of combined losses of the oracle."""
    with np.load(path) as arrays:
        data = {key: arrays[key] for key in arrays.files}
    config = ast.literal_eval(str(data["config"]))
    slots = zip(config["functions"], config["weights"], strict=True)
    functions, weights = zip(*(slot for slot in slots if slot[0] != "none"), strict=True)
    outputs = []
    for number in range(len(config["sizes"])):
        pred, target = (torch.from_numpy(data[f"{name}:{number}"]) for name in ("pred", "true"))
        weight = torch.ones_like(target[:, :1])
        if config["use_mask"]:
            weight = torch.from_numpy(data[f"mask_face:{number}"])
            for area in ("eye", "mouth"):
                if config[area] > 1 and (key := f"mask_{area}:{number}") in data:
                    weight = weight * (1 + config[area] * torch.from_numpy(data[key]))
        outputs.append((pred, target, weight))
    return Combination([*functions], [*weights], outputs, data)


def oracle_stride(size_px: int, stored_px: int) -> int:
    """Step between the pixels that the oracle has stored of a picture."""
    return -(-size_px // stored_px)


def _lpips_seed() -> int:
    """Seed of the weights of the oracle's lpips losses: `seed` in their file, else the rule's."""
    for path in oracle_files("losses/lpips_*.npz"):
        with np.load(path) as arrays:
            if "seed" in arrays:
                return int(arrays["seed"])
    return 4000


def _normal(number: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(_lpips_seed() + number).standard_normal(shape)


def lpips_trunk_weights(trunk: lpips.Trunk) -> dict[str, torch.Tensor]:
    """Weights of a network of the lpips losses by the oracle's rule."""
    with torch.device("meta"):
        layers = trunk.make()
    tensors = {}
    for number, (name, tensor) in enumerate(layers.state_dict().items()):
        shape = tuple(tensor.shape)
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.05
        tensors[f"features.{name}"] = torch.from_numpy(_normal(number, shape) * scale).float()
    return tensors


def lpips_linear_weights(trunk: lpips.Trunk) -> dict[str, torch.Tensor]:
    """Weights of the distances in a network of the lpips losses by the oracle's rule."""
    return {
        f"lin{number}.model.1.weight": torch.from_numpy(
            np.abs(_normal(1000 + number, (1, channels, 1, 1))) * 0.2
        ).float()
        for number, channels in enumerate(trunk.channels)
    }


def oracle_crop(combo: str) -> Crop:
    """The crop that a combination of the oracle such as face_87.5_128_0 names."""
    centering, coverage, size_px, offset = combo.split("_")
    return Crop(centering, float(coverage) / 100, float(offset) / 100, int(size_px))


def oracle_weight(row: list[Any]) -> np.ndarray:
    """A tensor by the oracle's rule: ``[number, sub-network, layer, kind, shape, base, scale]``."""
    number, _, _, _, shape, base, scale = row
    weight = np.empty(math.prod(shape), np.float32)
    for begin in range(0, weight.size, _IN_CACHE):
        x = np.arange(begin, min(begin + _IN_CACHE, weight.size), dtype=np.uint32)
        x *= np.uint32(2654435761)
        x += np.uint32((number + 1) * 2246822519 & 0xFFFFFFFF)
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x85EBCA6B)
        x ^= x >> np.uint32(13)
        x *= np.uint32(0xC2B2AE35)
        x ^= x >> np.uint32(16)
        weight[begin : begin + len(x)] = base + scale * (x / 2147483648.0 - 1.0)
    return weight.reshape(shape)


def oracle_face(size_px: int, phase: float) -> torch.Tensor:
    """(3, S, S): the picture that the oracle's networks were given; phase 0 is A's, 1 is B's."""
    h, w, c = np.meshgrid(*(np.arange(n) for n in (size_px, size_px, 3)), indexing="ij")
    f = 64 / size_px
    wave = np.sin(0.21 * f * h + 0.37 * f * w + 1.7 * c + 0.003 * f * f * h * w + phase)
    return torch.from_numpy((0.5 + 0.45 * wave).astype(np.float32)).permute(2, 0, 1)
