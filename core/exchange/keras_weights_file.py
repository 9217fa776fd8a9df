"""Arrays of a Keras model in an HDF5 file that may come from a stranger.

A dataset is read only when its shape is the one that the model has: it can claim any. Links that
lead elsewhere, datasets whose bytes lie in other files, filters that need a plugin and chunks far
larger than the array are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ...models.fields import shown
from ..system.requirements import install_command

if TYPE_CHECKING:
    import h5py

_FILTERS = {1, 2, 3}  # deflate, shuffle, Fletcher's checksum
_MOST_CHUNK_BYTES = 1 << 20
"""Bytes that one chunk of a small array may have all the same. Chosen, unmeasured."""


def require_h5py() -> Any:
    """The module; ValueError that says what to install where it is missing."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            "models of faceswap need h5py, which is not installed; install it with "
            f"`{install_command('mien[exchange]')}`"
        ) from error
    return h5py


@contextmanager
def open_arrays(path: Path | IO[bytes]) -> Iterator[h5py.File]:
    """An HDF5 file, or an open one, read-only.

    Raises:
        ValueError: It is none, or it is damaged.
    """
    module = require_h5py()
    with _damage("its HDF5 part is damaged"):
        file = module.File(path, "r")
    with file:
        yield file


@contextmanager
def _damage(text: str) -> Iterator[None]:
    """Say in one line what the library says in many words over a damaged file."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        # A refusal of the disk has a number; damage that the library finds has none.
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(text) from error


def array(file: h5py.File, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array, fp32, of the shape that the model has.

    Raises:
        ValueError: It is missing, of another shape, lies elsewhere, or holds numbers that are none.
    """
    dataset = check_array(file, path, shape)
    with _damage(f"{path} is damaged"):
        found = np.asarray(dataset[()], np.float32)
    if not np.isfinite(found).all():
        raise ValueError(f"{path} holds numbers that are not finite")
    return found


def check_array(file: h5py.File, path: str, shape: tuple[int, ...]) -> h5py.Dataset:
    """The dataset of an array, of the shape that the model has, before a number of it is read.

    Raises:
        ValueError: As `array`.
    """
    with _damage(f"{path} is damaged"):
        dataset = _dataset(file, path)
        if dataset.shape != shape:
            raise ValueError(f"{path} must have shape {shape}, got {shown(dataset.shape)}")
        _refuse_odd(dataset, path)
    return dataset


def _dataset(file: h5py.File, path: str) -> h5py.Dataset:
    """The dataset at a path, reached by groups alone."""
    module = require_h5py()
    place: Any = file
    for name in path.split("/"):
        link = place.get(name, getlink=True) if isinstance(place, module.Group) else None
        if link is None:
            raise ValueError(f"{path} is missing")
        # Soft and external links may lead to any file of the user's.
        if not isinstance(link, module.HardLink):
            raise ValueError(f"{path} is a link to elsewhere, which is not followed")
        place = place[name]
    if not isinstance(place, module.Dataset):
        raise ValueError(f"{path} is no array")
    return place


def _refuse_odd(dataset: h5py.Dataset, path: str) -> None:
    """Refuse what would be read from elsewhere, or in more memory than the array takes."""
    # Half and double pass: they are read into fp32, and both are found in files.
    if dataset.dtype.kind != "f" or dataset.dtype.itemsize > 8:
        raise ValueError(f"{path} must hold floating-point numbers, got {dataset.dtype}")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{path} lies in another file, which is not opened")
    settings = dataset.id.get_create_plist()
    if any(settings.get_filter(i)[0] not in _FILTERS for i in range(settings.get_nfilters())):
        raise ValueError(f"{path} is packed in a way that is not read")
    own_bytes = math.prod(dataset.shape) * dataset.dtype.itemsize
    chunk_bytes = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if dataset.chunks and chunk_bytes > max(4 * own_bytes, _MOST_CHUNK_BYTES):
        raise ValueError(f"{path} is packed in pieces much larger than it is")
    # HDF5 fills what was never written with zeros, which would pass for weights.
    if own_bytes and not dataset.id.get_storage_size():
        raise ValueError(f"{path} holds no numbers")
