"""Which way an operation runs: as kernels on a GPU, in plain PyTorch elsewhere.

Tests and benchmarks change that for a while: `interpreted` sends CPU tensors through Triton's
interpreter, `plain` takes the statements of `reference` in place of kernels.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor

_interpreted = False
_plain: frozenset[str] = frozenset()


def uses_triton(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` launches its Triton kernels."""
    return tensor.is_cuda or _interpreted


def is_plain(operation: str) -> bool:
    """Whether this operation (a name of `kernels.OPERATIONS`) is to run as its plain statement."""
    return operation in _plain


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """CPU tensors go through Triton's interpreter inside.

    TRITON_INTERPRET=1 must be set before `mien.kernels` is imported.
    """
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


@contextlib.contextmanager
def plain(*operations: str) -> Iterator[None]:
    """These operations run as their plain statements inside."""
    global _plain
    before, _plain = _plain, frozenset(operations)
    try:
        yield
    finally:
        _plain = before
