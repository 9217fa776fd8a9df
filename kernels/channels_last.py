"""What kernels of channels_last images share: tensors, tiles, and the gradient of a bias.

All tensors are NHWC in memory. The gradient of a bias is a sum over all pixels: each program adds
up its own in fp32, and the program that ends last adds up those sums, in a fixed order.

Shape letters: C channels, P pixels of a batch, N programs side by side.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import is_capturing

NHWC = torch.channels_last

TILE = 2048
"""Values of a program's tile: with 4 warps, 16 a thread. Chosen by what the compiler makes of it on
the CPU, unmeasured on a GPU."""

MAX_BLOCK_CHANNELS = 64
"""Channels of a tile at most: 128 bytes of bf16, the length of a cache line. Chosen on the CPU,
unmeasured on a GPU."""

MAX_PROGRAMS = 1056
"""Programs of a backward pass at most: 8 for each of the 132 multiprocessors of an H100. Fixed,
since the bits of sums depend on it. Chosen on the CPU, unmeasured on a GPU."""

_BLOCK_PIXELS = 1024
"""Pixels that plain PyTorch widens to fp32 at a time. Chosen on the CPU, where alone it is used."""

_MAX_SUMS = 4096
"""Sums of one launch at most, a counter each: some 65,000 channels with a factor of 6."""


@triton.jit
def add_up_last(
    partial_ptr,    # [N, NUM_CHANNELS] fp32
    grad_bias_ptr,  # [NUM_CHANNELS]
    arrived_ptr,    # programs that have stored their partial sums, 0 between two kernels
    channels, used,
    num_partials,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The program that arrives last adds up what all have stored, always in the same order: a launch
    # for each bias costs more than the sum. The barrier puts all threads' stores before the
    # counter's release; what other programs stored is read past the L1 cache.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == num_partials - 1:
        partials = tl.arange(0, BLOCK_N)
        # Places of 32 bits, which all partial sums fit in, and pointers that move on: places of 64
        # bits, or made anew for each block, took so many live values that the compilers for some
        # generations needed a stack.
        pointers = partial_ptr + (partials[:, None] * NUM_CHANNELS + channels[None, :])
        total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        for begin in range(0, num_partials, BLOCK_N):
            mask = (partials < num_partials - begin)[:, None] & used[None, :]
            total += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
            pointers += BLOCK_N * NUM_CHANNELS
        grad_bias = tl.sum(total, axis=0)
        tl.store(grad_bias_ptr + channels, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=used)
        # For the next kernel of the stream, which then needs no launch that clears it.
        tl.store(arrived_ptr, 0)


def new_image(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An image on the device of ``like``, of its dtype unless another is given; not yet written."""
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=NHWC)


def new_bias_gradient(grad: Tensor, channels: int, dtype: torch.dtype | None) -> Tensor:
    """(C,) of the bias's dtype; no elements where there is no bias."""
    return grad.new_empty(0 if dtype is None else channels, dtype=dtype)


def programs_and_tiles(num_blocks: int, parts: int) -> tuple[int, int]:
    """Programs side by side, one at least, and blocks of each, for ``num_blocks`` of pixels in
    ``parts``."""
    each = max(triton.cdiv(num_blocks * parts, MAX_PROGRAMS), 1)
    # One at least: of no pixels, too, somebody has to write the bias's gradient.
    return max(triton.cdiv(num_blocks, each), 1), each


_arrived: dict[tuple[torch.device, int], Tensor] = {}
"""Counters by device and stream: kernels of one stream follow one another, and each leaves 0."""


def _arrived_of(device: torch.device) -> Tensor:
    """The counters of `add_up_last` for the current stream, all 0."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters = _arrived.get((device, stream))
    if counters is None:
        counters = torch.zeros(_MAX_SUMS, dtype=torch.int32, device=device)
        if not is_capturing(device):
            _arrived[device, stream] = counters  # zeros of a capture are there at replays alone
    return counters


def bias_sums(grad_bias_c: Tensor, num_partials: int) -> tuple[Tensor | None, ...]:
    """Partial sums (N, C), their total and counters, as kernels take them; Nones without a bias."""
    if not len(grad_bias_c):
        return None, None, None
    partial_nc = grad_bias_c.new_empty(num_partials, len(grad_bias_c), dtype=torch.float32)
    return partial_nc, grad_bias_c, _arrived_of(grad_bias_c.device)


def sum_channels(grad_bchw: Tensor, grad_bias_c: Tensor) -> None:
    """Sums over all pixels, added up in fp32 at least."""
    grad_pc = grad_bchw.permute(0, 2, 3, 1).flatten(0, 2)
    if grad_pc.dtype.itemsize > 2:
        grad_bias_c.copy_(grad_pc.sum(0))
        return
    # Blocks that stay in the cache as fp32: as fast as a sum in the half type, which rounds it.
    sums_c = grad_pc.new_zeros(grad_pc.shape[1], dtype=torch.float32)
    for block_pc in grad_pc.split(_BLOCK_PIXELS):
        sums_c += block_pc.float().sum(0)
    grad_bias_c.copy_(sums_c)
