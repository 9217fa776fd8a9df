"""What a run is to be: the user's settings, the model's own and the recipe's made into one.

Nothing is read or written here, and nothing told: what there is to tell comes back.

    defaults < the model's own < preset, recipe, file, --set < flags < the stage of the recipe

A model keeps for its next session what lasts: all of that but the flags. The flags of what makes a
model (`Spec.stays`, and what is locked) are kept as well.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ... import models
from ...models.fields import Field, fields_of, shown
from ..checkpoint.format import Generation
from ..checkpoint.state import TrainingState
from ..config import (
    Config,
    DataConfig,
    OptimizerConfig,
    all_settings,
    from_dict,
    merge,
    path_settings,
    sections_of,
    to_dict,
)
from ..config.path_settings import Place
from ..config.recipes import Recipe
from ..console.reporter import Notice
from ..optim.lr_schedule import found_rate, settle_rate
from ..system.paths import expanded
from . import recipe_progress as stages
from .recipe_progress import Plan

_OF_A_START = {"save": {"model_dir": ""}, "model": {"load_weights": ""}}
"""What no model keeps: where it is now, and what it began with."""

_NOT_COMPARED = {"save.model_dir", "model.load_weights"}


@dataclass(frozen=True)
class Overrides:
    """What a user has set, by section and key."""

    lasting: dict[str, Any] = field(default_factory=dict)
    """Values by preset, recipe, file and `--set`: the model keeps them."""

    session: dict[str, Any] = field(default_factory=dict)
    """Values by flags: they hold for this session."""

    @property
    def given(self) -> dict[str, Any]:
        """Values of both kinds merged; those of the session win."""
        return merge(self.lasting, self.session)

    @property
    def model_dir(self) -> Path | None:
        """The folder of the model; None where none is given."""
        given = sections_of(self.given)["save"].model_dir
        return expanded(given) if given else None

    @property
    def trainer(self) -> str | None:
        """The model family that is asked for, if one is."""
        return self.given.get("model", {}).get("trainer")

    @property
    def kept(self) -> dict[str, Any]:
        """What of it a model keeps."""
        staying: dict[str, Any] = {}
        for spec in all_settings():
            if (spec.stays or spec.locked) and spec.name in self.session.get(spec.section, {}):
                value = self.session[spec.section][spec.name]
                staying.setdefault(spec.section, {})[spec.name] = value
        return merge(self.lasting, staying)

    def with_session(self, values: dict[str, Any]) -> "Overrides":
        """The same with further settings of this session."""
        return Overrides(self.lasting, merge(self.session, values))


@dataclass(frozen=True)
class Resolved:
    """The settings of a run."""

    config: Config
    """Settings of this session."""

    kept: Config
    """What the model keeps for the next."""

    before: Config | None
    """Settings of the last session, its flags among them; None: there was none."""

    plan: Plan | None
    """The recipe and the place in it."""

    notices: list[Notice]
    """What is to be told: differences to the last session, and what was left out."""


def resolve(
    overrides: Overrides,
    saved: Generation | None,
    recipe: Recipe | None,
    trust: Callable[[str, str], bool] = lambda setting, path: False,
) -> Resolved:
    """The settings of a session that begins, of a new model or one that resumes.

    Args:
        overrides: What the user has set.
        saved: The model, whose tensors are not looked at; None: a new one.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        trust: Whether a path counts that the model was saved with: called with the name of its
            setting and the absolute path.

    Raises:
        ValueError: A setting is unknown, out of its range, fixed in this model, or clashes.
    """
    sections_of(overrides.given)  # refuses what is unknown or out of range
    plan = stages.find_place(saved.state if saved else None, recipe)
    by_stage = {} if plan is None else plan.settings()
    given, kept = merge(overrides.given, by_stage), merge(overrides.kept, by_stage)
    if saved is None:
        trainer = from_dict(given).model.trainer
        resolved = Resolved(
            config=_whole(path_settings.with_absolute_paths(given, trainer)),
            kept=_whole(path_settings.with_absolute_paths(merge(kept, _OF_A_START), trainer)),
            before=None,
            plan=plan,
            notices=[],
        )
    else:
        resolved = _resumed(saved, given, kept, plan, trust)
    stages.check_figures(plan, resolved.config)
    return _writable(resolved)


def _resumed(
    saved: Generation,
    given: dict[str, Any],
    kept: dict[str, Any],
    plan: Plan | None,
    trust: Callable[[str, str], bool],
) -> Resolved:
    """The settings of a resumed run: the model's own where locked, the user's where free."""
    if saved.config is None:
        raise ValueError(
            f"{saved.path} holds no config.toml, so its settings are unknown; put it back, or "
            "choose another --model-dir"
        )
    state = TrainingState.from_dict(saved.state)
    own = to_dict(from_dict(merge(saved.config, _OF_A_START)))
    trainer = own["model"]["trainer"]
    strange = _strange_paths(own, trainer, trust)
    own = path_settings.with_paths(own, dict.fromkeys(strange, ""))
    given, kept = (path_settings.with_absolute_paths(each, trainer) for each in (given, kept))
    notices = _told_of_strange(strange, path_settings.paths_in(given, trainer))
    if given.get("model", {}).get("load_weights"):
        notices.append(
            Notice(
                "model.load_weights does nothing here: it is for a new model, and this one resumes",
                is_warning=True,
            )
        )
    given, kept = merge(given, {"model": {"load_weights": ""}}), merge(kept, _OF_A_START)
    optimizer, told = settle_rate(
        found_rate(state), OptimizerConfig(**own["optimizer"]), given.get("optimizer", {})
    )
    notices += told
    finder = {name: value for name, value in optimizer.items() if name == "use_lr_finder"}
    given, kept = (merge(each, {"optimizer": finder}) for each in (given, kept))
    _refuse_locked(own, given)
    config = _whole(merge(own, given))
    last = _of_last_session(own, state)
    _refuse_swapped(last["data"], config.data)
    names = {".".join(place) for place in strange} | _NOT_COMPARED
    notices += [Notice(text) for text in _changes(last, own, to_dict(config), names)]
    return Resolved(config, _whole(merge(own, kept)), _as_config(last, own), plan, notices)


def _writable(resolved: Resolved) -> Resolved:
    """The same, less the paths that a model cannot keep."""
    kept = to_dict(resolved.kept)
    lost = path_settings.unwritable(kept, resolved.kept.model.trainer)
    notices = [
        Notice(
            f"{'.'.join(place)} is no UTF-8 name ({shown(path)}) and is not kept: give it at every "
            "start, or rename it"
        )
        for place, path in lost.items()
    ]
    kept = path_settings.with_paths(kept, dict.fromkeys(lost, ""))
    return replace(resolved, kept=from_dict(kept), notices=[*resolved.notices, *notices])


def _whole(values: dict[str, Any]) -> Config:
    """The settings with every option of the family written out."""
    config = from_dict(values)
    options = models.options_of(config.model.trainer, config.model.options)
    written_out = {"model": {"options": dataclasses.asdict(options)}}
    return from_dict(merge(to_dict(config), written_out))


def _strange_paths(
    own: dict[str, Any], trainer: str, trust: Callable[[str, str], bool]
) -> dict[Place, str]:
    """The paths that the model was saved with and that do not count."""
    return {
        place: path
        for place, path in path_settings.paths_in(own, trainer).items()
        if not trust(".".join(place), os.path.abspath(os.path.expanduser(path)))
    }


def _told_of_strange(strange: dict[Place, str], given: dict[Place, str]) -> list[Notice]:
    """A line for each path that is left out and not given anew."""
    return [
        Notice(
            f"{'.'.join(place)} is left out: the model folder names {shown(path)}, which lies "
            f"outside it and has not been given here; give it: {path_settings.way_to_give(place)}",
            is_warning=True,
        )
        for place, path in strange.items()
        if place not in given
    ]


def _of_last_session(own: dict[str, Any], state: TrainingState) -> dict[str, Any]:
    """All settings as they were in the last session, its flags among them."""
    settings = state.sessions[-1].settings if state.sessions else {}
    last: dict[str, Any] = {}
    for spec in all_settings():
        table = settings.get(spec.section)
        if not spec.locked and isinstance(table, dict) and spec.name in table:
            last.setdefault(spec.section, {})[spec.name] = table[spec.name]
    return merge(own, last)


def _refuse_swapped(last: dict[str, Any], data: DataConfig) -> None:
    """Refuse the folders of the last session the other way round: A would be trained as B."""
    if data.input_a and data.input_b:
        if (data.input_a, data.input_b) == (last["input_b"], last["input_a"]):
            raise ValueError(
                f"the folders are swapped: the model knows {shown(data.input_b)} as A and "
                f"{shown(data.input_a)} as B; give -A and -B as before, or begin a new model"
            )


def _as_config(last: dict[str, Any], own: dict[str, Any]) -> Config:
    """The last session's settings; the model's own where that session's cannot be used today."""
    try:
        return from_dict(last)
    except ValueError:
        return from_dict(own)


def _refuse_locked(own: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse what would change a setting that is fixed in the model."""
    for spec in all_settings():
        table = given.get(spec.section, {})
        if spec.locked and spec.type is not dict and spec.name in table:
            _refuse_change(spec.full_name, own[spec.section][spec.name], table[spec.name])
    for item, was, becomes in _options(own, merge(own, given)):
        if item.locked:
            _refuse_change(f"model.options.{item.name}", was, becomes)


def _refuse_change(name: str, old: Any, new: Any) -> None:
    if old != new:
        raise ValueError(
            f"{name} is fixed at {_shown(old)} in this model and cannot become {_shown(new)}; "
            "leave it out, or choose another --model-dir"
        )


def _changes(
    last: dict[str, Any], own: dict[str, Any], new: dict[str, Any], left_out: set[str]
) -> Iterator[str]:
    """A sentence for each free setting that is other than in the last session."""
    for spec in all_settings():
        if spec.locked or spec.full_name in left_out:
            continue
        was, stays, becomes = (each[spec.section][spec.name] for each in (last, own, new))
        if was != becomes:
            why = "; it was set by a flag, for that session" if becomes == stays else ""
            was, becomes = (_shown(spec.word_for(value)) for value in (was, becomes))
            yield f"updated {spec.full_name} from {was} to {becomes}{why}"
    for item, was, becomes in _options(own, new):
        name = f"model.options.{item.name}"
        if was != becomes and name not in left_out:
            yield f"updated {name} from {_shown(was)} to {_shown(becomes)}"


def _options(own: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[Field, Any, Any]]:
    """Every option of the model's family: in the model, and as it is to become."""
    trainer = own["model"]["trainer"]
    old, becomes = (models.options_of(trainer, each["model"]["options"]) for each in (own, new))
    for item in fields_of(type(old)).values():
        yield item, getattr(old, item.name), getattr(becomes, item.name)


def _shown(value: Any) -> str:
    """A value as a user writes it, in one line that is not too long."""
    if isinstance(value, tuple):
        return shown(list(value))
    if isinstance(value, bool):
        return str(value).lower()
    is_word = isinstance(value, str) and value.isprintable() and 0 < len(value) <= 200
    return value if is_word else shown(value)
