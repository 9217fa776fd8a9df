"""A pause of a run: everything is saved and closed, and nothing is computed until it is over."""

from functools import partial
from pathlib import Path

from ..checkpoint import lock
from ..checkpoint.left_request import take_left_requests
from ..console.reporter import Reporter
from ..console.requests import Requests


def pause(model_dir: Path, iteration: int, reporter: Reporter, requests: Requests) -> None:
    """Wait for the end of a pause, or for a request to stop.

    Args:
        model_dir: The model folder, which stays this process's.
        iteration: Total iteration that is saved.
        reporter: Reports the pause and its end.
        requests: Requests of the user, one of which ends it.

    Raises:
        ValueError: Another run has taken the folder.
    """
    held = lock.acquire(model_dir)
    try:
        reporter.pause(iteration=iteration, is_over=False)
        requests.wait(partial(take_left_requests, model_dir))
    finally:
        held.release()
    if not requests.stop.signal_name:
        reporter.pause(iteration=iteration, is_over=True)
