"""Model folder of faceswap, written: the graph and its weights as one *.keras file, and the state.

The file is written by zipfile and h5py alone. Layers stand in the order in which Keras will number
them, for it finds weights by those numbers.
"""

import io
import json
import os
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ...models.graph import Layer, Network
from .keras_archive import CONFIG, METADATA, WEIGHTS
from .keras_config import to_json
from .keras_order import slots_of
from .keras_weights_file import require_h5py

# The version that faceswap pins; at 3.3 and before it would rename layers.
KERAS_VERSION = "3.14.1"
"""Version whose files these are like; one that is older would have its layers renamed."""

_PIECE_BYTES = 1 << 20


def write_keras(path: Path, graph: Network, metadata: dict[str, str]) -> None:
    """Write a *.keras file.

    Args:
        path: The file, which is not there yet.
        graph: Description of a model whose weights can be read.
        metadata: Origin of the model, beside the version.

    Raises:
        OSError: The disk refuses.
    """
    saved = time.strftime("%Y-%m-%d@%H:%M:%S", time.gmtime())
    head = {"keras_version": KERAS_VERSION, "date_saved": saved} | metadata
    with (
        # Without a name, for the folder is to hold what faceswap reads, and nothing else.
        tempfile.TemporaryFile(dir=path.parent) as unnamed,
        _Arrays(unnamed.fileno(), "r+b", closefd=False) as arrays,
        # Stored, as Keras does: weights hardly shrink.
        zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(METADATA, json.dumps(head))
        archive.writestr(CONFIG, json.dumps(to_json(graph)))
        with require_h5py().File(arrays, "w") as file:
            _fill(file, graph)
        # Only now: what HDF5 has held back it writes when it is closed.
        if arrays.refusal is not None:
            raise arrays.refusal
        entry = zipfile.ZipInfo(WEIGHTS, time.gmtime()[:6])
        # Told before it is written: above 4 GB an entry has another head.
        entry.file_size = arrays.seek(0, os.SEEK_END)
        arrays.seek(0)
        with archive.open(entry, "w") as weights:
            shutil.copyfileobj(arrays, weights, _PIECE_BYTES)


class _Arrays(io.FileIO):
    """A file that HDF5 writes, which takes all and keeps what the disk has refused to itself: the
    library cannot close a file that fails, and the process crashes."""

    refusal: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            # In parts: a disk that is nearly full takes some.
            while left and self.refusal is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.refusal = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.refusal = self.refusal or error
            return size or 0


def _fill(group: Any, network: Network) -> None:
    """Write the layers of a network into a group, each into its slot."""
    # Empty, and there all the same: Keras has one for each sub-network.
    group.create_group("vars").attrs["name"] = network.name
    for layer, slot in slots_of(network):
        place = group.create_group(f"layers/{slot}")
        if isinstance(layer, Network):
            _fill(place, layer)
            continue
        arrays = place.create_group("vars")
        # For people: Keras finds weights by the number of the group.
        arrays.attrs["name"] = layer.name
        for number, numbers in enumerate(_arrays(layer)):
            arrays.create_dataset(str(number), data=numbers)


def _arrays(layer: Layer) -> list[np.ndarray]:
    """Weights of a layer, fp32 little endian.

    Raises:
        ValueError: One cannot be read.
    """
    arrays = []
    for entry in layer.weights:
        if entry.read is None:
            raise ValueError(f"the weights of {layer.name} have no form in a Keras file")
        # Little endian in any case: a file is read on other machines.
        arrays.append(np.asarray(entry.read(), "<f4"))
    return arrays
