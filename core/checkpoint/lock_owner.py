"""The owner of a model folder's lock, seen from outside: the process that trains, and its requests.

It holds `.lock` of the model folder (flock) and has signed it; on a disk whose flock does not do
it has an owner file there. A request is a signal. One that a process does not listen for would end
it without a save, and a number that has been given to another process would hit that one: so the
lock, the machine and the caught signals are looked at first, with the process held by a handle that
no other can take over.
"""

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from ..system.durable_files import open_plain
from ..system.mounts import shares_flock
from .lock import LOCK, is_locked, signed_in
from .owner import read_owner

REQUESTS = {
    "save": signal.SIGUSR1,
    "preview": signal.SIGUSR2,
    "stop": signal.SIGTERM,
}
STEER = "steer"
"""Request to look at what `left_request` has for the process."""

_SIGNALS = REQUESTS | {STEER: signal.SIGRTMIN}


class RequestError(RuntimeError):
    """A request that no process can take; the message says why and what to do."""


@dataclass(frozen=True)
class LockOwner:
    """Process that has last locked a model folder."""

    pid: int
    host: str
    is_here: bool
    """Whether it can be seen from here; False where another machine, or another container of this
    one, may hold the lock."""

    is_running: bool
    """Whether it holds the lock now; False for a process that cannot be seen."""


def lock_owner(model_dir: Path) -> LockOwner | None:
    """Process that has last locked the folder; None where none has, or a run is just starting."""
    # Before the lock file, which is there on such a disk too, and which another machine may be
    # unable to lock.
    owner = read_owner(model_dir)
    if owner is not None and (owner.is_running or not owner.is_here):
        return LockOwner(owner.pid, owner.host, owner.is_here, owner.is_running)
    try:
        handle = open_plain(model_dir / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        owner, _ = signed_in(handle)
        if owner is None:
            return None
        # A free lock is tried only if the process may be there: else the trial could refuse a new
        # run.
        if owner.is_here:
            is_running = owner.is_running and is_locked(handle)
            return LockOwner(owner.pid, owner.host, is_here=True, is_running=is_running)
        # Of before a restart of this machine, say: a lock that is free everywhere is nobody's.
        is_over = shares_flock(model_dir) and not is_locked(handle)
        return LockOwner(owner.pid, owner.host, is_here=is_over, is_running=False)
    finally:
        os.close(handle)


def send_request(model_dir: Path, request: str) -> LockOwner:
    """Request of the process that trains a model to save, to draw a preview, to save and stop, or
    to look at what was left for it (`left_request`).

    Args:
        model_dir: The model folder.
        request: One of `REQUESTS`, or `STEER`.

    Returns:
        The process that the request was sent to.

    Raises:
        RequestError: Where none holds the folder on this host, or it does not listen for this.
    """
    number = _SIGNALS[request]
    owner = lock_owner(model_dir)
    if owner is None or (owner.is_here and not owner.is_running):
        raise RequestError(f"no run to {request}: nothing trains {model_dir} now")
    if not owner.is_here:
        here = socket.gethostname()
        other = f"host {owner.host}, this is {here}"
        if owner.host == here:
            other = f"another machine, or in another container, that is called {here} too"
        raise RequestError(f"the run is on {other}; ask there")
    try:
        # From here on the handle means this process, even if another one gets its number.
        process = os.pidfd_open(owner.pid)
    except OSError as error:
        raise RequestError(f"process {owner.pid} cannot be asked: {error.strerror}") from error
    try:
        # Asked again, now that the handle is held: only this order leaves no gap.
        if lock_owner(model_dir) != owner:
            raise RequestError("the run has just ended or another one began; look again")
        if not _listens(owner.pid, number):
            raise RequestError(
                f"process {owner.pid} does not listen for a {request} now: it is starting, or "
                "stopping already; try again in a moment"
            )
        signal.pidfd_send_signal(process, number)
    except PermissionError as error:
        raise RequestError(
            f"process {owner.pid} belongs to another user; start mien monitor as that one"
        ) from error
    except (ProcessLookupError, FileNotFoundError) as error:
        raise RequestError(f"process {owner.pid} has just ended") from error
    finally:
        os.close(process)
    return owner


def _listens(pid: int, number: signal.Signals) -> bool:
    """True where the process catches the signal; unhandled, it would end it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, mask = line.partition(":")
        if name == "SigCgt":
            # Signals are numbered from 1, the bits of the mask from 0.
            return bool(int(mask, 16) >> (number - 1) & 1)
    return False
