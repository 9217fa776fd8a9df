"""Recipes: a training run in stages that follow one another unattended.

A recipe is a TOML file of settings, as `--configfile` takes it, with a list of stages:

    description = "One line."

    [[stage]]
    name = "shapes"
    plateau = { window = 5000, patience = 4, improvement = 1.0 }

    [[stage]]
    name = "finish"
    iterations = 20_000
    rate_factor = 0.5
    set.augment.warp = false

A stage lasts until the first of its ends: so many iterations, a total iteration, minutes, or a
metric that no longer improves. One without an end lasts as long as the run. What a stage sets holds
until a later one sets it again, and weighs more than all else that a user gives.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....models.fields import Field, no_such, read_table, setting, shown
from ...system.paths import expanded
from ...system.printable import plural
from .. import from_dict, merge, read_toml, settings_in

PACKAGED = Path(__file__).parent

FALLING = ("loss", "loss_a", "loss_b", "pose_swap", "identity_b")
"""Metrics of a plateau, the lower the better; those after the losses as `evaluate` has them."""

RISING = ("ssim_a", "ssim_b", "psnr_a", "psnr_b")
"""The higher the better."""

# Each stage is resolved at the start, and its place is saved. Chosen, unmeasured.
MAX_STAGES = 100
_LOSSES = ("loss", "loss_a", "loss_b")
_NOT_IN_A_STAGE = {  # what belongs to the run as a whole, as every path does
    *("train.iterations", "train.until", "train.device", "model.options"),
    *("optimizer.use_lr_finder", "distribute.gpus", "distribute.exclude_gpus"),
    "distribute.restarts",
}


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """A metric that no longer improves."""

    metric: str = setting("loss", choices=FALLING + RISING)
    """The loss of both sides or one, or a metric of held-out faces, measured at saves."""

    window: int = setting(1000, low=1)
    """Iterations whose mean loss counts as one value. What is measured counts by itself."""

    patience: int = setting(5, low=1)
    """Values in a row that were no better than the best one before."""

    improvement: float = setting(1.0, low=0, high=100)
    """Percent by which a value must be better than the best one to count as better."""

    @property
    def is_loss(self) -> bool:
        return self.metric in _LOSSES

    def is_better(self, value: float, best: float) -> bool:
        """Whether a value improves on the best one so far."""
        # Of the size of the value: a psnr is large, and a loss may be near 0.
        step = abs(best) * self.improvement / 100
        return value > best + step if self.metric in RISING else value < best - step

    def __str__(self) -> str:
        values = plural(self.patience, "value")
        if self.is_loss:
            iterations = plural(self.window, "iteration")
            values = f"{plural(self.patience, 'mean')} of {self.window:,} {iterations}"
        return (
            f"{self.metric} has not improved by {self.improvement:g} % in {self.patience} {values}"
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run."""

    name: str
    set: dict[str, dict[str, Any]] = setting({})
    """Free settings, by section and key."""

    rate_factor: float | None = setting(None, low=0, high=100)
    """Factor of the learning rate; None: the same as in the stage before."""

    iterations: int | None = setting(None, low=1)
    """Iterations of this stage."""

    until_iteration: int | None = setting(None, low=1)
    """Total iteration."""

    minutes: float | None = setting(None, low=0)
    """Minutes of training, however often it was interrupted."""

    plateau: Plateau | None = None
    snapshot: bool = True
    """Copy the model, as it was before the stage, to a folder beside its own."""

    @property
    def ends(self) -> list[str]:
        """Ends of the stage, in words; whichever comes first counts."""
        iterations, minutes = self.iterations or 0, self.minutes or 0
        return [
            words
            for value, words in (
                (self.iterations, f"after {iterations:,} {plural(iterations, 'iteration')}"),
                (self.until_iteration, f"at iteration {self.until_iteration or 0:,}"),
                (self.minutes, f"after {minutes:g} {plural(minutes, 'minute')}"),
                (self.plateau, f"when {self.plateau}"),
            )
            if value is not None
        ]


@dataclass(frozen=True)
class Recipe:
    """Stages under a name."""

    name: str
    description: str
    settings: dict[str, dict[str, Any]]
    """Settings that hold from the start, by section and key."""

    stages: tuple[Stage, ...]

    def settings_of(self, number: int) -> dict[str, dict[str, Any]]:
        """Settings of the stages up to this one."""
        # From the first one on, so that a resume in the middle finds what was set before.
        return merge(*(stage.set for stage in self.stages[: number + 1]))

    def rate_factor_of(self, number: int) -> float:
        """Factor of the learning rate in this stage."""
        # Not multiplied up: each stage says its rate against the run's own.
        factors = [stage.rate_factor for stage in self.stages[: number + 1]]
        return next((factor for factor in reversed(factors) if factor is not None), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        stages = [
            {key: value for key, value in dataclasses.asdict(stage).items() if value is not None}
            for stage in self.stages
        ]
        return {"name": self.name, "description": self.description, "stage": stages}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe in plain values; ValueError where they are not one."""
        values = dict(values)
        name, description = (
            Field(type=str).take(values.pop(key, ""), key) for key in ("name", "description")
        )
        stages = tuple(_stages(values.pop("stage", [])))
        # Apart from the user's settings, so that a refusal names the recipe.
        from_dict(values)
        return cls(name, description, values, stages)


NONE = Recipe("none", "", {}, ())
"""Recipe without stages: it leaves that of a model."""


def available() -> list[Recipe]:
    """Recipes that come with mien, sorted by name."""
    return [read(path) for path in sorted(PACKAGED.glob("*.toml"))]


def load(name: str) -> Recipe:
    """The recipe of this name, or in this file; ValueError where there is none."""
    if name == NONE.name:
        return NONE
    path = expanded(name)
    # A file that is named so but is not there is a mistyped path, no name of a recipe.
    if path.suffix == ".toml" or path.is_file():
        return read(path)
    packaged = {path.stem: path for path in PACKAGED.glob("*.toml")}
    if name not in packaged:
        refusal, names = no_such("no recipe", name, packaged), ", ".join(sorted(packaged))
        raise ValueError(f"{refusal}; give a .toml file, none, or one of {names}")
    return read(packaged[name])


def read(path: Path) -> Recipe:
    """The recipe in a file, named after it; ValueError where there are no stages in it."""
    values = read_toml(path)
    if "stage" not in values:
        raise ValueError(f"{path} lists no stages: add [[stage]] tables")
    try:
        return Recipe.from_dict(values | {"name": path.stem})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def describe(recipe: Recipe) -> list[str]:
    """A line for each stage: its name, what it sets, when it ends."""
    lines = []
    for number, stage in enumerate(recipe.stages, 1):
        changes = [
            f"{section}.{key} = {json.dumps(value)}"
            for section, table in stage.set.items()
            for key, value in table.items()
        ]
        if stage.rate_factor is not None:
            changes.insert(0, f"{stage.rate_factor:g} times the learning rate")
        ends = f"ends {' or '.join(stage.ends)}" if stage.ends else "ends with the run"
        words = "; ".join([*changes, ends])
        lines.append(f"{number} {stage.name}: {words}")
    return lines


def _stages(values: Any) -> Iterator[Stage]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"stage must be a list of tables, [[stage]], got {shown(values)}")
    if len(values) > MAX_STAGES:
        raise ValueError(f"a recipe has at most {MAX_STAGES} stages, got {len(values)}")
    names: set[str] = set()
    for number, table in enumerate(values, 1):
        stage = _stage(table, f"stage {number}")
        if stage.name in names:
            raise ValueError(f"stage {number} has the name {stage.name!r} of an earlier one")
        # Told now, and not after the weeks that the stage would last.
        if not stage.ends and number < len(values):
            raise ValueError(
                f"stage {number}, {stage.name}, has no end, so the next is never reached: give it "
                "iterations, until_iteration, minutes or plateau"
            )
        names.add(stage.name)
        yield stage


def _stage(table: Any, place: str) -> Stage:
    values = read_table(Stage, table, place)
    name = values.setdefault("name", place)
    if not name.strip() or len(name) > 100 or not name.isprintable():
        raise ValueError(f"{place}.name must be text, got {shown(name)}")
    _check_settings(values.get("set", {}), place)
    return Stage(**values)


def _check_settings(values: dict[str, Any], place: str) -> None:
    """Refuse what is no setting, what a model fixes, and what belongs to the run as a whole."""
    try:
        from_dict(values)
    except ValueError as error:
        raise ValueError(f"{place}.set: {error}") from error
    for spec, _ in settings_in(values):
        name = spec.full_name
        if spec.locked:
            raise ValueError(f"{place}.set: {name} is fixed when a model is made; leave it out")
        if spec.is_path or spec.is_private or name in _NOT_IN_A_STAGE:
            raise ValueError(f"{place}.set: {name} is for the whole run; leave it out")
