"""The losses of filtered pictures, value and gradient as training has them.

Beside each the same by autograd of its map, in PyTorch's operations and compiled; and how many
times as long it takes as SSIM and MSE of the same pictures, which are the default. docs/losses.md
has what was predicted of it.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..core.losses import MADE_FOR_A_SIZE
from ..core.losses.picture import PictureLoss
from ..kernels.filtered_loss import LOSSES
from .bench_face_loss import SIZES, differentiated, planar, ssim_and_mse


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    """Yield (what it is, function to time)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for (batch, edge), name in itertools.product(SIZES[1:], LOSSES):
        elements = 2 * batch * 3 * edge * edge
        what = {
            "kernel": "filtered_loss",
            "losses": name,
            "batch": batch,
            "edge_px": edge,
            "dtype": "float32",
            # Prediction, target and gradient once, and the weight of each pixel.
            "bytes": elements * 3 * 4 + elements // 3 * 4,
        }
        loss = MADE_FOR_A_SIZE[name](edge).to(device, torch.float32)
        variants: dict[str, Callable[..., Any]] = {
            "mien": loss,
            "torch-eager": partial(PictureLoss.forward, loss),
        }
        if device == "cuda":
            torch.compiler.reset()
            variants["torch-compile"] = torch.compile(variants["torch-eager"], dynamic=False)
        sets = planar(batch, edge, device)
        for variant, function in variants.items():
            row = what | {"variant": variant, "beside": ssim_and_mse(batch, edge, device)}
            yield row, differentiated(function, sets)
