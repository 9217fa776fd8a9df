"""mien train on one of several ranks: what each of them shows, and how it leaves."""

import os
import sys
from typing import NoReturn, TextIO, cast

from ..core.checkpoint.model_folder import SaveError
from ..core.config.recipes import Recipe
from ..core.console.reporter import Reporter
from ..core.console.requests import Requests
from ..core.console.stop import StopRequest
from ..core.distribute.failure import RankLost
from ..core.distribute.group import Group, open_group
from ..core.distribute.ranks import Ranks
from ..core.distribute.stop_relay import StopRelay
from ..core.training.losing import exit_code_of
from ..core.training.resolve import Overrides
from ..core.training.unattended import train
from .acknowledge import acknowledge
from .lines import complain


class RankOutput:
    """The standard error of a rank that shows no reports: warnings of its own, under its name."""

    def __init__(self, rank: int):
        self.rank = rank

    def write(self, text: str) -> int:
        """Write lines, each after the name of the rank."""
        return sys.stderr.write(
            "".join(f"rank {self.rank}: {line}" for line in text.splitlines(True))
        )

    def flush(self) -> None:
        """Flush what was written."""
        sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal, whose cursor may be moved: it is not."""
        return False


def train_as_rank(
    overrides: Overrides, recipe: Recipe | None, ranks: Ranks, *, as_json: bool
) -> int:
    """Train together with the other ranks; the exit code is that of the run.

    Where one of them fails, it is said once: by the first rank, or if that was killed, by the first
    that is left on each machine.

    Args:
        overrides: What the user set.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        ranks: Place of this process.
        as_json: Whether reports are lines of JSON.

    Raises:
        ValueError: The ranks cannot meet, or what the user set is of no use; for the first rank.
    """
    group = open_group(ranks, when_slow=lambda text: complain("train", text))
    try:
        # A signal may come twice, from a terminal and from the launcher, which can insist.
        stop = StopRequest(can_insist=False)
        with Requests(stop, has_keys=ranks.is_first) as requests, StopRelay(group.store):
            if ranks.is_first:
                stop.when_noted.append(lambda: acknowledge(stop))
            reporter = _reporter(overrides, ranks, as_json=as_json)
            outcome = train(overrides, reporter, recipe, requests, group)
    except RankLost as lost:
        if _speaks(group, lost):
            go_on = (
                "" if lost.failure.has_reason else "; the last save is whole, start again to go on"
            )
            complain("train", f"{lost}{go_on}")
        _end(lost.failure.exit_code)
    except (ValueError, SaveError, KeyboardInterrupt) as error:
        # The first rank tells what another one leaves as its reason.
        if ranks.is_first:
            complain("train", error)
        _end(exit_code_of(error))
    if group.is_broken:
        _end(outcome)
    group.close()
    return outcome


def _reporter(overrides: Overrides, ranks: Ranks, *, as_json: bool) -> Reporter:
    """The reports of the run, for the first rank; the warnings of any other."""
    if ranks.is_first:
        return Reporter(as_json=as_json, level=overrides.sections["log"].level)
    return Reporter(cast(TextIO, RankOutput(ranks.rank)), level="warning")


def _speaks(group: Group, lost: RankLost) -> bool:
    """Whether it is on this rank to say what has happened."""
    if group.ranks.is_first:
        return True
    return not lost.failure.has_reason and lost.failure.rank == 0 and group.members.is_speaker


def _end(exit_code: int) -> NoReturn:
    """End this process now: connections with ranks that are gone, and a GPU that waits for them,
    would keep it from ending by itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
