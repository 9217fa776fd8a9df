"""The search for a learning rate: the rate of a new model rises until the loss diverges.

Update i = 1..N is made at the rate 1e-10 * g^(i - 1), g^N = 1e9. Of the losses L, with a = 0.98,

    average = a * average + (1 - a) * L          smoothed = average / (1 - a^i)

is noted for the rate 1e-10 * g^i. The search ends when it is more than four times the lowest so
far, or when a loss is not finite. The rate to train with is that at which it was lowest, divided by
what the strength says. After Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.

The model that is searched on is the one that will be trained: all that moved is put back.
"""

import io
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..console.reporter import Reporter
from ..console.stop import StopRequest
from ..data.sides import SIDES
from ..distribute.council import Call, Council
from ..optim.lr_schedule import LR_FINDER
from ..optim.optimizer import Update
from ..system.durable_files import replace_file
from .training_setup import StepSetup, TrainingSetup

LOWEST, HIGHEST = 1e-10, 1e-1
"""Rates between which the search moves."""

STRENGTHS = {"default": 10.0, "aggressive": 5.0, "extreme": 2.5}
"""What the rate at which the loss was lowest is divided by."""

_MEMORY, _DIVERGED = 0.98, 4.0
"""Decay of the average loss, and how many times the lowest one ends the search. Chosen,
unmeasured."""

_LEAST_RATE = 1e-9
_LEAST_UPDATES = 100
"""Smallest rate to take, and fewest updates to search with. Chosen, unmeasured."""

_STEPS_AHEAD = 32
"""Steps that the host runs ahead of a GPU at most, as in the trainer. Chosen on the CPU,
unmeasured on a GPU."""

_NOT_DRAWN = 10
"""First points, whose average is young. Chosen, unmeasured."""

_COLORS = {"default": "green", "aggressive": "gold", "extreme": "red"}


class Search:
    """The rates to try and what was seen at each, without the model."""

    def __init__(self, num_updates: int):
        self.growth = (HIGHEST / LOWEST) ** (1 / num_updates)
        self.rates: list[float] = []
        self.smoothed: list[float] = []
        """The smoothed loss at each of these rates."""

        self.lowest = math.inf
        self._average = 0.0

    def rate(self, updates: int) -> float:
        """The rate of the update that follows so many."""
        return LOWEST * self.growth**updates

    def add(self, loss: float) -> bool:
        """Take in the loss of one more update; whether the search goes on."""
        if not math.isfinite(loss):
            return False
        count = len(self.rates) + 1
        self._average = _MEMORY * self._average + (1 - _MEMORY) * loss
        # The average begins at 0; this takes out what it lacks.
        smoothed = self._average / (1 - _MEMORY**count)
        self.rates.append(self.rate(count))
        # Noted at the rate that the update would take next, as faceswap does.
        self.smoothed.append(smoothed)
        has_diverged = smoothed > _DIVERGED * self.lowest
        self.lowest = min(self.lowest, smoothed)
        return not has_diverged

    def found(self) -> dict[str, float]:
        """The rate to train with, by strength.

        Raises:
            ValueError: No loss was finite.
        """
        if not self.rates:
            raise ValueError("no learning rate was found: the first loss is not a number")
        # At the lowest loss, not at the steepest fall: the divisors of faceswap are made for that.
        best = self.rates[self.smoothed.index(self.lowest)]
        return {strength: best / divisor for strength, divisor in STRENGTHS.items()}


def is_due(setup: TrainingSetup) -> bool:
    """Whether the model is new and its rate has yet to be found."""
    is_new = setup.state.iterations == 0 and LR_FINDER not in setup.state.parts
    return setup.config.optimizer.use_lr_finder and is_new


def find_rate(setup: TrainingSetup, reporter: Reporter, stop: StopRequest) -> None:
    """Find the rate of a new model and have its schedule begin with it; nothing else changes.

    If the user wants to stop, nothing is found.

    Raises:
        ValueError: No usable rate was found, or too few updates are to find one.
    """
    config = setup.config.optimizer
    per_update, iterations = config.gradient_accumulation, config.lr_finder_iterations
    # Fewer steps over nine decades are so coarse that the first noise passes for the lowest loss.
    if iterations // per_update < _LEAST_UPDATES:
        raise ValueError(
            f"optimizer.lr_finder_iterations must be at least {_LEAST_UPDATES * per_update} "
            f"({_LEAST_UPDATES} updates) with optimizer.gradient_accumulation {per_update}, got "
            f"{iterations}"
        )
    search = Search(iterations // per_update)
    if setup.council is not None:
        setup.council.call(Call.SEARCH)
    # On the model itself and not on a copy, for which a GPU may have no room.
    restore = _restorer_of(setup.step.update)
    _search(setup, search, reporter, stop)
    if setup.council is not None:
        setup.council.call(Call.SEARCHED)
    restore()
    if stop.signal_name:
        return
    picture = None
    if config.lr_finder_mode != "set" and len(search.rates) > _NOT_DRAWN + 1:
        now = time.strftime("%Y-%m-%d_%H.%M.%S")
        picture = setup.folder.path / f"learning_rate_finder_{now}.png"
        picture = _drawn(search, picture, reporter)
    rates = _usable(search, config.lr_finder_strength, iterations)
    reporter.found_rates(rates, chosen=config.lr_finder_strength, picture=picture)
    rate = rates[config.lr_finder_strength]
    setup.state.parts[LR_FINDER] = {"rate": rate}
    setup.schedule = replace(setup.schedule, base_rate=rate, source="found")
    if setup.council is not None:
        setup.council.call(Call.RATE)
        # With all digits: every rank must take the same rate, to the bit.
        setup.council.group.text(repr(rate))


def follow_search(setup: StepSetup, council: Council) -> None:
    """Make the updates of the first rank's search; nothing has changed afterwards."""
    config = setup.config.optimizer
    search = Search(config.lr_finder_iterations // config.gradient_accumulation)
    restore = _restorer_of(setup.step.update)
    while True:
        call, update = council.await_call()
        if call == Call.SEARCHED:
            break
        _train(setup, search, update)
        # The first rank has the losses of all; here they would only fill the buffer.
        setup.step.loss_buffer.clear()
    restore()


def _drawn(search: Search, picture: Path, reporter: Reporter) -> Path | None:
    """The picture; None where the disk refuses it, of which a warning is given."""
    try:
        draw(search, picture)
    except OSError as error:
        reporter.warning(f"cannot write {picture}: {error.strerror or error}; it is left out")
        return None
    return picture


def _usable(search: Search, strength: str, iterations: int) -> dict[str, float]:
    """The rates that were found, if that of the strength is one that anything can learn at."""
    remedy = "leave --use-lr-finder out and give optimizer.learning_rate"
    try:
        rates = search.found()
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}, or choose other losses or faces") from error
    if rates[strength] < _LEAST_RATE:
        raise ValueError(
            f"no learning rate was found: that of optimizer.lr_finder_strength {strength} would be "
            f"{rates[strength]:.2g}, below {_LEAST_RATE:g}; raise optimizer.lr_finder_iterations "
            f"from {iterations}, or {remedy}"
        )
    return rates


def _search(setup: TrainingSetup, search: Search, reporter: Reporter, stop: StopRequest) -> None:
    """Train at rising rates until the search is over, or the user wants to stop."""
    per_update = setup.config.optimizer.gradient_accumulation
    num_updates = setup.config.optimizer.lr_finder_iterations // per_update
    with reporter.progress("Learning rate finder, updates") as report:
        for done, loss in enumerate(_losses(setup, search, num_updates), 1):
            report(done, num_updates)
            if stop.signal_name or not search.add(loss):
                return


def _losses(setup: TrainingSetup, search: Search, num_updates: int) -> Iterator[float]:
    """Loss A + loss B of every update, the mean over its iterations.

    On a GPU the host fetches those of some updates at once and goes on, so more updates are made
    than were looked at.
    """
    on_gpu = setup.device.type == "cuda"
    per_update = setup.config.optimizer.gradient_accumulation
    # On a CPU every loss is there at once, so the search ends without a step too many.
    block = max(1, _STEPS_AHEAD // per_update) if on_gpu else 1
    fetched: deque[Callable[[], np.ndarray]] = deque()
    for first in range(0, num_updates, block):
        updates = range(first, min(first + block, num_updates))
        for update in updates:
            if setup.council is not None:
                # One by one: the first rank alone sees when the search is over.
                setup.council.call(Call.STEP, update)
            _train(setup, search, update)
        fetched.append(setup.step.loss_buffer.fetch(len(updates) * per_update))
        # On a GPU a block stays under way: it computes while the host looks at the one before.
        if len(fetched) > (1 if on_gpu else 0):
            yield from _means(setup, fetched.popleft()(), per_update)
    for rows in fetched:
        yield from _means(setup, rows(), per_update)


def _train(setup: StepSetup, search: Search, update: int) -> None:
    """Make one update, at its rate."""
    per_update = setup.config.optimizer.gradient_accumulation
    setup.step.update.set_rate(search.rate(update))
    for iteration in range(update * per_update, (update + 1) * per_update):
        # Batches as in training, from the first face: the search sees what training will.
        seen = iteration * setup.config.train.batch_size
        # The state does not count it: training begins at the first face afterwards.
        setup.engine(dict.fromkeys(SIDES, seen))


def _means(setup: TrainingSetup, rows_nv: np.ndarray, per_update: int) -> list[float]:
    totals_n = setup.step.loss.named(rows_nv)["batch_total"].astype(np.float64)
    return totals_n.reshape(-1, per_update).mean(1).tolist()


def _restorer_of(update: Update) -> Callable[[], None]:
    """A function that puts weights, running estimates and the optimizer's state back to now."""
    # Copies that take no memory of a GPU.
    copies = [tensor.to("cpu", copy=True) for tensor in update.changing_tensors()]
    # Those of one part are those of all, for the model is new.
    scalars, rate = update.parts[0].scalars.clone(), update.rate

    def restore() -> None:
        for tensor, copy in zip(update.changing_tensors(), copies, strict=True):
            tensor.copy_(copy)
        update.set_rate(rate)
        for part in update.parts:  # of which there may be more by now
            part.scalars.copy_(scalars)

    return restore


def draw(search: Search, picture: Path) -> None:
    """The smoothed loss against the rate, with the found rate of every strength as a dot."""
    import matplotlib

    # No window, and no screen needed.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The last one is where the loss has left the picture.
    rates, smoothed = search.rates[_NOT_DRAWN:-1], search.smoothed[_NOT_DRAWN:-1]
    figure, axis = pyplot.subplots(figsize=(9, 5))
    axis.plot(rates, smoothed, color="tab:blue")
    for strength, rate in search.found().items():
        loss = np.interp(math.log(rate), np.log(rates), smoothed)
        color = _COLORS[strength]
        axis.scatter(rate, loss, color=color, zorder=3, label=f"{strength}: {rate:.2e}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss A + loss B")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    stream = io.BytesIO()
    # Into memory first: a picture is there whole or not at all.
    figure.savefig(stream, dpi=110)
    # Else pyplot keeps it as long as the process lives.
    pyplot.close(figure)
    replace_file(picture, stream.getvalue())
