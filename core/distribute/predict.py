"""Predicted speed of a run on several GPUs, from a step of one.

    exchange = 2 (W - 1) / W * bytes of the gradients / (0.8 * link)
    open     = max(exchange / 10, exchange - 0.85 * backward)      what no computation hides
    step     = step of one GPU + 3 % of its computation + open

W GPUs, each with as many faces as the one. So it is where every GPU keeps all of the optimizer's
state (mirrored). Where each updates a share of the weights (sharded), the same bytes go in two
halves: the gradients are summed during the backward pass, and the weights are gathered after the
update, which takes 1 / W of the time. The figures are engineering estimates, unmeasured on GPUs;
`mien bench scaling` prints them beside what it measures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..estimate.links import Link
from ..system.printable import plural

_LINK_SHARE = 0.8
"""Share of a link that NCCL's collectives reach. Engineering figure, unmeasured."""

_OPEN_SHARE = 0.1
"""Share of an exchange that comes after the last gradient, at least. Chosen, unmeasured."""

_HIDING_SHARE = 0.85
"""Share of the backward pass that an exchange can run beside: the first gradients are those of the
decoders, which have few of the weights. Fitted to a simulation part by part, unmeasured."""

_NCCL_SHARE = 0.03
"""Share by which NCCL's kernels slow the computation beside them. Chosen, unmeasured."""

_PART_BYTES, _PART_S = 16e6, 8e-6
"""Bytes that a collective sends at once, and seconds that each takes besides where nothing runs
beside it. Fitted to the same simulation, unmeasured."""

_PAYING_SHARE = 0.75
"""Share of W times the speed from which W GPUs are said to pay. Chosen."""

_LARGEST_BATCH = 4096


@dataclass(frozen=True)
class StepTime:
    """Time of a training step on one GPU, measured or by the roofline."""

    batch_size: int
    """Faces of a side on the GPU."""

    step_s: float
    backward_s: float
    update_s: float
    gradient_bytes: int
    """Bytes of all gradients, as they are sent."""

    hidden_s: float = 0.0
    """Seconds of the update that go by during the backward pass, and are not in ``step_s``; with
    several GPUs the update comes after the exchange."""

    @property
    def computed_s(self) -> float:
        """Seconds of everything but the update."""
        return self.step_s - (self.update_s - self.hidden_s)

    @property
    def eg_per_s(self) -> float:
        return 2 * self.batch_size / self.step_s


@dataclass(frozen=True)
class Prediction:
    """A step on several GPUs, each with as many faces as the one that it is predicted from."""

    distribution: str
    """mirrored: every GPU keeps all of the optimizer's state; sharded: each a share."""

    num_gpus: int
    one: StepTime
    step_s: float
    exchange_s: float
    open_s: float
    """Seconds of the exchange that no computation hides."""

    @property
    def eg_per_s(self) -> float:
        """Faces a second of all GPUs together."""
        return self.num_gpus * 2 * self.one.batch_size / self.step_s

    @property
    def speedup(self) -> float:
        """Faces a second against those of one GPU that has as many faces as each has here."""
        return self.eg_per_s / self.one.eg_per_s


def wire_bytes(num_bytes: int, num_gpus: int) -> float:
    """Bytes that each GPU sends, and receives, to sum so many bytes over all GPUs."""
    # Of a ring: each rank passes on all but its own part, once to sum and once to spread.
    return 2 * (num_gpus - 1) / num_gpus * num_bytes


def mirrored(one: StepTime, num_gpus: int, link: Link) -> Prediction:
    """The step where gradients are summed during the backward pass and all GPUs update all."""
    exchange_s = _exchange_s(one, num_gpus, link)
    open_s = _open_s(exchange_s, one, link)
    step_s = _slowed_s(one, num_gpus, link) + _update_s(one, num_gpus, link) + open_s
    return Prediction("mirrored", num_gpus, one, step_s, exchange_s, open_s)


def sharded(one: StepTime, num_gpus: int, link: Link) -> Prediction:
    """The step where each GPU updates a share of the weights and then sends it to the others."""
    exchange_s = _exchange_s(one, num_gpus, link)
    # Nothing runs beside the gathering of the weights, which the next forward pass reads.
    gather_s = exchange_s / 2 + (num_gpus > 1) * _PART_S * one.gradient_bytes / _PART_BYTES
    open_s = _open_s(exchange_s / 2, one, link) + gather_s
    # Divided by the GPUs: each moves its own share of the weights.
    step_s = _slowed_s(one, num_gpus, link) + _update_s(one, num_gpus, link) / num_gpus + open_s
    return Prediction("sharded", num_gpus, one, step_s, exchange_s, open_s)


def choose(one: StepTime, num_gpus: int, link: Link) -> Prediction:
    """The faster of both ways; mirrored, which is simpler, where they are equal."""
    both = mirrored(one, num_gpus, link), sharded(one, num_gpus, link)
    return min(both, key=lambda prediction: prediction.step_s)


def _exchange_s(one: StepTime, num_gpus: int, link: Link) -> float:
    return wire_bytes(one.gradient_bytes, num_gpus) / (_LINK_SHARE * 1e9 * link.gb_s)


def _open_s(exchange_s: float, one: StepTime, link: Link) -> float:
    # A CPU sums on the cores that compute, so nothing of it is hidden.
    if not link.is_beside:
        return exchange_s
    return max(_OPEN_SHARE * exchange_s, exchange_s - _HIDING_SHARE * one.backward_s)


def _slowed_s(one: StepTime, num_gpus: int, link: Link) -> float:
    """Seconds of everything but update and exchange."""
    # One GPU alone has no exchange beside its computation.
    slowed_s = (1 + _NCCL_SHARE * (num_gpus > 1)) * one.computed_s
    return slowed_s * _num_sharing(num_gpus, link)


def _update_s(one: StepTime, num_gpus: int, link: Link) -> float:
    """Seconds of the whole update that nothing hides."""
    update_s = one.update_s if num_gpus > 1 else one.update_s - one.hidden_s
    return update_s * _num_sharing(num_gpus, link)


def _num_sharing(num_gpus: int, link: Link) -> int:
    """Processes that divide what the one had alone: those of one CPU its cores."""
    return num_gpus if link.divides_cores else 1


def between(small: StepTime, large: StepTime) -> Callable[[int], StepTime]:
    """A function from the faces of a side on a GPU to its step: the line through two steps."""

    def on_line(batch_size: int, low: float, high: float) -> float:
        share = (batch_size - small.batch_size) / (large.batch_size - small.batch_size)
        # Not below nought, where the line is followed far to the left of both steps.
        return max(low + share * (high - low), 0.0)

    def step_at(batch_size: int) -> StepTime:
        return StepTime(
            batch_size,
            on_line(batch_size, small.step_s, large.step_s),
            on_line(batch_size, small.backward_s, large.backward_s),
            # The same at any batch: it moves the same weights.
            small.update_s,
            small.gradient_bytes,
            small.hidden_s,
        )

    return step_at


@dataclass(frozen=True)
class Outlook:
    """What several GPUs would bring to a run."""

    batch_size: int
    """Batch size of the run."""

    link: Link
    run: Prediction
    """The same run: its batch divided among the GPUs."""

    run_speedup: float
    """Speed against one GPU that has the whole batch."""

    grown: Prediction
    """A run in which every GPU has as many faces as one has now."""

    paying: Prediction | None
    """The run with the fewest faces a GPU that reaches three quarters of as many times the speed as
    there are GPUs; None: there is none."""

    def __str__(self) -> str:
        """One line, such as "2 GPUs over PCIe 4: 0.4x at batch size 32 (16 faces each); .."."""
        num_gpus, faces = self.run.num_gpus, self.run.one.batch_size
        grown = self.grown.one.batch_size
        words = [
            f"{num_gpus} {self._kind} over {self.link}: {self.run_speedup:.1f}x at batch size "
            f"{self.batch_size} ({faces} {plural(faces, 'face')} each)",
            f"{self.grown.speedup:.1f}x at {num_gpus * grown} ({grown} each, "
            f"{self.grown.distribution})",
        ]
        if self.paying is None:
            words.append("no batch size makes that many pay")
        elif self.paying.one.batch_size > grown:
            words.append(f"from {self.paying.one.batch_size} faces each {self.paying.speedup:.1f}x")
        return "; ".join(words)

    @property
    def _kind(self) -> str:
        return "GPUs" if self.link.is_beside else "processes"

    @property
    def warning(self) -> str:
        """Sentence for a user whose run would be slower than on one GPU; empty: it is not."""
        if self.run_speedup >= 1:
            return ""
        remedy = "train on one"
        if self.paying:
            least = self.paying.num_gpus * self.paying.one.batch_size
            remedy = f"{remedy}, or raise the batch size to {least:,}"
        return f"{self.run.num_gpus} {self._kind} are slower than one here: {remedy}"


def outlook(
    step_at: Callable[[int], StepTime], batch_size: int, num_gpus: int, link: Link
) -> Outlook:
    """What several GPUs would bring.

    Args:
        step_at: Step of one GPU by its faces of a side, such as `between` gives.
        batch_size: Faces of a side in the batch of the run.
        num_gpus: GPUs of the run, at most as many as faces.
        link: Slowest link between them.
    """
    # The largest share: all wait for the rank that has it.
    run = choose(step_at(math.ceil(batch_size / num_gpus)), num_gpus, link)
    predictions = (choose(step_at(b), num_gpus, link) for b in range(1, _LARGEST_BATCH + 1))
    return Outlook(
        batch_size,
        link,
        run,
        # The same batch on both sides: a run's result hangs on it, so this is what a user gets.
        step_at(batch_size).step_s / run.step_s,
        choose(step_at(batch_size), num_gpus, link),
        next((each for each in predictions if each.speedup >= _PAYING_SHARE * num_gpus), None),
    )
