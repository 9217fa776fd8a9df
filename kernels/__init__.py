"""Kernels of mien: one public function per operation, each with a reference in `reference.py`.

What belongs to an operation besides its function is imported from its module:
``from mien.kernels.augment import Ranges, draw, empty``.
"""

from .augment import augment

__all__ = ["augment"]
