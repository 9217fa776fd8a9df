"""One training step, without data: ours in every engine, and the same modules in plain PyTorch.

The plain step is what one would write first: each side through the encoder by itself, PyTorch's
convolutions, SSIM by dense ones, bias and activation and depth-to-space as operations of their own,
`torch.optim.Adam`, autocast. All are timed on the same batch. Rows with "without" leave one lever
out; the row with all of them is beside. Without a GPU the figure to read is faces per CPU second;
the calls and launches of a step are exact anywhere.

Run: ``mien bench step``.
"""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import TritonError

from ..core import precision as precisions
from ..core.config import from_dict
from ..core.data.feed import Batch
from ..core.distribute.group import Group
from ..core.estimate.flops import work_of
from ..core.estimate.roofline import ceiling
from ..core.losses.weighted import Loss, Losses
from ..core.optim.optimizer import Update
from ..core.optim.overlap import OverlappedUpdate
from ..core.system.memory import kept_memory
from ..core.training import engine as engines
from ..core.training.build import build_model, build_step
from ..core.training.step import TrainStep
from ..kernels import reference
from ..kernels.augment import launches as augment_launches
from ..models import blocks
from ..models.autoencoder import Autoencoder, Outputs
from . import launches
from .ceilings import card_of
from .harness import Pace, measure, pace, rounded, spread_ms
from .variants import variant

CASES = [("lightweight", 8), ("original", 16)]
GPU_CASES = [("lightweight", 16), ("original", 16), ("original", 64)]
GPU_CASES += [("dfaker-256", 16), ("dfl-h128", 16)]

LEVERS = ("bias_act", "face_loss", "adam", "align", "streams", "series", "dense_gradients")
"""What "without" names: three kernels, the aligned channels, the decoders' two streams, that the
update comes after the backward pass, not beside it, and that the gradients of large dense layers
lie in memory."""

CPU_LEVERS = (*LEVERS[:3], "kept_memory")
"""The fourth is what the computer's memory does; see `mien.core.system.memory`."""


def rows(
    ceilings: dict[str, Any] | None = None, modes: tuple[str, ...] = ("fp32", "bf16")
) -> Iterator[dict[str, Any]]:
    """One row a model, precision and engine, then one a lever that is left out.

    ceilings: of this card, as `ceilings.measure_ceilings` gives them; for `share_of_ceiling`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    best = "graph" if on_gpu else "eager"
    for name, batch_size in GPU_CASES if on_gpu else CASES:
        for mode in modes:
            what = {"kind": "step", "model": name, "batch_size": batch_size, "precision": mode}
            ours = partial(mien_step, name, batch_size, mode, device)
            plain = partial(plain_step, name, batch_size, mode, device)
            # Compiling takes a minute, so only in the precision that is meant for a GPU.
            compiles = on_gpu and mode == "bf16"
            engines_here = ["eager", *["compile"] * compiles, *["graph"] * on_gpu]
            makers: dict[tuple[str, str], Callable[[], Callable[[], object]]] = {
                (f"mien-{engine}", ""): partial(ours, engine) for engine in engines_here
            }
            makers["plain-torch", ""] = plain
            if compiles:
                makers["plain-compile", ""] = partial(plain, is_compiled=True)
            for lever in (LEVERS if on_gpu else CPU_LEVERS) if mode == "bf16" else ():
                makers[f"mien-{best}", lever] = partial(ours, best, without=lever)
            for (engine, lever), make in makers.items():
                without = {"without": lever} if lever else {}
                yield step_row(what | {"engine": engine} | without, make, device, ceilings)


def step_row(
    what: dict[str, Any],
    make: Callable[[], Callable[[], object]],
    device: torch.device,
    ceilings: dict[str, Any] | None,
    how: Pace | None = None,
) -> dict[str, Any]:
    """The figures of one step, or why there are none: one failure must not cost all others.

    how: None: at the `pace` of steps.
    """
    torch.compiler.reset()  # else shapes of the step before make this one's sizes dynamic
    gc.collect()  # a step refers to itself: else the memory of the one before counts as this one's
    # What cuBLAS took for the streams of the steps before it keeps: 64 MiB of each on an H100.
    kept_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        how = how or pace("step", device.type)
        with _memory_of(what, device):
            return what | _figures(what, make(), device, ceilings, how, kept_bytes)
    except (RuntimeError, TritonError) as error:
        return what | {"error": str(error).strip().partition("\n")[0]}


def _memory_of(
    what: dict[str, Any], device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Freed memory kept where training keeps it, but for the step that leaves this out."""
    is_kept = device.type == "cpu" and what.get("engine", "").startswith("mien")
    return (
        kept_memory
        if is_kept and what.get("without") != "kept_memory"
        else contextlib.nullcontext()
    )


def _figures(
    what: dict[str, Any],
    step: Callable[[], object],
    device: torch.device,
    ceilings: dict[str, Any] | None,
    how: Pace,
    kept_bytes: int,
) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    timed = measure(step, how, device_type=device.type)
    faces = 2 * what["batch_size"]
    eg_per_s = faces / timed["median_s"]
    is_eager = what["engine"] in ("mien-eager", "plain-torch")
    return {
        "threads": torch.get_num_threads(),
        "eg_per_s": rounded(eg_per_s),
        "eg_per_cpu_s": rounded(faces / timed["cpu_s"]) if timed["cpu_s"] else None,
        **spread_ms(timed),
        "share_of_ceiling": _share(what, eg_per_s, ceilings),
        "peak_mib": _peak_mib(step, device, kept_bytes, is_graph=what["engine"] == "mien-graph")
        if on_gpu
        else None,
        "python_calls": count_python_calls(step),
        "launches": launches.count(step) if is_eager else None,
    }


def _peak_mib(
    step: Callable[[], object], device: torch.device, kept_bytes: int, *, is_graph: bool
) -> float:
    """The most memory that a step takes once libraries have chosen, beyond what was kept before."""
    # A replay takes none: its memory was that of the capture, before which the engine resets.
    if not is_graph:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - kept_bytes) / 2**20


def _share(what: dict[str, Any], eg_per_s: float, ceilings: dict[str, Any] | None) -> float | None:
    """Share of what the roofline of this card allows; it is drawn for bf16."""
    if ceilings is None or what["precision"] != "bf16":
        return None
    work = work_of(variant(what["model"]).meta_model(), what["batch_size"])
    return rounded(eg_per_s / ceiling(work, card_of(ceilings)).eg_per_s)


def make_batch(
    model: Autoencoder, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Batch:
    """A random batch of the right shapes; ``dtype`` and channels of the input as the model's."""
    generator = torch.Generator().manual_seed(0)
    size, outs = model.input_px, model.output_px

    def draw(channels: int, size_px: int) -> Tensor:
        shape = (2 * batch_size, channels, size_px, size_px)
        drawn = torch.rand(*shape, generator=generator).to(device)
        return drawn.contiguous(memory_format=torch.channels_last)

    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    faces = draw(3, size).to(dtype)
    missing = first.weight.shape[1] - faces.shape[1]
    faces = F.pad(faces, (0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
    weights = tuple(draw(1, out).contiguous() for out in outs)
    return Batch(faces, tuple(draw(3, out) for out in outs), weights, None)


class OneBatch:
    """Gives the same batch for ever."""

    is_capturable = True

    def __init__(self, batch: Batch):
        self.only = batch

    def next(self, _faces_seen: dict[str, int]) -> Batch:
        """The batch."""
        return self.only

    def seek(self, _faces_seen: dict[str, int]) -> None:
        """Do nothing: there is one batch."""

    def batch(self, turn: int = 0) -> Batch:
        """The batch."""
        return self.only

    def following(self, faces_seen: dict[str, int]) -> dict[str, int]:
        """The same place."""
        return faces_seen


class _PlainLoss(Loss):
    """The losses as operations of PyTorch, differentiated by autograd."""

    def __call__(
        self, outputs: tuple[Outputs, Outputs], batch: Batch, scale: Tensor | None
    ) -> Losses:
        """Compute what the fused losses do, of a model with one output."""
        means, *gradients = reference.face_loss(
            outputs[0][0],
            outputs[1][0],
            batch.targets[0],
            batch.weights[0],
            losses=[*self.weights.items()],
        )
        if scale is not None:
            gradients = [scale * gradient for gradient in gradients]
        return Losses(means.flatten(), tuple(gradients))


class _PlainUpdate(Update):
    """The optimizer as PyTorch has it: upcast gradients, fused Adam, copies."""

    def __call__(self, gradients: Any) -> None:
        """Do what the fused update does, but for clipping and the check for numbers that are not
        finite."""
        if not hasattr(self, "torch_adam"):
            on_gpu = self.master_weights[0].is_cuda
            self.torch_adam = torch.optim.Adam(
                self.master_weights, lr=5e-5, eps=1e-7, fused=True, capturable=on_gpu
            )
        for master, gradient in zip(self.master_weights, gradients, strict=True):
            master.grad = gradient.float()
        self.torch_adam.step()
        if self.low_precision_weights:
            torch._foreach_copy_(self.low_precision_weights, self.master_weights)


@contextlib.contextmanager
def plain_blocks() -> Iterator[None]:
    """The models' blocks use PyTorch's convolutions and separate operations inside."""
    names = ("bias_act", "bias_act_depth_to_space", "to_image")
    patches: dict[str, Any] = {name: _plain(name) for name in names}
    patches["linear"], patches["convolution"] = F.linear, _plain_convolution
    with mock.patch.multiple(blocks, **patches):
        yield


def _plain_convolution(
    x_bchw: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, *, groups: int = 1
) -> Tensor:
    return F.conv2d(x_bchw, weight, None, stride, padding, groups=groups)


def _plain(name: str) -> Callable[..., Tensor]:
    """An operation in the type of its input: under autocast a bias of fp32 would widen it."""
    operation = getattr(reference, name)

    def run(x_bchw: Tensor, bias_c: Tensor | None, **options: Any) -> Tensor:
        return operation(x_bchw, None if bias_c is None else bias_c.to(x_bchw.dtype), **options)

    return run


def train_step(
    name: str,
    mode: str,
    device: torch.device,
    *,
    batch_size: int = 1,
    engine: str = "eager",
    align_channels: str = "auto",
    without: str = "",
    distribution: str = "auto",
    group: Group | None = None,
) -> tuple[TrainStep, Autoencoder]:
    """A step of a fresh model as training builds it but for a lever, and the model."""
    measured = variant(name)
    config = from_dict(
        {
            "model": {"trainer": measured.trainer, "options": measured.options},
            "optimizer": {"fused_dense": without == "dense_gradients"},
            "precision": {
                "mode": mode,
                "align_channels": "off" if without == "align" else align_channels,
            },
            "train": {
                "batch_size": batch_size,
                "engine": engine,
                "decoder_streams": "one" if without == "streams" else "auto",
                "distribution": distribution,
            },
        }
    )
    model, _ = build_model(config, device)
    return build_step(
        config,
        model,
        device,
        loss=_PlainLoss(config.loss, model.output_px, device) if without == "face_loss" else None,
        kind_of_update={"adam": _PlainUpdate, "series": OverlappedUpdate}.get(without, Update),
        group=group,
    ), model


def mien_step(
    name: str,
    batch_size: int,
    mode: str,
    device: torch.device,
    engine: str = "eager",
    without: str = "",
) -> Callable[[], object]:
    """Our step, bound to a model and a batch; one lever may be left out."""
    step, model = train_step(
        name, mode, device, batch_size=batch_size, engine=engine, without=without
    )
    # As training sets it.
    torch.backends.cudnn.benchmark = True
    compute = step.update.precision.compute
    batch = make_batch(model, batch_size, device, compute)
    source = OneBatch(batch)

    def fail(warning: str) -> None:
        raise RuntimeError(warning)  # a fallback would be measured under a wrong name

    run = engines.make(engine, step, source, fail)
    seen = {"a": 0, "b": 0}
    if without != "bias_act":
        return lambda: run(seen)

    def plainly() -> None:
        with plain_blocks():
            run(seen)

    return plainly


def plain_step(
    name: str, batch_size: int, mode: str, device: torch.device, *, is_compiled: bool = False
) -> Callable[[], object]:
    """The same modules, used plainly."""
    model = variant(name).build().to(device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    precision = precisions.resolve(mode, device)
    precision.apply()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5, eps=1e-7)
    batch = make_batch(model, batch_size, device, torch.float32)
    faces, target = batch.input_nchw.contiguous(), batch.targets[0].contiguous()
    weight = batch.weights[0].contiguous()
    lowered = precision.compute is not torch.float32

    def side_loss(side: Any, part: slice) -> Tensor:
        with torch.autocast(device.type, precision.compute, enabled=lowered):
            (decoded, *_) = model.swap(faces[part], side)
        decoded = decoded.float()
        error = plain_ssim(decoded, target[part]) + (decoded - target[part]).square()
        return (error * weight[part]).mean()

    def total() -> Tensor:
        return side_loss("a", slice(batch_size)) + side_loss("b", slice(batch_size, None))

    compute = torch.compile(total, dynamic=False) if is_compiled else total

    def step() -> None:
        with plain_blocks():
            compute().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_ssim(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """1 - SSIM by four dense depthwise convolutions with reflected borders."""
    x = torch.arange(11, device=pred_bchw.device) - 5.0
    taps = torch.exp(-x.square() / (2 * 1.5**2))
    window = torch.outer(taps, taps) / taps.sum().square()
    kernel = window.expand(3, 1, 11, 11)

    def blur(picture: Tensor) -> Tensor:
        return F.conv2d(F.pad(picture, (5, 5, 5, 5), mode="reflect"), kernel, groups=3)

    mean_x, mean_y = blur(pred_bchw), blur(target_bchw)
    squares = mean_x.square() + mean_y.square()
    spread = blur(pred_bchw.square() + target_bchw.square()) - squares
    covariance = blur(pred_bchw * target_bchw) - mean_x * mean_y
    # SSIM's constants, 0.01^2 and 0.03^2.
    luminance = (2 * mean_x * mean_y + 1e-4) / (squares + 1e-4)
    return 1 - luminance * (2 * covariance + 9e-4) / (spread.clamp_min(0) + 9e-4)


def count_python_calls(step: Callable[[], object]) -> int:
    """Python and C function calls that one step makes on the calling thread, exactly.

    On a GPU the backward pass has a thread of its own, which is not counted.
    """
    # The first call makes what later ones keep.
    step()
    count = 0

    def note(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def phase_launches(
    name: str, mode: str = "bf16", batch_size: int = 1, without: str = ""
) -> dict[str, int]:
    """Kernels that a step launches on a GPU in each phase, counted without one.

    The count does not depend on the batch size. Channels are aligned, as they are on a GPU.
    """
    cpu = torch.device("cpu")
    step, model = train_step(name, mode, cpu, align_channels="on", without=without)
    batch = make_batch(model, batch_size, cpu, step.update.precision.compute)
    made: dict[str, Any] = {}

    def forward() -> None:
        made["outputs"] = step.forward(batch.input_nchw)

    def loss() -> None:
        made["losses"] = step.loss(made["outputs"], batch, step.update.scale)

    def backward() -> None:
        gradients = step.backward(made["outputs"], made["losses"].gradients)
        made.setdefault("gradients", gradients)  # in place, as in a captured graph

    def update() -> None:
        step.update(made["gradients"])

    def log() -> None:
        step.loss_buffer.push(made["losses"].row_v)

    phases = (forward, loss, backward, update, log)
    counts = launches.count_phases({phase.__name__: phase for phase in phases})
    sizes: dict[str, Any] = {"input_px": model.input_px, "output_px": model.output_px}
    size_px = max(model.input_px, *model.output_px)
    augment = augment_launches(2 * batch_size, size_px=size_px, **sizes)
    counts["augment"] = sum(augment.values())
    return counts | {"all": sum(counts.values())}


def rank_launches(name: str, group: Group) -> dict[str, int]:
    """Kernels and collectives that a step launches beyond that of one process, by distribution.

    Args:
        name: Name of the model.
        group: Ranks that take the step; one is enough to count.
    """
    cpu = torch.device("cpu")

    def counted(distribution: str, group: Group | None) -> int:
        step, model = train_step(
            name, "bf16", cpu, align_channels="on", distribution=distribution, group=group
        )
        batch = make_batch(model, 1, cpu, step.update.precision.compute)
        return launches.count(lambda: step(batch))

    alone = counted("auto", None)
    return {kind: counted(kind, group) - alone for kind in ("mirrored", "sharded")}
