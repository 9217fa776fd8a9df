"""What can be chosen of an optimizer: the rule that moves the weights, and how gradients are bound.

Both are plain numbers; `mien.kernels.optimize` and its statement in `reference.py` read them.
"""

import math
from dataclasses import dataclass

from .checks import check_choice

EMA, BASE = "ema", "base"

MOMENTS = ("mean", "square", "largest", EMA, BASE)
"""Moments that rules keep of each weight, in fp32, by the names that they have in checkpoints: in
code exp_avg, exp_avg_sq, max_exp_avg_sq, ema, the average of the weight itself, and base, what the
steps of schedule-free move. `Rule.moments` says which of them a rule has."""

BEGIN_AT_WEIGHTS = (EMA, BASE)
"""Moments that begin as the weights; the others begin at 0."""

SCHEDULE_FREE = "schedule-free"

RULES = ("adabelief", "adam", "adamax", "adamw", "lion", "nadam", "rms-prop", SCHEDULE_FREE)

CLIPPINGS = ("none", "value", "norm", "global_norm", "autoclip")

_MOMENTS_OF_RULE = {
    "adamax": ("mean", "largest"),
    "lion": ("mean",),
    "rms-prop": ("square",),
    SCHEDULE_FREE: (BASE, "square"),
}
_DECOUPLED = ("adabelief", "adamw", "lion")
_WITH_AMSGRAD = ("adam", "adamw")

LEAST_INTERPOLATION = 0.1
"""Smallest beta_1 of schedule-free: what rounds the weights by 1 rounds the average by 1 / beta_1.
Chosen, unmeasured."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a gradient moves a weight.

    Raises:
        ValueError: On an unknown name or a number out of its range.
    """

    name: str
    """One of `RULES`."""

    beta_1: float = 0.9
    """Decay rate of exp_avg, 0 to below 1; of schedule-free the share of the average in the
    weights, at which gradients are taken."""

    beta_2: float = 0.999
    """Decay rate of exp_avg_sq (of max_exp_avg_sq with adamax, of exp_avg with lion), 0 to below
    1."""

    epsilon: float = 1e-8
    """Keeps the division by a small root in bounds; lion has none."""

    weight_decay: float = 0.0
    """Pull towards 0, of the parameters that `TensorTable.decays` says."""

    amsgrad: bool = False
    """Divide by the largest exp_avg_sq so far; of adam and adamw, others ignore it."""

    ema: float = 0.0
    """Decay rate of the average of the weights, 0 to below 1; 0: there is none beside that which
    schedule-free has."""

    def __post_init__(self) -> None:
        check_choice(self.name, "rule", RULES)
        for name in ("beta_1", "beta_2", "ema"):
            beta = getattr(self, name)
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must be 0 to below 1, got {beta}")
        for name, value in (("epsilon", self.epsilon), ("weight_decay", self.weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number from 0 on, got {value}")
        if self.is_schedule_free:
            self._check_schedule_free()

    def _check_schedule_free(self) -> None:
        if self.beta_1 < LEAST_INTERPOLATION:
            raise ValueError(
                f"beta_1 of schedule-free must be {LEAST_INTERPOLATION} or more, got {self.beta_1}"
            )
        if self.amsgrad or self.ema:
            raise ValueError("schedule-free has neither amsgrad nor an average beside its own")

    @property
    def moments(self) -> tuple[str, ...]:
        """Names among `MOMENTS` that the rule keeps."""
        moments = _MOMENTS_OF_RULE.get(self.name, ("mean", "square"))
        largest = ("largest",) if self.has_max_exp_avg_sq else ()
        return (*moments, *largest, *([EMA] if self.ema else []))

    @property
    def has_max_exp_avg_sq(self) -> bool:
        """Whether it is Adam or AdamW with amsgrad."""
        return self.amsgrad and self.name in _WITH_AMSGRAD

    @property
    def is_decoupled(self) -> bool:
        """Whether the decay shrinks the weight itself; else it is added to the gradient (L2), or,
        with schedule-free, to what the gradient makes of the step."""
        return self.name in _DECOUPLED

    @property
    def is_schedule_free(self) -> bool:
        """Whether it moves a base, and the weights between that and their average."""
        return self.name == SCHEDULE_FREE

    @property
    def has_average(self) -> bool:
        """Whether there is an average of the weights: kept (`ema`), or part of the rule."""
        return self.ema > 0 or self.is_schedule_free


@dataclass(frozen=True)
class Clipping:
    """How large a gradient may be, once the loss scale is undone.

    none         as it is
    value        each number, to -bound .. bound
    norm         each tensor by itself, to a norm of at most the bound
    global_norm  all tensors by one factor, to a norm of at most the bound
    autoclip     the same, where the bound is a percentile of the past norms and this one
                 (Seetharaman et al., 2020), as numpy's: linear between two of them

    Raises:
        ValueError: On an unknown kind or a bound out of its range.
    """

    kind: str = "none"

    bound: float = 0.0
    """Bound above 0; with autoclip the percentile, 0 to 100; without clipping it is not read."""

    def __post_init__(self) -> None:
        check_choice(self.kind, "clipping", CLIPPINGS)
        if self.kind == "autoclip" and not 0 <= self.bound <= 100:
            raise ValueError(f"the percentile of autoclip must be 0 to 100, got {self.bound}")
        if self.kind in CLIPPINGS[1:4] and not 0 < self.bound < math.inf:
            raise ValueError(
                f"the bound of clipping by {self.kind} must be a finite number above 0, got "
                f"{self.bound}"
            )

    @property
    def is_of_all(self) -> bool:
        """Whether it needs the norm of all tensors together."""
        return self.kind in ("global_norm", "autoclip")
