"""The lock of a model folder: one run at a time."""

import fcntl
import os
import socket
from pathlib import Path

LOCK = ".lock"


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
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError as error:
        pid, _, host = os.pread(handle, 300, 0).decode(errors="replace").strip().partition(" ")
        os.close(handle)
        elsewhere = f" on {host}" if host and host != socket.gethostname() else ""
        raise ValueError(
            f"model folder {path} is in use by process {pid or 'unknown'}{elsewhere}; stop that "
            "run, or choose another --model-dir"
        ) from error
    except OSError as error:
        os.close(handle)
        raise ValueError(
            f"cannot lock model folder {path}: {error.strerror}; choose a --model-dir on a local "
            "disk with free space"
        ) from error
    return handle
