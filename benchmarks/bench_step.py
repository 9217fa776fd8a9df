"""One training step, without data: ours, and the same modules in plain PyTorch eager.

The plain step is what one would write first: each side through the encoder by itself, NCHW, SSIM by
dense convolutions, `torch.optim.Adam`. Both are timed in turn, on the same batch. Without a GPU the
figure to read is faces per CPU second; the calls and launches of a step are exact anywhere.

Run: ``mien bench step``.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import models
from ..core.config import LossConfig, OptimizerConfig
from ..core.data.feed import Batch
from ..core.train import precision as precisions
from ..core.train.losses import Loss
from ..core.train.optim import Update
from ..core.train.step import TrainStep
from ..models.autoencoder import Autoencoder
from .harness import measure

CASES = [("lightweight", 8), ("original", 16)]


def rows(repeats: int = 5, modes: tuple[str, ...] = ("fp32", "bf16")) -> Iterator[dict[str, Any]]:
    """One row a model, precision and engine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, batch_size in CASES:
        for mode in modes:
            steps = {
                "mien-eager": mien_step(name, batch_size, mode, device),
                "plain-torch": plain_step(name, batch_size, mode, device),
            }
            for engine, step in steps.items():
                yield _row(name, batch_size, mode, engine, step, repeats, device)


def _row(
    name: str,
    batch_size: int,
    mode: str,
    engine: str,
    step: Callable[[], object],
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    def timed() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    figures = measure(timed, repeats=repeats, warmup=2)
    faces = 2 * batch_size
    return {
        "kind": "step",
        "model": name,
        "batch_size": batch_size,
        "precision": mode,
        "engine": engine,
        "eg_per_s": round(faces / figures["median_s"], 2),
        "eg_per_cpu_s": round(faces / figures["cpu_s"], 2),
        "median_ms": round(1e3 * figures["median_s"], 1),
        "p10_ms": round(1e3 * figures["p10_s"], 1),
        "p90_ms": round(1e3 * figures["p90_s"], 1),
        "threads": torch.get_num_threads(),
        "python_calls": count_python_calls(step),
        "launches": count_launches(step),
    }


def make_batch(model: Autoencoder, batch_size: int, device: torch.device) -> Batch:
    """A random batch of the right shapes."""
    generator = torch.Generator().manual_seed(0)
    size, out = model.input_px, model.output_px[-1]

    def draw(channels: int, size_px: int) -> Tensor:
        shape = (2 * batch_size, channels, size_px, size_px)
        drawn = torch.rand(*shape, generator=generator).to(device)
        return drawn.contiguous(memory_format=torch.channels_last)

    return Batch(draw(3, size), (draw(3, out),), (draw(1, out),), None)


def mien_step(name: str, batch_size: int, mode: str, device: torch.device) -> Callable[[], object]:
    """Our step, bound to a model and a batch."""
    model = models.build(name).to(device)
    precision = precisions.resolve(mode, device)
    step = TrainStep(
        model, Loss(LossConfig()), Update(model, OptimizerConfig(), precision), precision
    )
    batch = make_batch(model, batch_size, device)
    return lambda: step(batch)


def plain_step(name: str, batch_size: int, mode: str, device: torch.device) -> Callable[[], object]:
    """The same modules, used plainly."""
    model = models.build(name).to(device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    precision = precisions.resolve(mode, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5, eps=1e-7)
    batch = make_batch(model, batch_size, device)
    faces, target = batch.input_nchw.contiguous(), batch.targets[0].contiguous()
    weight = batch.weights[0].contiguous()

    def step() -> None:
        total = faces.new_zeros(())
        for side, part in (("a", slice(batch_size)), ("b", slice(batch_size, None))):
            with precision.forward():
                (decoded, *_) = model.swap(faces[part], side)
            error = plain_ssim(decoded, target[part]) + (decoded - target[part]).square()
            total = total + (error * weight[part]).mean()
        total.backward()
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
    luminance = (2 * mean_x * mean_y + 1e-4) / (squares + 1e-4)
    return 1 - luminance * (2 * covariance + 9e-4) / (spread.clamp_min(0) + 9e-4)


def count_python_calls(step: Callable[[], object]) -> int:
    """Python and C function calls that one step makes on the calling thread; exact."""
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


class _LaunchCounter(TorchDispatchMode):
    """Counts operations that do work; views and metadata are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not (func.is_view or func.namespace == "prim"):
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_launches(step: Callable[[], object]) -> int:
    """Operations other than views in one step, forward, backward and update; exact."""
    step()
    with _LaunchCounter() as counter:
        step()
    return counter.count
