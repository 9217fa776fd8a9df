"""Whether training may go on: losses and gradients that are numbers, and no collapse.

A model has collapsed where its loss jumped and stayed, or where its faces became one colour. It
seldom recovers; a lower learning rate from before the jump does.
"""

from dataclasses import dataclass

import numpy as np

WINDOW = 100
"""Iterations whose mean loss counts as one value."""

JUMP = 2.0
"""A mean of so many times the lowest one is no noise."""

STAYED = 3
"""Means in a row, that high, that count as a collapse."""

_FLAT_LEVELS, _VARIED_LEVELS = 2.0, 8.0  # standard deviations, of 255
_LEARNT_SHARE = 0.25  # of the faces' own deviation: more than noise, and than one colour early on
_SURELY_LEARNT = 5000  # iterations after which a network shows more than one colour
_OVERFLOWS = 50
"""Iterations in a row that moved nothing with fp16: no loss scale helps any more."""


@dataclass(frozen=True)
class TrainingDiverged(Exception):
    """Training must not go on like this."""

    cause: str
    """What happened, in a few words."""

    good_until: int | None = None
    """Last total iteration whose saves are good; None: all are."""

    def __str__(self) -> str:
        return self.cause


class NotFinite:
    """Looks for losses and gradients that are not numbers.

    Args:
        scales_loss: With fp16 single steps whose gradient overflows only lower the loss scale.
        accumulation: Iterations of a step.
    """

    def __init__(self, scales_loss: bool, accumulation: int = 1):
        self.scales_loss, self.accumulation = scales_loss, accumulation
        self.skipped = 0
        self.overflows = 0
        """Iterations in a row, at least, whose steps were left out."""

    def check(self, named: dict[str, np.ndarray], first: int, skipped: int) -> None:
        """Raise TrainingDiverged where one of some iterations was not finite.

        Args:
            named: Losses by name, (N,).
            first: Total iteration of the first of them.
            skipped: Steps of the session whose gradient was not finite, after the last of them.
        """
        count = len(named["batch_total"])
        new, self.skipped = skipped - self.skipped, skipped
        were_all = new > 0 and new * self.accumulation >= count
        self.overflows = self.overflows + count if were_all else 0
        bad = {name: ~np.isfinite(values) for name, values in named.items()}
        bad_rows = np.flatnonzero(np.any([*bad.values()], axis=0))
        if len(bad_rows):
            row = bad_rows[0]
            names = ", ".join(name for name in bad if bad[name][row])
            raise TrainingDiverged(f"not a number at iteration {first + int(row)} ({names})")
        if new > 0 and not self.scales_loss:
            raise TrainingDiverged("not a number at the gradient")
        if self.overflows >= _OVERFLOWS:
            raise TrainingDiverged(
                f"the gradients of the last {self.overflows} iterations were too large for fp16"
            )


class Collapse:
    """Looks for a loss that jumped and stayed, and for faces of one colour."""

    def __init__(self) -> None:
        self.lowest: float | None = None
        self.high = 0
        """Means in a row that were high."""

        self.loss_sum, self.loss_count = 0.0, 0
        self.varied_at: list[int | None] = [None, None]
        """Of each side, the last total iteration at which its pictures were as varied as faces."""

    def take_losses(self, totals: np.ndarray, first: int) -> None:
        """Take in the summed losses (N,) of iterations from ``first``; raise TrainingDiverged."""
        for i, total in enumerate(totals.tolist()):
            self.loss_sum += total
            self.loss_count += 1
            if self.loss_count == WINDOW:
                self._take(self.loss_sum / WINDOW, first + i)
                self.loss_sum, self.loss_count = 0.0, 0

    def take_pictures(
        self, predictions: np.ndarray, targets: np.ndarray, iterations: int, session_iterations: int
    ) -> None:
        """Look at what the preview shows; raise TrainingDiverged.

        Args:
            predictions: (2 sides, n, S, S, C) uint8, each side's faces re-created.
            targets: (2 sides, n, F, F, C) uint8.
            iterations: In total.
            session_iterations: Of this session.
        """
        for side, (made, wanted) in enumerate(zip(predictions, targets, strict=True)):
            varied_at, there = self.varied_at[side], _spread(wanted[..., :3])
            spread = _spread(made[..., :3])
            if spread >= _LEARNT_SHARE * there:
                self.varied_at[side] = iterations
            elif (
                spread < _FLAT_LEVELS
                and there > _VARIED_LEVELS
                and (varied_at is not None or session_iterations >= _SURELY_LEARNT)
            ):
                begun = iterations - session_iterations
                raise TrainingDiverged(
                    f"every face of {'AB'[side]} has become one colour",
                    good_until=begun if varied_at is None else varied_at,
                )

    def _take(self, mean: float, iteration: int) -> None:
        if self.lowest is None or mean < self.lowest:
            self.lowest = mean
        self.high = self.high + 1 if mean > JUMP * self.lowest else 0
        if self.high == STAYED:
            begun = iteration - STAYED * WINDOW
            raise TrainingDiverged(
                f"the loss jumped from {self.lowest:.4f} to {mean:.4f} after iteration {begun} and "
                "stayed",
                good_until=begun,
            )


def _spread(pictures: np.ndarray) -> float:
    """The largest standard deviation over the pixels of any picture and channel, in levels."""
    return float(pictures.astype(np.float32).std(axis=(1, 2)).max())
