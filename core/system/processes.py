"""Processes of this machine: where a number means one, and when it was started."""

import os
import socket
from pathlib import Path


def process_space() -> str:
    """What tells where process numbers mean the same: the boot, and the space of the numbers.

    A host's name does not: containers and cloned machines may share it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def stat_of(pid: int) -> list[str] | None:
    """Values of a process of this machine, from its state on; None where it is gone."""
    try:
        # The name, in brackets, may itself hold spaces and brackets: the last one ends it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def start_of(pid: int) -> int | None:
    """Start of a process of this machine, in ticks since the boot; None where it is gone."""
    stat = stat_of(pid)
    # A zombie holds nothing any more.
    return None if stat is None or stat[0] in "ZX" else int(stat[19])


def is_running(pid: int, start: int = 0) -> bool:
    """Whether a process of this machine is there; where its start is given, and not 0, whether it
    is no later one of the same number."""
    stat = stat_of(pid)
    if stat is not None:
        # A zombie holds nothing any more.
        return stat[0] not in "ZX" and start in (0, int(stat[19]))
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's, which /proc may be mounted to hide
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
