"""What is to be exported: the network of a save, its crop, its origin, and faces to try it on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...models.autoencoder import Autoencoder
from ..checkpoint.format import metadata_of
from ..checkpoint.inference import Weights, network_of, read_model, refuse_not_finite
from ..config import Config, to_dict
from ..config.path_settings import each_path
from ..data.decode import decode_one
from ..faces.folder import read_folders
from ..faces.geometry import Crop

# Faces show more of a model than noise does; two of each side take no time. Chosen.
_FACES_OF_SIDE = 2

Report = Callable[[str], None]
"""What is called with each stage of an export, in a few words."""


def silent(_: str) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A save of a model folder, ready to be written for another program."""

    source: Path
    """Folder of the save."""

    network: Autoencoder
    """Network in evaluation mode."""

    config: Config
    state: dict[str, Any]
    """State of the training, as saved."""

    metadata: dict[str, str]
    """Origin: kind, run, version of mien, iterations, hash of the settings."""

    @property
    def crop(self) -> Crop:
        """Crop that it was trained on, at the size of its largest pictures."""
        data, network = self.config.data, self.network
        size_px = max(network.input_px, network.output_px[-1])
        return Crop(data.centering, data.coverage / 100, data.vertical_offset / 100, size_px)

    def faces(self) -> list[np.ndarray]:
        """Crops of the first faces of both folders, (S, S, 3) uint8, BGR; none of a folder that
        is not there any more."""
        crops = []
        data = self.config.data
        for paths in (data.input_a, data.input_b):
            # A model may be exported where its faces are not: the drawn pictures are compared then.
            with suppress(ValueError):
                folder = read_folders(
                    each_path(list(paths)),
                    minimum=0,
                    most=_FACES_OF_SIDE,
                    sub_folders=data.sub_folders,
                )
                crops += [decode_one(face, self.crop) for face in folder.faces]
        return [crop for crop in crops if isinstance(crop, np.ndarray)]


def read_trained_model(
    path: Path,
    generation: str | None = None,
    report: Report = silent,
    weights: Weights = "auto",
) -> TrainedModel:
    """Read a save of a model folder, which is only read.

    Args:
        path: The model folder.
        generation: Name of a save, or `backup`; None: the newest.
        report: Called when it begins.
        weights: Same as for `read_model`.

    Raises:
        ValueError: There is no such save, or it is damaged, does not fit its own settings, or holds
            numbers that are none.
    """
    report("reading the save")
    source, state, config, tensors, chosen = read_model(path, generation, weights=weights)
    refuse_not_finite(tensors)
    # Sorted, so that equal settings have one hash whatever wrote them.
    settings = json.dumps(to_dict(config), sort_keys=True)
    origin = {"config_sha256": hashlib.sha256(settings.encode()).hexdigest()}
    metadata = metadata_of(state) | {"weights": chosen} | origin
    del metadata["format"]  # of the tensors' own file
    return TrainedModel(
        source=source,
        network=network_of(source, config, tensors),
        config=config,
        state=state,
        metadata=metadata,
    )


def sample_pictures(size_px: int, faces: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
    """Pictures to compare with: random values, one value, and faces if there are any.

    Args:
        size_px: Edge of the pictures.
        faces: (E, E, 3) uint8 each.
    """
    # A fixed seed, so that a difference that is found can be found again.
    random = np.random.default_rng(0).random((size_px, size_px, 3), np.float32)
    area = cv2.INTER_AREA
    resized = (cv2.resize(face, (size_px, size_px), interpolation=area) for face in faces)
    return [random, np.full_like(random, 0.5), *[face.astype(np.float32) / 255 for face in resized]]
