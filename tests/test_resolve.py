"""Settings of a run: what weighs more, what a model keeps, what of its own counts, what is told."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from mien import models
from mien.core.checkpoint.format import Generation
from mien.core.checkpoint.state import TrainingState
from mien.core.config import (
    Config,
    all_settings,
    from_dict,
    merge,
    nested,
    parse_toml,
    to_dict,
    to_toml,
)
from mien.core.config.path_settings import each_path, paths_in
from mien.core.config.recipes import NONE, Recipe
from mien.core.optim.lr_schedule import LR_FINDER
from mien.core.training.batch_size import with_batch_size
from mien.core.training.recipe_progress import StageState
from mien.core.training.resolve import Overrides, resolve
from mien.models.fields import fields_of
from mien.models.options import Options, option

SAVED = {
    "model": {"trainer": "lightweight", "options": {"width": 32}},
    "data": {"input_a": "/old/a", "input_b": "/old/b", "coverage": 87.5},
    "train": {"batch_size": 8, "seed": 5},
}
_WEIGHTS = {"model": {"load_weights": "/other/model"}}
OF_A_START = {"save.model_dir", "model.load_weights"} | {
    f"distribute.{name}" for name in ("gpus", "exclude_gpus", "restarts")
}
FLAGS = [spec for spec in all_settings() if spec.flags]
PATHS = [spec for spec in all_settings() if spec.is_path]


def _saved(values=SAVED, session=None, **parts):
    """A model with these settings whose last session had those."""
    config = from_dict(values)
    state = TrainingState(trainer=config.model.trainer, parts=parts)
    state.begin_session(from_dict(merge(values, session or {})), batch_size=8)
    state.advance()
    return Generation("1", Path("model/1"), {}, None, state.to_dict(), to_dict(config))


def _resolve(saved=None, lasting=None, recipe=None, trusts=True, **session):
    return resolve(Overrides(lasting or {}, session), saved, recipe, lambda *_: trusts)


def _told(resolved):
    return [*(notice.text for notice in resolved.notices), *map(str, resolved.changes)]


def _held(spec, path):
    """A path as the setting holds it."""
    return (path,) if spec.is_list_of_paths else path


def _other(spec):
    """A valid value that is not the default; None where there is none."""
    if spec.type is bool:
        return not spec.default
    if spec.choices:
        others = [choice for choice in spec.choices if choice not in (spec.default, "none")]
        return others[0] if others else None
    if spec.is_path:
        return _held(spec, "/other.png")
    if spec.is_private:
        return "the user's alone"
    if spec.type is str:
        return {"trainer": "original", "mask_color": "#00ff00", "gpus": "2"}[spec.name]
    if spec.type == tuple[str, ...]:
        return ("1",)
    return spec.type(spec.high if spec.default != spec.high else spec.low)


# What lasts


def test_nothing_given_is_the_saved_config():
    resolved = _resolve(_saved())
    assert resolved.config == resolved.kept
    expected = merge(SAVED, {"model": {"options": {"width": 32}}})
    assert resolved.config == from_dict(expected)
    assert _told(resolved) == []


@pytest.mark.parametrize("spec", FLAGS, ids=lambda spec: spec.full_name)
def test_a_flag_holds_for_its_session_unless_it_makes_the_model(spec):
    value = _other(spec)
    given = {spec.section: {spec.name: value}}
    first = _resolve(**given)
    assert getattr(getattr(first.config, spec.section), spec.name) == value
    kept = getattr(getattr(first.kept, spec.section), spec.name)
    stays = spec.locked or spec.full_name in (
        *("data.input_a", "data.input_b", "data.sub_folders", "optimizer.use_lr_finder"),
    )
    assert kept == (value if stays else spec.default)


@pytest.mark.parametrize("spec", all_settings(), ids=lambda spec: spec.full_name)
def test_what_is_set_by_file_or_set_lasts(spec):
    value = _other(spec) if spec.type is not dict else {"width": 8}
    if value is None:
        pytest.skip(f"{spec.name} has one choice only")
    first = _resolve(lasting={spec.section: {spec.name: value}})
    kept = getattr(getattr(first.kept, spec.section), spec.name)
    is_of_a_start = spec.is_private or spec.full_name in OF_A_START
    expected = merge(kept, value) if spec.type is dict else value
    assert kept == (spec.default if is_of_a_start else expected)


def test_a_flag_weighs_more_than_what_lasts_and_leaves_it():
    lasting = {"augment": {"warp": False}, "train": {"batch_size": 32}}
    resolved = _resolve(_saved(), lasting, augment={"warp": True}, train={"batch_size": 4})
    assert (resolved.config.augment.warp, resolved.config.train.batch_size) == (True, 4)
    assert (resolved.kept.augment.warp, resolved.kept.train.batch_size) == (False, 32)


def test_a_stage_weighs_more_than_a_flag_and_lasts():
    stage = {"name": "one", "set": {"augment": {"warp": False, "flip": False}}}
    recipe = Recipe.from_dict({"name": "mine", "stage": [stage]})
    for saved in (None, _saved()):
        resolved = _resolve(saved, recipe=recipe, augment={"warp": True, "color": False})
        assert resolved.progress.stage.name == "one"
        assert resolved.config.augment.warp is resolved.kept.augment.warp is False
        assert (resolved.config.augment.color, resolved.kept.augment.color) == (False, True)
    assert _resolve(_saved(), recipe=NONE).progress is None


def test_nothing_but_the_arguments_counts_and_they_stay_as_they_are(monkeypatch):
    """No file is opened, nothing is printed, and twice the same is the same."""
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr("os.open", None)
    monkeypatch.setattr("builtins.print", None)
    stage = {"name": "one", "set": {"augment": {"warp": False}}}
    recipe = Recipe.from_dict({"name": "mine", "stage": [stage]})
    overrides = Overrides({"data": {"input_a": "a"}}, {"train": {"iterations": 5}})
    for saved in (None, _saved()):
        before = copy.deepcopy((overrides, saved, recipe))
        first, second = (resolve(overrides, saved, recipe) for _ in range(2))
        assert first == second
        assert (overrides, saved, recipe) == before


def test_another_batch_size_changes_nothing_else_and_keeps_its_rule():
    config = _resolve(lasting={"model": {"trainer": "lightweight"}}).config
    other = with_batch_size(config, 4)
    assert (other.train.batch_size, config.train.batch_size) == (4, 16)
    assert with_batch_size(other, 16) == config
    with pytest.raises(ValueError, match="^train.batch_size must be auto or a whole number"):
        with_batch_size(config, -1)


# What is told


def test_differences_to_the_last_session_are_told_and_are_no_notices():
    lasting = {"data": {"input_a": "/new/a"}, "loss": {"loss_weight_2": 50}}
    resolved = _resolve(_saved(), lasting, augment={"zoom_amount": 5}, save={"logs": False})
    assert _told(resolved) == [
        "data.input_a: /old/a -> /new/a",
        "loss.loss_weight_2: 100 -> 50",
        "save.logs: true -> false",
    ]
    assert resolved.notices == []
    rate, logs = resolved.changes[1:]
    assert (rate.name, rate.old, rate.new, rate.note) == ("loss.loss_weight_2", 100, 50, "")
    assert (logs.old, logs.new) == (True, False)


def test_a_flag_that_has_ended_is_told():
    last = {"augment": {"warp": False}, "train": {"iterations": 5, "batch_size": 4}}
    saved = _saved(session=last)
    ended = "; it was set by a flag, for that session"
    assert _told(_resolve(saved)) == [
        f"augment.warp: false -> true{ended}",
        f"train.batch_size: 4 -> 8{ended}",
        f"train.iterations: 5 -> 1000000{ended}",
    ]
    assert _told(_resolve(saved, **last)) == [], "the same line again changes nothing"
    again = last | {"train": {"iterations": 6, "batch_size": 4}}
    assert _told(_resolve(saved, **again)) == ["train.iterations: 5 -> 6"]


def test_the_place_of_the_model_is_no_difference():
    saved = _saved(session={"save": {"model_dir": "/somewhere/else"}})
    assert _told(_resolve(saved, save={"model_dir": "/here"})) == []


def test_the_folders_of_the_last_session_swapped_are_refused():
    """A would be trained as B, and the model would be spoilt before anybody looks."""
    swapped = {"input_a": "/old/b", "input_b": "/old/a"}
    with pytest.raises(ValueError, match="the model knows '/old/a' as A and '/old/b' as B"):
        _resolve(_saved(), data=swapped)
    assert _resolve(_saved(), data={"input_a": "/old/b", "input_b": "/new/b"}).config
    assert _resolve(data=swapped).config, "of a new model"


def test_what_was_before_is_the_last_session_with_its_flags():
    """Else the same line, given again, would count as a change: counts would begin anew."""
    last = {"optimizer": {"warmup_steps": 6}, "augment": {"warp": False}}
    resolved = _resolve(_saved(session=last), **last)
    assert resolved.before.optimizer == resolved.config.optimizer != resolved.kept.optimizer
    assert resolved.before.augment == resolved.config.augment != resolved.kept.augment
    assert _resolve(**last).before is None, "of a new model"


def test_before_a_session_that_is_not_valid_today_are_the_settings_of_the_model():
    saved = _saved()
    saved.state["sessions"][0]["settings"]["optimizer"]["warmup_steps"] = -1
    assert _resolve(saved).before == from_dict(SAVED | {"model": saved.config["model"]})


def test_a_strange_session_is_told_in_lines_that_cannot_harm():
    saved = _saved()
    settings = saved.state["sessions"][0]["settings"]
    settings["preview"]["write_image"] = "\x1b[31m\nmkdir x\n" * 1000
    settings["log"]["level"] = {"a": [1]}
    settings["augment"] = "none of ours"
    told = _told(_resolve(saved))
    assert len(told) == 2
    for line in told:
        assert line.isprintable()
        assert len(line) < 400


def test_weights_to_begin_with_do_nothing_at_a_resume_and_that_is_told():
    for resolved in (_resolve(_saved(), _WEIGHTS), _resolve(_saved(), **_WEIGHTS)):
        assert resolved.config.model.load_weights == resolved.kept.model.load_weights == ""
        assert [notice.is_warning for notice in resolved.notices] == [True]
        assert _told(resolved)[0].startswith("model.load_weights does nothing here: it is for a")
    for resolved in (_resolve(None, _WEIGHTS), _resolve(None, **_WEIGHTS)):
        assert resolved.config.model.load_weights == "/other/model"


# What is fixed


def test_locked_settings_may_be_repeated_but_not_changed():
    same = {
        "model": {"trainer": "lightweight", "options": {"width": 32}},
        "data": {"coverage": 87.5},
        "train": {"seed": 5},
    }
    assert _told(_resolve(_saved(), **same)) == []
    assert _told(_resolve(_saved(), same)) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": {"trainer": "original"}}, "model.trainer is fixed at lightweight in this model"),
        ({"data": {"coverage": 100}}, "data.coverage is fixed at 87.5 in this model and cannot"),
        ({"train": {"seed": 6}}, "train.seed is fixed at 5 in this model and cannot become 6"),
        ({"model": {"options": {"width": 8}}}, "model.options.width is fixed at 32 in this model"),
        ({"data": {"mask_type": "none"}}, "data.mask_type is fixed at extended"),
        ({"train": {"batch_sise": 3}}, "unknown setting train.batch_sise; did you mean train.bat"),
        ({"train": {"batch_size": -1}}, "train.batch_size must be auto or a whole number"),
        ({"train": 5}, "train must be a table"),
    ],
)
def test_refusals(given, said):
    for overrides in (Overrides(given), Overrides(session=given)):
        with pytest.raises(ValueError, match="fixed|must be|unknown") as caught:
            resolve(overrides, _saved(), None)
        assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "spec", [spec for spec in all_settings() if spec.type is not dict], ids=lambda s: s.full_name
)
def test_every_setting_is_refused_or_updated_as_its_lock_says(spec):
    other = _other(spec)
    if other is None:
        pytest.skip(f"{spec.name} has one choice only")
    saved, given = _saved({"model": {"trainer": "villain"}}), {spec.section: {spec.name: other}}
    if spec.locked:
        with pytest.raises(ValueError, match=f"^{spec.full_name} is fixed at"):
            _resolve(saved, given)
        return
    resolved = _resolve(saved, given)
    if spec.full_name in OF_A_START | {"optimizer.use_lr_finder"}:
        return
    if spec.is_private:  # a notice of it would be kept with the others
        assert _told(resolved) == []
        return
    (told,) = _told(resolved)
    assert told.startswith(f"{spec.full_name}: ")


@dataclass(frozen=True, kw_only=True, slots=True)
class _FreeAndLocked(Options):
    """Options of a family, one of each kind and one of several words."""

    family = "original"
    nodes: int = option(8, low=1, high=64)
    dropout: float = option(0.0, low=0.0, high=0.9, free=True)
    layers: tuple[str, ...] = option(("encoder",), choices=("encoder", "fc"), free=True)
    weights: str = option("", free=True, path=True)


@pytest.fixture
def with_options(monkeypatch):
    """A model made before there were `layers`."""
    monkeypatch.setattr(models.family("original"), "Config", _FreeAndLocked)
    return _saved({"model": {"options": {"nodes": 16, "dropout": 0.25}}})


def test_free_options_change_and_locked_ones_are_refused_one_by_one(with_options):
    given = {"model": {"options": {"nodes": 16, "dropout": 0.5, "layers": ["encoder", "fc"]}}}
    resolved = _resolve(with_options, given)
    assert _told(resolved) == [
        "model.options.dropout: 0.25 -> 0.5",
        "model.options.layers: ['encoder'] -> ['encoder', 'fc']",
    ]
    assert resolved.kept.model.options["nodes"] == 16
    assert resolved.kept.model.options["dropout"] == 0.5
    given["model"]["options"]["nodes"] = 8
    with pytest.raises(ValueError, match="^model.options.nodes is fixed at 16 in this model"):
        _resolve(with_options, given)
    with pytest.raises(
        ValueError, match="^model.options.dropout of original must be a number from"
    ):
        _resolve(with_options, {"model": {"options": {"dropout": 0.95}}})
    with pytest.raises(ValueError, match="^model.trainer is fixed at original"):
        _resolve(with_options, {"model": {"trainer": "lightweight", "options": {"width": 8}}})


def test_an_option_that_the_model_is_older_than_has_its_default(with_options):
    assert _told(_resolve(with_options, {"model": {"options": {"layers": ["encoder"]}}})) == []
    assert _resolve(with_options).config.model.options["layers"] == ("encoder",)


def test_settings_that_an_older_version_lacked_get_their_defaults():
    saved = dataclasses.replace(_saved(), config={"data": {"coverage": 87.5}})
    saved.state["trainer"] = "original"
    config = _resolve(saved).config
    assert config.data.coverage == 87.5
    assert config.train == Config().train


# The found rate


def test_a_found_rate_stays_with_the_model_whatever_flags_are_given():
    flag = {"optimizer": {"use_lr_finder": True}}
    first = _resolve(**flag)
    assert first.kept.optimizer.use_lr_finder
    saved = _saved(merge(SAVED, flag), **{LR_FINDER: {"rate": 2e-4}})
    assert _resolve(saved).config.optimizer.use_lr_finder
    given = _resolve(saved, {"optimizer": {"learning_rate": 1e-3}})
    assert not given.config.optimizer.use_lr_finder
    assert not given.kept.optimizer.use_lr_finder
    assert given.notices[0].text.startswith("the learning rate is 0.001, as set, in place of")
    without = _resolve(_saved(), **flag)
    assert without.notices[0].is_warning
    assert not without.kept.optimizer.use_lr_finder


# Paths that a model folder names


def test_every_text_without_choices_is_a_path_or_known_not_to_be_one():
    free = {spec.full_name for spec in all_settings() if spec.type is str and not spec.choices}
    paths = {spec.full_name for spec in PATHS}
    private = {spec.full_name for spec in all_settings() if spec.is_private}
    assert free - paths - private == {"model.trainer", "preview.mask_color", "distribute.gpus"}
    lists = {spec.full_name for spec in PATHS if spec.is_list_of_paths}
    assert paths <= free | lists


def test_every_option_that_is_a_text_without_choices_is_a_path():
    for name in models.available():
        for field in fields_of(models.family(name).Config).values():
            if field.type is str and field.choices is None:
                assert field.is_path, f"{name} {field.name}"


@pytest.mark.parametrize("spec", PATHS, ids=lambda spec: spec.full_name)
def test_a_path_that_the_model_folder_names_counts_only_if_it_is_trusted(spec):
    path = "/home/user/x.png"
    saved = _saved(merge(SAVED, {spec.section: {spec.name: path}}))
    asked = []

    def trust(setting, asked_path):
        asked.append((setting, asked_path))
        return setting != spec.full_name

    resolved = resolve(Overrides(), saved, None, trust)
    for config in (resolved.config, resolved.kept):
        assert path not in _paths_of(config)
    if spec.full_name in ("save.model_dir", "model.load_weights"):
        assert resolved.notices == [], "it never comes from the folder"
        return
    assert (spec.full_name, path) in asked
    (notice,) = resolved.notices
    assert notice.is_warning
    assert notice.text.startswith(f"{spec.full_name} is left out: the model folder names '{path}'")
    assert notice.text.endswith(spec.flags[-1] if spec.flags else f"--set {spec.full_name}=")
    trusted = _resolve(saved)
    assert getattr(getattr(trusted.config, spec.section), spec.name) == _held(spec, path)


def _paths_of(config):
    """All paths in the settings of a lightweight model."""
    values = paths_in(to_dict(config), "lightweight").values()
    return {path for value in values for path in each_path(value)}


@pytest.mark.parametrize("spec", PATHS, ids=lambda spec: spec.full_name)
def test_a_path_that_is_given_again_counts_and_the_named_one_does_not_come_back(spec):
    saved = _saved(merge(SAVED, {spec.section: {spec.name: "/strange.png"}}))
    given = {spec.section: {spec.name: "/mine.png"}}
    resolved = resolve(Overrides(session=given), saved, None, lambda *_: False)
    assert not any(spec.full_name in line and "left out" in line for line in _told(resolved))
    assert "/strange.png" not in _paths_of(resolved.kept)
    if spec.full_name != "model.load_weights":
        held = _held(spec, "/mine.png")
        assert getattr(getattr(resolved.config, spec.section), spec.name) == held


def test_options_that_are_paths_count_likewise(with_options):
    saved = dataclasses.replace(
        with_options, config=merge(with_options.config, {"model": {"options": {"weights": "~/x"}}})
    )
    asked = []
    resolved = resolve(Overrides(), saved, None, lambda *pair: asked.append(pair))
    assert asked == [("model.options.weights", str(Path.home() / "x"))]
    assert resolved.config.model.options["weights"] == ""
    assert resolved.notices[0].text.endswith("give it: --set model.options.weights=")
    assert _resolve(saved).config.model.options["weights"] == "~/x"


def test_a_recipe_in_a_model_folder_sets_no_path():
    saved = _saved()
    for spec in PATHS:
        stage = {"name": "x", "set": {spec.section: {spec.name: "/home/user/x.png"}}}
        values = {
            "recipe": {"name": "r", "stage": [stage]},
            "place": dataclasses.asdict(StageState()),
        }
        saved.state["parts"] = {"recipe": values}
        with pytest.raises(ValueError, match=f"{spec.full_name} is for the whole run; leave it"):
            _resolve(saved)


def test_paths_are_absolute_wherever_they_come_from(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    relative = nested({("data", "input_a"): "a", ("log", "file"): "~/x.log"})
    for resolved in (_resolve(lasting=relative), _resolve(_saved(), relative)):
        folders = (str(tmp_path / "a"),)
        assert resolved.config.data.input_a == resolved.kept.data.input_a == folders
        assert resolved.config.log.file == "/home/user/x.log"


def test_a_home_that_is_not_there_is_refused_and_trusted_to_nobody():
    for given in ({"data": {"input_a": "~nobody-here/a"}}, {"save": {"model_dir": "~nobody-here"}}):
        with pytest.raises(ValueError, match="that home folder is not known here"):
            _resolve(**given)
    saved = _saved(merge(SAVED, {"log": {"file": "~nobody-here/x"}}))
    resolved = resolve(Overrides(), saved, None, lambda setting, path: setting != "log.file")
    assert resolved.config.log.file == ""


def test_a_name_that_is_no_utf_8_holds_for_the_session_and_is_not_kept():
    given = {"data": {"input_a": "/faces/\udce4", "input_b": "/faces/\xe4"}}
    for saved in (None, _saved()):
        resolved = _resolve(saved, given)
        assert resolved.config.data.input_a == ("/faces/\udce4",)
        assert (resolved.kept.data.input_a, resolved.kept.data.input_b) == ((), ("/faces/\xe4",))
        assert parse_toml(to_toml(resolved.kept).encode())["data"]["input_b"] == ["/faces/\xe4"]
        assert "data.input_a is no UTF-8 name (/faces/\\xe4)" in _told(resolved)[0]


# Several folders of a side


def test_each_of_several_folders_must_be_trusted_by_its_path_without_the_share():
    """Else a link in a model folder from a stranger would be read by adding a number to it."""
    folders = ["/old/a", "/strange/link:0.5"]
    saved = _saved(merge(SAVED, {"data": {"input_a": folders}}))
    asked = []

    def trust(setting, path):
        asked.append(path)
        return "strange" not in path

    resolved = resolve(Overrides(), saved, None, trust)
    assert "/strange/link" in asked
    assert resolved.config.data.input_a == ()
    assert "the model folder names '/strange/link'" in _told(resolved)[0]
    assert _resolve(saved).config.data.input_a == tuple(folders)


def test_several_folders_are_told_absolute_and_refused_on_the_other_side(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    saved = _saved(merge(SAVED, {"data": {"input_a": ["/a", "/c"]}}))
    given = {"data": {"input_a": ["one", "two:0.3"]}}
    assert _told(_resolve(saved, given)) == [
        f"data.input_a: /a, /c -> {tmp_path}/one, {tmp_path}/two:0.3"
    ]
    swapped = {"input_a": "/old/b", "input_b": ["/c:0.5", "/a"]}
    with pytest.raises(ValueError, match="the folders are swapped"):
        _resolve(saved, data=swapped)
    # As it was written before there were lists, and by a stranger.
    one = dataclasses.replace(saved, config=merge(saved.config, {"data": {"input_a": "/a"}}))
    assert _resolve(one).config.data.input_a == ("/a",)
    settings = saved.state["sessions"][0]["settings"]["data"]
    settings["input_a"] = "/old/a"
    (told,) = _told(_resolve(saved))
    assert told.startswith("data.input_a: /old/a -> /a, /c; it was set by a flag")
    settings["input_a"] = 5
    assert _told(_resolve(saved)) == []
