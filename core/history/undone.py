"""Marks in the logs of a model where going back to an earlier save has undone what follows.

Nothing is taken out of the logs. The folder of the last session that counts gets one more file of
events, which begins anew after the last iteration that counts: TensorBoard, `mien analyze` and the
page of `mien monitor` leave out what was logged of the session after it. The file's name ends in
`restored_<that iteration>`. Going forward again, to a save that was archived, takes away the marks
that would hide iterations of it.
"""

import json
import re
import time
from itertools import accumulate
from pathlib import Path

from ..checkpoint.state import TrainingState
from ..console.event_files import ReportFile
from ..console.report import Report
from ..console.reporter import EVENTS
from ..console.tensorboard import LogError, TensorBoardLog

MARK = re.compile(r"events\.out\.tfevents\..*\.restored_(\d{1,12})", re.ASCII)


def mark_undone(model_dir: Path, state: TrainingState) -> None:
    """Have the logs of a model hold no more than a restored state knows.

    Args:
        model_dir: The model folder.
        state: The one that is in use now.

    Raises:
        OSError: The disk refuses; the same call again finishes it.
    """
    logs = model_dir / "logs"
    lasts = accumulate(session.iterations for session in state.sessions)
    for session, last in zip(state.sessions, lasts, strict=True):
        _remove_marks(logs / f"session_{session.number}" / "train", last)
    # Nothing is trained yet: there are no logs that could say too much.
    if not state.sessions:
        return
    number = state.session.number
    # No folder is made for a mark: the run may have been told to keep no logs.
    if (logs / f"session_{number}" / "train").is_dir():
        _mark_events(model_dir, number, state.iterations)
    if (logs / f"session_{number}" / EVENTS).is_file():
        _report(logs / f"session_{number}" / EVENTS, state.iterations)


def _remove_marks(train: Path, last: int) -> None:
    """Remove the marks that hide iterations of a session whose last one is in use."""
    for path in train.iterdir() if train.is_dir() else ():
        match = MARK.fullmatch(path.name)
        # A mark at `last` hides nothing of what is in use, and stays.
        if match and int(match[1]) < last:
            path.unlink()


def _mark_events(model_dir: Path, session: int, last: int) -> None:
    try:
        TensorBoardLog(model_dir, session, last + 1, ending=f".restored_{last}").close()
    except LogError as error:
        raise OSError(str(error.__cause__)) from error


def _report(events: Path, last: int) -> None:
    """Add what happened to the events of a session."""
    now = time.time()
    line = json.dumps({"event": "restore", "time": now, "iteration": last})
    file = ReportFile(events, level="debug", as_json=True, remedy="mend that")
    problem = file.add(Report("restore", now, "info", f"Went back to iteration {last}", line))
    file.close()
    if problem:
        raise OSError(problem)
