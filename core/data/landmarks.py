"""The landmarks that faces are warped to: of every face of the store, and whose are alike.

Letters: f = face of this side, g = face of the other, l = landmark (68), 2 = (x, y), k = the
nearest.
"""

import numpy as np
import torch

from ...kernels.augment import NUM_NEAREST, Landmarks
from ..faces.folder import Face
from ..faces.geometry import Crop, crop_landmarks

_BLOCK_FACES = 1024  # bounds the matrix of distances; chosen, unmeasured


def store_landmarks(faces: list[Face], crop: Crop) -> np.ndarray:
    """Landmarks of the faces in px of the store, (f, 68, 2) float32.

    Every face has 68 of them: a file that has not is no face, and was rejected when it was read.
    """
    return np.stack([crop_landmarks(face.landmarks_l2, face.alignment, crop) for face in faces])


def nearest_faces(landmarks_fl2: np.ndarray, others_gl2: np.ndarray) -> np.ndarray:
    """The ten faces of the other side whose landmarks are nearest, (f, 10) int32, nearest first.

    By the sum of squared differences of the 136 numbers; of equals the one that comes first.

    Raises:
        ValueError: The other side has fewer than ten faces.
    """
    if len(others_gl2) < NUM_NEAREST:
        raise ValueError(
            f"warping to landmarks needs {NUM_NEAREST} faces of each side, got {len(others_gl2)}"
        )
    centre = others_gl2.mean(axis=0, dtype=np.float64)  # near 0, less is lost by cancellation
    ours = (landmarks_fl2 - centre).reshape(len(landmarks_fl2), -1)
    others = (others_gl2 - centre).reshape(len(others_gl2), -1)
    # The square opened up, so that the distances are one matrix product.
    lengths = np.square(others).sum(axis=1)
    nearest = np.empty((len(ours), NUM_NEAREST), np.int32)
    for begin in range(0, len(ours), _BLOCK_FACES):
        block = slice(begin, begin + _BLOCK_FACES)
        distances_fg = lengths - 2 * ours[block] @ others.T  # less a constant of each row
        # Sorted by number first, so that the stable sort by distance leaves equals in that order.
        chosen = np.sort(np.argpartition(distances_fg, NUM_NEAREST - 1)[:, :NUM_NEAREST])
        order = np.argsort(np.take_along_axis(distances_fg, chosen, 1), axis=1, kind="stable")
        nearest[block] = np.take_along_axis(chosen, order, 1)
    return nearest


def landmarks_of_sides(
    landmarks: tuple[np.ndarray, np.ndarray], device: torch.device
) -> tuple[Landmarks, Landmarks]:
    """What the augmentation needs to warp each side's faces to the other's."""
    a, b = landmarks
    one, other = (
        Landmarks(
            points_fl2=torch.from_numpy(ours).to(device),
            nearest_fk=torch.from_numpy(nearest_faces(ours, theirs)).to(device),
        )
        for ours, theirs in ((a, b), (b, a))
    )
    return one, other
