"""Requests that another process, such as `mien monitor`, leaves for the one that trains.

Each is a small file of the model folder, `.request-<pid>-<number>`, written before the signal that
has it read. It holds ``pause``, ``resume``, or a change of a setting as ``section.key=value``. A
process reads those of its own number alone, and no start reads any: what lies in a folder that came
from elsewhere changes nothing.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from ..system.durable_files import DamagedError, read_regular, write_file
from .lock_owner import STEER, LockOwner, RequestError, lock_owner, send_request

MAX_REQUEST_BYTES = 1000
_PREFIX = ".request-"
# Bounds a look at the folder; what is left over comes with the next one. Chosen.
_MOST_AT_ONCE = 100


def leave_request(model_dir: Path, pid: int, text: str) -> Path:
    """Leave a request for a process; the file that holds it.

    Raises:
        ValueError: It is longer than a request can be.
        OSError: The disk refuses.
    """
    content = text.encode()
    if len(content) > MAX_REQUEST_BYTES:
        raise ValueError(
            f"a request has {MAX_REQUEST_BYTES} bytes at most, got {len(content)}; shorten it"
        )
    # Of so many digits that names sort as times do: requests are carried out in their order.
    path = model_dir / f"{_PREFIX}{pid}-{time.time_ns():020d}"
    write_file(path, content)
    return path


def send_left_request(model_dir: Path, text: str) -> LockOwner:
    """Leave a request for the process that trains a model, and have it look.

    Raises:
        ValueError: It is longer than a request can be.
        RequestError: As `send_request`, or the disk refuses; nothing is left then.
    """
    owner = lock_owner(model_dir)
    if owner is None or not owner.is_running:
        return send_request(model_dir, STEER)  # which says why there is none to ask
    try:
        path = leave_request(model_dir, owner.pid, text)
    except OSError as error:
        raise RequestError(f"{model_dir} takes no request: {error.strerror}") from error
    try:
        return send_request(model_dir, STEER)
    except RequestError:
        # Else the next signal would have it carried out, long after its sender was told that it
        # failed.
        path.unlink(missing_ok=True)
        raise


def take_left_requests(model_dir: Path) -> list[str]:
    """The requests left for this process, oldest first; all that were left are removed."""
    texts = []
    for path in sorted(model_dir.glob(f"{_PREFIX}*"))[:_MOST_AT_ONCE]:
        with suppress(OSError, DamagedError):  # taken away at this moment, or no plain file
            # Bounded, and no pipe is waited for: what lies in the folder may be anybody's.
            content = read_regular(path, MAX_REQUEST_BYTES)
            if path.name.startswith(f"{_PREFIX}{os.getpid()}-"):
                texts.append(content.decode(errors="replace"))
        # Those for other numbers, too: their processes have ended, for only this one may train
        # here.
        with suppress(OSError):
            path.unlink()
    return texts
