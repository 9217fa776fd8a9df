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

from .. import models
from ..core.config import LossConfig, OptimizerConfig
from ..core.data.feed import Batch
from ..core.train import precision as precisions
from ..core.train.losses import Loss
from ..core.train.optim import Update
from ..core.train.step import TrainStep
from ..models.autoencoder import Autoencoder
from . import launches
from .ceilings import card_of
from .harness import measure, pace, rounded, spread_ms
from .roofline import ceiling, meta_model, work_of

CASES = [("lightweight", 8), ("original", 16)]


def rows(
    ceilings: dict[str, Any] | None = None, modes: tuple[str, ...] = ("fp32", "bf16")
) -> Iterator[dict[str, Any]]:
    """One row a model, precision and engine.

    ceilings: of this card, as `ceilings.measure_ceilings` gives them; for `share_of_ceiling`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, batch_size in CASES:
        for mode in modes:
            for engine, make in ENGINES.items():
                step = make(name, batch_size, mode, device)
                what = {
                    "kind": "step",
                    "model": name,
                    "batch_size": batch_size,
                    "precision": mode,
                    "engine": engine,
                    "threads": torch.get_num_threads(),
                }
                yield what | _figures(what, step, device, ceilings)


def _figures(
    what: dict[str, Any],
    step: Callable[[], object],
    device: torch.device,
    ceilings: dict[str, Any] | None,
) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    timed = measure(step, pace("step", device.type), device_type=device.type)
    faces = 2 * what["batch_size"]
    eg_per_s = faces / timed["median_s"]
    return {
        "eg_per_s": rounded(eg_per_s),
        "eg_per_cpu_s": rounded(faces / timed["cpu_s"]) if timed["cpu_s"] else None,
        **spread_ms(timed),
        "share_of_ceiling": _share(what, eg_per_s, ceilings),
        "peak_mib": torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None,
        "python_calls": count_python_calls(step),
        "launches": launches.count(step),
    }


def _share(what: dict[str, Any], eg_per_s: float, ceilings: dict[str, Any] | None) -> float | None:
    """Of what the roofline of this card allows; it is drawn for bf16."""
    if ceilings is None or what["precision"] != "bf16":
        return None
    work = work_of(meta_model(what["model"]), what["batch_size"])
    return rounded(eg_per_s / ceiling(work, card_of(ceilings)).eg_per_s)


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


ENGINES: dict[str, Callable[[str, int, str, torch.device], Callable[[], object]]] = {
    "mien-eager": mien_step,
    "plain-torch": plain_step,
}
"""Makes a step of (model, batch size, precision, device), by name."""
