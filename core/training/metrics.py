"""Losses on their way from the device to the log, and the status lines that report them."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..console.reporter import Reporter
from ..console.tensorboard import Encode
from ..data.sides import SIDES
from .loss_buffer import CAPACITY, to_host
from .training_setup import TrainingSetup

_SECONDS_BETWEEN_LINES = 1.0
"""Seconds between two status lines where no interval is set: an interval of iterations would be
most of the work at thousands a minute. Chosen, unmeasured."""

Losses = dict[str, np.ndarray]
"""Losses by name, (N,) each, of N iterations."""


@dataclass(frozen=True)
class Interval:
    """Some iterations in a row, whose losses are on their way to the host."""

    rows: Callable[[], np.ndarray]
    skipped: Callable[[], list[np.ndarray]]
    first: int
    count: int
    seconds: float
    """Seconds that they took."""

    waited_s: float
    """Seconds of these that were spent waiting for data."""

    exchanged_s: float
    """Seconds of these that were spent on the exchange with other ranks, as far as the host sees
    it."""

    ended_at: float
    """Time at which they ended, in seconds since 1970."""

    @property
    def last(self) -> int:
        """Total iteration of the last of them."""
        return self.first + self.count - 1

    @property
    def skipped_steps(self) -> int:
        """Steps of the session, up to their end, whose gradient was not finite."""
        return int(self.skipped()[0])

    def wall_time(self, i: int) -> float:
        """Time at which iteration ``first + i`` ended, taking all as equally long; since 1970."""
        return self.ended_at - self.seconds * (1 - (i + 1) / self.count)


class MetricsLogger:
    """Fetches losses at every interval, writes them as events and reports the status line.

    On a GPU losses are reported one interval late, so that the host need not wait for the device.

    Args:
        setup: The session whose losses they are.
        reporter: Shows the status line.
        until: Total iteration at which training is to end.
        take: Called with the losses of each interval, once they are on the host.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        reporter: Reporter,
        until: int,
        take: Callable[[Losses, Interval], None],
    ):
        self.setup, self.reporter, self.until, self.take = setup, reporter, until, take
        self.to_save: Callable[[float], float | None] = lambda _seconds: None
        """Seconds until the next save, given those of an iteration; set by whoever saves."""

        self.is_late = setup.device.type == "cuda"
        self.unlogged = 0
        """Iterations whose losses have not been fetched."""

        self.on_their_way: deque[Interval] = deque()
        self.began_at = self.asked_at = time.monotonic()
        self.waited_s, self.exchanged_s = setup.feed.waited_s, self._exchanged_s()
        self.exchanged_before_s = self.exchanged_s
        """Seconds of exchange before the session's first iteration."""

        self.saving_s, self.drawing_s = 0.0, 0.0
        """Seconds of the session for which saves, and the images made with them, held it up."""

    def step(self) -> None:
        """Count an iteration that was just started, and log where that is due."""
        self.unlogged += 1
        if self._is_due():
            self.log()

    def _is_due(self) -> bool:
        """Whether to log: at the first iteration, then at every interval, else once a second."""
        interval = self.setup.config.train.log_interval
        # At the latest when the buffer holds no more rows, whatever the clock says.
        if self.setup.state.session.iterations == 1 or self.unlogged == (interval or CAPACITY):
            return True
        return not interval and time.monotonic() - self.asked_at >= _SECONDS_BETWEEN_LINES

    def log(self, wait: bool = False) -> None:
        """Fetch the losses since the last time; report those that are there, or wait for all."""
        if self.unlogged:
            # Two clocks: intervals must not jump with the time of day, and graphs are drawn by it.
            now, ended_at, waited_s = time.monotonic(), time.time(), self.setup.feed.waited_s
            exchanged_s = self._exchanged_s()
            # The copies are queued, and waited for an interval later, when they have long arrived.
            self.on_their_way.append(
                Interval(
                    rows=self.setup.step.loss_buffer.fetch(self.unlogged),
                    skipped=to_host(self.setup.step.update.skipped),
                    first=self.setup.state.iterations - self.unlogged + 1,
                    count=self.unlogged,
                    # Above 0: rates are divided by it, and a clock may stand still.
                    seconds=max(now - self.asked_at, 1e-9),
                    waited_s=waited_s - self.waited_s,
                    exchanged_s=exchanged_s - self.exchanged_s,
                    ended_at=ended_at,
                )
            )
            self.asked_at, self.waited_s, self.unlogged = now, waited_s, 0
            self.exchanged_s = exchanged_s
        # One interval stays under way on a GPU; on a CPU its losses are there at once.
        while len(self.on_their_way) > (1 if self.is_late and not wait else 0):
            self._report(self.on_their_way.popleft())

    def record(
        self, scalars: Mapping[str, float], iteration: int, wall_time: float | None = None
    ) -> None:
        """Write an event."""
        self.setup.log.scalars(dict(scalars), iteration, wall_time)

    def picture(self, name: str, encode: Encode, iteration: int) -> None:
        """Write a picture into the logs, as `Log.picture` takes it."""
        self.setup.log.picture(name, encode, iteration)

    def flush(self) -> None:
        """Have all events so far be in their file, with one of the ranks, if there are several."""
        if self.setup.council is not None:
            elapsed_s = max(time.monotonic() - self.began_at, 1e-9)
            exchanged_s = self._exchanged_s() - self.exchanged_before_s
            # Of GPUs the host sees no exchange: it only queues it.
            exchange = {} if self.is_late else {"exchange": exchanged_s / elapsed_s}
            ranks = {"gpus": float(self.setup.council.ranks.size)}
            self.record(ranks | exchange, self.setup.state.iterations)
        self.setup.log.flush()

    def _report(self, interval: Interval) -> None:
        named, schedule = self.setup.step.loss.named(interval.rows()), self.setup.schedule
        for i in range(interval.count):
            scalars = {k: float(v[i]) for k, v in named.items() if k.startswith("batch_")}
            if not schedule.is_constant:
                # The rate was that before the iteration was counted.
                scalars["learning_rate"] = schedule.rate(interval.first + i - 1)
            self.record(scalars, interval.first + i, interval.wall_time(i))
        self._status(named, interval)
        self.take(named, interval)

    def _status(self, named: Losses, interval: Interval) -> None:
        # Of all ranks: the batch is that of the run.
        faces = len(SIDES) * self.setup.config.train.batch_size * interval.count
        state, elapsed_s = self.setup.state, time.monotonic() - self.began_at
        # The losses may be of iterations a while ago; what is left is counted from now.
        behind = state.iterations - interval.last
        remaining = max(self.until - state.iterations, 0)
        if self.setup.progress:
            remaining = self.setup.progress.iterations_left(state.iterations, at_most=remaining)
        self.reporter.step(
            iteration=interval.last,
            loss_a=float(named["loss_a"].mean()),
            loss_b=float(named["loss_b"].mean()),
            eg_per_s=faces / interval.seconds,
            data_wait=min(interval.waited_s / interval.seconds, 1.0),
            memory_mib=self._peak_memory_mib(),
            learning_rate=self.setup.schedule.rate(interval.last - 1),
            session_iterations=state.session.iterations - behind,
            elapsed_s=elapsed_s,
            saving=self.saving_s / elapsed_s,
            drawing=self.drawing_s / elapsed_s,
            seconds_left=(remaining + behind) * interval.seconds / interval.count,
            seconds_to_save=self.to_save(interval.seconds / interval.count),
            **self._of_ranks(interval),
        )

    def _peak_memory_mib(self) -> float | None:
        """Peak memory of the GPU, of several the largest; None on a CPU."""
        own, council = peak_memory_mib(self.setup.device), self.setup.council
        return max(own, council.peak_mib if council else 0) if self.is_late else None

    def _exchanged_s(self) -> float:
        """Seconds that the host has spent on the exchange with other ranks, so far."""
        return self.setup.council.group.exchanged_s if self.setup.council else 0.0

    def _of_ranks(self, interval: Interval) -> dict[str, Any]:
        """The number of GPUs, where there are several, and the share of time that their exchange
        took; of GPUs it is not known, which sum by themselves."""
        if self.setup.council is None:
            return {}
        exchange = None if self.is_late else min(interval.exchanged_s / interval.seconds, 1.0)
        return {"gpus": self.setup.council.ranks.size, "exchange": exchange}


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that PyTorch has taken of a GPU, in MiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
