"""Addresses of the tensors of an optimizer: what lets one launch update all of them.

A kernel over many tensors reads their addresses from tables on the device. Weights and moments
never move, so theirs are written once. Gradients move from step to step, except inside a CUDA
graph, so theirs are sent whenever they differ; those of a graph once, after its capture, by
`finish_capture`, so that no replay holds the transfer.

The update runs where the weights lie that the network computes with. Master weights, moments and
accumulators may as well lie in page-locked host memory: a kernel of a GPU reads and writes it at
the host's address (unified addressing), over the link between the two.

Gradients of low rank have no address but those of their factors, and no chunks but tiles: see
`dense_table`.

Letters: T tensors, N chunks of them, S slots, C columns.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import auto
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import (
    FLOAT_DTYPES,
    WIDEST_ACCESS,
    are_aligned,
    check_alignment,
    check_tensor,
    is_reachable,
)
from .dense import low_rank_of
from .dense_table import SLOTS, DenseTable
from .dispatch import is_capturing
from .optimizer_rules import BASE, EMA, MOMENTS
from .places import Places


class Column(Places):
    """Column of the table of tensors; the first seven hold addresses, 0 where there is none."""

    PARAMETER = auto()
    """Master weights, fp32."""

    EXP_AVG = auto()
    """First moment; of schedule-free, which has none, its base."""

    EXP_AVG_SQ = auto()
    """Second moment."""

    MAX_EXP_AVG_SQ = auto()
    """Largest second moment with amsgrad; AdaMax's infinity norm."""

    EMA = auto()
    """Average of the master weights."""

    LOW_PRECISION = auto()
    """Weights that the network computes with, bf16 or fp16."""

    ACCUMULATOR = auto()
    """Sum of gradients of several backward passes."""

    DECAYS = auto()
    """Flag: 1 if the weight decay moves the parameter, else 0."""

    FIRST_CHUNK = auto()
    """Place where the parameter's partial sums of the norm begin."""

    NUM_CHUNKS = auto()
    """Number of its partial sums."""


NUM_COLUMNS = len(Column)

_MOMENTS_OF_COLUMN = (("mean", BASE), ("square",), ("largest",), (EMA,))
"""Moments in each column from EXP_AVG to EMA; a rule has one of them at most."""

CHUNK = 16384
"""Elements of a program: some 5,000 programs for 82 M weights, and a short tail. Chosen on the CPU,
unmeasured on a GPU."""

_FULL, _HALF = (torch.float32,), (torch.bfloat16, torch.float16)

# Chosen on the CPU, unmeasured on a GPU. In eager steps PyTorch's allocator gives gradients few
# different sets of addresses; every captured step keeps its slot for good.
_EAGER_SLOTS, _CAPTURE_SLOTS = 16, 112


@triton.jit
def tensor_at(address, POINTER: tl.constexpr):
    """The pointer at an address of a table; `TensorTable` refuses those that are not aligned."""
    return tl.multiple_of(tl.load(address).to(POINTER), 16)


@dataclass(frozen=True)
class State:
    """Parameters and what belongs to them, some of all; empty where the rule has none.

    Of each its numbers on one axis, as they lie in memory: plain operations copy what they find
    channels_last, there and back.
    """

    parameters: list[Tensor]
    moments: tuple[list[Tensor], ...]
    """exp_avgs (with schedule-free bases), exp_avg_sqs, max_exp_avg_sqs, emas."""

    low_precision: list[Tensor]


class TensorTable:
    """The tensors of one optimizer and their addresses.

    Make it before a CUDA graph is captured: it takes page-locked memory, which a capture forbids.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        moments: Mapping[str, Sequence[Tensor]],
        low_precision: Sequence[Tensor] = (),
        accumulators: Sequence[Tensor] = (),
        *,
        decays: Sequence[bool] | None = None,
        low_rank: Sequence[bool] | None = None,
        slices_of: Sequence[int] | None = None,
    ):
        """Check the tensors and write their addresses to the device.

        Args:
            parameters: fp32, contiguous or channels_last, on the device of the update or, as the
                moments and accumulators may, in page-locked host memory.
            moments: Moments among `MOMENTS` that the rule keeps; fp32, each tensor of the shape and
                the strides of its parameter, zeros at the start; but those of `BEGIN_AT_WEIGHTS` as
                the parameters.
            low_precision: The weights that the network computes with: the same, but all bf16 or all
                fp16; none where it computes in fp32.
            accumulators: Tensors that sum gradients of several backward passes, laid out as the
                parameters, fp32; none where each one makes a step.
            decays: Whether the weight decay moves each parameter; default: all.
            low_rank: Whether each gradient comes as a stand-in of `dense`; default: none. Their
                parameters are matrices of sizes that are multiples of 16; none are accumulated.
            slices_of: Numbers of the parameters that the tensors are slices of, where the rest is
                with others; `optimize` then gets the sums of squares of whole parameters, in the
                order of those numbers.

        Raises:
            ValueError: On a tensor that does not fit.
        """
        if not parameters:
            raise ValueError("parameters must be at least one, got none")
        self.parameters, self.low_precision = list(parameters), list(low_precision)
        self.moments = {kind: list(moments[kind]) for kind in MOMENTS if kind in moments}
        self.accumulators = list(accumulators)
        self.decays = [True] * len(self.parameters) if decays is None else list(decays)
        is_low = [False] * len(self.parameters) if low_rank is None else list(low_rank)
        self.device = (self.low_precision or self.parameters)[0].device
        """Device on which the update runs: that of the weights that the network computes with."""

        self._check_lists(is_low)

        self.plain = [number for number, low in enumerate(is_low) if not low]
        """Numbers of the parameters whose gradients lie in memory."""

        low = [number for number, low in enumerate(is_low) if low]
        self.plain_state, self.dense_state = self._state(self.plain), self._state(low)
        self._layouts = _layouts([self.parameters[number] for number in self.plain], self.device)
        self._first_addresses = self._addresses()
        self._write(low, slices_of)

    def _write(self, low: list[int], slices_of: Sequence[int] | None) -> None:
        """Make the tables on the device; ``low``: numbers of the gradients of low rank."""
        device, num_tensors = self.device, len(self.parameters)
        chunks = [
            (index, start, min(CHUNK, self.parameters[index].numel() - start))
            for index in self.plain
            for start in range(0, self.parameters[index].numel(), CHUNK)
        ]
        # Of no chunks, as of empty tensors, the list has no second axis.
        self.chunks_n3 = torch.tensor(chunks, dtype=torch.int64).view(-1, 3).to(device)
        """int64: tensor, first element, elements."""

        decayed = [int(decay) for decay in self.decays]
        places = self._places_of_partials([*self.plain, *low])
        if slices_of is not None:
            places = list(slices_of), [1] * num_tensors
        columns = [*self._first_addresses, decayed, *places]
        # Turned, so that what a program reads of its tensor lies together.
        self.tensors_tc = torch.tensor(columns, dtype=torch.int64).t().contiguous().to(device)
        """int64: of each tensor, what `Column` says."""

        num_partials = len(chunks) + SLOTS * len(low)
        self.partials_n = torch.zeros(num_partials, dtype=torch.float64, device=device)
        """Sum of squares of each chunk of the last gradients, then those of low rank."""

        self.factors_t = torch.ones(num_tensors, device=device)
        """What the gradient of each tensor is multiplied with where each is clipped by itself."""

        self._gradient_rows = _AddressRows(num_tensors, device)
        self.dense: DenseTable | None = None
        """Table of the parameters whose gradients are of low rank; None: there are none."""

        if low:
            find_row = _AddressRows(3 * len(low), device).find
            parameters = [self.parameters[number] for number in low]
            self.dense = DenseTable(low, parameters, len(chunks), find_row, device)

    def check_unmoved(self) -> None:
        """Raise ValueError if a tensor has got another address since."""
        if self._addresses() != self._first_addresses:
            raise ValueError("a tensor has moved since its TensorTable was made: make a new one")

    def fitted(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of `plain`; as a copy where one lies in another way than its parameter.

        Raises:
            ValueError: On a gradient of another shape, type or device.
        """
        self._check_length("gradients", gradients)
        for number in self.plain:
            if low_rank_of(gradients[number]) is not None:
                raise ValueError(f"gradients[{number}] must lie in memory, got one of low rank")
        gradients = [gradients[number] for number in self.plain]
        types = {gradient.dtype for gradient in gradients}
        # One comparison for all, since every call in Python costs the host time at each step.
        if len(types) == 1 and types <= {*FLOAT_DTYPES} and _layouts(gradients) == self._layouts:
            if are_aligned(*gradients):
                return list(gradients)  # as a rule
        fitted: list[Tensor] = []
        for number, gradient in zip(self.plain, gradients, strict=True):
            parameter = self.parameters[number]
            dtypes = (gradients[0].dtype,) if fitted else FLOAT_DTYPES
            name, shape = f"gradients[{number}]", tuple(parameter.shape)
            check_tensor(gradient, name, shape, dtypes, self.device)
            if not (_same_layout(gradient, parameter) and are_aligned(gradient)):
                # On the device of the update by name: the parameter may lie in host memory.
                empty = torch.empty_like(parameter, dtype=gradient.dtype, device=self.device)
                gradient = empty.copy_(gradient)
            fitted.append(gradient)
        return fitted

    def gradient_row(self, gradients: Sequence[Tensor]) -> Tensor:
        """Addresses of gradients from `fitted`: int64 (T,) on the device; ask once a step."""
        addresses = [0] * len(self.parameters)
        in_memory = map(Tensor.data_ptr, gradients)
        for number, address in zip(self.plain, in_memory, strict=True):
            addresses[number] = address
        return self._gradient_rows.find(tuple(addresses))

    def _addresses(self) -> list[list[int]]:
        """Addresses in the columns from PARAMETER to ACCUMULATOR."""
        lists = (self.parameters, *self._moments_by_column(), self.low_precision, self.accumulators)
        none = [0] * len(self.parameters)
        return [list(map(Tensor.data_ptr, tensors)) if tensors else none for tensors in lists]

    def _places_of_partials(self, in_order: list[int]) -> tuple[list[int], list[int]]:
        """Partial sums in this order of parameters: (first of each, how many they are)."""
        nums = [SLOTS] * len(self.parameters)
        for number in self.plain:
            nums[number] = -(-self.parameters[number].numel() // CHUNK)
        ends = itertools.accumulate(nums[number] for number in in_order)
        firsts = {n: end - nums[n] for n, end in zip(in_order, ends, strict=True)}
        return [firsts[number] for number in range(len(nums))], nums

    def _state(self, numbers: list[int]) -> State:
        def own(tensors: list[Tensor]) -> list[Tensor]:
            return [_as_stored(tensors[number]) for number in numbers] if tensors else []

        moments = tuple(map(own, self._moments_by_column()))
        return State(own(self.parameters), moments, own(self.low_precision))

    def _moments_by_column(self) -> list[list[Tensor]]:
        """Moments in the columns from EXP_AVG to EMA; empty where the rule has none."""
        return [
            next((self.moments[kind] for kind in kinds if kind in self.moments), [])
            for kinds in _MOMENTS_OF_COLUMN
        ]

    def _check_lists(self, is_low: list[bool]) -> None:
        self._check_state("parameters", self.parameters, _FULL)
        for kind, tensors in self.moments.items():
            self._check_state(kind, tensors, _FULL)
        if self.low_precision:
            self._check_state("low_precision", self.low_precision, _HALF)
        if self.accumulators:
            self._check_state("accumulators", self.accumulators, _FULL)
        self._check_length("decays", self.decays)
        self._check_length("low_rank", is_low)
        if any(is_low) and self.accumulators:
            raise ValueError("gradients of low rank cannot be accumulated: make each one a step")

    def _check_length(self, name: str, values: Sequence[object]) -> None:
        if len(values) != len(self.parameters):
            raise ValueError(
                f"{name} must be as many as the parameters, {len(self.parameters)}, "
                f"got {len(values)}"
            )

    def _check_state(
        self, name: str, tensors: Sequence[Tensor], dtypes: tuple[torch.dtype, ...]
    ) -> None:
        self._check_length(name, tensors)
        for index, (tensor, parameter) in enumerate(zip(tensors, self.parameters, strict=True)):
            one, shape = f"{name}[{index}]", tuple(parameter.shape)
            allowed = (tensors[0].dtype,) if index else dtypes
            device = None if is_reachable(tensor, self.device) else self.device
            check_tensor(tensor, one, shape, allowed, device)
            if not _is_dense(tensor):
                raise ValueError(
                    f"{one} must be contiguous or channels_last, got strides {tensor.stride()}"
                )
            if not _same_layout(tensor, parameter):
                raise ValueError(
                    f"{one} must have the strides {parameter.stride()} of its parameter, "
                    f"got {tensor.stride()}"
                )
            check_alignment(tensor, one, WIDEST_ACCESS)


class _AddressRows:
    """Addresses of gradients on the device, each set of them sent once.

    Sets are sent from slots of page-locked memory that are there from the start. Eager steps rotate
    through some of the slots. A row that a captured step reads belongs to that graph for good: it
    is filled by `finish_capture`, since a transfer queued in the capture would run at every replay.
    """

    def __init__(self, length: int, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.device = device
        # An even length keeps every row at 16 bytes, so that one compiled kernel fits all.
        shape = (_EAGER_SLOTS + _CAPTURE_SLOTS, length + length % 2)
        self.staged_st = torch.zeros(shape, dtype=torch.int64, pin_memory=self.on_gpu)
        self.rows_st = torch.zeros(shape, dtype=torch.int64, device=device)
        self.slots: dict[tuple, int] = {}  # (stream, addresses) -> eager slot
        self.contents: list[tuple | None] = [None] * _EAGER_SLOTS  # the reverse
        self.copied = [torch.cuda.Event() for _ in range(_EAGER_SLOTS)] if self.on_gpu else []
        self.next_slot = 0
        self.num_captured = 0

    def find(self, addresses: tuple[int, ...]) -> Tensor:
        """A row with these addresses, sent unless it is there."""
        if is_capturing(self.device):
            return self._captured(addresses)
        # A row is there for what comes after its transfer in the same stream, for no other.
        stream = torch.cuda.current_stream(self.device) if self.on_gpu else None
        key = (stream, addresses)
        slot = self.slots.get(key)
        if slot is None:
            slot = self.next_slot
            self.next_slot = (slot + 1) % _EAGER_SLOTS
            self._release(slot, stream)
            self._send(slot, addresses)
            self.slots[key], self.contents[slot] = slot, key
            # After this event the staged numbers have been read: the slot may be filled again.
            if stream is not None:
                self.copied[slot].record(stream)
        return self.rows_st[slot]

    def _captured(self, addresses: tuple[int, ...]) -> Tensor:
        if self.num_captured == _CAPTURE_SLOTS:
            raise RuntimeError(
                f"this TensorTable has been captured {_CAPTURE_SLOTS} times: make a new one"
            )
        slot = _EAGER_SLOTS + self.num_captured
        self.num_captured += 1
        _unsent.append(partial(self._send, slot, addresses))
        return self.rows_st[slot]

    def _release(self, slot: int, stream: torch.cuda.Stream | None) -> None:
        """Wait until nothing reads the slot any more; that is long ago, as a rule."""
        content = self.contents[slot]
        if content is None:
            return
        del self.slots[content]
        if stream is None:
            return
        if content[0] == stream:
            self.copied[slot].synchronize()  # what reads the row is before us in the stream
        else:
            # Kernels of that stream may still read the row, and no event stands behind them.
            content[0].synchronize()

    def _send(self, slot: int, addresses: tuple[int, ...]) -> None:
        self.staged_st[slot, : len(addresses)] = torch.tensor(addresses, dtype=torch.int64)
        self.rows_st[slot].copy_(self.staged_st[slot], non_blocking=True)


# Of all tables: who ends a capture does not know which of them have been in it.
_unsent: list[Callable[[], None]] = []
"""Transfers of the addresses that captures have met since the last `finish_capture`."""


def finish_capture() -> None:
    """Send the addresses of gradients that a captured step reads, on the current stream.

    To be called after the capture of a CUDA graph that holds `optimize` and before its first
    replay, on the stream of the replays.
    """
    while _unsent:
        _unsent.pop()()


def drop_capture() -> None:
    """Forget the addresses that a capture has met which failed: nothing will replay it, and they
    hold the memory of their tables."""
    _unsent.clear()


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _as_stored(tensor: Tensor) -> Tensor:
    """A dense tensor's numbers on one axis, as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _layouts(tensors: Sequence[Tensor], device: torch.device | None = None) -> list[tuple]:
    """Shape, strides and device of each tensor; of master weights that of their gradients."""
    strides = map(Tensor.stride, tensors)
    return [
        (each.shape, lie, device or each.device) for each, lie in zip(tensors, strides, strict=True)
    ]


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order."""
    if a.stride() == b.stride():
        return True
    places = zip(a.shape, a.stride(), b.stride(), strict=True)
    # The stride of an axis of one element leads nowhere, and PyTorch may set any.
    return all(size == 1 or in_a == in_b for size, in_a, in_b in places) or a.numel() == 0
