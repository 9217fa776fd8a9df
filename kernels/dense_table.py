"""Shares of programs of a GPU in the low-rank gradients of a model's dense layers.

The update takes a tile of a weight by program. The norm takes a span of the columns of one factor
by program, multiplies it with itself and leaves a Gram matrix of a span, faces by faces.

Letters: L layers, M tiles, P spans, C columns of the table of layers.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import auto

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, are_aligned, check_memory, check_tensor
from .dense import LowRank, low_rank_of
from .places import Places


class LayerColumn(Places):
    """Column of the table of layers."""

    TENSOR = auto()
    """Number of the weight in its `TensorTable`."""

    INPUTS = auto()
    """Columns of the weight."""

    OUTPUTS = auto()
    """Rows of the weight."""

    FIRST_SLOT = auto()
    """First partial sum of the norm."""

    FIRST_SPAN_OF_INPUTS = auto()
    """First span of the layer's input."""

    FIRST_SPAN_OF_GRAD_OUTPUTS = auto()
    """First span of its grad_output, where those of the input end."""

    END_OF_SPANS = auto()
    """Span after the last."""


NUM_LAYER_COLUMNS = len(LayerColumn)

TILE_OUTPUTS, TILE_INPUTS = 32, 64
"""Rows and columns of a weight that a program moves: of 64 rows its registers would leave room for
one program on a multiprocessor, of 32 for two or three, whose loads and products overlap. Chosen
by what the compiler says, unmeasured on a GPU."""

SPAN = 512
"""Columns of a factor that a program multiplies with themselves: 66 programs for a layer of
`original`. Chosen on the CPU, unmeasured on a GPU."""

SLOTS = 32
"""Partial sums of the norm of a layer, a program each. Chosen on the CPU, unmeasured on a GPU."""

MULTIPLE = 16
"""Divisor of both sizes of a weight, so that every access is wide."""


@dataclass(frozen=True)
class LowRankGradients:
    """Gradients of low rank of a step, a layer each."""

    inputs: list[Tensor]
    grad_outputs: list[Tensor]
    row_t: Tensor
    """int64 on the device: of each layer the addresses of both, and the number of faces."""


class DenseTable:
    """The layers of one optimizer whose gradients are of low rank."""

    def __init__(
        self,
        numbers: Sequence[int],
        parameters: Sequence[Tensor],
        first_slot: int,
        find_row: Callable[[tuple[int, ...]], Tensor],
        device: torch.device,
    ):
        """Write what the programs are to do to the device.

        Args:
            numbers: Numbers of the weights in their `TensorTable`.
            parameters: Weights (outputs, inputs).
            first_slot: Place where the partial sums of the norm begin; each layer has SLOTS.
            find_row: Function that gives the row on the device with these numbers, 3 a layer.
            device: Device on which the update runs.

        Raises:
            ValueError: A weight is no contiguous matrix, or its sizes are no multiples of 16.
        """
        self.numbers, self.parameters, self._find_row = list(numbers), list(parameters), find_row
        self.device = device
        for number, parameter in zip(numbers, parameters, strict=True):
            _check(number, parameter)
        shapes = [parameter.shape for parameter in parameters]
        layers: list[tuple[int, ...]] = []
        spans: list[tuple[int, ...]] = []
        tiles: list[tuple[int, ...]] = []
        for layer, (number, (outputs, inputs)) in enumerate(zip(numbers, shapes, strict=True)):
            firsts = [len(spans)]
            for factor, columns in enumerate((inputs, outputs)):
                spans += [(layer, factor, first) for first in range(0, columns, SPAN)]
                firsts.append(len(spans))
            layers.append((number, inputs, outputs, first_slot + layer * SLOTS, *firsts))
            firsts_of_tiles = range(0, outputs, TILE_OUTPUTS), range(0, inputs, TILE_INPUTS)
            tiles += [(layer, *corner) for corner in itertools.product(*firsts_of_tiles)]
        # The kernels make addresses of these numbers, which need 64 bits.
        self.layers_lc, self.spans_p3, self.tiles_m3 = (
            torch.tensor(rows, dtype=torch.int64).to(device) for rows in (layers, spans, tiles)
        )
        """int64: of each layer, what `LayerColumn` says; of each span its layer, 0 for the inputs
        or 1 for the grad_outputs, its first column; of each tile its layer, first output, first
        input."""

    def find(self, gradients: Sequence[Tensor]) -> LowRankGradients:
        """The gradients of low rank, of the stand-ins among those of all parameters; ask once a
        step.

        Raises:
            ValueError: One is no stand-in, or its factors are of another size or type.
        """
        low_rank: list[LowRank] = []
        for number, parameter in zip(self.numbers, self.parameters, strict=True):
            factors = low_rank_of(gradients[number])
            if factors is None:
                raise ValueError(
                    f"gradients[{number}] must be a stand-in that `dense` leaves, got a tensor: is "
                    "the weight used twice?"
                )
            # One type for all, which the kernels take from the first factor.
            dtypes = (low_rank[0].input_ni.dtype,) if low_rank else FLOAT_DTYPES
            low_rank.append(_fitted(number, factors, parameter.shape, dtypes, self.device))
        addresses = [
            (each.input_ni.data_ptr(), each.grad_output_no.data_ptr(), each.num_faces)
            for each in low_rank
        ]
        return LowRankGradients(
            [each.input_ni for each in low_rank],
            [each.grad_output_no for each in low_rank],
            self._find_row(tuple(itertools.chain(*addresses))),
        )


def _check(number: int, parameter: Tensor) -> None:
    name = f"parameters[{number}]"
    if parameter.ndim != 2 or any(size % MULTIPLE or not size for size in parameter.shape):
        raise ValueError(
            f"{name} must be a matrix with sizes that are multiples of {MULTIPLE} to have a "
            f"gradient of low rank, got {tuple(parameter.shape)}"
        )
    check_memory(parameter, name)


def _fitted(
    number: int,
    factors: LowRank,
    shape: torch.Size,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> LowRank:
    """The factors, as copies where they are not aligned."""
    outputs, inputs = shape
    faces = max(factors.num_faces, 1)
    pair = (factors.input_ni, factors.grad_output_no)
    check_tensor(pair[0], f"gradients[{number}], its input,", (faces, inputs), dtypes, device)
    own = (pair[0].dtype,)
    check_tensor(pair[1], f"gradients[{number}], its grad_output,", (faces, outputs), own, device)
    return LowRank(*(each if are_aligned(each) else each.clone() for each in pair))
