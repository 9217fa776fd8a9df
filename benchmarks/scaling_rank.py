"""A rank of `mien bench scaling`: measures links and steps, and prints what the first rank saw.

Started with the variables of torchrun and a list of jobs in JSON on standard input; a job is what
a row says of what was measured. Every rank makes the same calls, so their number depends on no
clock: windows of `STEPS` steps or collectives.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from ..core.config import from_dict
from ..core.distribute.group import Group, open_group
from ..core.distribute.ranks import Ranks, from_environment
from ..core.distribute.update import MirroredUpdate
from ..core.training import engine as engines
from ..core.training.build import build_model, build_step
from .bench_step import OneBatch, make_batch
from .harness import Pace, measure, rounded, spread_ms
from .variants import variant

_WINDOWS, _WARM_UP = 5, 2
STEPS = {"cuda": 20, "cpu": 1}
"""Steps of a window. Chosen, unmeasured on a GPU."""

_COLLECTIVES = {"cuda": 16, "cpu": 4}

NUMBERS_OF_A_MEETING = 4
"""Numbers that the ranks agree on a few times a second."""


def figures(
    make: Callable[[], object], device: torch.device, repeats: int, *, captured: bool = False
) -> dict[str, float]:
    """Milliseconds of one of so many repeats, which every rank makes in every window."""

    def window() -> None:
        for _ in range(repeats):
            make()

    pace = Pace(_WINDOWS, 0.0, _WARM_UP)
    measured = measure(window, pace, device_type=device.type, capture=1 if captured else 0)
    return {
        name: value / repeats if name.endswith("_s") else value for name, value in measured.items()
    }


def link_figures(group: Group, device: torch.device, job: dict[str, Any]) -> dict[str, Any]:
    """Bytes a second that each rank sends, and receives, in a sum of so many bytes."""
    num_bytes = job["case"]["bytes"]
    sent = torch.zeros(num_bytes // 4, device=device)
    timed = figures(
        lambda: group.all_reduce(sent),
        device,
        _COLLECTIVES[device.type],
        captured=job["case"]["timed"] == "graph",
    )
    size = group.ranks.size
    on_wire = 2 * (size - 1) / size * num_bytes
    return {**spread_ms(timed), "gb_per_s": rounded(on_wire / timed["median_s"] / 1e9)}


def meeting_figures(group: Group) -> dict[str, Any]:
    """Time in which all ranks agree on some numbers."""
    cpu = torch.device("cpu")
    timed = figures(lambda: group.max([0] * NUMBERS_OF_A_MEETING), cpu, 50)
    return spread_ms(timed)


def step_figures(
    group: Group | None, ranks: Ranks, device: torch.device, job: dict[str, Any]
) -> dict[str, Any]:
    """Speed of all ranks together, by the steps of this one."""
    with _exchange(job.get("exchange", "")):
        step = _step(group, ranks, device, job)
        timed = figures(step, device, STEPS[device.type])
    return {
        "threads": torch.get_num_threads(),
        "eg_per_s": rounded(2 * job["batch_size"] / timed["median_s"]),
        "eg_per_cpu_s": rounded(2 * job["batch_size"] / (ranks.size * timed["cpu_s"])),
        **spread_ms(timed),
    }


@contextlib.contextmanager
def _exchange(how: str) -> Iterator[None]:
    """Exchange as in training, or none: replaced by nothing."""
    silent: dict[str, Any] = dict.fromkeys(("all_reduce", "reduce_scatter", "all_gather"), _nothing)
    with mock.patch.multiple(Group, **silent) if how == "none" else contextlib.nullcontext():
        yield


def _nothing(*_: object) -> None:
    """Send nothing."""


def _step(
    group: Group | None, ranks: Ranks, device: torch.device, job: dict[str, Any]
) -> Callable[[], object]:
    """A step of this rank, on one batch for ever."""
    measured = variant(job["model"])
    config = from_dict(
        {
            "model": {"trainer": measured.trainer, "options": measured.options},
            "precision": {"mode": job["precision"]},
            "train": {
                "batch_size": job["batch_size"],
                "engine": job["engine"],
                "distribution": job.get("distribution", "auto"),
            },
        }
    )
    torch.backends.cudnn.benchmark = True
    model, _ = build_model(config, device)
    step = build_step(config, model, device, group=group)
    if isinstance(step.update, MirroredUpdate) and job["exchange"] != "none":
        step.update.is_beside = job["exchange"] == "beside"
    count = ranks.share(job["batch_size"]).count
    batch = make_batch(model, count, device, step.update.precision.compute)
    run = engines.make(job["engine"], step, OneBatch(batch), _fail)
    return lambda: run({"a": 0, "b": 0})


def _fail(warning: str) -> None:
    raise RuntimeError(warning)  # a fallback would be measured under a wrong name


def main() -> None:
    """Do the jobs; the first rank prints a line of JSON for each."""
    ranks = from_environment() or Ranks()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    group = open_group(ranks, device) if ranks.size > 1 else None
    for job in json.loads(sys.stdin.read()):
        if job["kind"] == "scaling":
            found = step_figures(group, ranks, device, job)
        else:
            assert group is not None  # one rank has nobody to talk to
            is_link = job["kind"] == "link"
            found = link_figures(group, device, job) if is_link else meeting_figures(group)
        if ranks.is_first:
            print(json.dumps(job | found), flush=True)
    if group is not None:
        group.close()


if __name__ == "__main__":
    main()
