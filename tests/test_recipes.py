"""Recipes: what a file may say, and when a stage is over."""

import json
import re

import numpy as np
import pytest
import tomli_w

from mien.cli import main
from mien.core.checkpoint.state import TrainingState
from mien.core.config import recipes
from mien.core.config.recipes import NONE, Plateau, Recipe
from mien.core.training.recipe_progress import PART, RecipeProgress, StageState, find_progress

LEARN = {"name": "learn", "iterations": 10, "set": {"augment": {"flip": False}}}
FINISH = {"name": "finish", "rate_factor": 0.5, "set": {"augment": {"warp": False}}}


def _recipe(*stages, name="mine"):
    return Recipe.from_dict({"name": name, "stage": [*stages]})


def _named(*totals):
    values = np.array(totals, dtype=np.float64)
    return {"batch_total": values, "loss_a": values / 4, "loss_b": values * 3 / 4}


@pytest.mark.parametrize("recipe", recipes.available(), ids=lambda recipe: recipe.name)
def test_the_packaged_recipes_are_whole(recipe):
    assert recipe.description.endswith(".")
    assert all(stage.ends for stage in recipe.stages), "one has no end"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_the_standard_recipe_ends_without_warp_and_flip():
    recipe = recipes.load("standard")
    last = len(recipe.stages) - 1
    assert recipe.settings_of(last)["augment"] == {"warp": False, "flip": False}
    assert recipe.settings_of(0) == {}
    assert recipe.rate_factor_of(0) == 1.0
    assert 0 < recipe.rate_factor_of(last) < recipe.rate_factor_of(1) < 1


def test_settings_hold_until_a_later_stage_sets_them_again():
    again = {"name": "again", "set": {"augment": {"flip": True}}}
    recipe = _recipe(LEARN, FINISH | {"iterations": 5}, again)
    assert recipe.settings_of(1) == {"augment": {"flip": False, "warp": False}}
    assert recipe.settings_of(2) == {"augment": {"flip": True, "warp": False}}
    assert [recipe.rate_factor_of(n) for n in range(3)] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stage must be a list of tables, [[stage]], got []"),
        ("learn", "stage must be a list of tables"),
        ([3], "stage 1 must be a table, got 3"),
        ([{"nmae": "x"}], "unknown key nmae of stage 1; did you mean name?"),
        ([{"name": "a"}, {"name": "b"}], "stage 1, a, has no end, so the next is never reached"),
        ([LEARN, LEARN], "stage 2 has the name 'learn' of an earlier one"),
        ([{"iterations": 0}], "stage 1.iterations must be a whole number, at least 1, got 0"),
        ([{"iterations": True}], "stage 1.iterations must be a whole number"),
        ([{"minutes": -1}], "stage 1.minutes must be a number, at least 0, got -1"),
        ([{"minutes": float("nan")}], "stage 1.minutes must be a number"),
        ([{"rate_factor": "half"}], "stage 1.rate_factor must be a number from 0 to 100"),
        ([{"snapshot": "yes"}], "stage 1.snapshot must be true or false, got 'yes'"),
        ([{"plateau": {"metric": "los"}}], "stage 1.plateau.metric must be one of loss, loss_a"),
        ([{"plateau": {"windw": 3}}], "unknown key windw of stage 1.plateau; did you mean window?"),
        ([{"plateau": {"window": 0}}], "stage 1.plateau.window must be a whole number, at"),
        ([{"set": {"augment": {"wrap": False}}}], "did you mean augment.warp?"),
        ([{"set": {"data": {"coverage": 80}}}], "data.coverage is fixed when a model is made"),
        ([{"set": {"train": {"iterations": 5}}}], "train.iterations is for the whole run"),
        ([{"set": {"train": {"until": 5}}}], "train.until is for the whole run"),
        ([{"set": {"loss": {"loss_weight_2": 900}}}], "loss.loss_weight_2 must be a whole number"),
    ],
)
def test_refusals_name_the_stage_and_the_rule(stages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe.from_dict({"stage": stages})


def test_a_file_may_hold_settings_too(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps({"loss": {"loss_weight_2": 50}, "stage": [LEARN, FINISH]}))
    recipe = recipes.load(str(path))
    assert (recipe.name, recipe.settings) == ("mine", {"loss": {"loss_weight_2": 50}})
    path.write_text("[augment]\nflip = false\n")
    with pytest.raises(ValueError, match="lists no stages"):
        recipes.load(str(path))
    with pytest.raises(ValueError, match=r"no recipe 'standrad' \(did you mean standard\?\)"):
        recipes.load("standrad")
    assert recipes.load("none") is NONE


def test_the_command_line_lists_and_shows(capsys):
    assert main(["recipe", "list"]) == 0
    assert "standard" in capsys.readouterr().out
    assert main(["recipe", "show", "standard"]) == 0
    assert "augment.warp = false" in capsys.readouterr().out
    assert main(["recipe", "show", "standard", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"][0]["name"] == "learn"
    assert main(["recipe", "show", "other"]) == 2


def test_print_config_with_a_recipe_is_a_file_to_train_with(tmp_path, capsys):
    assert main(["train", "--recipe", "standard", "--print-config"]) == 0
    path = tmp_path / "standard.toml"
    path.write_text(capsys.readouterr().out)
    assert recipes.read(path).stages == recipes.load("standard").stages


def test_a_stage_is_over_at_the_first_of_its_ends():
    stage = {"iterations": 10, "until_iteration": 25, "minutes": 2}
    progress = RecipeProgress(_recipe(stage), StageState(begun=20, seconds=60))
    assert progress.end(20) is None
    assert progress.end(24, seconds=59) is None
    assert progress.end(25) == "iteration 25 is reached"
    assert progress.end(24, seconds=60) == "2 minutes have passed"
    progress.stage_state.begun = 10
    assert progress.end(20) == "10 iterations are done"


def test_a_plateau_of_the_loss_does_not_depend_on_how_losses_arrive():
    plateau = {"metric": "loss_b", "window": 4, "patience": 2, "improvement": 10}
    totals = [8.0] * 4 + [4.0] * 4 + [3.7] * 4 + [3.9] * 4
    ended = []
    for sizes in ([1] * 16, [16], [3, 5, 7, 1]):
        progress = RecipeProgress(_recipe({"plateau": plateau}))
        at = 0
        for size in sizes:
            progress.take_losses(_named(*totals[at : at + size]))
            at += size
        assert progress.stage_state.best == pytest.approx(3.0)
        assert progress.stage_state.stale == 2, "neither 3.7 nor 3.9 is 10 % better than 4"
        ended.append(progress.end(16))
    assert ended == [ended[0]] * 3
    assert "loss_b has not improved by 10 % in 2 means of 4 iterations" in ended[0]


def test_a_plateau_of_a_measured_figure_counts_each_once():
    progress = RecipeProgress(
        _recipe({"plateau": {"metric": "ssim_a", "patience": 2, "improvement": 1}})
    )
    for iteration, value in ((10, 0.5), (20, 0.6), (20, 0.1), (30, 0.601), (40, 0.59)):
        assert progress.end(iteration) is None
        progress.take_metrics(iteration, {"ssim_a": value})
    assert progress.end(41) is not None
    assert not progress.closes_window(0), "no loss is waited for"


def test_one_is_told_in_the_singular():
    stage = _recipe({"iterations": 1, "minutes": 1}).stages[0]
    assert stage.ends == ["after 1 iteration", "after 1 minute"]
    assert RecipeProgress(_recipe({"iterations": 1})).end(1) == "1 iteration is done"
    assert RecipeProgress(_recipe({"minutes": 1})).end(0, 60) == "1 minute has passed"
    assert str(Plateau(metric="ssim_a", patience=1)).endswith("in 1 value")
    assert str(Plateau(patience=1, window=9)).endswith("in 1 mean of 9 iterations")
    assert str(Plateau(patience=2, window=1)).endswith("in 2 means of 1 iteration")
    assert str(Plateau(patience=2, window=9)).endswith("in 2 means of 9 iterations")


def _saved(iterations, progress=None):
    """A saved state, with the progress of a recipe among its parts."""
    parts = {} if progress is None else {PART: json.loads(json.dumps(progress))}
    return TrainingState(trainer="original", iterations=iterations, parts=parts).to_dict()


def test_the_place_is_saved_and_found_again():
    recipe = _recipe(LEARN, FINISH)
    progress = find_progress(None, recipe)
    assert (progress.stage_state.stage, progress.is_entered) == (0, True)
    saved = _saved(4, progress.to_dict(seconds=30))
    again = find_progress(saved, None)
    assert again.recipe == recipe
    assert again.stage_state.seconds == 30
    assert not again.is_entered

    later = find_progress(saved | {"iterations": 10}, None)
    assert (later.stage.name, later.stage_state.begun, later.is_entered) == ("finish", 10, True)
    assert later.rate_factor == 0.5
    assert find_progress(saved, NONE) is None
    assert find_progress(_saved(4), None) is None


def test_an_edited_recipe_goes_on_in_its_stage_and_another_begins():
    progress = RecipeProgress(_recipe(LEARN, FINISH), StageState(stage=1, begun=10))
    saved = _saved(12, progress.to_dict())
    edited = _recipe(LEARN, {"name": "more", "iterations": 5}, FINISH | {"rate_factor": 0.1})
    found = find_progress(saved, edited)
    assert (found.stage.name, found.stage_state.begun, found.rate_factor) == ("finish", 10, 0.1)
    other = find_progress(saved, _recipe(LEARN, name="other"))
    assert (other.stage.name, other.stage_state.begun) == ("learn", 12)


def _place(**values):
    return lambda part: part["place"].update(values)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda part: part.pop("place"), "it lacks parts.recipe.place"),
        (lambda part: part.update(place=[]), "parts.recipe.place must be an object"),
        (lambda part: part["place"].pop("stale"), "it lacks parts.recipe.place.stale"),
        (_place(x=1), "it has the unknown key parts.recipe.place.x"),
        (_place(stage=2), "parts.recipe.place.stage must be a whole number from 0 to "),
        (_place(stage=-1), "place.stage must be a whole number"),
        (_place(begun="x"), "place.begun must be a whole number"),
        (_place(begun=5), "place.begun must be a whole number from 0 to 4, got 5"),
        (_place(seconds=float("inf")), "place.seconds must be a number from 0 to 1e+11, got inf"),
        (_place(seconds=10**400), "place.seconds must be a number from 0 to 1e+11, got 1000"),
        (_place(best=[]), "place.best must be a finite number, got []"),
        (_place(stale=True), "place.stale must be a whole number, at least 0, got True"),
        (_place(loss_sum=None), "place.loss_sum must be a finite number, got None"),
        (_place(loss_count=-1), "place.loss_count must be a whole number"),
        (_place(loss_count=2**63), "place.loss_count must be a whole number"),
        (_place(measured=0.5), "place.measured must be a whole number"),
        (lambda part: part["recipe"].update(stage=[]), "stage must be a list of tables"),
        (lambda part: part["recipe"].update(stage=[{}] * 101), "at most 100 stages, got 101"),
        (lambda part: part.update(recipe=1), "parts.recipe.recipe must be an object, got 1"),
    ],
    ids=range(19),
)
def test_a_spoilt_place_is_refused_with_a_way_out(spoil, text):
    part = RecipeProgress(_recipe(LEARN, FINISH)).to_dict()
    spoil(part)
    saved = TrainingState(trainer="original", iterations=4, parts={PART: part}).to_dict()
    with pytest.raises(ValueError, match="go on without the recipe: --recipe none") as caught:
        find_progress(saved, None)
    assert text in str(caught.value)
    assert find_progress(saved, NONE) is None


def test_a_window_that_an_edited_recipe_has_made_shorter_is_closed_at_once():
    plateau = {"window": 10, "patience": 2}
    progress = RecipeProgress(
        _recipe({"plateau": plateau}), StageState(loss_sum=9 * 4.0, loss_count=9)
    )
    progress.recipe = _recipe({"plateau": plateau | {"window": 3}})
    progress.take_losses(_named(1.0, 1.0, 1.0, 1.0))
    assert (progress.stage_state.best, progress.stage_state.loss_count) == (1.0, 1)
    assert progress.stage_state.stale == 0, "the mean of nine comes first"
