"""The lock of a model folder: one run at a time.

`.lock` is locked by flock, which ends with the process, and holds "<pid> <host> <machine> <start>",
in a pause with " paused" behind it, for people and for `lock_owner`. A disk that refuses flock, as
some network disks do, has an owner file instead: see `owner`. One that takes a lock and may keep it
from other machines, as other network disks do, has both; so has any where another machine has left
an owner file.
"""

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from ..system.durable_files import open_plain
from ..system.mounts import shares_flock
from .owner import (
    MAX_OWNER_BYTES,
    OWNER,
    STALE_SECONDS,
    InUseError,
    Owner,
    OwnerFile,
    read_owner,
)

LOCK = ".lock"

NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
"""How a disk says that it has no flock."""

_PAUSED = " paused"

# Whoever looks for the owner holds the lock for a moment: 80 ms outlast that. Chosen, unmeasured.
_TRIES, _PAUSE_SECONDS = 5, 0.02


class Lock:
    """A model folder that is this process's until `release`; made by `acquire`."""

    def __init__(self, folder: Path, handle: int, owner: OwnerFile | None, notice: str) -> None:
        self._folder, self._handle, self._owner = folder, handle, owner
        self.notice = notice
        """What the user should know of how the folder is held; empty where nothing is unusual."""

    def confirm(self) -> None:
        """Make sure that the folder is still this process's.

        Raises:
            InUseError: Another run has taken it, since its lock file was removed or, on a disk
                without flock, not renewed for minutes.
            OSError: The disk refuses.
        """
        if self._owner is not None:
            self._owner.confirm()
        elif not _is_in_place(self._handle, self._folder):
            # The file was removed by hand: whoever locks the new one first has the folder.
            handle = _open(self._folder)
            try:
                _lock(handle)
                _sign(handle)
            except OSError as error:
                owner, _ = signed_in(handle)
                os.close(handle)
                if not isinstance(error, BlockingIOError):
                    raise
                raise InUseError(owner) from error
            os.close(self._handle)
            self._handle = handle

    def mark_paused(self) -> None:
        """Have whoever wants the folder be told that its run is paused, until `release`."""
        with suppress(OSError):  # a full disk: they are told that the folder is in use
            _sign(self._handle, is_paused=True)

    def remove_folder(self) -> None:
        """Remove the folder where it holds nothing but its lock."""
        names = {LOCK, OWNER} if self._owner is not None else {LOCK}
        if set(os.listdir(self._folder)) <= names and _is_in_place(self._handle, self._folder):
            # While it is locked: whoever has opened it already sees that it is not in its place any
            # more.
            (self._folder / LOCK).unlink()
            if self._owner is not None:
                self._owner.release()
            self._folder.rmdir()

    def release(self) -> None:
        """Let another run have the folder."""
        if self._owner is not None:
            self._owner.release()
        with suppress(OSError):  # a disk without flock
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # for children that hold a copy of the handle
        os.close(self._handle)


def acquire(path: Path) -> Lock:
    """The lock of a folder, which is made where there is none.

    Raises:
        ValueError: Another run has it, or the disk refuses; one line says which.
    """
    for _ in range(_TRIES):
        # Tried again where the file went under it: a run that was refused removes its folder.
        lock = _try(path)
        if lock is not None:
            return lock
    raise ValueError(
        f"model folder {path} is being made or removed by other runs; try again, or choose another "
        "model folder"
    )


def owner_in_words(path: Path) -> str | None:
    """Process that owns the lock of a folder now, in words; None where none does."""
    owner = _marked_by(path)
    if owner is not None:
        return str(owner)
    try:
        handle = open_plain(path / LOCK, os.O_RDONLY)
    except PermissionError:
        # Not as if nobody had it: that cannot be seen here.
        raise
    except OSError:  # there is none, or none that a run could hold
        return None
    try:
        return str(InUseError(signed_in(handle)[0])) if is_locked(handle) else None
    finally:
        os.close(handle)


def is_locked(handle: int) -> bool:
    """Whether a lock file is locked by flock, as far as this machine can see."""
    try:
        # Shared, so that several who look at the same time do not see one another.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a disk without flock, which refuses everybody
        return False
    fcntl.flock(handle, fcntl.LOCK_UN)
    return False


def signed_in(handle: int) -> tuple[Owner | None, bool]:
    """Process that has signed a lock file, None where none has, and whether its run is paused."""
    line = os.pread(handle, MAX_OWNER_BYTES, 0).decode(errors="replace")
    words = line.removesuffix("\n")
    # Half a line is none: it would name another process.
    owner = Owner.from_words(words.removesuffix(_PAUSED)) if line.endswith("\n") else None
    return owner, words.endswith(_PAUSED)


def _try(path: Path) -> Lock | None:
    """The lock; None where its file went as it was taken: whoever had it removed the folder."""
    try:
        with suppress(FileExistsError):  # in `mkdir`, too, where the folder goes meanwhile
            path.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return _taken(path, _open(path))
    except OSError as error:
        raise ValueError(
            f"cannot write to model folder {path}: {error.strerror}; make it writable, or choose "
            "another model folder"
        ) from error
    return None


def _taken(path: Path, handle: int) -> Lock | None:
    """The lock by a handle of its file, which is closed where it is none."""
    owner, is_held = None, False
    try:
        owner, notice = _lock_or_own(handle, path)
        is_held = _is_in_place(handle, path)
        if is_held:
            _sign(handle)
            return Lock(path, handle, owner, notice)
        return None
    except FileNotFoundError:  # the folder itself went
        return None
    except (BlockingIOError, InUseError) as error:
        raise ValueError(
            f"model folder {path} is in use by {_other_run(handle, error)}, or choose another "
            "model folder"
        ) from error
    except OSError as error:
        # It could not be signed, as on a full disk: nobody could tell whose it is.
        is_held = False
        raise ValueError(
            f"cannot lock model folder {path}: {error.strerror}; choose one on a local disk "
            "with free space"
        ) from error
    finally:
        if not is_held:
            if owner is not None:
                owner.release()
            os.close(handle)


def _open(folder: Path) -> int:
    return open_plain(folder / LOCK, os.O_RDWR | os.O_CREAT)


def _lock_or_own(handle: int, folder: Path) -> tuple[OwnerFile | None, str]:
    """Take the folder by flock, by an owner file, or by both: the owner file that comes back, and
    the user's notice."""
    try:
        _lock(handle)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return OwnerFile(folder), _notice(folder, "has no flock", "instead")
    if not shares_flock(folder):
        return OwnerFile(folder), _notice(folder, "may hide a lock from other machines", "as well")
    # One who has come to this disk by a way that has no flock, or that keeps it to itself. Where
    # it is silent for long, its owner file is taken over, so that it notices if it wakes again.
    return (None if _marked_by(folder) is None else OwnerFile(folder)), ""


def _notice(folder: Path, flaw: str, how: str) -> str:
    return (
        f"the disk of {folder} {flaw}: {OWNER} in the folder marks this run {how}; one of another "
        "host that is not renewed for 5 minutes counts as left behind"
    )


def _marked_by(folder: Path) -> Owner | None:
    """Process that the owner file of a folder names, unless that is seen to have ended."""
    owner = read_owner(folder)
    return owner if owner is not None and (owner.is_running or not owner.is_here) else None


def _lock(handle: int) -> None:
    """Take the lock; whoever only looks for its owner has it for a moment and is waited for."""
    for _ in range(_TRIES - 1):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_in_place(handle: int, folder: Path) -> bool:
    """Whether a handle is of the folder's lock file, and not of one that was removed."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(folder / LOCK))
    except FileNotFoundError:
        return False


def _sign(handle: int, *, is_paused: bool = False) -> None:
    """Write down who holds the lock, and whether its run is paused."""
    paused = _PAUSED if is_paused else ""
    # Not under a new name: the lock is on this very file.
    # So it is empty for a moment, which whoever reads it takes for a run that is just starting.
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{Owner.of_this_process().words}{paused}\n".encode(), 0)


def _other_run(handle: int, error: BlockingIOError | InUseError) -> str:
    """The run that has the folder, and what to do about it: of one that is paused, how it goes
    on."""
    signer, is_paused = signed_in(handle)
    in_use = error if isinstance(error, InUseError) else InUseError(signer)
    owner = in_use.owner
    if owner is not None and is_paused and owner == signer:
        where = "" if owner.is_here else f" on {owner.place}"
        remedy = f"have it go on by p there or `kill -CONT {owner.pid}`{where}"
        return f"{in_use}, which is paused; {remedy}"
    remedy = "stop that run"
    # Its owner file is all that is seen of it, and would outlive it.
    if in_use is error and owner is not None and not owner.is_here:
        remedy += f", wait {STALE_SECONDS / 60:.0f} minutes where it has ended already"
    return f"{in_use}; {remedy}"
