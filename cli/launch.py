"""`mien train --gpus`: a rank on each GPU."""

import sys
from pathlib import Path

from ..core.checkpoint.generations import Generations
from ..core.config import DistributeConfig
from ..core.config.recipes import Recipe
from ..core.console.reporter import Reporter
from ..core.distribute.launcher import Place, launch
from ..core.distribute.places import places_on_cpu, places_on_gpus
from ..core.distribute.ranks import Ranks
from ..core.training.devices import count_gpus
from ..core.training.prepare import settings_of
from ..core.training.resolve import Overrides
from .lines import complain

_ALONE = ("--gpus=", "--exclude-gpus=", "--restarts=0")
"""Flags by which a rank starts no others."""


def launch_ranks(
    words: list[str], overrides: Overrides, recipe: Recipe | None, *, as_json: bool
) -> int:
    """Train on several GPUs, or in several processes of the CPU; the exit code.

    Args:
        words: Command line of mien, which the ranks get too.
        overrides: What the user set.
        recipe: Stages to train in.
        as_json: Report the loss of a rank as an event too.

    Raises:
        ValueError: A setting or a folder cannot be used, or a GPU that is set is not there.
    """
    distribute: DistributeConfig = overrides.sections["distribute"]
    if not (distribute.gpus or distribute.exclude_gpus):
        raise ValueError(
            "distribute.restarts goes on with the GPUs that are left of several; give --gpus too"
        )
    # What is wrong with the settings is told here, once.
    train = settings_of(overrides, recipe).config.train
    places = _places(train.device, distribute)
    if train.batch_size:
        Ranks(size=len(places)).share(train.batch_size)  # refused before any process is started
    model_dir = overrides.model_dir
    until = train.last_iteration(_saved_iterations(model_dir))

    def command(restart: int) -> list[str]:
        # All restarts together have the iterations of this start.
        more = [f"--until={until}"] if restart else []
        # -P: no file of the working folder is to stand in for a module.
        return [sys.executable, "-P", "-m", "mien.cli", *words, *_ALONE, *more]

    def saved() -> str:
        iterations = _saved_iterations(model_dir)
        return f"iteration {iterations:,} is saved" if iterations else "nothing is saved yet"

    def report(line: str) -> None:
        complain("train", line)
        if as_json:
            Reporter(as_json=True).warning(line)

    return launch(command, places, restarts=distribute.restarts, saved=saved, report=report)


def _places(device: str, config: DistributeConfig) -> list[Place]:
    """Places of the ranks: GPUs, or processes of the CPU."""
    if device == "cpu":
        return places_on_cpu(config)
    if device.startswith("cuda:"):
        raise ValueError(
            f"train.device is {device}, one GPU, and distribute.gpus is {config.gpus}; leave one "
            "of them out"
        )
    return places_on_gpus(config, count_gpus())


def _saved_iterations(model_dir: Path | None) -> int:
    """Total iterations of the newest save; 0: there is none."""
    manifests = Generations(model_dir).manifests() if model_dir else []
    return manifests[0].iterations if manifests else 0
