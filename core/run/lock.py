"""The lock of a model folder: one run at a time."""

import fcntl
import os
import socket
import time
from pathlib import Path

LOCK = ".lock"

_TRIES, _PAUSE_SECONDS = 5, 0.02


def acquire(path: Path) -> int:
    """A handle of the folder's lock file, locked and holding this process's number and host."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(path / LOCK, flags, 0o644)
    except OSError as error:
        raise ValueError(
            f"cannot write to model folder {path}: {error.strerror}; make it writable, or choose "
            "another --model-dir"
        ) from error
    try:
        _lock(handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = _told_by(handle)
        os.close(handle)
        raise ValueError(
            f"model folder {path} is in use by {holder}; stop that "
            "run, or choose another --model-dir"
        ) from error
    except OSError as error:
        os.close(handle)
        raise ValueError(
            f"cannot lock model folder {path}: {error.strerror}; choose a --model-dir on a local "
            "disk with free space"
        ) from error
    return handle


def holder_of(path: Path) -> str | None:
    """Who holds the lock of a folder now, in words; None where nobody does."""
    try:
        handle = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _told_by(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    """Take the lock; whoever only asks for its holder has it for a moment and is waited for."""
    for _ in range(_TRIES - 1):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _told_by(handle: int) -> str:
    """The process, and the host where it is another, that a lock file names."""
    pid, _, host = os.pread(handle, 300, 0).decode(errors="replace").strip().partition(" ")
    elsewhere = f" on {host}" if host and host != socket.gethostname() else ""
    words = f"process {pid or 'unknown'}{elsewhere}"
    return words if words.isprintable() else "an unknown process"
