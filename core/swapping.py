"""A trained model in use: faces of one side, decoded as the other.

Letters: N or B faces, E edge of a picture in px, S edge of the model's output; nhwc, nchw: face,
row, column, channel.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import models
from ..models.autoencoder import Autoencoder, Side
from .checkpoint.format import open_tensors
from .checkpoint.inference import SCHEMA, Weights, built, network_of, read_model, refuse_misfit
from .checkpoint.inference import SIDES as SIDES_OF
from .config import DataConfig, from_dict
from .data.decode import decode_one
from .faces.folder import read_face
from .faces.geometry import Crop, resize
from .faces.png import FaceFileError
from .system.durable_files import DamagedError

_WARM_UP_RUNS = 2
"""Runs before a capture, as the training's graph has them; unmeasured on a GPU."""


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

    run_id: str
    """Name of the run that trained it, for whatever is made with it."""

    iterations: int
    """Number of iterations that it was trained for."""

    weights: str = "raw"
    """Weights that it has: those of the training (raw), or their average (ema)."""

    @property
    def input_px(self) -> int:
        """Edge of the pictures that the network takes."""
        return self.network.input_px

    @property
    def output_px(self) -> int:
        """Edge of the faces that come back."""
        return self.network.output_px[-1]

    @property
    def crop(self) -> Crop:
        """Part of a face that the network takes, at its size."""
        return Crop(self.centering, self.coverage / 100, self.vertical_offset / 100, self.input_px)

    @property
    def has_mask(self) -> bool:
        """Whether a mask comes back with each face."""
        return self.network.build.learn_mask

    @property
    def device(self) -> torch.device:
        """Device on which it computes."""
        return next(self.network.parameters()).device


def load_model(
    path: str | Path,
    *,
    generation: str | None = None,
    device: str | torch.device = "cpu",
    weights: Weights = "auto",
) -> SwapModel:
    """Read a model for use.

    Args:
        path: A model folder, which is only read, or a file of `mien model inference`.
        generation: Name of a save of the folder, or `backup`; None: the newest.
        device: Device on which it is to compute.
        weights: Weights of a folder's save: of the training (raw), their average (ema), which
            `train.ema` or schedule-free keeps, or that where there is one (auto). A file has those
            that it was made with.

    Raises:
        ValueError: There is no model, it is damaged, or it does not fit its own settings; one line
            says which.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_folder(path, generation, device, weights)
    # Refused, not passed over: a user who names a save would get another one.
    if generation is not None:
        raise ValueError(f"{path} is no model folder, so it has no generation {generation!r}")
    if weights != "auto":
        raise ValueError(
            f"{path} is no model folder, so it has one set of weights, not {weights!r}; leave "
            "weights out"
        )
    return _of_file(path, device)


def read_crops(model: SwapModel, paths: Iterable[str | Path]) -> np.ndarray:
    """Cut the faces out of face files as the model was trained on them.

    Args:
        model: Model from `load_model`.
        paths: Face PNGs, or JPEGs of DeepFaceLab.

    Returns:
        (N, E, E, 3) uint8, BGR, at the edge that the model takes.

    Raises:
        ValueError: There is no path, or a file is no usable face; one line says which.
    """
    crops = [_read_crop(Path(path).expanduser(), model.crop) for path in paths]
    if not crops:
        raise ValueError("paths must name one face file or more, got none")
    return np.stack(crops)


def _read_crop(path: Path, crop: Crop) -> np.ndarray:
    """One face's crop, (E, E, 3) uint8 BGR."""
    try:
        decoded = decode_one(read_face(path)[0], crop)
        if isinstance(decoded, FaceFileError):
            raise decoded
    except FaceFileError as error:
        raise ValueError(f"{path}: {error}") from None
    return decoded


def swap(
    model: SwapModel, faces: np.ndarray, side: Side = "b", batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode faces as one side: those of the other are swapped, its own re-created.

    Args:
        model: Model from `load_model`.
        faces: (N, E, E, 3) BGR, uint8 or float32 in 0..1: crops as the model was trained on, of
            any edge.
        side: Side as whom the faces are decoded.
        batch_size: Faces that are computed at a time.

    Returns:
        (N, S, S, 3) BGR, and the masks that the model has learned, (N, S, S), or None; both of the
        dtype of the faces.

    Raises:
        ValueError: The faces have another form, or the model has no such side.
    """
    _check_faces(faces)
    require_side(model, side)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    # In fp32, where weights stay as they are: the caller's model may be asked again.
    decoder = BatchDecoder(model, side, batch_size)
    edge_px = model.output_px
    pictures = np.empty((len(faces), edge_px, edge_px, 3), faces.dtype)
    masks = np.empty(pictures.shape[:3], faces.dtype) if model.has_mask else None
    for first in range(0, len(faces), batch_size):
        batch = slice(first, first + batch_size)
        # By the filters of training: another one gives the model pictures that it has not learned.
        resized = np.stack([resize(face, model.input_px) for face in faces[batch]])
        decoded, mask = decoder(_shares(resized))
        pictures[batch] = _levels(decoded, faces.dtype)
        if masks is not None and mask is not None:
            masks[batch] = _levels(mask, faces.dtype)
    return pictures, masks


def require_side(model: SwapModel, side: str) -> None:
    """Refuse, by a ValueError, a side as whom the model cannot decode."""
    if side not in model.sides:
        raise ValueError(f"side must be one of {', '.join(model.sides)}, got {side!r}")


class BatchDecoder:
    """Decoding of faces as one side; on a GPU a CUDA graph, which each batch replays.

    Args:
        model: Model from `load_model`.
        side: Side as whom the faces are decoded.
        batch_size: Most faces of a call.
        compute: Number format in which it is computed. With one of 16 bits this takes over the
            model's weights: they become copies in it.
    """

    def __init__(
        self,
        model: SwapModel,
        side: Side,
        batch_size: int,
        compute: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._side = model, side
        self._batch_size, self._compute = batch_size, compute
        # The weights alone: norms keep their statistics in fp32, as in training.
        for parameter in model.network.parameters():
            parameter.data = parameter.data.to(compute)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs_bchw: Tensor
        self._outputs: tuple[Tensor, Tensor | None]

    @torch.inference_mode()
    def __call__(self, faces_nhwc: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The faces decoded, (n, S, S, 3), and their masks, (n, S, S), or None; float32 in 0..1.

        Args:
            faces_nhwc: Up to a batch of faces at the model's input size, BGR, float32 in 0..1.
        """
        count = len(faces_nhwc)
        faces_nchw = torch.from_numpy(faces_nhwc).permute(0, 3, 1, 2)
        if self._model.device.type == "cuda":
            with torch.cuda.device(self._model.device):
                face_bchw, mask_b1hw = self._replayed(faces_nchw)
        else:
            face_bchw, mask_b1hw = self._decoded(faces_nchw.to(self._compute))
        pictures_nhwc = face_bchw[:count].permute(0, 2, 3, 1).cpu().contiguous().numpy()
        masks_nhw = None if mask_b1hw is None else mask_b1hw[:count, 0].cpu().numpy()
        return pictures_nhwc, masks_nhw

    def _replayed(self, faces_nchw: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the graph makes of a batch that begins with these faces."""
        if self._graph is None:
            self._graph = self._captured()
        # A last, smaller batch leaves old faces behind it, whose results are cut off.
        self._inputs_bchw[: len(faces_nchw)].copy_(faces_nchw)
        self._graph.replay()
        return self._outputs

    def _decoded(self, faces_bchw: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest face and its mask, fp32 in 0..1."""
        outputs = self._model.network.swap(faces_bchw, self._side)
        if self._model.has_mask:
            return outputs[-2].float().clamp(0, 1), outputs[-1].float().clamp(0, 1)
        return outputs[-1].float().clamp(0, 1), None

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Record the decoding of a batch; run before, so that libraries have chosen their ways."""
        edge_px, stream = self._model.input_px, torch.cuda.Stream()
        # Outside of the capture, in the program's own memory: each replay reads from this address.
        self._inputs_bchw = torch.zeros(
            self._batch_size, 3, edge_px, edge_px, device=self._model.device, dtype=self._compute
        )
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self._decoded(self._inputs_bchw)
        # The program's stream goes on behind the warm-up, whose memory it may be given.
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread of the program may use the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = self._decoded(self._inputs_bchw)
        return graph


def _check_faces(faces: np.ndarray) -> None:
    """Refuse, by a ValueError, what are no faces."""
    is_square = faces.ndim == 4 and faces.shape[1:] == (faces.shape[1], faces.shape[1], 3)
    if faces.dtype not in (np.uint8, np.float32) or not is_square or not faces.shape[1]:
        shape = "x".join(map(str, faces.shape))
        raise ValueError(
            f"faces must be (N, E, E, 3) of uint8 or float32, got {shape} of {faces.dtype}"
        )
    # `not <=`: NaN is refused, too. Levels up to 255 would pass for very bright faces.
    if faces.dtype == np.float32 and faces.size and not (0 <= faces.min() and faces.max() <= 1):
        raise ValueError(
            f"faces of float32 must be within 0..1, got {faces.min():g} to {faces.max():g}; divide "
            "levels by 255"
        )


def _shares(faces: np.ndarray) -> np.ndarray:
    """The faces as float32 in 0..1; a cubic that enlarges them goes beyond."""
    if faces.dtype == np.uint8:
        return faces.astype(np.float32) / 255
    return faces.clip(0, 1)


def _levels(shares: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in 0..1 as the dtype holds them."""
    return np.rint(shares * 255).astype(np.uint8) if dtype == np.uint8 else shares


def _of_folder(
    path: Path, generation: str | None, device: str | torch.device, weights: Weights
) -> SwapModel:
    source, state, config, tensors, chosen = read_model(path, generation, weights=weights)
    network = network_of(source, config, tensors).to(device)
    facts = state["run_id"], state["iterations"], chosen
    return _ready(network, SIDES_OF["both"], config.data, *facts)


def _of_file(path: Path, device: str | torch.device) -> SwapModel:
    if not path.is_file():
        raise ValueError(f"{path} is neither a model folder nor a file")
    try:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                raise ValueError(f"{path} is no file of `mien model inference`")
            sides = SIDES_OF[metadata["side"]]
            run_id, iterations = metadata["run_id"], int(metadata["iterations"])
            # From the header: the shapes are compared before there is memory for any tensor.
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
    except (OSError, DamagedError) as error:
        # An error of the library has its text alone, and no `strerror`.
        reason, remedy = (
            (error.strerror or error, "")
            if isinstance(error, OSError)
            else (error, "; give a model folder, or a file of `mien model inference`")
        )
        raise ValueError(f"cannot read {path}: {reason}{remedy}") from error
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its metadata is not that of a model") from error
    # A file may hold 16 bits; the model is built in fp32 and computes in what the caller says.
    plain = {name: _as_fp32(tensor) for name, tensor in tensors.items()}
    network = built(metadata["trainer"], options, plain).to(device)
    weights = "ema" if metadata.get("weights") == "ema" else "raw"
    return _ready(network, sides, data, run_id, iterations, weights)


def _ready(
    network: Autoencoder,
    sides: tuple[Side, ...],
    data: DataConfig,
    run_id: str,
    iterations: int,
    weights: str,
) -> SwapModel:
    return SwapModel(
        network=network,
        sides=sides,
        centering=data.centering,
        coverage=data.coverage,
        vertical_offset=data.vertical_offset,
        run_id=run_id,
        iterations=iterations,
        weights=weights,
    )


def _as_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
