"""The faces of pictures: some of each side, as the network sees them and as they are shown.

Shape letters: s sides, n faces of one side, S edge of the network's input, F edge of the shown
picture, o edge of the network's picture.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...models.autoencoder import Side
from ..config import DataConfig
from ..data.decode import decode_crops
from ..data.pipeline import configured_masks
from ..data.sides import SIDES
from ..faces import geometry
from ..faces.folder import Face
from ..faces.masks import landmark_mask
from ..faces.png import FaceFileError
from ..system.printable import plural


@dataclass(frozen=True)
class PreviewFaces:
    """What the network is shown and what is drawn around its answer."""

    sides: tuple[Side, ...]
    """Sides that the faces are of, in their order."""

    inputs: np.ndarray
    """(s, n, S, S, 3) uint8 BGR: crops at the trained coverage."""

    targets: np.ndarray
    """(s, n, F, F, 4) uint8: crops at full coverage, BGR and face mask; without the mask where
    none is trained with."""

    landmark_masks: np.ndarray
    """(s, n, o, o) uint8: extended masks at the trained coverage, by which swaps are pasted where
    the model learns no mask."""


def full_size_px(output_px: int, coverage: float) -> int:
    """Edge of a full-coverage picture whose covered part is ``output_px`` wide."""
    # Even, so that the same number of px is left on either side of the covered part.
    return 2 * round(output_px / coverage / 2)


@dataclass(frozen=True)
class PreviewLoader:
    """Reads faces as the pictures of one model need them."""

    data: DataConfig
    has_mask: bool
    """The model trains with a mask."""

    input_px: int
    output_px: int
    num_threads: int

    def load(self, faces: Mapping[str, list[Face]]) -> PreviewFaces:
        """The faces of each side that can be used, in their order, as many as both sides have.

        Raises:
            ValueError: A side has none.
        """
        coverage, offset = self.data.coverage / 100, self.data.vertical_offset / 100
        process_px = max(self.input_px, self.output_px)
        seen = geometry.Crop(self.data.centering, coverage, offset, process_px)
        shown = geometry.Crop(
            self.data.centering, 1.0, offset, full_size_px(self.output_px, coverage)
        )
        names = tuple(side for side in SIDES if side in faces)
        sides = [self._usable(faces[name], seen, shown) for name in names]
        for usable, of_side in zip(sides, map(faces.__getitem__, names), strict=True):
            if not usable:
                count = len(of_side)
                raise ValueError(
                    f"none of {count} {plural(count, 'face')} of {of_side[0].path.parent} can be "
                    f"shown: {plural(count, 'it is', 'they are')} damaged, or "
                    f"{plural(count, 'lacks', 'lack')} the mask {self.data.mask_type}; extract "
                    f"{plural(count, 'it', 'them')} again"
                )
        # One array for both sides: a row of the preview shows a face of each.
        least = min(len(side) for side in sides)
        inputs, targets, masks = (
            np.array([[each[part] for each in side[:least]] for side in sides]) for part in range(3)
        )
        return PreviewFaces(names, inputs, targets, masks)

    def _usable(
        self, faces: list[Face], seen: geometry.Crop, shown: geometry.Crop
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Input, target and landmark mask of each face of which there are both pictures."""
        crops = []
        for crop in (seen, shown):
            decoded = decode_crops(faces, crop, backend="opencv", num_threads=self.num_threads)
            crops.append([crop_bgr for _, crop_bgr in decoded])
        # Landmarks are moved, not the mask resized: the edge stays sharp at any output size.
        trained = dataclasses.replace(seen, size_px=self.output_px)
        usable = []
        for face, small, full in zip(faces, *crops, strict=True):
            # One damaged file must not stop a training that has thousands of others.
            if isinstance(small, FaceFileError) or isinstance(full, FaceFileError):
                continue
            if self.has_mask:
                try:
                    full = np.dstack((full, configured_masks(face, shown, self.data)[..., 0]))
                except FaceFileError:
                    continue
            landmarks_l2 = geometry.crop_landmarks(face.landmarks_l2, face.alignment, trained)
            mask = landmark_mask("extended", landmarks_l2, self.output_px)
            usable.append((geometry.resize(small, self.input_px), full, mask))
        return usable


def spread(faces: list[Face], count: int) -> list[Face]:
    """Choose up to ``count`` faces, evenly spread over all."""
    places = np.linspace(0, len(faces) - 1, min(count, len(faces))).round().astype(int)
    return [faces[place] for place in places]


def drawn(faces: list[Face], count: int, *numbers: int) -> list[Face]:
    """Choose up to ``count`` faces, the same for the same ``numbers``, in the order of the
    folder."""
    # Its own generator: a preview must not move the random numbers of the training.
    generator = np.random.default_rng(numbers)
    places = generator.choice(len(faces), min(count, len(faces)), replace=False)
    return [faces[place] for place in sorted(places)]
