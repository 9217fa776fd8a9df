"""The lock of a folder that a film is written to: one swap at a time.

The folder itself is locked by flock, which ends with the process and leaves no file among the
user's frames.
"""

import errno
import fcntl
import os
from pathlib import Path

from ..checkpoint.lock import NO_FLOCK

_NO_FLOCK_OF_FOLDERS = NO_FLOCK | {errno.EBADF}
"""How a disk says that it has no flock, or none of folders: NFS locks only what can be written."""


class OutputLock:
    """A folder that is this process's until `release`.

    Args:
        folder: The folder, which is there.

    Raises:
        ValueError: Another swap is writing to it; one line says so.
        OSError: It cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.notice = ""
        """What the user should know of how the folder is held; empty where nothing is unusual."""

        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._lock(folder)
        except BaseException:
            self.release()
            raise

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it removes it when its video is whole: then this is of no folder.
            is_taken = not os.path.samestat(os.fstat(self._handle), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            is_taken = True
        except OSError as error:
            if error.errno not in _NO_FLOCK_OF_FOLDERS:
                raise
            self.notice = (
                f"the disk of {folder} has no flock: let no other `mien swap` write there "
                "meanwhile, for nothing would stop it"
            )
            return
        if is_taken:
            raise ValueError(
                f"{folder} is being written to by another `mien swap`: wait for it or stop it, or "
                "give another output"
            )

    def release(self) -> None:
        """Let another swap have the folder; once."""
        if self._handle >= 0:
            # Without the call that unlocks: no child has a copy of the handle that could keep the
            # lock.
            os.close(self._handle)
            self._handle = -1
