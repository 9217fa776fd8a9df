"""Changes of settings that another process, such as `mien monitor`, wants of the one that trains.

Each is a small file of the model folder, `.change-<pid>-<number>`, which holds one
``section.key=value`` and is written before the signal that has it read. A process reads those of
its own number alone, and no start reads any: what lies in a folder that came from elsewhere changes
nothing.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from ..system.durable_files import DamagedError, read_regular, write_file

MAX_CHANGE_BYTES = 1000
_PREFIX = ".change-"
_MOST_AT_ONCE = 100


def write_change(model_dir: Path, pid: int, change: str) -> Path:
    """Leave a change for a process; the file that holds it.

    Raises:
        OSError: The disk refuses.
    """
    path = model_dir / f"{_PREFIX}{pid}-{time.time_ns():020d}"
    write_file(path, change.encode())
    return path


def take_changes(model_dir: Path) -> list[str]:
    """The changes that were left for this process, oldest first; all that were left are removed."""
    changes = []
    for path in sorted(model_dir.glob(f"{_PREFIX}*"))[:_MOST_AT_ONCE]:
        with suppress(OSError, DamagedError):  # taken away at this moment, or no plain file
            content = read_regular(path, MAX_CHANGE_BYTES)
            if path.name.startswith(f"{_PREFIX}{os.getpid()}-"):
                changes.append(content.decode(errors="replace"))
        with suppress(OSError):
            path.unlink()
    return changes
