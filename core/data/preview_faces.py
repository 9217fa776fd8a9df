"""The faces that every preview of a run shows: some of each side, evenly spread over the folder.

Shape letters: n faces of one side, S edge of the network's input, F edge of the shown picture.
"""

from dataclasses import dataclass

import numpy as np

from ..config import DataConfig
from ..faces import geometry
from ..faces.folder import Face
from ..faces.png import FaceFileError
from .decode import decode_crops
from .store import configured_masks


@dataclass(frozen=True)
class PreviewFaces:
    """What the network is shown and what is drawn around its answer."""

    inputs: np.ndarray
    """(2 sides, n, S, S, 3) uint8 BGR: crops at the trained coverage."""

    targets: np.ndarray
    """(2 sides, n, F, F, 4) uint8: crops at full coverage, BGR and face mask."""


def full_size_px(output_px: int, coverage: float) -> int:
    """Edge of a full-coverage picture whose covered part is ``output_px`` wide."""
    return 2 * round(output_px / coverage / 2)


def load_preview_faces(
    faces: dict[str, list[Face]],
    data: DataConfig,
    *,
    count: int,
    input_px: int,
    output_px: int,
    num_threads: int,
) -> PreviewFaces:
    """Faces for the preview; as many of each side as both can give, at most ``count``.

    ``faces`` are those that are trained on, by side.

    Raises:
        ValueError: None of a side's can be read.
    """
    coverage, offset = data.coverage / 100, data.vertical_offset / 100
    process_px = max(input_px, output_px)
    seen = geometry.Crop(data.centering, coverage, offset, process_px)
    shown = geometry.Crop(data.centering, 1.0, offset, full_size_px(output_px, coverage))
    sides = [_decode_spread(side, count, seen, shown, num_threads) for side in faces.values()]
    for chosen, side in zip(faces.values(), sides, strict=True):
        if not side:
            raise ValueError(
                f"none of the faces of {chosen[0].path.parent} that the preview shows can be read "
                "any more; put them back and start again"
            )
    least = min(len(side) for side in sides)
    inputs, targets = [], []
    for side in sides:
        inputs.append([geometry.resize(crop, input_px) for _, crop, _ in side[:least]])
        targets.append(
            [
                np.dstack((full, configured_masks(face, shown, data)[..., 0]))
                for face, _, full in side[:least]
            ]
        )
    return PreviewFaces(np.array(inputs), np.array(targets))


def _decode_spread(
    faces: list[Face], count: int, seen: geometry.Crop, shown: geometry.Crop, num_threads: int
) -> list[tuple[Face, np.ndarray, np.ndarray]]:
    """Up to ``count`` readable faces, evenly spread, each with both of its crops."""
    spread = np.linspace(0, len(faces) - 1, min(count, len(faces))).round().astype(int)
    chosen = [faces[i] for i in spread]
    crops = []
    for crop in (seen, shown):
        decoded = decode_crops(chosen, crop, backend="opencv", num_threads=num_threads)
        crops.append(dict(decoded))
    readable = []
    for i, face in enumerate(chosen):
        small, full = crops[0][i], crops[1][i]
        if not isinstance(small, FaceFileError) and not isinstance(full, FaceFileError):
            readable.append((face, small, full))
    return readable
