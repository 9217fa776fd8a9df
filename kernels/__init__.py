"""Kernels of mien: a module an operation, called like it, each stated plainly in `reference.py`.

An operation is imported from its module, with what belongs to it:
``from mien.kernels.augment import Augmented, augment``. No name here hides a module.
"""

OPERATIONS = (
    "augment",
    "bias_act",
    "conv3x3",
    "enlarge",
    "face_loss",
    "filtered_loss",
    "optimize",
    "to_image",
)
"""Operations that have a kernel, a reference, a test and a benchmark of this name."""
