"""What this card can do at all: bytes a second of a copy, FLOP/s of products and convolutions.

Everything else is judged by these. A copy reads and writes, and both count. The convolutions are
those of the models, channels_last, each with its data and its weight gradient: what the library
makes of the shapes that matter. On a CPU sizes are small, the result is called a CPU's, and the
convolutions run in fp32.

Run: ``mien bench ceilings``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.estimate.roofline import Card
from ..core.precision import restoring_products, round_products
from .harness import device_name, measure, pace, rounded, spread_ms
from .variants import variant

_MODELS = ("lightweight", "original", "dfaker-256", "dfl-h128")
"""Models whose convolutions are measured: those whose speed has a goal."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_GPU_MODES, _CPU_MODES = ("bf16", "fp16", "tf32"), ("bf16", "fp32")
_GPU_EDGE, _CPU_EDGE = 8192, 1024
_GPU_COPY_BYTES, _CPU_COPY_BYTES = 2**30, 2**26
_GRAPH_CALLS = 16  # of each, in one CUDA graph, so that Python is not what is timed
_GPU_BATCH_SIZE, _CPU_BATCH_SIZE = 16, 1


def measure_ceilings(device: torch.device) -> dict[str, Any]:
    """Copy, products and convolutions of one device, as they go into a results file."""
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # the library's best algorithm, as in training
    modes = _GPU_MODES if on_gpu else _CPU_MODES
    batch_size = _GPU_BATCH_SIZE if on_gpu else _CPU_BATCH_SIZE
    edge = _GPU_EDGE if on_gpu else _CPU_EDGE
    return {
        "device": device_name(device.type),
        "num_sms": _num_sms(device),
        "copy_gb_s": _copy(device, _GPU_COPY_BYTES if on_gpu else _CPU_COPY_BYTES),
        "gemm_edge": edge,
        "gemm_tflops": {mode: _gemm(device, mode, edge) for mode in modes},
        "batch_size": batch_size,
        "convolutions": list(_convolutions(device, batch_size, "bf16" if on_gpu else "fp32")),
    }


def card_of(ceilings: dict[str, Any]) -> Card:
    """The measured card, to predict steps for."""
    return Card(
        ceilings["device"],
        ceilings["gemm_tflops"]["bf16"],
        ceilings["copy_gb_s"],
        ceilings["num_sms"],
    )


def ceiling_s(
    ceilings: dict[str, Any], num_bytes: float | None, flops: float | None, dtype: str
) -> float | None:
    """Seconds below which this card cannot move and compute so much; None where nothing is known.

    dtype: a key of ``gemm_tflops``; where that was not measured, FLOPs are left out.
    """
    bounds = []
    if num_bytes:
        bounds.append(num_bytes / (1e9 * ceilings["copy_gb_s"]))
    if flops and dtype in ceilings["gemm_tflops"]:
        bounds.append(flops / (1e12 * ceilings["gemm_tflops"][dtype]))
    return max(bounds, default=None)


def _num_sms(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; a CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


def _seconds(fn: Callable[[], object], device: torch.device) -> dict[str, float]:
    capture = _GRAPH_CALLS if device.type == "cuda" else 0
    return measure(fn, pace("kernel", device.type), device_type=device.type, capture=capture)


def _copy(device: torch.device, num_bytes: int) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rounded(2 * num_bytes / _seconds(lambda: target.copy_(source), device)["median_s"] / 1e9)


def _gemm(device: torch.device, mode: str, edge: int) -> float:
    """TFLOP/s of a square product; tf32 is fp32 with rounding allowed."""
    dtype = _DTYPES["fp32" if mode == "tf32" else mode]
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    with restoring_products():
        round_products(mode == "tf32")
        seconds = _seconds(lambda: torch.mm(left, right, out=out), device)["median_s"]
    return rounded(2 * edge**3 / seconds / 1e12)


@dataclass(frozen=True)
class Convolution:
    """One convolution of a model: shapes (B, C, H, W) and (O, C, R, S), and how it steps."""

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def __str__(self) -> str:
        batch, channels, rows, columns = self.input_shape
        outputs, _, taps, _ = self.weight_shape
        return f"{batch}x{channels}x{rows}x{columns} -> {outputs}, {taps}x{taps}/{self.stride[0]}"


class _Recorder(TorchDispatchMode):
    """Notes the convolutions that run inside, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Convolution, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, _, transposed, *_ = args
            if not transposed:
                shapes = tuple(x.shape), tuple(weight.shape)
                self.found[Convolution(*shapes, tuple(stride), tuple(padding))] = None
        return func(*args, **(kwargs or {}))


def convolutions_of(name: str, batch_size: int) -> list[Convolution]:
    """The different convolutions of a step of ``batch_size`` faces a side."""
    model = variant(name).meta_model()
    edge = model.input_px
    with torch.no_grad(), _Recorder() as recorder:
        model(torch.empty(2 * batch_size, 3, edge, edge, device="meta"))
    return list(recorder.found)


def _convolutions(device: torch.device, batch_size: int, mode: str) -> Iterator[dict[str, Any]]:
    """One entry a convolution and phase; those that families share are measured once."""
    users: dict[Convolution, list[str]] = {}
    for name in _MODELS:
        for convolution in convolutions_of(name, batch_size):
            users.setdefault(convolution, []).append(name)
    for convolution, names in users.items():
        for phase, run, flops in _phases(convolution, device, _DTYPES[mode]):
            figures = _seconds(run, device)
            yield {
                "models": names,
                "shape": str(convolution),
                "phase": phase,
                "precision": mode,
                "tflops": rounded(flops / figures["median_s"] / 1e12),
                **spread_ms(figures),
            }


def _phases(
    convolution: Convolution, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(phase, function to time, its FLOPs)."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(*shape, device=device).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last)

    x, weight = draw(convolution.input_shape), draw(convolution.weight_shape)
    settings = (convolution.stride, convolution.padding, (1, 1), False, (0, 0), 1)

    def forward() -> Tensor:
        return torch.ops.aten.convolution(x, weight, None, *settings)

    out = forward()
    grad = draw(tuple(out.shape))
    flops = 2 * out.numel() * weight[0].numel()

    def backward(mask: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *settings, mask)

    yield "forward", forward, flops
    yield "data", backward([True, False, False]), flops
    yield "weight", backward([False, True, False]), flops
