"""Comparison of an ONNX file with the model that it was made of, before anybody gets it.

What the file is to give is computed by the model itself and by OpenCV, without the file's graph,
and in fp64: a difference is then the rounding of whatever runs the file. Between two orders of fp32
sums it can pass 1e-4 where layers are large.

Letters: N faces, S edge of a picture in px, c channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from ...models.autoencoder import Autoencoder, Side
from ..data.sides import SIDES
from .dfm import DfmPlan, constant_mask
from .dfm_crops import Placement
from .onnx_graph import import_onnx

# Fifty times what exports differ by in fp32, 2e-6, and a fortieth of a grey level.
MAX_DIFFERENCE = 1e-4
"""Largest difference from the model, of 0..1, that an export may have."""

Arrays = list[np.ndarray]
Expected = Callable[[np.ndarray], Arrays]
"""What a file gives for one picture (1, S, S, 3) float32, as (1, S, S, c) each, fp32 or fp64."""


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison."""

    difference: float
    """Largest difference from the model, of 0..1."""

    num_pictures: int
    runtime: str
    """Name of what ran the file."""


def verify(content: bytes, pictures: Sequence[np.ndarray], expected: Expected) -> Verdict:
    """Compare a file with what it is to give.

    Args:
        content: The file.
        pictures: (S, S, 3) float32 each, 0..1, of the size that the file takes.
        expected: What it is to give.

    Raises:
        ValueError: The file breaks the rules of ONNX, or differs by more than `MAX_DIFFERENCE`.
    """
    checker = import_onnx().checker
    try:
        # The full check infers every shape, which programs allocate by.
        checker.check_model(content, full_check=True)
    except (checker.ValidationError, import_onnx().shape_inference.InferenceError) as error:
        raise ValueError(f"the file breaks a rule of ONNX: {error}") from error
    runtime, run = _runner(content)
    differences = [
        _difference(found, wanted)
        for picture_ssc in pictures
        for found, wanted in zip(run(picture_ssc[None]), expected(picture_ssc[None]), strict=True)
    ]
    difference = float(np.max(differences))  # where one is no number, neither is this
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(
            f"the file differs from the model by {difference:.1e} in {runtime}, at most "
            f"{MAX_DIFFERENCE:.0e} is allowed; nothing was written"
        )
    return Verdict(difference, len(pictures), runtime)


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference; infinite where the shapes differ."""
    return float(abs(found - wanted).max()) if found.shape == wanted.shape else np.inf


def _runner(content: bytes) -> tuple[str, Expected]:
    """The name of what runs a file on the CPU, and its call: onnxruntime where it is installed,
    else the slow evaluator of the package onnx."""
    onnx = import_onnx()
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(onnx.load_model_from_string(content))
        (name,) = evaluator.input_names
        return "onnx.reference", lambda faces: list(evaluator.run(None, {name: faces}))
    # On the CPU, which every machine has, and whose sums do not depend on a card.
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    return "onnxruntime", lambda faces: list(session.run(None, {port.name: faces}))


def expected_of_plain(exact: Autoencoder) -> Expected:
    """What a file of the model as it is gives; exact: the model in fp64."""

    def run(faces_nssc: np.ndarray) -> Arrays:
        return [output for side in SIDES for output in _decoded(exact, faces_nssc, side)]

    return run


def expected_of_dfm(exact: Autoencoder, plan: DfmPlan) -> Expected:
    """What a .dfm gives; exact: the model in fp64."""
    placement = plan.placement

    def run(picture_1ssc: np.ndarray) -> Arrays:
        picture_ssc = picture_1ssc[0]
        face = _sized(_inside(picture_ssc, placement), exact.input_px)
        of_a, of_b = (_decoded(exact, face[None], side) for side in SIDES)
        swapped = _put(of_b[-2 if exact.build.learn_mask else -1][0], picture_ssc, placement)
        nothing = np.zeros_like(picture_ssc[..., :1])
        if plan.mask == "learned":
            masks = [_put(outputs[-1][0], nothing, placement) for outputs in (of_a, of_b)]
        else:
            masks = [constant_mask(plan)[..., None]] * 2
        return [array[None] for array in (masks[0], swapped, masks[1])]

    return run


@torch.inference_mode()
def _decoded(exact: Autoencoder, faces_nssc: np.ndarray, side: Side) -> Arrays:
    faces_nchw = torch.from_numpy(faces_nssc).permute(0, 3, 1, 2).double()
    return [output.permute(0, 2, 3, 1).numpy() for output in exact.swap(faces_nchw, side)]


def _inside(picture_ssc: np.ndarray, placement: Placement) -> np.ndarray:
    """The model's square of the program's picture, whose border goes on outside."""
    far = placement.side_px
    # As much on every side as the square can reach out, so that one slice serves all cases.
    framed = cv2.copyMakeBorder(picture_ssc, *(far,) * 4, cv2.BORDER_REPLICATE)
    row, column = (at + far for at in placement.corner)
    return framed[row : row + far, column : column + far]


def _put(square: np.ndarray, onto_ssc: np.ndarray, placement: Placement) -> np.ndarray:
    """A copy of a picture with the model's square in its place."""
    far, size_px = placement.side_px, placement.size_px
    framed = cv2.copyMakeBorder(onto_ssc, *(far,) * 4, cv2.BORDER_CONSTANT)
    # OpenCV takes away the axis of a single channel.
    framed = framed.reshape(*framed.shape[:2], -1)
    row, column = (at + far for at in placement.corner)
    framed[row : row + far, column : column + far] = _sized(square, far)
    return framed[far : far + size_px, far : far + size_px]


def _sized(picture: np.ndarray, size_px: int) -> np.ndarray:
    """The picture at another size: the mean of areas where it shrinks, else linear."""
    method = cv2.INTER_AREA if size_px < len(picture) else cv2.INTER_LINEAR
    resized = cv2.resize(picture, (size_px, size_px), interpolation=method)
    return resized.reshape(size_px, size_px, -1)
