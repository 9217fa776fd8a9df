"""Kernels of mien: one public function per operation, each stated plainly in `reference.py`.

What belongs to an operation besides its function is imported from its module:
``from mien.kernels.augment import Ranges, draw, empty``.
"""

from . import reference
from .augment import augment
from .conv3x3 import conv3x3
from .dense import dense
from .enlarge import enlarge
from .face_loss import face_loss
from .filtered_loss import filtered_loss
from .optimize import optimize
from .upscale import activate, to_image, upscale

OPERATIONS = (
    *("augment", "conv3x3", "enlarge", "face_loss", "filtered_loss", "optimize", "upscale"),
)
"""Operations that have a kernel, a reference, a test and a benchmark of this name."""

__all__ = [
    "OPERATIONS",
    "activate",
    "augment",
    "conv3x3",
    "dense",
    "enlarge",
    "face_loss",
    "filtered_loss",
    "optimize",
    "reference",
    "to_image",
    "upscale",
]
