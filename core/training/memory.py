"""How much GPU memory a run will need, known before it starts; what to change if it is too much.

What belongs to a parameter follows from the precision and the optimizer. What belongs to a face is
read from the model's own graph: the forward pass runs over tensors without memory (those of the
meta device), once for few and once for more faces; what it keeps for the backward pass is counted,
each storage once, and so is the largest layer. The rest are allowances.

    memory = footprint(config, precision).at(batch_size)
    batch_size = footprint(config, precision).largest_batch(free_bytes)
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ... import models
from ...kernels.augment import empty, workspace_bytes
from ...models.alignment import MULTIPLE
from ...models.autoencoder import Autoencoder
from ..config import Config, from_dict, merge, to_dict
from ..estimate.flops import meta_model
from ..estimate.links import Link, host_link
from ..optim import fused_dense, placement
from ..optim.optimizer import rule_of
from ..precision import Precision

MIB = 2**20

USABLE_SHARE = 0.9
"""Share of the free memory to use; the allocator's blocks and other programs take the rest. Chosen,
unmeasured on a GPU."""

# Both chosen, unmeasured on a GPU.
_CONTEXT_BYTES = 500 * MIB  # driver, kernels of PyTorch and of the libraries
_LIBRARY_BYTES = 256 * MIB  # workspaces of cuBLAS (32 MiB a stream) and of cuDNN's convolutions
_PROBES = (4, 12)  # faces a side: two sizes give the line; chosen, unmeasured


@dataclass(frozen=True)
class Memory:
    """GPU memory of a run, by what it is for."""

    batch_size: int
    parts: dict[str, int]
    """Bytes."""

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def total_mib(self) -> float:
        return self.total_bytes / MIB

    def __str__(self) -> str:
        """One line: the total, then its parts from the largest to the smallest."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        listed = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in parts if size)
        return f"{self.total_mib:,.0f} MiB at batch size {self.batch_size}: {listed}"


@dataclass(frozen=True)
class Footprint:
    """What a run needs at any batch size: so much, and so much more for each face of a side."""

    fixed: dict[str, int]
    """Bytes, whatever the batch size."""

    per_face: dict[str, float]
    """Bytes for each face of a side, so for two faces of the batch."""

    def at(self, batch_size: int) -> Memory:
        """Memory at a batch size."""
        parts = dict(self.fixed)
        for name, size in self.per_face.items():
            parts[name] = parts.get(name, 0) + round(size * batch_size)
        return Memory(batch_size, parts)

    def largest_batch(self, free_bytes: int, at_most: int = 4096) -> int:
        """The largest batch size of `batch_sizes` that fits in 90 % of the free memory; 0: none.

        Args:
            free_bytes: Free memory, as it is before the run takes any.
            at_most: Larger ones are passed over.
        """
        room = USABLE_SHARE * free_bytes
        fitting = (size for size in batch_sizes() if self.at(size).total_bytes <= room)
        return max((size for size in fitting if size <= at_most), default=0)


def batch_sizes() -> Sequence[int]:
    """What `largest_batch` chooses from: multiples of 4 up to 64, of 16 above, to 4096.

    Tensor cores work on tiles, so a batch in between is hardly faster than the next smaller one.
    """
    return (*range(4, 64, 4), *range(64, 4097, 16))


def footprint(
    config: Config, precision: Precision, *, store_bytes: int = 0, num_ranks: int = 1
) -> Footprint:
    """What a run with these settings needs on a GPU.

    Args:
        config: All settings; the batch size is not read.
        precision: What `precision.mode` was resolved to.
        store_bytes: Bytes of the decoded faces of both sides, where they are kept on the GPU.
        num_ranks: Ranks of the run; what is counted is for each.
    """
    model = _model_of(config, precision)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    # Two sizes give a line: what does not grow with the batch is its value at 0.
    small, large = (_measure(model, config, precision.compute, size) for size in _PROBES)
    fixed = {
        name: round(trained * size)
        for name, size in _bytes_of_a_parameter(config, precision.compute, num_ranks).items()
    }
    # These layers leave two small factors in the place of a gradient.
    fixed["gradients"] -= precision.compute.itemsize * _never_in_memory(model, config)
    fixed |= {"frozen weights": frozen * precision.compute.itemsize}
    fixed |= {"decoded faces": store_bytes, "workspaces": _LIBRARY_BYTES, "CUDA": _CONTEXT_BYTES}
    per_face = {}
    for name in small:
        per_face[name] = (large[name] - small[name]) / (_PROBES[1] - _PROBES[0])
        fixed[name] = fixed.get(name, 0) + round(small[name] - per_face[name] * _PROBES[0])
    return Footprint(fixed, per_face)


def host_state(
    config: Config, precision: Precision, num_parameters: int, link: Link, *, num_holders: int = 1
) -> str:
    """Clause about what it brings and costs to keep the optimizer's state in host memory.

    Args:
        config: Settings of the run.
        precision: Same as for `footprint`.
        num_parameters: Number of parameters that are trained.
        link: Link between the GPU and the host.
        num_holders: Ranks that divide the state among themselves; it is told for one of them.
    """
    rule = rule_of(config.optimizer, config.train.ema)
    of_all = num_parameters * placement.host_bytes(rule, precision.compute)
    num_bytes = of_all // num_holders
    return placement.described(num_bytes, link, config.optimizer.gradient_accumulation)


def advice(
    config: Config,
    precision: Precision,
    free_bytes: int,
    *,
    store_bytes: int = 0,
    num_ranks: int = 1,
) -> str:
    """What to change after a run with these settings went out of memory: one line.

    The nearest setting that fits: a smaller batch, else the faces in host memory, else the state of
    the optimizer divided among the ranks, else a lower precision, else that state in host memory,
    else the family's `lowmem`, which makes another model.

    Args:
        config: The settings of the run; an automatic batch size is taken for the one that it
            leads to.
        precision: Same as for `footprint`.
        free_bytes: Free before the run took any, on one GPU.
        store_bytes: Same as for `footprint`.
        num_ranks: Ranks of the run, which share its batch.
    """
    need = footprint(config, precision, store_bytes=store_bytes, num_ranks=num_ranks)
    fits = need.largest_batch(free_bytes)
    batch_size = config.train.batch_size or num_ranks * (fits or batch_sizes()[0])
    # Of the rank that has most: where the batch does not divide evenly, some have a face less.
    share = math.ceil(batch_size / num_ranks)
    on_each = f" ({share} on each of {num_ranks} GPUs)" if num_ranks > 1 else ""
    begin = (
        f"out of GPU memory: {config.model.trainer} in {precision.name} needs about "
        f"{need.at(share).total_mib:,.0f} MiB at batch size {batch_size}{on_each}, and "
        f"{free_bytes / MIB:,.0f} MiB were free; "
    )
    # Below the batch that failed: an estimate that says it fits has just been proved wrong.
    smaller = [size for size in batch_sizes() if size < share and size <= fits]
    if smaller:
        return f"{begin}use --batch-size {num_ranks * smaller[-1]}"
    # From the change that costs least: faces in host memory change no result at all.
    for words, changed, lowered, store in _changes(config, precision, store_bytes, num_ranks):
        need = footprint(changed, lowered, store_bytes=store, num_ranks=num_ranks)
        fits = need.largest_batch(free_bytes)
        if fits:
            cost = _cost_of_placement(config, changed, lowered, num_ranks)
            return f"{begin}use {words} --batch-size {min(num_ranks * fits, batch_size)}{cost}"
    return f"{begin}no setting of this model fits; use a GPU with more memory"


def _cost_of_placement(before: Config, after: Config, precision: Precision, num_ranks: int) -> str:
    """What it brings and costs to move the optimizer's state, in brackets; empty: it stays."""
    if after.optimizer.placement == before.optimizer.placement:
        return ""
    trained = sum(p.numel() for p in meta_model(after).parameters() if p.requires_grad)
    # The rest is in the memory of the other ranks anyway.
    num_holders = num_ranks if after.train.distribution == "sharded" else 1
    told = host_state(after, precision, trained, host_link(), num_holders=num_holders)
    return f" ({told})"


def _changes(
    config: Config, precision: Precision, store_bytes: int, num_ranks: int
) -> Iterator[tuple[str, Config, Precision, int]]:
    """(a user's words, settings, precision, bytes of the store), each change on top of the last."""
    words = ""
    if store_bytes:
        words = "--set data.placement=host"
        yield words, config, precision, 0
    # Not with micro-batches, which every rank adds up whole.
    if num_ranks > 1 and config.train.distribution != "sharded" and not config.train.micro_batch:
        words = f"{words} --set train.distribution=sharded".strip()
        config = from_dict(merge(to_dict(config), {"train": {"distribution": "sharded"}}))
        yield words, config, precision, 0
    if precision.compute is torch.float32:
        words = f"{words} --precision bf16".strip()
        precision = dataclasses.replace(precision, name="bf16", compute=torch.bfloat16)
        yield words, config, precision, 0
    if config.optimizer.placement == "gpu":
        words = f"{words} --set optimizer.placement=host".strip()
        config = from_dict(merge(to_dict(config), {"optimizer": {"placement": "host"}}))
        yield words, config, precision, 0
    options = models.options_of(config.model.trainer, config.model.options)
    if getattr(options, "lowmem", True):
        return  # it is on already, or the family has none
    lowmem = {"model": {"options": {"lowmem": True}}}
    words = f"a new model with --set model.options.lowmem=true {words}".strip()
    yield words, from_dict(merge(to_dict(config), lowmem)), precision, 0


def _model_of(config: Config, precision: Precision) -> Autoencoder:
    """The configured model as it is trained on a GPU: aligned, in the format of the precision."""
    model = meta_model(config)
    # auto is on: what is estimated is a run on a GPU, wherever that is done.
    if config.precision.align_channels != "off":
        model.align(MULTIPLE)
    model.to_channels_last()
    return model.to(precision.compute)


def _never_in_memory(model: Autoencoder, config: Config) -> int:
    """Numbers of the gradients that stay factors, which are small."""
    names = fused_dense.switch(model, is_on=config.optimizer.fused_dense)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


def _bytes_of_a_parameter(config: Config, compute: torch.dtype, num_ranks: int) -> dict[str, float]:
    """Bytes of a parameter on the GPU by purpose; in 16 bits the optimizer keeps fp32 weights
    besides the network's."""
    rule, is_lowered = rule_of(config.optimizer), compute is not torch.float32
    accumulates = config.optimizer.gradient_accumulation > 1
    # What is kept of a parameter for its update; where auto divides it, less is taken than said.
    share = 1 / num_ranks if config.train.distribution == "sharded" else 1.0
    share = 0.0 if config.optimizer.placement == "host" else share
    state = {
        "weights": 4 * share if is_lowered else 4,
        "lowered weights": compute.itemsize if is_lowered else 0,
        "gradients": compute.itemsize,
        "optimizer state": 4 * share * len(rule.moments),
        "average of the weights": 4 * share if config.train.ema else 0,
    }
    if num_ranks == 1:
        return state | {"accumulated gradients": 4 if accumulates else 0}
    is_widened = accumulates or config.optimizer.reduce == "fp32"
    return state | {"gradients to send": 4 if is_widened else compute.itemsize}


def _measure(
    model: Autoencoder, config: Config, compute: torch.dtype, batch_size: int
) -> dict[str, int]:
    """Bytes that grow with the batch, at one batch size."""
    sizes: dict[str, Any] = {"input_px": model.input_px, "output_px": model.output_px}
    faces = 2 * batch_size
    batch = empty(
        faces,
        **sizes,
        input_channels=3 if config.precision.align_channels == "off" else MULTIPLE,
        learn_mask=config.loss.learn_mask,
        input_dtype=compute,
        device="meta",
    )
    tensors = [batch.input_bchw, *batch.targets_bchw, *batch.weights_b1hw]
    tensors += [] if batch.mask_b1hw is None else [batch.mask_b1hw]
    saved = _Saved([*model.parameters(), *tensors])
    with saved.hooks(), _Largest() as largest:
        outputs_a, outputs_b = model(batch.input_bchw)
    outputs = [*outputs_a, *outputs_b]
    size_px = max(model.input_px, *model.output_px)
    return {
        # One batch is in use, the next in the making.
        "batches": 2 * sum(tensor.nbytes for tensor in tensors),
        "kept for backward": saved.num_bytes,
        # The loss writes gradients of the outputs' own format.
        "outputs and their gradients": 2 * sum(tensor.nbytes for tensor in outputs),
        "largest layer": largest.num_bytes,
        "workspaces": workspace_bytes(faces, size_px=size_px, **sizes),
    }


class _Saved:
    """Bytes of what is kept for the backward pass, without what would be there anyway."""

    def __init__(self, known: Sequence[Tensor]):
        # Held, so that no storage is freed and its identity given to another.
        self.known = [tensor.untyped_storage() for tensor in known]
        self.seen = {storage._cdata for storage in self.known}
        self.num_bytes = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Counts what is saved inside."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Views of one storage are saved many times, and take their memory once.
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.known.append(storage)
            self.num_bytes += storage.nbytes()
        return tensor


class _Largest(TorchDispatchMode):
    """Bytes of the operation with the largest input and output: the backward pass holds the
    gradients of both at once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # A view takes no memory.
        if isinstance(out, Tensor) and not func.is_view:
            first = next((arg for arg in args if isinstance(arg, Tensor)), out)
            self.num_bytes = max(self.num_bytes, out.nbytes + first.nbytes)
        return out


def describe(memory: Memory, free_bytes: int) -> str:
    """Whether it fits, in one line for the start-up report."""
    room = free_bytes / MIB
    fits = memory.total_bytes <= USABLE_SHARE * free_bytes
    return f"{memory}; {'fits' if fits else 'does not fit'} in 90 % of {room:,.0f} MiB free"
