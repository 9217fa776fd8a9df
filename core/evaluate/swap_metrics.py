"""Metrics of swaps by networks of others: do they look where the original looks, and who is it.

Letters: n faces of A, f edge of a picture, px; c = B, G, R; l = landmark (68), p = point (5),
2 = (x, y), e = embedding.
"""

from collections.abc import Callable

import cv2
import numpy as np

from ..data.held_out import HeldOutFaces
from ..faces import geometry
from .onnx_network import Network

SwapMetric = Callable[[np.ndarray], dict[str, float]]
"""Metric: from A's held-out faces as decoded by B, (n, f, f, 3) uint8, to values by name."""

NUM_LANDMARKS = 68
_OUTER_EYE_CORNERS = 36, 45
_LARGEST_SHARE = 2.0  # shares of the picture may leave it a little, px are far larger
# Chosen, unmeasured:
_WORST_DETECTOR = 0.5  # mean error, in distances of the eyes, of what is no detector of landmarks
_ALIGNED_PX = 112  # of ArcFace, as are the points below
# Where both eyes, the nose and the corners of the mouth lie in the 112 x 112 px pictures that
# recognisers take since ArcFace (Deng et al. 2019).
_ALIGNED_P2 = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


class PoseMetric:
    """Compares the landmarks that a network finds in a swap with those of the original's header.

    The network takes the whole crop in RGB, 0..1, and gives 136 numbers: x and y of each landmark,
    in shares of the picture or in its px; which of the two is seen from the original faces.

    Raises:
        ValueError: The network gives something else.
    """

    def __init__(self, network: Network, faces_a: HeldOutFaces):
        self.network = network
        self.truth_nl2 = faces_a.landmarks_nl2
        one, other = _OUTER_EYE_CORNERS
        between_n2 = self.truth_nl2[:, one] - self.truth_nl2[:, other]
        # In distances of the eyes, so that a face counts alike whatever its size in the crop.
        self.eye_distances_n = np.linalg.norm(between_n2, axis=1)
        predicted_nl2 = self._predicted(faces_a.targets_nffc)
        is_share = np.abs(predicted_nl2).max() <= _LARGEST_SHARE
        self.picture_px = 1 if is_share else network.size_px
        """Edge of the picture in the network's unit."""

        self.original = self._error(faces_a.targets_nffc)
        # `not <=`, so that NaN is refused, too.
        if not self.original <= _WORST_DETECTOR:
            raise ValueError(
                f"{network.name} must give x, y of {NUM_LANDMARKS} landmarks in 0..1 or px, but "
                f"misses those of the faces of A by {self.original:.2g} distances of their eyes"
            )

    def __call__(self, swaps_nffc: np.ndarray) -> dict[str, float]:
        """Mean distance of the landmarks, in distances of the outer eye corners; lower is better.

        pose_original: of the same faces unswapped, which is the network's own error.
        """
        return {"pose_swap": self._error(swaps_nffc), "pose_original": self.original}

    def _error(self, pictures_nffc: np.ndarray) -> float:
        scale = pictures_nffc.shape[1] / self.picture_px
        distances_nl = np.linalg.norm(
            self._predicted(pictures_nffc) * scale - self.truth_nl2, axis=2
        )
        return float((distances_nl.mean(axis=1) / self.eye_distances_n).mean())

    def _predicted(self, pictures_nffc: np.ndarray) -> np.ndarray:
        """Landmarks (n, 68, 2) in the network's unit."""
        size_px = self.network.size_px
        rows = [self.network(geometry.resize(each, size_px)) for each in pictures_nffc]
        if rows[0].size != 2 * NUM_LANDMARKS:
            raise ValueError(
                f"{self.network.name} must give {2 * NUM_LANDMARKS} numbers, x and y of "
                f"{NUM_LANDMARKS} landmarks, gives {rows[0].size}"
            )
        return np.stack(rows).reshape(-1, NUM_LANDMARKS, 2)


class IdentityMetric:
    """Compares what a face recogniser makes of a swap with what it makes of real A and real B.

    The recogniser takes a face aligned as for ArcFace, in RGB, as (pixel - 127.5) / 127.5, and
    gives one vector. Real faces are shown to it at the network's output size, as the swaps are.

    Raises:
        ValueError: The recogniser gives one number, or one that is not finite, for a real face.
    """

    def __init__(self, network: Network, faces: dict[str, HeldOutFaces]):
        self.network = network
        self.landmarks_nl2 = faces["a"].landmarks_nl2
        self.means_e = {
            # The mean of many: what a single face shows of light and pose averages out.
            side: _unit(self._embeddings(each.targets_nffc, each.landmarks_nl2).mean(axis=0))
            for side, each in faces.items()
        }
        if any(
            len(mean_e) < 2 or not np.isfinite(mean_e).all() for mean_e in self.means_e.values()
        ):
            raise ValueError(
                f"{network.name} must give a vector of finite numbers for a real face, gives "
                f"{self.means_e['a']}"
            )

    def __call__(self, swaps_nffc: np.ndarray) -> dict[str, float]:
        """Mean cosine distance, 0..2, of the swaps to real A and B; B's is the one to be small."""
        embeddings_ne = self._embeddings(swaps_nffc, self.landmarks_nl2)
        return {
            f"identity_{side}": float(1 - (embeddings_ne @ mean_e).mean())
            for side, mean_e in self.means_e.items()
        }

    def _embeddings(self, pictures_nffc: np.ndarray, landmarks_nl2: np.ndarray) -> np.ndarray:
        """Embeddings (n, e) of length 1."""
        rows = [
            self.network(aligned(picture, landmarks_l2, self.network.size_px))
            for picture, landmarks_l2 in zip(pictures_nffc, landmarks_nl2, strict=True)
        ]
        return _unit(np.stack(rows).astype(np.float64))


def aligned(picture_ffc: np.ndarray, landmarks_l2: np.ndarray, size_px: int) -> np.ndarray:
    """The face turned, moved and scaled to where a recogniser expects it, (size_px, size_px, 3).

    landmarks_l2: (68, 2), px of the picture. Black where the picture ends.
    """
    points_p2 = np.array(
        [
            landmarks_l2[36:42].mean(axis=0),
            landmarks_l2[42:48].mean(axis=0),
            landmarks_l2[30],
            landmarks_l2[48],
            landmarks_l2[54],
        ]
    )
    matrix_23 = _similarity(points_p2, _ALIGNED_P2 * (size_px / _ALIGNED_PX))
    edge_px = picture_ffc.shape[0]
    scale = float(np.hypot(matrix_23[0, 0], matrix_23[1, 0]))
    if scale < 1:  # warpAffine would skip pixels
        picture_ffc = geometry.resize(picture_ffc, max(round(scale * edge_px), 1))
        matrix_23[:, :2] *= edge_px / picture_ffc.shape[0]
    return cv2.warpAffine(picture_ffc, matrix_23, (size_px, size_px), flags=cv2.INTER_LINEAR)


def _similarity(points_p2: np.ndarray, places_p2: np.ndarray) -> np.ndarray:
    """The least-squares turn, scale and shift of points to places, (2, 3) float64."""
    x, y = points_p2.T.astype(np.float64)
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    cosine, sine, right, down = np.linalg.lstsq(rows, places_p2.T.ravel(), rcond=None)[0]
    return np.array([[cosine, -sine, right], [sine, cosine, down]])


def _unit(vectors_e: np.ndarray) -> np.ndarray:
    """The vectors at length 1; one of length 0 stays so."""
    lengths = np.linalg.norm(vectors_e, axis=-1, keepdims=True)
    return vectors_e / np.maximum(lengths, np.finfo(np.float64).tiny)
