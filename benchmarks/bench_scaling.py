"""Speed of one run on 1, 2, 4, 8 GPUs, beside what is predicted, and the links between them.

Each number of ranks trains at an equal batch of the run, and at an equal batch of each rank. The
exchange is measured beside the backward pass, as GPUs train; after it, as CPUs do; and replaced by
nothing, which shows what of it stays in the open. Without a GPU there are 2 ranks, of one thread
each.

Run: ``mien bench scaling``.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..core import precision as precisions
from ..core.config import from_dict
from ..core.distribute import predict
from ..core.estimate.links import LOOPBACK, NVLINK, Link
from ..core.training.scaling import measured_step_time
from .bench_step import GPU_CASES
from .ceilings import card_of
from .harness import rounded
from .variants import variant

_CPU_CASES = [("lightweight", 16)]
_MIB = 2**20
_GPU_SIZES = [size * _MIB for size in (1, 4, 16, 64, 256)]
_CPU_SIZES = [size * _MIB for size in (1, 4, 16)]
_LINK_SHARE = 0.8  # of a link, which a prediction takes of it: the measured rate is of the whole
_MOST_OFF = 0.15
"""Difference of a prediction from what was measured, above which a GPU's row is an error."""


def rows(ceilings: dict[str, Any], counts: tuple[int, ...] = ()) -> Iterator[dict[str, Any]]:
    """Rows of links and meetings, then of steps, from one rank to most.

    Args:
        ceilings: What the device can do, as `ceilings.measure_ceilings` gives it.
        counts: Numbers of ranks; default: 1, 2, 4, 8 as far as there are GPUs, else 1 and 2.
    """
    num_gpus = torch.cuda.device_count()
    counts = counts or tuple(n for n in (1, 2, 4, 8) if n <= (num_gpus or 2))
    alone: dict[tuple[str, int], float] = {}
    """Seconds of a step of one rank, by model and faces of a side."""

    for size in counts:
        link: Link | None = None
        for row in _measured(size, list(_jobs(size, max(counts)))):
            if row["kind"] == "link":
                found = [link] if link else []
                link = max([*found, _link(row)], key=lambda each: each.gb_s)
            elif row["kind"] == "scaling":
                where = row["model"], row["batch_size"]
                if size == 1:
                    alone[where] = row["median_ms"] / 1e3
                else:
                    row |= _beside(row, alone, link, ceilings)
            yield row


def _jobs(size: int, most: int) -> Iterator[dict[str, Any]]:
    """What so many ranks measure; one rank all batches that others divide or have each."""
    on_gpu = torch.cuda.is_available()
    if size > 1:
        for nbytes in _GPU_SIZES if on_gpu else _CPU_SIZES:
            for timed in ("stream", "graph") if on_gpu else ("wall",):
                case = {"bytes": nbytes, "timed": timed}
                yield {"kind": "link", "ranks": size, "case": case}
        yield {"kind": "meeting", "ranks": size}
    for name, faces in GPU_CASES if on_gpu else _CPU_CASES:
        what = {
            "kind": "scaling",
            "model": name,
            "precision": "bf16" if on_gpu else "fp32",
            "engine": "graph" if on_gpu else "eager",
            "ranks": size,
        }
        if size == 1:
            shares = {faces // other for other in (1, 2, 4, 8) if other <= most}
            yield from (what | {"batch_size": batch} for batch in sorted(shares))
            continue
        for batch_size in (faces, size * faces):
            mirrored = what | {"batch_size": batch_size, "distribution": "mirrored"}
            yield from (mirrored | {"exchange": how} for how in ("beside", "after", "none"))
            yield mirrored | {"distribution": "sharded", "exchange": _as_in_training()}


def _as_in_training() -> str:
    """Time of the exchange in a run on such devices."""
    return "beside" if torch.cuda.is_available() else "after"


def _measured(size: int, jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of so many ranks, processes of their own.

    Raises:
        RuntimeError: One of them has failed; its traceback is on standard error.
    """
    # Another process may take the port before the ranks do; then they fail, and say so.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", f"{__package__}.scaling_rank"]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(size):
            environment = os.environ | _place(rank, size, port)
            start = partial(subprocess.Popen, command, env=environment, text=True)
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            process = stack.enter_context(start(stdin=subprocess.PIPE, stdout=out))
            # Runs before the context of the process, which waits for its end.
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(jobs))
            process.stdin.close()
        assert processes[0].stdout is not None
        yield from map(json.loads, processes[0].stdout)
        if any(process.wait() for process in processes):
            raise RuntimeError(f"a rank of {size} has failed; standard error says why")


def _place(rank: int, size: int, port: int) -> dict[str, str]:
    """Variables of a rank, as torchrun sets them; on a CPU each has one thread."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    return {name: str(value) for name, value in place.items()} | threads


def _link(row: dict[str, Any]) -> Link:
    """The link of a measured row."""
    known = NVLINK if torch.cuda.is_available() else LOOPBACK
    return Link("the link measured", row["gb_per_s"] / _LINK_SHARE, "measured", known.is_beside)


def _beside(
    row: dict[str, Any],
    alone: dict[tuple[str, int], float],
    link: Link | None,
    ceilings: dict[str, Any],
) -> dict[str, Any]:
    """Fields that compare a row with one rank: as measured, and as predicted from that."""
    name, size, batch_size = row["model"], row["ranks"], row["batch_size"]
    fields: dict[str, Any] = {}
    if (name, batch_size) in alone:
        fields["speedup"] = rounded(alone[name, batch_size] * 1e3 / row["median_ms"])
    elif (name, batch_size // size) in alone:
        one_s = alone[name, batch_size // size]
        fields["speedup"] = rounded(size * one_s * 1e3 / row["median_ms"])
    if (
        row["exchange"] != _as_in_training()
        or link is None
        or (name, batch_size // size) not in alone
    ):
        return fields
    one = _one(row, alone[name, batch_size // size], ceilings)
    way = predict.sharded if row["distribution"] == "sharded" else predict.mirrored
    predicted = way(one, size, link).eg_per_s
    off = abs(predicted / row["eg_per_s"] - 1)
    fields |= {"predicted_eg_per_s": rounded(predicted), "off": rounded(off, 3)}
    if off > _MOST_OFF and torch.cuda.is_available():
        fields["error"] = f"predicted {predicted:,.0f} EG/s, which is {100 * off:.0f} % off"
    return fields


def _one(row: dict[str, Any], measured_s: float, ceilings: dict[str, Any]) -> predict.StepTime:
    """The step of one rank with its share of the batch, as measured."""
    measured = variant(row["model"])
    config = from_dict(
        {
            "model": {"trainer": measured.trainer, "options": measured.options},
            "train": {"batch_size": row["batch_size"] // row["ranks"]},
        }
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precisions.resolve(row["precision"], device)
    return measured_step_time(config, precision, device, card_of(ceilings), measured_s)
