"""Squares that programs cut out of a frame for a face model, in normalised coordinates.

A program fits some points of a face to a template of its own and cuts a square that stands still
in it. Seen from mien's mean face (`faces.geometry`) such a square has a side and a centre; a model
that was trained on another square finds its own one inside the program's.

Letters: l = landmark, 2 = (x, y), 23 = 2 x 3 matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..faces.geometry import INNER_LANDMARKS, MEAN_FACE_L2, Crop, align, crop_matrix, similarity

_MEAN_51_2 = MEAN_FACE_L2[INNER_LANDMARKS]
_NOSE_AXIS_SHIFT = np.array([-0.009873, 0.0])
"""Distance of the mean face of DeepFaceLab and DeepFaceLive from mien's."""

_SAME_SIDE = 0.02
_SAME_CENTRE = 0.015
"""Differences of two squares, as shares of the side, below which they count as one: less than
faces differ from the mean face. Chosen by the programs' templates, untried in them."""


@dataclass(frozen=True)
class Square:
    """A square of a frame in normalised coordinates, y downward; roll in degrees."""

    side: float
    centre_x: float
    centre_y: float
    roll: float = 0.0

    def is_nearly(self, other: "Square") -> bool:
        """Whether a model of the other square can be given this one."""
        shift = math.hypot(self.centre_x - other.centre_x, self.centre_y - other.centre_y)
        same_side = abs(self.side / other.side - 1) <= _SAME_SIDE
        return same_side and shift <= _SAME_CENTRE * other.side


@dataclass(frozen=True)
class Program:
    """A program's square: where it lies in the template that points of the face are fitted to."""

    points: Callable[[np.ndarray], np.ndarray]
    """Points of the face, of its 68 landmarks."""

    template_l2: np.ndarray
    side: float
    centre: tuple[float, float]
    """Side and centre of the square in the template's coordinates."""

    def matrix(self, landmarks_l2: np.ndarray) -> np.ndarray:
        """Matrix from the landmarks' coordinates to the square's, 0..1, (2, 3) float64.

        landmarks_l2: (68, 2) of any frame.
        """
        points_l2 = self.points(landmarks_l2.astype(np.float64))
        # A similarity, as the programs fit it: they neither shear nor mirror a face.
        matrix_23 = similarity(points_l2, self.template_l2) / self.side
        matrix_23[:, 2] += 0.5 - np.array(self.centre) / self.side
        return matrix_23


def _five_points(landmarks_l2: np.ndarray) -> np.ndarray:
    """Both eyes, the tip of the nose, the corners of the mouth."""
    eyes = [landmarks_l2[first : first + 6].mean(axis=0) for first in (36, 42)]
    return np.stack([*eyes, *landmarks_l2[[30, 48, 54]]])


def _inner_points(numbers: list[int]) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """Landmarks by number, and where DeepFaceLab's mean face has them."""
    template_l2 = MEAN_FACE_L2[numbers] + _NOSE_AXIS_SHIFT
    return lambda landmarks_l2: landmarks_l2[numbers], template_l2


# Of DeepFaceLab's "whole face".
_DFL_PADDING = 0.40

PROGRAMS = {
    "facefusion": Program(
        # Its template "dfl_whole_face".
        _five_points,
        np.array(
            [
                *([0.35342266, 0.39285716], [0.62797622, 0.39285716], [0.48660713, 0.54017860]),
                *([0.38839287, 0.68750011], [0.59821427, 0.68750011]),
            ]
        ),
        side=1.0,
        centre=(0.5, 0.5),
    ),
    "deepfacelive": Program(
        *_inner_points([*range(17, 36), 36, 39, 42, 45, 48, 54]), side=2.2, centre=(0.5, 0.42)
    ),
    "visomaster": Program(
        # ArcFace's template of 112 px, 8 px to the right in one of 128 px.
        _five_points,
        np.array(
            [
                *([0.36168, 0.40388], [0.63697, 0.40235], [0.50020, 0.56044]),
                *([0.38710, 0.72161], [0.61508, 0.72034]),
            ]
        ),
        side=1.0,
        centre=(0.5, 0.5),
    ),
    "dfl": Program(
        *_inner_points([*range(17, 49), 54]),
        side=1 + 2 * math.sqrt(2) * _DFL_PADDING,
        centre=(0.5, 0.43),
    ),
}
"""Programs that load a .dfm file, and how each cuts: facefusion's "whole face", DeepFaceLive with
its 68-point marker and a coverage of 2.2, DeepFaceLab's "whole face"."""


def square_of(matrix_23: np.ndarray, landmarks_l2: np.ndarray = MEAN_FACE_L2) -> Square:
    """Square that a matrix maps to 0..1.

    matrix_23: from the coordinates of the landmarks, (68, 2), which are those of the frame.
    """
    from_frame = np.vstack([align(landmarks_l2).matrix_23, [0, 0, 1]])
    scale_x, turn = np.vstack([matrix_23, [0, 0, 1]])[:2, 0]
    # Which point the matrix sends to the middle of the square.
    centre = np.linalg.solve(matrix_23[:, :2], 0.5 - matrix_23[:, 2])
    centre_x, centre_y, _ = (from_frame @ [*centre, 1]).tolist()
    frame_turn = math.degrees(math.atan2(from_frame[1, 0], from_frame[0, 0]))
    side = math.hypot(*from_frame[:2, 0]) / math.hypot(scale_x, turn)
    return Square(side, centre_x, centre_y, math.degrees(math.atan2(turn, scale_x)) - frame_turn)


def program_square(program: str) -> Square:
    """Square of the mean face that a program cuts out."""
    return square_of(PROGRAMS[program].matrix(MEAN_FACE_L2))


def model_square(crop: Crop, landmarks_l2: np.ndarray = MEAN_FACE_L2) -> Square:
    """Square that a model of this crop was trained on, of the mean face or of another."""
    return square_of(crop_matrix(align(landmarks_l2), crop) / crop.size_px, landmarks_l2)


@dataclass(frozen=True)
class Placement:
    """A model's square inside a program's picture, px; it may reach outside."""

    size_px: int
    """Edge of the program's picture."""

    left: int
    top: int
    side_px: int
    """Edge of the model's square."""

    @property
    def corner(self) -> tuple[int, int]:
        """First row and first column of the model's square."""
        return self.top, self.left

    @property
    def is_whole(self) -> bool:
        """Whether both are the same square."""
        return (self.left, self.top, self.side_px) == (0, 0, self.size_px)


def place(model: Square, program: Square, side_px: int) -> Placement:
    """Position of a model's square, of ``side_px``, in the picture that a program cuts out.

    The picture is as large as makes the square whole pixels; both are one where they nearly agree.
    """
    if model.is_nearly(program):
        return Placement(side_px, 0, 0, side_px)
    # The program's picture is chosen by the model's square, which then needs no resize.
    size_px = round(side_px * program.side / model.side)
    left, top = (
        round(((centre - program_centre) / program.side + 0.5) * size_px - side_px / 2)
        for centre, program_centre in (
            (model.centre_x, program.centre_x),
            (model.centre_y, program.centre_y),
        )
    )
    return Placement(size_px, left, top, side_px)
