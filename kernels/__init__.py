"""Kernels of mien: one public function per operation, each stated plainly in `reference.py`.

What belongs to an operation besides its function is imported from its module:
``from mien.kernels.augment import Ranges, draw, empty``.
"""

from . import reference
from .adam import adam
from .augment import augment
from .face_loss import face_loss
from .upscale import activate, to_image, upscale

OPERATIONS = ("adam", "augment", "face_loss", "upscale")
"""Operations that have a kernel, a reference, a test and a benchmark of this name."""

__all__ = [
    "OPERATIONS",
    "activate",
    "adam",
    "augment",
    "face_loss",
    "reference",
    "to_image",
    "upscale",
]
