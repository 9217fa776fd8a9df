"""Ends of a run on several ranks that one of them brings about: in one line, with mien's codes."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..checkpoint.model_folder import SaveError
from ..console.outcome import Outcome
from ..distribute.failure import RankLost
from ..distribute.group import Group
from .end import End
from .training_setup import TrainingSetup

_OWN_FAILURE = 1
"""Exit code of a failure of mien itself."""

_PATIENCE_S = 10.0
"""Seconds in which a rank that others have left must end. Chosen, unmeasured on a GPU."""


@contextmanager
def leaving_reasons(group: Group) -> Iterator[None]:
    """Leave the reason for which this rank ends inside, where the others find it."""
    try:
        yield
    except RankLost as lost:
        # Who loses this rank next is to hear of the one that was lost first.
        group.pass_on(lost)
        raise
    except BaseException as error:
        # Whatever has ended this rank, Ctrl-C too: the others are waiting for it.
        # One line: it becomes the last line of the other ranks.
        text = str(error).strip().partition("\n")[0]
        code = exit_code_of(error)
        if code == _OWN_FAILURE:
            text = f"{type(error).__name__}: {text}; its traceback is above"
        group.leave_failure(text or "interrupted before there was anything to save", code)
        raise


def exit_code_of(error: BaseException) -> int:
    """Exit code of a rank that ends by an error."""
    if isinstance(error, ValueError):
        return Outcome.MISTAKE
    if isinstance(error, SaveError):
        return Outcome.HALTED
    return Outcome.STOPPED if isinstance(error, KeyboardInterrupt) else _OWN_FAILURE


def end_of_lost(lost: RankLost, setup: TrainingSetup) -> End:
    """The end of a session of which another rank is lost; what was queued for the disk is saved."""
    if setup.council is not None:
        setup.council.group.pass_on(lost)
    # Before the wait: the copies of a save may stand behind a step that never ends.
    if setup.device.type == "cuda":
        end_in_time(lost.failure.exit_code)
    saved = "nothing was saved"
    try:
        setup.saver.wait()
    except SaveError as error:
        saved = str(error)
    if setup.folder.last_complete is not None:
        saved = f"iteration {setup.folder.last_complete} is saved; start again to go on"
    # A failure of mien itself is that of another rank, which has shown its traceback.
    code = lost.failure.exit_code
    return End(Outcome(code) if code in list(Outcome) else Outcome.HALTED, f"{lost}; {saved}")


def end_in_time(exit_code: int) -> None:
    """End this process after 10 s at the latest: a GPU may wait for a lost rank for ever, and
    with it every call of CUDA that follows."""
    # `sys.exit` would end the timer's own thread and nothing else.
    timer = threading.Timer(_PATIENCE_S, os._exit, [exit_code])
    # A daemon, so that a process that can end by itself does so at once.
    timer.daemon = True
    timer.start()
