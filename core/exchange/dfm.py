"""A trained model as one ONNX file: plain, or as the .dfm that face-swap programs load.

A .dfm takes the square that its program cuts out of the film and gives the swapped square, both of
S px. A model that was trained on another square cuts its own one out of it, and what lies outside
stays as it came, under a mask of zeros.

Letters: N faces, S edge of the program's picture, W edge of the model's square in it, h rows,
w columns, c channels. Pictures are 0..1, BGR.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from ...models.autoencoder import Autoencoder
from ..data.sides import SIDES
from ..faces.geometry import MEAN_FACE_L2, Crop, transform
from ..faces.masks import landmark_mask
from .dfm_crops import PROGRAMS, Placement, model_square, place, program_square
from .onnx_graph import OnnxGraph, Port
from .onnx_layers import ModelWriter

MASKS = ("learned", "mean", "ones")

# Chosen with the mean face's outline, untried in the programs.
_FEATHER = 0.06
"""Width of the mean face's soft edge, normalised."""

_DFM_INPUT = "in_face:0"
_DFM_OUTPUTS = {"out_face_mask:0": 1, "out_celeb_face:0": 3, "out_celeb_face_mask:0": 1}
"""Outputs and their channels, in the order in which programs find them: the mask of the film's
face, the swapped face, its mask."""


@dataclass(frozen=True)
class OnnxFile:
    """What an ONNX file is to hold: its graph, and what goes in and out."""

    graph: OnnxGraph
    input: Port
    outputs: tuple[Port, ...]

    def content(self, metadata: dict[str, str]) -> bytes:
        """Bytes of the file; ValueError where they are too many for one."""
        return self.graph.content([self.input], [*self.outputs], metadata, metadata["kind"])


def plain_file(network: Autoencoder) -> OnnxFile:
    """Model as it is: a face in, every output of both sides out.

    Raises:
        ValueError: It has a layer that cannot be said in ONNX.
    """
    graph, model = OnnxGraph(), network.graph()
    face = graph.add("Transpose", "face", perm=[0, 3, 1, 2])
    names = ModelWriter(graph).write(model, face, face)
    ports = [
        Port(name, value.shape)
        for name, value in zip(_plain_names(network), model.outputs, strict=True)
    ]
    for name, port in zip(names, ports, strict=True):
        graph.add("Transpose", name, output=port.name, perm=[0, 2, 3, 1])
    return OnnxFile(graph, Port("face", (network.input_px, network.input_px, 3)), tuple(ports))


def _plain_names(network: Autoencoder) -> list[str]:
    """Names of the outputs: `face_a`, before it smaller ones by their size, behind it `mask_a`;
    then those of B."""
    names = []
    for side in SIDES:
        names += [f"face_{side}_{edge_px}px" for edge_px in network.output_px[:-1]]
        names += [f"face_{side}"]
        names += [f"mask_{side}"] if network.build.learn_mask else []
    return names


@dataclass(frozen=True)
class DfmPlan:
    """Choices that make a .dfm of a model."""

    target: str
    mask: str
    placement: Placement

    @property
    def size_px(self) -> int:
        """Edge of the pictures that go in and out."""
        return self.placement.size_px


def dfm_plan(network: Autoencoder, crop: Crop, target: str, mask: str | None) -> DfmPlan:
    """Choose the sizes of a .dfm.

    Args:
        network: The model.
        crop: Crop that it was trained on.
        target: Program that is to load it, a key of `PROGRAMS`.
        mask: One of `MASKS`; None: the learned mask where there is one, else the mean face.

    Raises:
        ValueError: The model has learned no mask, and is to put out one.
    """
    if mask == "learned" and not network.build.learn_mask:
        raise ValueError(
            "mask must be mean or ones for a model that has learned none, got learned; train with "
            "model.learn_mask to have one"
        )
    default = "learned" if network.build.learn_mask else "mean"
    # The larger of both: facefusion pastes what comes out at the size that went in.
    side_px = max(network.input_px, network.output_px[-1])
    placement = place(model_square(crop), program_square(target), side_px)
    return DfmPlan(target, mask or default, placement)


def dfm_file(network: Autoencoder, plan: DfmPlan) -> OnnxFile:
    """Model as a .dfm.

    Raises:
        ValueError: It has a layer that cannot be said in ONNX.
    """
    graph, model, placement = OnnxGraph(), network.graph(), plan.placement
    picture = graph.add("Transpose", _DFM_INPUT, perm=[0, 3, 1, 2])
    face = _resized(graph, _cut(graph, picture, placement), placement.side_px, network.input_px)
    outputs = ModelWriter(graph).write(model, face, face)
    of_a, of_b = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    edge_px, learned = network.output_px[-1], network.build.learn_mask

    def placed(name: str) -> str:
        return _pasted(graph, _resized(graph, name, edge_px, placement.side_px), placement)

    swapped = placed(of_b[-2] if learned else of_b[-1])
    if not placement.is_whole:
        is_model = graph.constant(_square_of_ones(placement).astype(bool)[None, None])
        # The film's own pixels around it, and no black: facefusion matches colours over the whole.
        swapped = graph.add("Where", is_model, swapped, picture)
    if plan.mask == "learned":
        # The film's face as decoded by A, then the swap's: programs take the smaller of the two.
        masks = (placed(of_a[-1]), placed(of_b[-1]))
    else:
        masks = (_repeated(graph, constant_mask(plan), picture),) * 2
    size_px = plan.size_px
    values = (masks[0], swapped, masks[1])
    ports = tuple(Port(name, (size_px, size_px, c)) for name, c in _DFM_OUTPUTS.items())
    for name, port in zip(values, ports, strict=True):
        graph.add("Transpose", name, output=port.name, perm=[0, 2, 3, 1])
    return OnnxFile(graph, Port(_DFM_INPUT, (size_px, size_px, 3)), ports)


def constant_mask(plan: DfmPlan) -> np.ndarray:
    """Mask of a model that has learned none, (S, S) float32: the mean face with a soft edge, or
    ones; 0 outside the model's square."""
    square = _square_of_ones(plan.placement)
    if plan.mask == "ones":
        return square
    program, size_px = PROGRAMS[plan.target], plan.size_px
    # In the program's square, not in the model's: it pastes its own back.
    matrix_23 = size_px * program.matrix(MEAN_FACE_L2)
    mask = landmark_mask("extended", transform(MEAN_FACE_L2, matrix_23), size_px)
    feather_px = _FEATHER * size_px / program_square(plan.target).side
    inner = square
    if not plan.placement.is_whole:  # the edge is soft where the model's square cuts it, too
        kernel = np.ones((2 * round(feather_px) + 1,) * 2, np.uint8)
        inner = cv2.erode(square, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    soft = cv2.GaussianBlur(inner * (mask / np.float32(255)), (0, 0), feather_px / 2)
    return square * soft.clip(max=1)  # the filter's shares add up to 1 but for its rounding


def _square_of_ones(placement: Placement) -> np.ndarray:
    """(S, S) float32: 1 inside the model's square, 0 outside."""
    ones = np.zeros((placement.size_px,) * 2, np.float32)
    rows, columns = (slice(max(at, 0), at + placement.side_px) for at in placement.corner)
    ones[rows, columns] = 1
    return ones


def _resized(graph: OnnxGraph, x: str, from_px: int, to_px: int) -> str:
    """The square picture at another size: the mean of an area where it shrinks, else linear.

    Products with the shares of pixels are exact for every pair of sizes, in every runtime.
    """
    if from_px == to_px:
        return x
    shares = _area_shares(from_px, to_px) if to_px < from_px else _linear_shares(from_px, to_px)
    rows = graph.add("MatMul", graph.constant(shares), x)
    return graph.add("MatMul", rows, graph.constant(shares.T))


def _area_shares(from_px: int, to_px: int) -> np.ndarray:
    """(to_px, from_px) float32: the share of each pixel in each that takes its place."""
    edges, pixels = np.arange(to_px + 1) * (from_px / to_px), np.arange(from_px)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (covered.clip(min=0) * (to_px / from_px)).astype(np.float32)


def _linear_shares(from_px: int, to_px: int) -> np.ndarray:
    """(to_px, from_px) float32: the same where the picture grows."""
    # Centres of pixels, as OpenCV's resize: training has made its pictures by that.
    centres = ((np.arange(to_px) + 0.5) * (from_px / to_px) - 0.5).clip(0, from_px - 1)
    return (1 - abs(centres[:, None] - np.arange(from_px))).clip(min=0).astype(np.float32)


def _cut(graph: OnnxGraph, picture: str, placement: Placement) -> str:
    """The model's square of the program's picture, whose border goes on outside."""
    if placement.is_whole:
        return picture
    before = [max(-at, 0) for at in placement.corner]
    after = [max(at + placement.side_px - placement.size_px, 0) for at in placement.corner]
    if any(before + after):
        picture = graph.add("Pad", picture, graph.sizes(0, 0, *before, 0, 0, *after), mode="edge")
    begins = [at + pad for at, pad in zip(placement.corner, before, strict=True)]
    return _sliced(graph, picture, begins, [at + placement.side_px for at in begins])


def _pasted(graph: OnnxGraph, square: str, placement: Placement) -> str:
    """The program's picture: the model's square in its place, 0 outside."""
    if placement.is_whole:
        return square
    size_px, side_px = placement.size_px, placement.side_px
    begins = [max(-at, 0) for at in placement.corner]
    ends = [min(size_px - at, side_px) for at in placement.corner]
    part = _sliced(graph, square, begins, ends)
    before = [max(at, 0) for at in placement.corner]
    after = [max(size_px - side_px - at, 0) for at in placement.corner]
    # Its value is left out, which stands for zeros: a mask ends where the square does.
    return graph.add("Pad", part, graph.sizes(0, 0, *before, 0, 0, *after))


def _sliced(graph: OnnxGraph, x: str, begins: list[int], ends: list[int]) -> str:
    return graph.add("Slice", x, graph.sizes(*begins), graph.sizes(*ends), graph.sizes(2, 3))


def _repeated(graph: OnnxGraph, mask_ss: np.ndarray, picture: str) -> str:
    """A constant mask, once for each face of a batch."""
    shape = graph.add("Shape", picture)
    batch = graph.add("Slice", shape, graph.sizes(0), graph.sizes(1))
    # The batch is known only where the file runs, so the shape is put together there.
    one_each = graph.add("Concat", batch, graph.sizes(1, 1, 1), axis=0)
    return graph.add("Expand", graph.constant(mask_ss[None, None]), one_each)
