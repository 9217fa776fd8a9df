"""Every model: what it takes to make one and, on a GPU, how fast it trains.

Run: ``mien bench models [--only NAME ...]``. Without a GPU a step of the larger models takes
minutes, so only what it costs to make them is measured then, and what their step launches.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.config import from_dict
from ..core.precision import Precision
from ..core.training import memory
from ..models.alignment import MULTIPLE
from ..models.batch_norm import norms_of, update_running_stats
from . import launches
from .bench_step import mien_step, step_row
from .harness import rounded
from .variants import Variant, names, variant

BATCH_SIZES = (16, 64)
MIB = 2**20


def rows(only: Sequence[str] = (), ceilings: dict[str, Any] | None = None) -> Iterator[dict]:
    """One row a model of making it; on a GPU one more a batch size of training it.

    only: names of models; none: all.
    """
    chosen = {name: variant(name) for name in only or names()}
    for name, model in chosen.items():
        yield {"kind": "model", "model": name, **_making(name), **_need(model)}
        if torch.cuda.is_available():
            for batch_size in BATCH_SIZES:
                what = {"kind": "step", "model": name, "batch_size": batch_size}
                what |= {"precision": "bf16", "engine": "mien-graph"}
                device = torch.device("cuda")
                make = partial(mien_step, name, batch_size, "bf16", device, "graph")
                yield step_row(what, make, device, ceilings)
                torch.cuda.empty_cache()


def _making(name: str) -> dict[str, Any]:
    """Seconds and memory of making a model, in a process of its own."""
    # Spawned: a fork would begin with the pages of this process.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_make, (name,))


def _make(name: str) -> dict[str, Any]:
    variant(name).meta_model()  # what is to be imported is imported
    before, begin = _resident_bytes(), time.perf_counter()
    model = variant(name).build()
    seconds = time.perf_counter() - begin
    return {
        "build_s": rounded(seconds),
        "build_mib": rounded((_resident_bytes() - before) / MIB),
        "parameters_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _need(model: Variant) -> dict[str, Any]:
    """GPU memory that training needs, by estimate, and launches of the network in a step."""
    config = from_dict({"model": {"trainer": model.trainer, "options": model.options}})
    need = memory.footprint(config, Precision("bf16", torch.bfloat16, "as set"))
    launched = network_launches(model)
    return {
        **{f"gpu_mib_{size}": round(need.at(size).total_mib) for size in BATCH_SIZES},
        **{f"launches_{phase}": count for phase, count in launched.items()},
    }


def network_launches(model: Variant) -> dict[str, int]:
    """Kernels of a step's forward and backward pass, with aligned channels as on a GPU."""
    network = model.meta_model()
    network.align(MULTIPLE)
    network.to_channels_last()
    edge, parameters = network.input_px, list(network.parameters())
    faces = torch.empty(2, MULTIPLE, edge, edge, device="meta", dtype=torch.bfloat16)
    faces = faces.contiguous(memory_format=torch.channels_last)
    network.to(torch.bfloat16)
    norms, made = norms_of(network), dict[str, Any]()

    def forward() -> None:
        made["outputs"] = [output for side in network(faces) for output in side]
        update_running_stats(norms)

    def backward() -> None:
        pulls = [torch.empty_like(output) for output in made["outputs"]]
        torch.autograd.grad(made["outputs"], parameters, pulls)

    return launches.count_phases({"forward": forward, "backward": backward})
