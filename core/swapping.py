"""A trained model in use: faces of one side, decoded as the other.

Letters: N faces, E edge of a picture in px, S edge of the model's output.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import models
from ..models.autoencoder import Autoencoder, Side
from .checkpoint.inference import SCHEMA, built, network_of, read_model, refuse_misfit
from .checkpoint.inference import SIDES as SIDES_OF
from .config import DataConfig, from_dict
from .faces.geometry import resize


@dataclass(frozen=True, kw_only=True)
class SwapModel:
    """A trained model, ready to decode faces."""

    network: Autoencoder
    """Network in evaluation mode, on its device."""

    sides: tuple[Side, ...]
    """Sides as whom it decodes faces."""

    centering: str
    """What the crops of the faces that it was trained on are centred on: face, head or legacy."""

    coverage: float
    """Share of such a crop that it sees, in percent."""

    vertical_offset: int
    """How far the crop is moved down, in percent of its edge."""

    @property
    def input_px(self) -> int:
        """Edge of the pictures that the network takes."""
        return self.network.input_px

    @property
    def output_px(self) -> int:
        """Edge of the faces that come back."""
        return self.network.output_px[-1]


def load_model(
    path: str | Path, *, generation: str | None = None, device: str | torch.device = "cpu"
) -> SwapModel:
    """Read a model for use.

    Args:
        path: A model folder, which is only read, or a file of `mien model inference`.
        generation: Name of a save of the folder, or `backup`; None: the newest.
        device: Device on which it is to compute.

    Raises:
        ValueError: There is no model, it is damaged, or it does not fit its own settings; one line
            says which.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_folder(path, generation, device)
    if generation is not None:
        raise ValueError(f"{path} is no model folder, so it has no generation {generation!r}")
    return _of_file(path, device)


def swap(
    model: SwapModel, images: np.ndarray, side: Side = "b", batch_size: int = 16
) -> np.ndarray:
    """Decode faces as one side: those of the other are swapped, its own re-created.

    Args:
        model: Model from `load_model`.
        images: (N, E, E, 3) uint8, BGR: crops as the model was trained on, of any edge.
        side: Side as whom the faces are decoded.
        batch_size: Faces that are computed at a time.

    Returns:
        (N, S, S, 3) uint8, BGR.

    Raises:
        ValueError: The pictures have another form, or the model has no such side.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != _square(images):
        shape = "x".join(map(str, images.shape))
        raise ValueError(f"images must be (N, E, E, 3) of uint8, got {shape} of {images.dtype}")
    if side not in model.sides:
        raise ValueError(f"side must be one of {', '.join(model.sides)}, got {side!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    decoded = [
        _decoded(model, images[first : first + batch_size], side)
        for first in range(0, len(images), batch_size)
    ]
    edge_px = model.output_px
    return np.concatenate(decoded) if decoded else np.empty((0, edge_px, edge_px, 3), np.uint8)


def _square(images: np.ndarray) -> tuple[int, int, int]:
    """The shape of a square picture in colours that is as high as these."""
    return images.shape[1], images.shape[1], 3


@torch.inference_mode()
def _decoded(model: SwapModel, images: np.ndarray, side: Side) -> np.ndarray:
    device = next(model.network.parameters()).device
    faces_nhwc = np.stack([resize(image, model.input_px) for image in images])
    faces_nchw = torch.from_numpy(faces_nhwc).to(device).permute(0, 3, 1, 2).float() / 255
    outputs = model.network.swap(faces_nchw, side)
    decoded_nchw = outputs[-2] if model.network.build.learn_mask else outputs[-1]
    levels_nchw = (decoded_nchw.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return levels_nchw.permute(0, 2, 3, 1).cpu().contiguous().numpy()


def _of_folder(path: Path, generation: str | None, device: str | torch.device) -> SwapModel:
    source, _, config, tensors = read_model(path, generation)
    network = network_of(source, config, tensors).to(device)
    return _ready(network, SIDES_OF["both"], config.data)


def _of_file(path: Path, device: str | torch.device) -> SwapModel:
    if not path.is_file():
        raise ValueError(f"{path} is neither a model folder nor a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                raise ValueError(f"{path} is no file of `mien model inference`")
            sides = SIDES_OF[metadata["side"]]
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            options = json.loads(metadata["options"])
            own = models.meta_model(metadata["trainer"], **options)
            refuse_misfit(path, own, shapes, sides)  # before there is memory for any
            tensors = {name: file.get_tensor(name) for name in shapes}
            data = from_dict(
                {
                    "data": {
                        "centering": metadata["centering"],
                        "coverage": float(metadata["coverage"]),
                        "vertical_offset": int(metadata["vertical_offset"]),
                    }
                }
            ).data
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its metadata is not that of a model") from error
    plain = {name: _as_fp32(tensor) for name, tensor in tensors.items()}
    network = built(metadata["trainer"], options, plain).to(device)
    return _ready(network, sides, data)


def _ready(network: Autoencoder, sides: tuple[Side, ...], data: DataConfig) -> SwapModel:
    return SwapModel(
        network=network,
        sides=sides,
        centering=data.centering,
        coverage=data.coverage,
        vertical_offset=data.vertical_offset,
    )


def _as_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
