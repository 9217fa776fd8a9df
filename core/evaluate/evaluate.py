"""How good a model is on faces that it was never trained on; what the figures can tell, and what
they cannot, is in docs/evaluating.md.

    ssim_a, ssim_b    SSIM of each side's faces by its own decoder, inside the face mask
    psnr_a, psnr_b    the same of PSNR, dB
    pose_swap, pose_original, identity_a, identity_b    of A by decoder B: `judges`

Letters: b faces of a batch, s and f edges in px, c = 3 colours, h = w = f.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference import ssim
from ...models.autoencoder import Autoencoder
from ..checkpoint.state import TrainingState
from ..config import Config
from ..data.held_out import HeldOutFaces, load_held_out
from ..data.sides import SIDES, SideFaces
from ..faces.folder import skipped
from ..precision import Precision
from ..system import saved_values
from .onnx_network import Network
from .swap_metrics import IdentityJudge, Judge, PoseJudge

PART = "evaluate"
"""Name under which the state keeps the latest metrics, with the total iteration they are of."""

_MOST_FACES_AT_ONCE = 16  # a GPU may be filled by training; the preview takes as many
_LEAST_ERROR = 1e-10  # 100 dB; none at all would be infinitely many


@dataclass(frozen=True)
class Evaluation:
    """What a model is measured with."""

    faces: dict[str, HeldOutFaces]
    """Held-out faces by side."""

    judges: tuple[Judge, ...]
    """What is told of the swaps."""

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
    """The held-out faces and the networks that judge swaps; None where no faces are held out.

    Raises:
        ValueError: No held-out face of a side can be used, or a network's file cannot.
    """
    settings = config.evaluate
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
    judges: list[Judge] = []
    if settings.landmark_model:
        network = Network(settings.landmark_model, "evaluate.landmark_model")
        judges.append(PoseJudge(network, loaded["a"]))
    if settings.embedding_model:
        network = Network(
            settings.embedding_model, "evaluate.embedding_model", middle=127.5, span=127.5
        )
        judges.append(IdentityJudge(network, loaded))
    batch_size = min(config.train.batch_size, _MOST_FACES_AT_ONCE)
    return Evaluation(loaded, tuple(judges), batch_size)


def measured_at(state: TrainingState) -> int | None:
    """The total iteration of the figures that a state holds; None where there are none.

    Raises:
        ValueError: The part that was saved is not valid.
    """
    if PART not in state.parts:
        return None
    part, prefix = state.parts[PART], f"parts.{PART}."
    saved_values.require("iteration" in part, f"{prefix}iteration", "there", None)
    for name in part.keys() - {"iteration"}:
        saved_values.number(part, name, prefix)
    return saved_values.count(part, "iteration", prefix, high=state.iterations)


@torch.no_grad()
def evaluate(model: Autoencoder, precision: Precision, evaluation: Evaluation) -> dict[str, float]:
    """The figures of the present weights, by name; of the model nothing is changed by it."""
    figures = {}
    swaps: list[np.ndarray] = []
    model.eval()
    for side in SIDES:
        faces = evaluation.faces[side]
        similarities: list[float] = []
        ratios: list[float] = []
        for begin in range(0, len(faces.inputs_nssc), evaluation.batch_size):
            batch = slice(begin, begin + evaluation.batch_size)
            inputs_bcss = _shares(model, faces.inputs_nssc[batch], precision.compute)
            codes = model.encode(inputs_bcss)
            pred_bchw = _face(model, model.decode(model.mix(codes, side), side)).double()
            target_bchw = _shares(model, faces.targets_nffc[batch], torch.float64)
            mask_b1hw = _shares(model, faces.masks_nff[batch, ..., None], torch.float64)
            for face in zip(pred_bchw, target_bchw, mask_b1hw, strict=True):  # spares memory
                similarities.append(float(masked_ssim(*face)))
                ratios.append(float(masked_psnr(*face)))
            if side == "a" and evaluation.judges:
                swaps.append(_pixels(_face(model, model.decode(model.mix(codes, "b"), "b"))))
        figures[f"ssim_{side}"] = float(np.mean(similarities))
        figures[f"psnr_{side}"] = float(np.mean(ratios))
    model.train()
    for judge in evaluation.judges:
        figures |= judge(np.concatenate(swaps))
    return figures


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
    return torch.from_numpy(pixels_nhwc).permute(0, 3, 1, 2).to(device).to(dtype) / 255


def _face(model: Autoencoder, outputs: tuple[Tensor, ...]) -> Tensor:
    """The largest face of what a decoder gives."""
    return outputs[-2] if model.build.learn_mask else outputs[-1]


def _pixels(face_bchw: Tensor) -> np.ndarray:
    """(b, f, f, c) uint8 of a face in 0..1."""
    bytes_bchw = (face_bchw.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return bytes_bchw.permute(0, 2, 3, 1).cpu().contiguous().numpy()
