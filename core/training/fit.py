"""Training from Python: no signals, no keys, nothing printed unless requested."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..config import Config, DistributeConfig, nested, read_toml, recipes, settings_in, to_dict
from ..config.advice import without_flags
from ..console.outcome import Outcome
from ..console.reporter import Reporter
from ..console.requests import Requests
from ..console.stop import StopRequest
from ..distribute.group import open_group
from ..distribute.ranks import from_environment
from .resolve import Overrides
from .unattended import train as train_unattended

Listener = Callable[[dict[str, Any]], None]

_ADVISING = {"message", "reason"}
"""Fields of an event that hold sentences for the user."""


def train(
    config: Config | Mapping[str, Mapping[str, Any]] | str | Path,
    *,
    recipe: str | Path | None = None,
    on_metrics: Listener | None = None,
    on_event: Listener | None = None,
    should_stop: Callable[[], bool] | None = None,
    echo: bool = False,
) -> Outcome:
    """Train a new model, or go on with the one in `save.model_dir`.

    Several may run in one process, one after another: meanwhile PyTorch's settings of precision,
    determinism and threads, and its seed, are the run's; afterwards they are as they were. In a
    process that torchrun or srun has started as one of several ranks they train together; the
    first one saves and reports, and any may ask for a stop. The first one's process serves
    MASTER_PORT until it ends, for the next training and for torch.distributed in the same program.
    After a failure with GPUs connected, which only the end of a process undoes, it trains with
    others no more: start it anew.

    Args:
        config: File of settings, or values by section, as such a file has them; of a `Config`
            those that are no defaults.
        recipe: The name or file of stages to train in; None: those that the model was saved with,
            if any.
        on_metrics: Called with the iteration, the losses and EG/s, as a `step` line of `--json` has
            them, at most a few times a second. What it raises ends the training, with the last
            save as it was.
        on_event: Called in the same way with every report, a `step` too.
        should_stop: Called between steps; the training ends after a save when it returns true.
            All three are called in the thread that trains.
        echo: Print what `mien train` prints.

    Returns:
        How the training ended.

    Raises:
        ValueError: A setting or a folder cannot be used; one line says which and what to do.
        SaveError: The first save fails.
        RankLost: Another rank has ended.
    """
    with _saying_settings(), ExitStack() as stack:
        # Not without a stream: the reporter takes the program's output where it has none.
        stream = None if echo else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        reporter = Reporter(stream, listener=_listener(on_metrics, on_event))
        # As a file's settings: the model keeps them for its next session.
        overrides = Overrides(lasting=_overrides_in(config))
        if overrides.sections["distribute"] != DistributeConfig():
            raise ValueError(
                "the settings of distribute are for `mien train`, which starts a process for each "
                "GPU; leave them out"
            )
        chosen = None if recipe is None else recipes.load(str(recipe))
        # Not entered: signals and keys are those of the program that calls.
        requests = Requests(StopRequest(should_stop))
        ranks = from_environment()
        group = open_group(ranks) if ranks is not None and ranks.size > 1 else None
        if group is not None:
            # However training ends: the program may go on, and unless GPUs failed train once more.
            stack.callback(group.close)
        return train_unattended(overrides, reporter, chosen, requests, group)


@contextmanager
def _saying_settings() -> Iterator[None]:
    """Have what is raised name settings, where a user of the command line is told flags."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        # In place: its kind and its traceback are what they were.
        error.args = tuple(
            without_flags(each) if isinstance(each, str) else each for each in error.args
        )
        raise


def _listener(
    on_metrics: Listener | None, on_event: Listener | None
) -> Callable[[str], None] | None:
    """What takes the lines of JSON and hands out what they hold; None where nobody listens."""
    if on_metrics is None and on_event is None:
        return None

    def hand_out(line: str) -> None:
        # From the line, so that a listener sees what `--json` writes, but for names of settings.
        event = json.loads(line)
        for field in _ADVISING & event.keys():
            event[field] = without_flags(event[field])
        if on_metrics is not None and event["event"] == "step":
            on_metrics(event)
        if on_event is not None:
            on_event(event)

    return hand_out


def _overrides_in(
    config: Config | Mapping[str, Mapping[str, Any]] | str | Path,
) -> dict[str, Any]:
    """The settings as plain tables, of a `Config` those that a user has set."""
    if isinstance(config, (str, Path)):
        return read_toml(Path(config).expanduser())
    if isinstance(config, Mapping):
        return dict(config)
    # A `Config` has every value; a resumed model would take each for the user's wish.
    values = settings_in(to_dict(config))
    return nested({spec.place: value for spec, value in values if spec.of(config) != spec.default})
