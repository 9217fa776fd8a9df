"""Whether training has diverged: losses and gradients that are no numbers, a loss that does not
fall, images that show nothing of the faces.

A model that has diverged seldom recovers; a lower learning rate from before does. Everything here
is computed on the host, of numbers and pictures that were fetched for the log and the preview.

What must be known again at a resume is the part `divergence` of the training state: a run that has
diverged and is started again is recognised, and one that shows in many short sessions too.

Letters: N iterations, n faces, S and F edges of a picture in px, C channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...models.fields import setting
from ..checkpoint.state import TrainingState
from ..config import Config, DataConfig
from ..system.saved_values import require

PART = "divergence"
"""Name under which the state keeps what is known of earlier iterations."""

WINDOW = 100
"""Iterations whose mean loss counts as one value; pictures count from so many in a session on.
Chosen, unmeasured."""

JUMP = 2.0
"""A mean of so many times the lowest one is no noise. Chosen, unmeasured."""

STAYED = 3
"""Means in a row, that high, that count as a jump. Chosen, unmeasured."""

UNMOVED = 5e-4
"""Sum of the rates up to which a new model's losses are those of its first weights: one iteration
at 0.01, eleven at 5e-5. No weight has moved by more, whatever the optimizer."""

FIRST = 100
"""Iterations whose losses are taken for that, at most. Chosen, unmeasured."""

ABOVE = 400
"""Iterations in a row with a higher loss than the first weights had. Where nothing is learnt, the
first of 401 losses is the lowest by chance once in 401 times, whatever the noise of a batch."""

EXCESS = 80.0
"""Excess of those losses over the first, summed in units of it: 400 by a fifth each.

Tiny models of the families, batches of four, drawn and filmed faces, on the CPU: with Lion and
RMSprop at 0.01 a loss stays at 1.19 to 1.59 of the first; not that of phaze-a, and of one side of
dlight (0.94 to 1.14), whose images show it. With Adam at 5e-5 it is at most 1.05 of it for some
hundred iterations, by the chance of the first batches, and single losses are 0.75 to 0.9 of it.
"""

ZEROS = 25
"""Iterations in a row whose loss is exactly 0: with one face a batch, half of the masks empty, a
chance of 1 in 30 million."""

SAME = 0.025
"""Share of the faces' own variety below which all pictures are the same one.

Of the same models, after 100 iterations: 0.018 at most with Lion and RMSprop at 0.01, and 0.006
where Adam at 0.01 ends so. Of those that learn, 0.053 at least with Adam at 0.01, 0.17 at 2e-4 and
0.21 at 5e-5, also of the full-size original on filmed faces.
"""

PINNED = 0.95
"""Share of the values at an end of their range above which a picture is none of a face: 1.00 where
those models turn black or neon, 0.00 to 0.15 where they learn, from the first iteration on."""

# Thresholds of images; where nothing else is said, chosen and unmeasured.
_FLAT_LEVELS, _VARIED_LEVELS = 2.0, 8.0  # standard deviations over pixels, of 255
_HOW_FACES_ARE_KEPT = ("decoder", "placement", "store_dir", "num_threads", "strict")
_ENDS = 2  # levels
_LEAST_VARIETY = 4.0  # levels: mean standard deviation over faces, of 255; a still has less
_LEARNT_SHARE = 0.25  # of the faces' own deviation: more than noise, and than one colour early on
_SURELY_LEARNT = 5000  # iterations after which a network shows more than one colour
_OVERFLOWS = 50
"""Iterations in a row that moved nothing with fp16: no loss scale helps any more. Chosen,
unmeasured."""


class TrainingDiverged(Exception):
    """Training must not go on like this.

    Args:
        cause: What happened, in a few words.
        good_until: Last total iteration whose saves are good; None: all are.
        remedy: What helps, where neither a lower rate does nor an earlier save.
    """

    def __init__(self, cause: str, good_until: int | None = None, remedy: str | None = None):
        super().__init__(cause)
        self.good_until, self.remedy = good_until, remedy


class NotFinite:
    """Looks for losses and gradients that are not numbers.

    Args:
        scales_loss: Whether the loss is scaled: with fp16 single steps whose gradient overflows
            only lower the scale.
        accumulation: Iterations of a step.
    """

    def __init__(self, scales_loss: bool, accumulation: int = 1):
        self.scales_loss, self.accumulation = scales_loss, accumulation
        self.skipped = 0
        self.overflows = 0
        """Iterations in a row, at least, whose steps were left out."""

    def check(self, named: Mapping[str, np.ndarray], first: int, skipped: int) -> None:
        """Raise TrainingDiverged where one of some iterations was not finite.

        Args:
            named: Losses by name, (N,).
            first: Total iteration of the first of them.
            skipped: Steps of the session whose gradient was not finite, after the last of them.
        """
        count = len(named["batch_total"])
        # The count is the device's own, of the whole session.
        new, self.skipped = skipped - self.skipped, skipped
        # Single overflows are how the loss scale finds its size; all in a row are not.
        # A step that is left out stands for all the iterations that it adds up.
        were_all = new > 0 and new * self.accumulation >= count
        self.overflows = self.overflows + count if were_all else 0
        bad = {name: ~np.isfinite(values) for name, values in named.items()}
        # The first of them: what follows is not finite because of it.
        bad_rows = np.flatnonzero(np.any([*bad.values()], axis=0))
        if len(bad_rows):
            row = bad_rows[0]
            names = ", ".join(name for name in bad if bad[name][row])
            raise TrainingDiverged(f"not a number at iteration {first + int(row)} ({names})")
        # Without a loss scale nothing would mend it by itself.
        if new > 0 and not self.scales_loss:
            raise TrainingDiverged("not a number at the gradient")
        if self.overflows >= _OVERFLOWS:
            raise TrainingDiverged(
                f"the gradients of the last {self.overflows} iterations were too large for fp16"
            )


class Jump:
    """Looks for a loss that jumped and stayed, within a session."""

    def __init__(self) -> None:
        self.lowest: float | None = None
        self.high = 0
        """Means in a row that were high."""

        self.loss_sum, self.loss_count = 0.0, 0

    def check(self, totals: np.ndarray, first: int) -> None:
        """Take in the summed losses (N,) of iterations from ``first``; raise TrainingDiverged."""
        for i, total in enumerate(totals.tolist()):
            self.loss_sum += total
            self.loss_count += 1
            # Means, since losses of single batches jump by themselves.
            if self.loss_count == WINDOW:
                self._take(self.loss_sum / WINDOW, first + i)
                self.loss_sum, self.loss_count = 0.0, 0

    def _take(self, mean: float, iteration: int) -> None:
        if self.lowest is None or mean < self.lowest:
            self.lowest = mean
        self.high = self.high + 1 if mean > JUMP * self.lowest else 0
        if self.high == STAYED:
            # Saves from before the first high mean are good.
            begun = iteration - STAYED * WINDOW
            raise TrainingDiverged(
                f"the loss jumped from {self.lowest:.4f} to {mean:.4f} after iteration {begun} and "
                "stayed",
                good_until=begun,
            )


@dataclass(kw_only=True)
class Side:
    """What is known of one side, over all sessions with the same faces and losses."""

    first_loss: float | None = None
    """Loss of the first weights of a model that knew nothing; None: of no such one."""

    above: int = setting(0, low=0)
    """Iterations in a row, to the last one, whose loss was higher."""

    excess: float = 0.0
    """Excess of these losses over the first one, summed, in units of it."""

    zeros: int = setting(0, low=0)
    """Iterations in a row, to the last one, whose faces had a loss of exactly 0."""

    good_until: int = setting(0, low=0)
    """Total iteration up to which saves show different faces, as far as it was seen."""

    has_varied: bool = False
    """Whether they have been seen to."""

    def check_loss(self, name: str, loss: float, iteration: int) -> None:
        """Take in the loss of a total iteration; raise TrainingDiverged."""
        # A model with weights of another may begin below what it comes to.
        if self.first_loss is None:
            return
        self.above = self.above + 1 if loss > self.first_loss else 0
        self.excess = self.excess + loss / self.first_loss - 1 if self.above else 0.0
        if self.above >= ABOVE and self.excess >= EXCESS:
            mean = self.first_loss * (1 + self.excess / self.above)
            raise TrainingDiverged(
                f"the loss of {name} has been above that of the first iteration, "
                f"{self.first_loss:.4f}, for {self.above} iterations, {mean:.4f} on average",
                # The first of these losses is of the weights that the iteration before has made.
                good_until=max(iteration - self.above - 1, 0),
            )

    def check_zero(self, name: str, loss: float) -> None:
        """Take in the loss of the faces alone; raise TrainingDiverged."""
        self.zeros = self.zeros + 1 if loss == 0 else 0
        if self.zeros >= ZEROS:
            raise TrainingDiverged(
                f"the loss of {name} has been exactly 0 for {self.zeros} iterations",
                remedy=f"The masks of {name} leave nothing to learn from: look at them with `mien "
                "faces check FOLDER`, put faces with whole masks in the place of those that it "
                "names, or begin a new model with another data.mask_type",
            )

    def check_pictures(
        self, name: str, predictions: np.ndarray, targets: np.ndarray, done: int, begun: int
    ) -> None:
        """Look at the side's faces as they are re-created; raise TrainingDiverged.

        Args:
            name: Name of the side.
            predictions: (n, S, S, 3) uint8.
            targets: (n, F, F, 3) uint8.
            done: Iterations in total.
            begun: Iterations of earlier sessions.
        """
        is_judged = done - begun >= WINDOW
        contrast, target_contrast = _contrast(predictions), _contrast(targets)
        # Faces that are themselves black and white, as drawn ones, are no sign of it.
        if is_judged and _pinned(predictions) >= PINNED > _pinned(targets):
            raise self._shows(name, "pure colours")
        if contrast < _FLAT_LEVELS and target_contrast > _VARIED_LEVELS:
            # A young model shows one colour before it learns; one that has shown faces does not.
            if self.has_varied or done - begun >= _SURELY_LEARNT:
                raise self._shows(name, "one colour")
        # A still, or faces that are all alike, cannot tell whether the model knows them apart.
        elif contrast >= _VARIED_LEVELS and _variety(targets) >= _LEAST_VARIETY:
            # Each by its own contrast: blurred faces are not the same face.
            share = _variety(predictions) / contrast / (_variety(targets) / target_contrast)
            if share >= SAME:
                self.good_until = done
                self.has_varied |= contrast >= _LEARNT_SHARE * target_contrast
            elif is_judged:
                raise self._shows(name, "the same picture")

    def _shows(self, name: str, what: str) -> TrainingDiverged:
        return TrainingDiverged(f"every face of {name} has become {what}", self.good_until)


@dataclass(kw_only=True)
class _Part:
    """Saved knowledge of both sides and of the first weights."""

    a: Side
    b: Side
    moved: float = setting(0.0, low=0)
    """Sum of the rates, which counts up to `UNMOVED`."""

    @property
    def sides(self) -> dict[str, Side]:
        """Both sides by name."""
        return {"a": self.a, "b": self.b}


class DivergenceDetector:
    """Detector of divergence during a session.

    Args:
        state: State of the run, after `settle`.
        not_finite: Looks for what is not finite.
        rate: The rate of the iteration that follows so many, where a new model begins with weights
            that know nothing, so that learning lowers its loss; None: it does not. A resumed model
            has begun so where it has a first loss.
    """

    def __init__(
        self,
        state: TrainingState,
        not_finite: NotFinite,
        rate: Callable[[int], float] | None = None,
    ):
        part = _saved_part(state)
        self.sides = part.sides
        self.not_finite, self.jump = not_finite, Jump()
        has_begun = all(side.first_loss is not None for side in self.sides.values())
        self.rate = rate if state.iterations == 0 or has_begun else None
        self.moved = part.moved

    def check_losses(self, named: Mapping[str, np.ndarray], first: int, skipped: int) -> None:
        """Raise TrainingDiverged where the losses of some iterations say so; as in `NotFinite`."""
        self.not_finite.check(named, first, skipped)
        # The faces alone: a mask that is learnt has a loss even where nothing of a face counts.
        faces = {
            key: np.sum([named[n] for n in named if n.startswith(f"batch_face_{key}")], axis=0)
            for key in self.sides
        }
        for i, iteration in enumerate(range(first, first + len(named["batch_total"]))):
            losses = {key: float(named[f"loss_{key}"][i]) for key in self.sides}
            self._take_first(losses, iteration)
            for key, side in self.sides.items():
                side.check_zero(key.upper(), float(faces[key][i]))
                side.check_loss(key.upper(), losses[key], iteration)
        # Last: of causes that show at once, the one of a single side says more.
        self.jump.check(named["batch_total"], first)

    def _take_first(self, losses: dict[str, float], iteration: int) -> None:
        """Have the first loss of each side be the mean of all while the weights are the first."""
        if self.rate is None:
            return
        if self.moved > UNMOVED or iteration > FIRST:
            self.rate = None
            return
        self.moved += self.rate(iteration - 1)
        for key, side in self.sides.items():
            # A running mean: one batch alone may be far off.
            before = side.first_loss or 0.0
            # None where it is 0, since losses are divided by it.
            side.first_loss = before + (losses[key] - before) / iteration or None

    def check_pictures(
        self, predictions: np.ndarray, targets: np.ndarray, done: int, begun: int
    ) -> None:
        """Raise TrainingDiverged where the preview shows it.

        Args:
            predictions: (2 sides, n, S, S, C) uint8, each side's faces re-created.
            targets: (2 sides, n, F, F, C) uint8.
            done: Iterations in total.
            begun: Iterations of earlier sessions.
        """
        images = zip(self.sides.items(), predictions[..., :3], targets[..., :3], strict=True)
        for (key, side), predicted, target in images:
            side.check_pictures(key.upper(), predicted, target, done, begun)

    def to_dict(self) -> dict[str, Any]:
        """The part of the training state, as plain values."""
        return asdict(_Part(**self.sides, moved=self.moved))


def settle(state: TrainingState, before: Config, config: Config) -> None:
    """Have the part of a state be that of a session that begins.

    Losses of other faces, or of others' kind, do not compare; with another optimizer's settings
    those that were too high get another chance.

    Args:
        state: State of the run.
        before: The settings of the session before.
        config: Settings of this session.

    Raises:
        ValueError: The part that was saved is not valid.
    """
    part = _saved_part(state)
    sides = part.sides
    if _what_is_learnt(before) != _what_is_learnt(config):
        sides = {
            key: Side(good_until=side.good_until, has_varied=side.has_varied)
            for key, side in sides.items()
        }
    elif before.optimizer != config.optimizer:
        # The first loss stays, of the same faces and losses; only the count begins anew.
        sides = {key: replace(side, above=0, excess=0.0) for key, side in sides.items()}
    state.parts[PART] = asdict(_Part(**sides, moved=part.moved))


def _what_is_learnt(config: Config) -> tuple[Any, ...]:
    """The settings of faces and losses, less those of where and how the faces are kept."""
    usual = DataConfig()
    defaults = {name: getattr(usual, name) for name in _HOW_FACES_ARE_KEPT}
    return config.loss, config.augment, replace(config.data, **defaults)


def _saved_part(state: TrainingState) -> _Part:
    """Knowledge in a state; of a model that nobody looked at, that it is good."""
    done = state.iterations
    # Bounded by the iterations that there were: what was saved may be a stranger's.
    part = state.part(PART, _Part, above=done, zeros=done, good_until=done)
    if part is None:
        return _Part(a=Side(good_until=done), b=Side(good_until=done))
    for key, side in part.sides.items():
        is_above_0 = side.first_loss is None or side.first_loss > 0
        require(is_above_0, f"parts.{PART}.{key}.first_loss", "above 0", side.first_loss)
    return part


def _pinned(pictures: np.ndarray) -> float:
    """The share of values that are all there is of a colour, or nothing, but for 2 levels."""
    return float(((pictures <= _ENDS) | (pictures >= 255 - _ENDS)).mean())


def _contrast(pictures: np.ndarray) -> float:
    """The largest standard deviation over the pixels of any picture and channel, in levels."""
    # In fp32: of bytes NumPy would make numbers of eight bytes each.
    return float(pictures.astype(np.float32).std(axis=(1, 2)).max())


def _variety(pictures: np.ndarray) -> float:
    """The standard deviation over pictures (n, S, S, 3), mean of all pixels, in levels."""
    return float(pictures.astype(np.float32).std(axis=0).mean())
