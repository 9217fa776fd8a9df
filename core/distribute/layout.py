"""Places of tensors in one flat buffer, in parts of which each can be sent as it lies.

Every tensor begins at a multiple of 8 elements, which is 16 bytes of a 16-bit type. A part ends at
a multiple of 8 times the number of ranks, so that each rank's slice of it does, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optim.arrivals import grouped

ALIGNMENT = 8
"""Elements: the widest access of a kernel, 16 bytes, where an element has 2."""

PART_BYTES = 16 * 2**20
"""Bytes of a part, at least, but for the last one: enough to use a link, and few enough for the
first to leave early. Chosen among the 8 to 32 MB that others take, unmeasured on a GPU."""


@dataclass(frozen=True)
class Piece:
    """Elements of one parameter that lie in one rank's slice of a part."""

    number: int
    """Number of the parameter."""

    first: int
    """First of them within the parameter, in the order in which it lies in memory."""

    length: int
    place: int
    """Place of the first in the flat buffer."""

    own_place: int
    """Place of the first in a buffer that holds the slices of one rank and nothing else."""


class Layout:
    """Places of parameters, or of what belongs to them, in a flat buffer.

    Args:
        parameters: Dense tensors; their shapes and strides are those of the views.
        order: Numbers of them in the order in which they lie.
        num_ranks: Ranks among which each part is divided.
        element_bytes: Bytes of an element, of which `PART_BYTES` make a part.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        order: Sequence[int],
        *,
        num_ranks: int,
        element_bytes: int,
    ):
        self.num_ranks = num_ranks
        # The strides too: weights of convolutions lie channels last, and views keep that.
        self.shapes = [(each.shape, each.stride()) for each in parameters]
        self.sizes = sizes = [each.numel() for each in parameters]
        self.parts = grouped(order, sizes, PART_BYTES // element_bytes)
        """Numbers of the parameters of each part."""

        self.starts = [0] * len(sizes)
        """Place of each parameter's first element."""

        self.spans: list[tuple[int, int]] = []
        """First element of each part, and the one after its last."""

        end = 0
        for part in self.parts:
            first = end
            for number in part:
                self.starts[number] = end
                # Room is left behind a tensor, not before it: the first begins the part.
                end = _rounded_up(end + sizes[number], ALIGNMENT)
            end = first + _rounded_up(end - first, ALIGNMENT * num_ranks)
            self.spans.append((first, end))
        self.length = end

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, one for every parameter, with its shape and strides."""
        return [
            flat.as_strided(shape, strides, start)
            for (shape, strides), start in zip(self.shapes, self.starts, strict=True)
        ]

    def new_flat(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor of zeros, so that what lies between tensors stays finite."""
        return torch.zeros(self.length, dtype=dtype, device=device)

    def parts_of(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, one for every part."""
        return [flat[first:end] for first, end in self.spans]

    def pieces(self, index: int, rank: int) -> list[Piece]:
        """Pieces of parameters that a rank's slice of a part holds, at least one.

        A slice behind the last parameter has a piece that lies outside of it.
        """
        first, end = self.spans[index]
        slice_length = (end - first) // self.num_ranks
        low = first + rank * slice_length
        # Each part gives every rank the same share, so one's own slices lie without gaps.
        shift = first // self.num_ranks - low
        pieces = []
        for number in self.parts[index]:
            start = self.starts[number]
            begin = max(start, low)
            length = min(start + self.sizes[number], low + slice_length) - begin
            if length > 0:
                pieces.append(Piece(number, begin - start, length, begin, begin + shift))
        # Never none: the tables and the partial sums of a part need one tensor at least.
        last = self.parts[index][-1]
        return pieces or [Piece(last, self.sizes[last], ALIGNMENT, low, low + shift)]


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
