"""Settings of a run: the user's, the model's own and the recipe's made into one.

Nothing is read or written here, and nothing reported: the notices come back with the settings.

    defaults < the model's own < preset, recipe, file, --set < flags < the stage of the recipe

A model keeps for its next session what lasts: all of that but the flags. The flags of what makes a
model (`Spec.stays`, and what is locked) are kept as well.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
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
    nested,
    path_settings,
    sections_of,
    settings_in,
    to_dict,
    without_private,
)
from ..config.recipes import Recipe
from ..config.settings import Place
from ..console.reporter import Notice
from ..optim.lr_schedule import found_rate, settle_rate
from ..system.paths import expanded
from ..system.printable import printable
from . import recipe_progress as stages
from .recipe_progress import RecipeProgress

_OF_A_START: dict[str, dict[str, Any]] = {
    "save": {"model_dir": ""},
    "model": {"load_weights": ""},
    "distribute": {"gpus": "", "exclude_gpus": (), "restarts": 0},
}
"""Settings that no model keeps, nor are they compared with those of the last session: where it is
now, what it began with, and the GPUs of one start."""

_NOT_KEPT = without_private(_OF_A_START)
"""Defaults of those, and of what is the user's alone, which a stranger's folder must never set."""

_NOT_COMPARED = {f"{section}.{name}" for section, names in _OF_A_START.items() for name in names}


@dataclass(frozen=True)
class Overrides:
    """Settings of a user, by section and key."""

    lasting: dict[str, Any] = field(default_factory=dict)
    """Values by preset, recipe, file and `--set`: the model keeps them."""

    session: dict[str, Any] = field(default_factory=dict)
    """Values by flags: they hold for this session."""

    notices: tuple[Notice, ...] = ()
    """Sentences about where the values come from, to be reported with those about the settings."""

    @cached_property
    def sections(self) -> dict[str, Any]:
        """Sections by name, with the defaults of what is not set.

        Raises:
            ValueError: A setting is unknown or breaks its rule.
        """
        return sections_of(merge(self.lasting, self.session))

    @property
    def model_dir(self) -> Path | None:
        """The folder of the model; None where none is set."""
        model_dir = self.sections["save"].model_dir
        return expanded(model_dir) if model_dir else None

    @property
    def trainer(self) -> str | None:
        """The model family, if one is set."""
        values = merge(self.lasting, self.session)
        return values.get("model", {}).get("trainer")

    @property
    def of_the_model(self) -> dict[str, Any]:
        """Values that a model keeps: those that last, and the flags of what makes it."""
        flags = settings_in(self.session)
        staying = {spec.place: value for spec, value in flags if spec.stays or spec.locked}
        return merge(self.lasting, nested(staying))

    def with_session(self, values: dict[str, Any]) -> "Overrides":
        """The same, told of before, with further settings of this session."""
        return Overrides(self.lasting, merge(self.session, values))

    def with_lasting(self, values: dict[str, dict[str, Any]]) -> "Overrides":
        """The same, told of before, with further values that the model keeps, also in the place of
        flags."""
        flags = {
            section: {name: value for name, value in table.items() if name not in values[section]}
            if section in values
            else table
            for section, table in self.session.items()
        }
        return Overrides(merge(self.lasting, values), flags)


@dataclass(frozen=True)
class Change:
    """A setting that is other than in the last session."""

    name: str
    old: Any
    new: Any
    """Values for programs; words where those stand for numbers."""

    text: str
    """Both values in words."""

    note: str = ""
    """Clause about where the change comes from, or what it leads to."""

    def __str__(self) -> str:
        return "; ".join(filter(None, (f"{self.name}: {self.text}", self.note)))


@dataclass(frozen=True)
class Resolved:
    """The settings of a run."""

    config: Config
    """Settings of this session."""

    kept: Config
    """Settings that the model keeps for its next session."""

    before: Config | None
    """Settings of the last session, its flags among them; None: there was none."""

    progress: RecipeProgress | None
    """The recipe and the progress in it."""

    changes: list[Change]
    """Differences to the last session."""

    notices: list[Notice]
    """Sentences to report, as of what was left out."""


def resolve(
    overrides: Overrides,
    saved: Generation | None,
    recipe: Recipe | None,
    trust: Callable[[str, str], bool] = lambda setting, path: False,
) -> Resolved:
    """The settings of a session that begins, of a new model or one that resumes.

    Args:
        overrides: Settings of the user.
        saved: The model, whose tensors are not looked at; None: a new one.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        trust: Whether a path counts that the model was saved with: called with the name of its
            setting and the absolute path.

    Raises:
        ValueError: A setting is unknown, out of its range, fixed in this model, or clashes.
    """
    sections = overrides.sections  # first of all, what is unknown or out of range is refused
    progress = stages.find_progress(saved.state if saved else None, recipe)
    by_stage = progress.settings() if progress else {}
    model = _saved_model(saved, trust) if saved else None
    own = model.own if model else {}
    # The model's own: a user who gives another one is refused below, as for all that is locked.
    trainer = own["model"]["trainer"] if model else sections["model"].trainer
    # Two sets from here on: what holds now, and what the model keeps.
    session = merge(overrides.lasting, overrides.session, by_stage)
    lasting = merge(overrides.of_the_model, by_stage, _NOT_KEPT)
    # Before the model's own are merged in: a relative path is one of this start's folder.
    paths, lasting_paths = (
        path_settings.absolute_paths(each, trainer) for each in (session, lasting)
    )
    at_resume, notices = _settled_at_resume(model, session) if model else ({}, [])
    session = merge(own, session, paths, at_resume)
    lasting = merge(own, lasting, lasting_paths, at_resume)
    # TOML is UTF-8: such a name holds for this session, and cannot be kept.
    unwritable = path_settings.unwritable(lasting, trainer)
    lasting = merge(lasting, nested(dict.fromkeys(unwritable, "")))
    # Every option written out, so that later defaults do not change the model.
    config = from_dict(merge(session, _every_option(session, trainer)))
    kept = from_dict(merge(lasting, _every_option(lasting, trainer)))
    stages.check_metrics(progress, config)
    if model:
        _refuse_swapped(model.last["data"], config.data)
    changes = list(_changes(model, to_dict(config))) if model else []
    notices = [*overrides.notices, *notices, *_notices_of_unwritable(unwritable)]
    return Resolved(config, kept, model.before if model else None, progress, changes, notices)


@dataclass(frozen=True)
class _SavedModel:
    """The settings of a model that resumes, by section and key."""

    own: dict[str, Any]
    """Settings that it keeps; paths that do not count here are empty."""

    last: dict[str, Any]
    """All settings as they were in its last session, flags among them."""

    strange: dict[Place, str]
    """The paths that it was saved with and that do not count here."""

    found_rate: float | None

    @property
    def before(self) -> Config:
        """The last session's settings; the model's own where those cannot be used today."""
        try:
            return from_dict(self.last)
        except ValueError:
            return from_dict(self.own)


def _saved_model(saved: Generation, trust: Callable[[str, str], bool]) -> _SavedModel:
    """The settings in a save."""
    if saved.config is None:
        raise ValueError(
            f"{saved.path} holds no config.toml, so its settings are unknown; put it back, or "
            "choose another --model-dir"
        )
    state = TrainingState.from_dict(saved.state)
    # Through a config, which refuses what is not valid and adds what an older mien lacked.
    own = to_dict(from_dict(merge(saved.config, _NOT_KEPT)))
    strange = {
        place: path
        for place, value in path_settings.paths_in(own, own["model"]["trainer"]).items()
        for path in path_settings.each_path(value)
        if not trust(".".join(place), os.path.abspath(os.path.expanduser(path)))
    }
    # Emptied and not refused: a copied folder must open, and a notice names what is left out.
    own = merge(own, nested(dict.fromkeys(strange, "")))
    return _SavedModel(own, _of_last_session(own, state), strange, found_rate(state))


def _of_last_session(own: dict[str, Any], state: TrainingState) -> dict[str, Any]:
    """All settings as they were in the last session, its flags among them."""
    # Of the session and not of the folder, in which flags leave no trace.
    settings = state.sessions[-1].settings if state.sessions else {}
    last: dict[Place, Any] = {}
    for spec, value in settings_in(settings):
        if spec.is_list_of_paths:
            # One path is written as a list of one today; what is none stays the model's own.
            with suppress(ValueError):
                last[spec.place] = list(spec.take(value, spec.full_name))
        # Of what is locked the model's own counts, whatever a session has noted.
        elif not spec.locked:
            last[spec.place] = value
    return merge(own, nested(last))


def _settled_at_resume(
    model: _SavedModel, session: dict[str, Any]
) -> tuple[dict[str, Any], list[Notice]]:
    """Settings that a resumed model has in the place of the user's, and why; ValueError where the
    user would change what is fixed."""
    _refuse_locked(model.own, session)
    again = path_settings.paths_in(session, model.own["model"]["trainer"])
    notices = [
        Notice(
            f"{'.'.join(place)} is left out: the model folder names {shown(path)}, which lies "
            f"outside it and has not been given here; give it: {path_settings.way_to_give(place)}",
            is_warning=True,
        )
        for place, path in model.strange.items()
        if place not in again
    ]
    if session.get("model", {}).get("load_weights"):
        notices.append(
            Notice(
                "model.load_weights does nothing here: it is for a new model, and this one resumes",
                is_warning=True,
            )
        )
    saved, optimizer = OptimizerConfig(**model.own["optimizer"]), session.get("optimizer", {})
    settled, rate_notices = settle_rate(model.found_rate, saved, optimizer)
    finder = {name: value for name, value in settled.items() if name == "use_lr_finder"}
    return {"model": {"load_weights": ""}, "optimizer": finder}, notices + rate_notices


def _every_option(values: dict[str, Any], trainer: str) -> dict[str, Any]:
    """All options of the family, those that are not set with their defaults."""
    options = models.options_of(trainer, values.get("model", {}).get("options", {}))
    return {"model": {"options": dataclasses.asdict(options)}}


def _notices_of_unwritable(paths: dict[Place, str]) -> list[Notice]:
    return [
        Notice(
            f"{'.'.join(place)} is no UTF-8 name ({printable(path)}) and is not kept: give it at "
            "every start, or rename it"
        )
        for place, path in paths.items()
    ]


def _refuse_swapped(last: dict[str, Any], data: DataConfig) -> None:
    """Refuse the folders of the last session the other way round: A would be trained as B."""
    if data.input_a and data.input_b:
        # Only both at once: a user may well put another folder in the place of one.
        # In whatever order and with whatever shares they are listed.
        a, b, last_a, last_b = (
            sorted(path_settings.each_path(list(folders)))
            for folders in (data.input_a, data.input_b, last["input_a"], last["input_b"])
        )
        if (a, b) == (last_b, last_a):
            raise ValueError(
                f"the folders are swapped: the model knows {', '.join(map(shown, b))} as A and "
                f"{', '.join(map(shown, a))} as B; give -A and -B as before, or begin a new model"
            )


def _refuse_locked(own: dict[str, Any], session: dict[str, Any]) -> None:
    """Refuse what would change a setting that is fixed in the model."""
    for spec, value in settings_in(session):
        # Options are a table: each is locked or free by itself, which is looked at below.
        if spec.locked and spec.type is not dict:
            _refuse_change(spec, spec.full_name, own[spec.section][spec.name], value)
    for option, old, new in _options(own, merge(own, session)):
        if option.locked:
            _refuse_change(option, f"model.options.{option.name}", old, new)


def _refuse_change(field: Field, name: str, old: Any, new: Any) -> None:
    if old != new:
        raise ValueError(
            f"{name} is fixed at {field.written(old)} in this model and cannot become "
            f"{field.written(new)}; leave it out, or choose another --model-dir"
        )


def _changes(model: _SavedModel, new: dict[str, Any]) -> Iterator[Change]:
    """Each free setting that is other than in the last session."""
    not_compared = {".".join(place) for place in model.strange} | _NOT_COMPARED
    for spec in all_settings():
        # What is locked cannot differ, and what is private is shown nowhere.
        if spec.locked or spec.is_private or spec.full_name in not_compared:
            continue
        last, own, value = (each[spec.section][spec.name] for each in (model.last, model.own, new))
        if last != value:
            # Else the user, who has changed nothing, would look for what did.
            reason = "it was set by a flag, for that session" if value == own else ""
            consequence = _consequence(spec.full_name, last, value)
            yield Change(
                spec.full_name,
                spec.word_for(last),
                spec.word_for(value),
                text=f"{spec.written(last)} -> {spec.written(value)}",
                note="; ".join(filter(None, (reason, consequence))),
            )
    for option, own, value in _options(model.own, new):
        name = f"model.options.{option.name}"
        if own != value and name not in not_compared:
            yield Change(name, own, value, f"{option.written(own)} -> {option.written(value)}")


def _consequence(setting: str, last: Any, value: Any) -> str:
    """Clause about what a changed setting does to what the model keeps; empty: nothing."""
    if setting != "train.ema" or bool(last) == bool(value):
        return ""
    if value:
        return "the average begins at the weights as they are now"
    return "the average of the weights is dropped, and saves from now on lack it"


def _options(own: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[Field, Any, Any]]:
    """Every option of the model's family: its value in the model, and the new one."""
    trainer = own["model"]["trainer"]
    old_options, new_options = (
        models.options_of(trainer, each["model"]["options"]) for each in (own, new)
    )
    for option in fields_of(type(old_options)).values():
        yield option, getattr(old_options, option.name), getattr(new_options, option.name)
