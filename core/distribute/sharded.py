"""An update on several ranks that each rank does for its own slice of the weights (ZeRO-1).

The gradients of a part are summed over the ranks, each rank getting its slice of the sums; it moves
that slice of the weights; then all ranks gather the slices of all. So the bytes that are sent are
those of a plain sum, while the work of the update, the moments and, where the network computes in
16 bits, the master weights are divided among the ranks (Rajbhandari et al., 2020).

Letters: N chunks, P parameters, M chunks of a parameter at most.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.tensor_table import CHUNK, TensorTable
from ..optim import placement
from ..optim.optimizer import Part, decays
from .group import Group
from .layout import Piece
from .update import MirroredUpdate


@dataclass(frozen=True)
class SlicedPart(Part):
    """Parameters that are moved together, of which this rank moves some pieces."""

    gradients: list[Tensor]
    """Gradient of each piece, where the sum over the ranks lies."""

    squares: "WholeSquares"


class ShardedUpdate(MirroredUpdate):
    """An update of which each rank keeps, and moves, a slice of every part.

    `weights` and `tensors` are for the first rank, after all have called `gather`.
    """

    @property
    def num_holders(self) -> int:
        """Ranks that divide master weights and moments among themselves: all."""
        return self.group.ranks.size

    def _allocate(self) -> None:
        # First: the layout says which pieces are this rank's.
        self._connect()
        parts = range(len(self.layout.parts))
        rank = self.group.ranks.rank
        # In the order of the parts, which is that of the tables and of the partial sums.
        # Slices, and not whole parameters by rank: a few hold most of a model's weights.
        self.pieces = [each for part in parts for each in self.layout.pieces(part, rank)]
        """Pieces of parameters that this rank moves."""

        # Taken before the weights move: with 16 bits these are the exact ones.
        masters = self.master_weights
        self._lay_out_weights()
        # One tensor of each kind, so that a save gathers it by one call.
        self.slices = {kind: self._new_slices() for kind in self.rule.moments}
        """What this rank keeps, by kind: its slices of the parts, one behind the other."""

        self.moments = {kind: self._views_of_own(each) for kind, each in self.slices.items()}
        views = self._views(self.flat_weights)
        if not self.low_precision_weights:
            self.master_weights = views
        else:
            self.low_precision_weights = views
            self.slices["weight"] = self._new_slices()
            self.master_weights = self._views_of_own(self.slices["weight"])
            for number, master in enumerate(masters):
                self._take("weight", number, master)

    def _lay_out_weights(self) -> None:
        """Move what the network computes with into one buffer, whose parts can be gathered."""
        first = self.parameters[0]
        self.flat_weights = self.layout.new_flat(first.dtype, first.device)
        views = self.layout.views(self.flat_weights)
        for parameter, view in zip(self.parameters, views, strict=True):
            view.copy_(parameter.detach())
            # In the place of its own memory: what is gathered is then what the network reads.
            parameter.data = view

    def _new_slices(self) -> Tensor:
        length = self.layout.length // self.layout.num_ranks
        if self.is_on_host:
            return placement.page_locked_zeros([torch.empty(length, device="meta")])[0]
        return torch.zeros(length, device=self.flat_weights.device)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [flat[each.place : each.place + each.length] for each in self.pieces]

    def _views_of_own(self, slices: Tensor) -> list[Tensor]:
        return [slices[each.own_place : each.own_place + each.length] for each in self.pieces]

    def _places(self, numbers: Collection[int]) -> list[int]:
        """Places of the pieces of some parameters."""
        return [place for place, piece in enumerate(self.pieces) if piece.number in numbers]

    def _part(self, numbers: list[int], scalars: Tensor) -> Part:
        places = self._places({*numbers})
        pieces = [self.pieces[place] for place in places]
        gradients = self._views(self.exchange.flat)
        # Only there: `norm` clips each parameter by its own, which lies on several ranks.
        by_parameter = len(self.parameters) if self.clipping.kind == "norm" else None
        squares = WholeSquares(self.group, pieces, by_parameter, self.flat_weights.device)
        own = [gradients[place] for place in places]
        return SlicedPart(numbers, self._table(numbers), scalars, own, squares)

    def _table(self, numbers: list[int]) -> TensorTable:
        places = self._places({*numbers})

        def own(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[place] for place in places] if tensors else []

        slices_of = [self.pieces[place].number for place in places]
        return TensorTable(
            own(self.master_weights),
            {kind: own(tensors) for kind, tensors in self.moments.items()},
            own(self.low_precision_weights),
            decays=[decays(self.names[number], self.parameters[number]) for number in slices_of],
            slices_of=slices_of if self.clipping.kind == "norm" else None,
        )

    def _send(self, part: Tensor) -> None:
        self.group.reduce_scatter(part)

    def _move_part(self, index: int) -> None:
        part = self.parts[index]
        assert isinstance(part, SlicedPart)
        self._move(part, part.gradients, part.squares)
        flats = self.layout.parts_of(self.flat_weights)
        # Without overlap there is one part for all, and its buffer is still sent in pieces.
        for flat in [flats[index]] if self.overlaps else flats:
            self.group.all_gather(flat)

    @property
    def _divided(self) -> list[str]:
        return [*super()._divided, *self.slices]

    def _gather(self, kind: str) -> list[Tensor]:
        if kind not in self.slices:
            return super()._gather(kind)
        # Slices in host memory may be what a GPU is still to move.
        self._settle()
        slices = self.group.gather(self.slices[kind])
        if not slices:
            return []
        # As a checkpoint holds it, whatever the network computes in.
        whole = self.layout.new_flat(torch.float32, torch.device("cpu"))
        for (first, end), part in zip(self.layout.spans, self.layout.parts_of(whole), strict=True):
            # Where the part's slice lies in the buffer of one rank.
            begin, stop = (place // self.layout.num_ranks for place in (first, end))
            part.copy_(torch.cat([each[begin:stop] for each in slices]))
        return self.layout.views(whole)

    def _whole(self, kind: str) -> list[Tensor]:
        # In fp32 every rank has all weights, as the network computes with them.
        if kind == "weight" and kind not in self.slices:
            return [parameter.detach() for parameter in self.parameters]
        return super()._whole(kind)

    def _take(self, kind: str, number: int, tensor: Tensor) -> None:
        if kind == "accumulator":
            super()._take(kind, number, tensor)
            return
        if kind == "weight":
            # All of it, and not the slice alone: every rank computes with all weights.
            self.parameters[number].detach().copy_(tensor)
        parameter = self.parameters[number]
        # In the parameter's order of memory, which the pieces are counted in.
        in_place = torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device)
        flat = in_place.copy_(tensor).as_strided((parameter.numel(),), (1,))
        for place in self._places({number}):
            piece = self.pieces[place]
            values = flat[piece.first : piece.first + piece.length]
            # A piece that lies outside of its parameter has no values.
            self._own(kind)[place][: len(values)].copy_(values)


class WholeSquares:
    """Sums of squares of the gradients of whole parameters, of which each rank has some pieces.

    Args:
        group: Ranks of the run.
        pieces: Pieces whose chunks have partial sums, in their order.
        num_parameters: Parameters, where each one's own sum is asked for; None: the sum over all.
        device: Device of the sums.
    """

    def __init__(
        self,
        group: Group,
        pieces: Sequence[Piece],
        num_parameters: int | None,
        device: torch.device,
    ):
        self.group = group
        self.places_pm: Tensor | None = None
        if num_parameters is None:
            return
        counts = [-(-piece.length // CHUNK) for piece in pieces]
        ends = [*itertools.accumulate(counts)]
        # Behind the chunks there is a zero, for parameters of fewer chunks than others.
        # A table made once: which chunks are whose never changes, and a graph replays it.
        places = torch.full((num_parameters, max(counts)), ends[-1])
        for piece, count, end in zip(pieces, counts, ends, strict=True):
            places[piece.number, :count] = torch.arange(end - count, end)
        self.places_pm = places.to(device)

    def __call__(self, partials_n: Tensor) -> Tensor:
        """The sum over all ranks, (1,), or that of each parameter, (P,)."""
        if self.places_pm is None:
            squares = partials_n.sum()[None]
        else:
            # Not index_add, whose order of summation a GPU leaves to chance.
            extended = torch.cat((partials_n, partials_n.new_zeros(1)))
            squares = extended[self.places_pm].sum(1)
        self.group.all_reduce(squares)
        return squares
