"""A pause of a run: everything is saved and closed, and nothing is computed until it is over."""

import os
from functools import partial
from pathlib import Path

from ..checkpoint import lock
from ..checkpoint.left_request import take_left_requests
from ..console.reporter import Reporter
from ..console.requests import Requests
from ..preview.window import SECONDS_BETWEEN_LOOKS, PreviewWindow


def pause(
    model_dir: Path,
    iteration: int,
    reporter: Reporter,
    requests: Requests,
    window: PreviewWindow,
) -> None:
    """Wait for the end of a pause, or for a request to stop.

    Args:
        model_dir: The model folder, which stays this process's.
        iteration: Total iteration that is saved.
        reporter: Reports the pause and its end.
        requests: Requests of the user, one of which ends it.
        window: Window of the run; where it is open it stays alive, and its keys count.

    Raises:
        ValueError: Another run has taken the folder.
    """
    # Anew, since the session has let go of the folder when it was closed.
    held = lock.acquire(model_dir)
    try:
        requests.stop.is_idle = True
        held.mark_paused()
        reporter.pause(iteration=iteration, resumed_by=_resumed_by(requests, window))
        left = partial(take_left_requests, model_dir)
        if window.is_open:
            # A window has no handle to wait at; unasked for long, it is taken for one that hangs.
            requests.wait(left, window.keys, every_s=SECONDS_BETWEEN_LOOKS)
        else:
            requests.wait(left)
    finally:
        requests.stop.is_idle = False
        # Before the next session opens the folder, and locks it by itself.
        held.release()
    if not requests.stop.signal_name:
        reporter.pause(iteration=iteration, resumed_by=None)


def _resumed_by(requests: Requests, window: PreviewWindow) -> str:
    """What ends the pause, in words: only what there is."""
    if requests.is_suspended:
        return "fg or SIGCONT"
    if requests.has_keyboard:
        return "p here or in the window, or SIGCONT" if window.is_open else "p or SIGCONT"
    by_signal = f"`kill -CONT {os.getpid()}`"
    return f"p in the window or {by_signal}" if window.is_open else by_signal
