"""How good a model is on faces that it was never trained on; what the metrics can show, and
what they cannot, is in docs/evaluating.md.

    ssim_a, ssim_b    SSIM of each side's faces by its own decoder, inside the face mask
    psnr_a, psnr_b    the same of PSNR, dB
    pose_swap, pose_original, identity_a, identity_b    of A by decoder B: `swap_metrics`

Letters: b faces of a batch, s and f edges in px, c = 3 colours, h = w = f.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference import ssim
from ...models.autoencoder import Autoencoder
from ...models.fields import Field
from ..checkpoint.state import TrainingState
from ..config import Config
from ..data.held_out import HeldOutFaces, load_held_out
from ..data.sides import SIDES, SideFaces
from ..faces.folder import skipped
from ..precision import Precision
from ..system.saved_values import require, take
from .onnx_network import Network
from .swap_metrics import IdentityMetric, PoseMetric, SwapMetric

PART = "evaluate"
"""Name under which the state keeps the latest metrics, with the total iteration they are of."""

_MOST_FACES_AT_ONCE = 16  # training may fill a GPU; the preview takes as many; unmeasured
_LEAST_ERROR = 1e-10  # 100 dB; none at all would be infinitely many


@dataclass(frozen=True)
class Evaluation:
    """What a model is measured with."""

    faces: dict[str, HeldOutFaces]
    """Held-out faces by side."""

    swap_metrics: tuple[SwapMetric, ...]
    """Metrics of A's held-out faces as decoded by B."""

    batch_size: int
    """Faces that go through the model at once."""


def open_evaluation(
    config: Config,
    faces: dict[str, SideFaces],
    *,
    input_px: int,
    output_px: tuple[int, ...],
    num_threads: int,
    warn: Callable[[str], None],
) -> Evaluation | None:
    """The held-out faces and the networks that measure swaps; None where no faces are held out.

    Raises:
        ValueError: No held-out face of a side can be used, or a network's file cannot.
    """
    settings = config.evaluate
    # Both sides or none: a score of one alone would say nothing about a swap.
    if not all(opened.held_out.faces for opened in faces.values()):
        return None
    loaded = {
        side: load_held_out(
            opened.held_out,
            config.data,
            count=settings.max_faces,
            input_px=input_px,
            output_px=output_px,
            num_threads=num_threads,
        )
        for side, opened in faces.items()
    }
    for held_out in loaded.values():
        if held_out.rejected:
            warn(skipped(held_out.rejected, "held out"))
    swap_metrics: list[SwapMetric] = []
    if settings.landmark_model:
        network = Network(settings.landmark_model, "evaluate.landmark_model")
        swap_metrics.append(PoseMetric(network, loaded["a"]))
    if settings.embedding_model:
        network = Network(
            settings.embedding_model, "evaluate.embedding_model", middle=127.5, span=127.5
        )
        swap_metrics.append(IdentityMetric(network, loaded))
    batch_size = min(config.train.batch_size, _MOST_FACES_AT_ONCE)
    return Evaluation(loaded, tuple(swap_metrics), batch_size)


def measured_at(state: TrainingState) -> int | None:
    """Total iteration of the metrics that a state holds; None where there are none.

    Raises:
        ValueError: The part that was saved is not valid.
    """
    if PART not in state.parts:
        return None
    part, prefix = state.parts[PART], f"parts.{PART}."
    require("iteration" in part, f"{prefix}iteration", "there", None)
    for name in part.keys() - {"iteration"}:
        take(Field(type=float), part[name], f"{prefix}{name}")
    iterations = Field(type=int, low=0, high=state.iterations)
    return take(iterations, part["iteration"], f"{prefix}iteration")


@torch.no_grad()
def evaluate(model: Autoencoder, precision: Precision, evaluation: Evaluation) -> dict[str, float]:
    """Metrics of the present weights, by name; the model is left as it was."""
    metrics = {}
    swaps: list[np.ndarray] = []
    # Dropout and noise off, and norms by their running estimates, as in a swap.
    model.eval()
    for side in SIDES:
        faces = evaluation.faces[side]
        similarities: list[float] = []
        ratios: list[float] = []
        for begin in range(0, len(faces.inputs_nssc), evaluation.batch_size):
            batch = slice(begin, begin + evaluation.batch_size)
            inputs_bcss = _shares(model, faces.inputs_nssc[batch], precision.compute)
            codes = model.encode(inputs_bcss)
            # In fp64: sums over a large face lose digits that a metric of 0.999 needs.
            pred_bchw = _face(model, model.decode(model.side_code(codes, side), side)).double()
            target_bchw = _shares(model, faces.targets_nffc[batch], torch.float64)
            mask_b1hw = _shares(model, faces.masks_nff[batch, ..., None], torch.float64)
            for face in zip(pred_bchw, target_bchw, mask_b1hw, strict=True):  # spares memory
                similarities.append(float(masked_ssim(*face)))
                ratios.append(float(masked_psnr(*face)))
            if side == "a" and evaluation.swap_metrics:
                swaps.append(_pixels(_face(model, model.decode(model.side_code(codes, "b"), "b"))))
        # The mean of faces, not of all pixels: a face counts as one however much its mask covers.
        metrics[f"ssim_{side}"] = float(np.mean(similarities))
        metrics[f"psnr_{side}"] = float(np.mean(ratios))
    model.train()
    for metric in evaluation.swap_metrics:
        metrics |= metric(np.concatenate(swaps))
    return metrics


def masked_ssim(pred_chw: Tensor, target_chw: Tensor, mask_1hw: Tensor) -> Tensor:
    """Mean SSIM of a face in 0..1, its pixels weighted by the mask; up to 1."""
    return _masked_mean(1 - ssim(pred_chw[None], target_chw[None])[0], mask_1hw)


def masked_psnr(pred_chw: Tensor, target_chw: Tensor, mask_1hw: Tensor) -> Tensor:
    """PSNR of a face in 0..1, its pixels weighted by the mask; dB, up to 100."""
    error = _masked_mean((pred_chw - target_chw).square(), mask_1hw)
    return -10 * error.clamp(min=_LEAST_ERROR).log10()


def _masked_mean(map_chw: Tensor, mask_1hw: Tensor) -> Tensor:
    return (map_chw * mask_1hw).sum() / (len(map_chw) * mask_1hw.sum())


def _shares(model: Autoencoder, pixels_nhwc: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Bytes as 0..1, where the model is."""
    device = next(model.parameters()).device
    # Sent as bytes, a quarter of fp32, and widened there.
    return torch.from_numpy(pixels_nhwc).permute(0, 3, 1, 2).to(device).to(dtype) / 255


def _face(model: Autoencoder, outputs: tuple[Tensor, ...]) -> Tensor:
    """The largest face of what a decoder gives."""
    return outputs[-2] if model.build.learn_mask else outputs[-1]


def _pixels(face_bchw: Tensor) -> np.ndarray:
    """(b, f, f, c) uint8 of a face in 0..1."""
    # As bytes: a metric's network is to see what a frame would hold.
    bytes_bchw = (face_bchw.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return bytes_bchw.permute(0, 2, 3, 1).cpu().contiguous().numpy()
