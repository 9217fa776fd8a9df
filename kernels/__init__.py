"""Kernels of mien: one public function per operation, each stated plainly in `reference.py`.

What belongs to an operation besides its function is imported from its module:
``from mien.kernels.augment import Ranges, draw, empty``.
"""

from . import reference
from .augment import augment
from .face_loss import face_loss

OPERATIONS = ("augment", "face_loss")
"""Operations that have a kernel, a reference, a test and a benchmark of this name."""

__all__ = ["OPERATIONS", "augment", "face_loss", "reference"]
