"""Training from Python: no signals, no keys, nothing printed unless requested."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..config import Config, recipes, to_dict
from ..console.outcome import Outcome
from ..console.reporter import Reporter
from ..console.requests import Requests
from ..console.stop import StopRequest
from .resolve import Overrides
from .unattended import train as train_unattended


def train(
    settings: Config | Mapping[str, Mapping[str, Any]],
    *,
    recipe: str | Path | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    stop: StopRequest | None = None,
    echo: bool = False,
) -> Outcome:
    """Train a new model, or go on with the one in `save.model_dir`.

    Several may run in one process, one after another: PyTorch's settings of precision and
    determinism are the process's.

    Args:
        settings: Values by section, as in a file of settings; of a `Config` those that are no
            defaults.
        recipe: The name or file of stages to train in; None: those that the model was saved with,
            if any.
        on_event: Called with each report, which has the form of a line of `--json`, in the thread
            that trains. What it raises ends the training, with the last save as it was.
        stop: Ends the training, after a save, when `StopRequest.request` is called.
        echo: Print what `mien train` prints.

    Returns:
        How the training ended.

    Raises:
        ValueError: A setting or a folder cannot be used; one line says which and what to do.
        SaveError: The first save fails.
    """
    with ExitStack() as stack:
        stream = None if echo else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        reporter = Reporter(stream, listener=_parsed(on_event))
        overrides = Overrides(lasting=_overrides_in(settings))
        chosen = None if recipe is None else recipes.load(str(recipe))
        return train_unattended(overrides, reporter, chosen, Requests(stop))


def _parsed(on_event: Callable[[dict[str, Any]], None] | None) -> Callable[[str], None] | None:
    """The listener for lines of JSON that hands out what they hold."""
    return None if on_event is None else lambda line: on_event(json.loads(line))


def _overrides_in(settings: Config | Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings as plain tables, of a `Config` those that a user has set."""
    if not isinstance(settings, Config):
        return {section: dict(table) for section, table in settings.items()}
    usual = to_dict(Config())
    return {
        section: {name: value for name, value in table.items() if value != usual[section][name]}
        for section, table in to_dict(settings).items()
    }
