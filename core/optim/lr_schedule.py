"""The learning rate of every update: it warms up, then stays, falls along a cosine or in steps.

    rate(i) = base * factor * min(1, (u + 1) / warmup_steps) * fall(i)
    constant:  fall(i) = 1
    cosine:    fall(i) = f + (1 - f) * (1 + cos(pi * min(1, i / n))) / 2
    step:      fall(i) = f ^ floor(i / n)

i counts the iterations since the schedule began, u the updates that they made; n is
`schedule_iterations`, f `schedule_factor`. The cosine is one fall of those of Loshchilov and
Hutter, 2017. The first update of a warm-up moves the weights already.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ...models.fields import setting
from ..checkpoint.state import TrainingState
from ..config import Config, OptimizerConfig
from ..console.reporter import Notice
from ..system.printable import plural

SCHEDULE, LR_FINDER, ROLLBACK = "schedule", "lr_finder", "rollback"
"""Names of the parts of a training state: where the schedule began, the rate that was found, and
what rollbacks have multiplied the rate with."""

# A saved 0 would stop the training for ever, without a word.
_LEAST_SHARE = 1e-12
"""Smallest number that a saved rate or factor may be. Chosen, unmeasured."""

SCHEDULE_SETTINGS = {"warmup_steps", "schedule", "schedule_iterations", "schedule_factor"}
"""Settings of which a change, also by a stage, begins the schedule anew."""


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """Saved begin of the schedule."""

    begun: int = setting(0, low=0)
    """Total iterations before its first one."""

    settings: dict = setting({})
    """Settings of the schedule that it began with."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Saved result of the finder."""

    rate: float = setting(1.0, low=_LEAST_SHARE, high=1)


@dataclass(frozen=True, kw_only=True)
class _RolledBack:
    """Saved effect of rollbacks."""

    rate_factor: float = setting(1.0, low=_LEAST_SHARE, high=1)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The rate of every iteration."""

    config: OptimizerConfig
    base_rate: float
    """What the warm-up rises to."""

    source: str
    """Origin of the base rate, in words."""

    begun: int = 0
    """Total iterations before its first one."""

    factor: float = 1.0
    """Scales every rate."""

    def rate(self, iterations: int) -> float:
        """The rate of the iteration that follows so many of the model."""
        since = iterations - self.begun
        return self.base_rate * self.factor * self._warmth(since) * self._fall(since)

    def _warmth(self, since: int) -> float:
        # With accumulation the rate warms up by updates: iterations between them move nothing.
        updates = since // self.config.gradient_accumulation
        # + 1: faceswap's first update has the rate 0, which wastes a batch.
        return min(1.0, (updates + 1) / max(1, self.config.warmup_steps))

    def _fall(self, since: int) -> float:
        config = self.config
        length, factor = config.schedule_iterations, config.schedule_factor
        if config.schedule == "cosine":
            share = min(since, length) / length
            return factor + (1 - factor) * (1 + math.cos(math.pi * share)) / 2
        return factor ** (since // length) if config.schedule == "step" else 1.0

    @property
    def is_constant(self) -> bool:
        """Whether every iteration has the same rate."""
        # A warm-up of one update is at the full rate with its first one.
        return self.config.schedule == "constant" and self.config.warmup_steps <= 1

    def __str__(self) -> str:
        """The rate, where it comes from and what becomes of it, for people."""
        config, iterations = self.config, self.config.schedule_iterations
        share = "" if self.factor == 1 else f"{self.factor:g} times {self.base_rate:.4g}, "
        words = [f"{self.base_rate * self.factor:.4g} ({share}{self.source})"]
        if config.warmup_steps > 1:
            words.append(f"warm-up over {config.warmup_steps} updates")
        kinds = {
            "constant": "constant",
            "cosine": f"falls along a cosine to {config.schedule_factor:g} of it in "
            f"{iterations} {plural(iterations, 'iteration')}",
            "step": f"falls to {config.schedule_factor:g} of itself every "
            f"{plural(iterations, 'iteration', f'{iterations} iterations')}",
        }
        words.append(kinds[config.schedule])
        since = "" if self.is_constant else f"; begun at iteration {self.begun}"
        return ", ".join(words) + since


def begin_schedule(state: TrainingState, config: Config, stage_factor: float = 1.0) -> Schedule:
    """The schedule of a run; it goes on where it was, unless one of its settings has changed.

    Args:
        state: State of the run; it keeps where the schedule begins.
        config: Settings of the run.
        stage_factor: What the stage multiplies the rate with.
    """
    optimizer = config.optimizer
    # Sorted, so that a saved state has the same bytes whatever the order of a set.
    settings = {name: getattr(optimizer, name) for name in sorted(SCHEDULE_SETTINGS)}
    begun = _begun(state, settings)
    state.parts[SCHEDULE] = asdict(_Begun(begun=begun, settings=settings))
    rate, source = optimizer.learning_rate, "as set"
    found = found_rate(state)
    if optimizer.use_lr_finder and found is not None:
        rate, source = found, "found"
    elif optimizer.use_lr_finder:
        source = "until the finder has run"
    return Schedule(
        config=optimizer,
        base_rate=rate,
        source=source,
        begun=begun,
        # A product: a rollback in the middle of a stage must not undo what the stage asks for.
        factor=stage_factor * rate_factor(state),
    )


def _begun(state: TrainingState, settings: dict[str, Any]) -> int:
    """Total iterations before the saved schedule's first one; now, where it has other settings."""
    # Not after now: a state from elsewhere could else hold the rate at its start for ever.
    saved = state.part(SCHEDULE, _Begun, begun=state.iterations)
    # A change of its settings begins it anew; a resume with the same ones goes on.
    return saved.begun if saved and saved.settings == settings else state.iterations


def found_rate(state: TrainingState) -> float | None:
    """The learning rate that the finder has found for the model; None where it has not run.

    Raises:
        ValueError: The state holds no such number.
    """
    found = state.part(LR_FINDER, _Found)
    return found.rate if found else None


def rate_factor(state: TrainingState) -> float:
    """What rollbacks have multiplied the learning rate with, so far.

    Raises:
        ValueError: The state holds no such number.
    """
    return (state.part(ROLLBACK, _RolledBack) or _RolledBack()).rate_factor


def settle_rate(
    found: float | None, saved: OptimizerConfig, overrides: dict[str, Any]
) -> tuple[dict[str, Any], list[Notice]]:
    """Settings that override the saved ones at a resume, by name, with the finder off where it has
    no say; and why it has none.

    A found rate stays in use until `optimizer.learning_rate` is given. Given together with the
    finder, as a settings file does, it must differ from the saved one.

    Args:
        found: The rate that the finder found for the model; None: it was trained without.
        saved: The settings of what is resumed.
        overrides: Settings of the optimizer that the user gave.
    """
    if not overrides.get("use_lr_finder", saved.use_lr_finder):
        return overrides, []
    rate = overrides.get("learning_rate", saved.learning_rate)
    without = overrides | {"use_lr_finder": False}
    if found is None:
        why = (
            "optimizer.use_lr_finder does nothing here: it is for a new model, and this one was "
            f"trained without; the learning rate is {rate:g}, as set"
        )
        return without, [Notice(why, is_warning=True)]
    # A settings file always holds both: only a rate that differs is the user's wish.
    if rate != saved.learning_rate or (
        "learning_rate" in overrides and "use_lr_finder" not in overrides
    ):
        why = (
            f"the learning rate is {rate:g}, as set, in place of {found:g}, as found; "
            "--use-lr-finder goes back to that"
        )
        return without, [Notice(why)]
    return overrides, []
