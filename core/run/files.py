"""Files of a model folder: written so that a power cut leaves the old or the new one, and read as
what a stranger may have made."""

import errno
import os
import shutil
import stat
from pathlib import Path

_DAMAGE = {errno.ENOENT, errno.ELOOP, errno.EIO, errno.EISDIR, errno.ENXIO}


class DamagedError(Exception):
    """Why a file or generation cannot be used."""


def copy_files(source: Path, target: Path) -> None:
    """Make a folder of the same plain files, durably: hard links where the disk has them."""
    target.mkdir()
    for entry in os.scandir(source):
        if not entry.is_file(follow_symlinks=False):
            continue
        try:
            os.link(entry.path, target / entry.name, follow_symlinks=False)
        except OSError:
            shutil.copyfile(entry.path, target / entry.name, follow_symlinks=False)
            sync_file(target / entry.name)
    sync_folder(target)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in the place of another in one step, durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_file(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder, so that the names in it survive a power cut."""
    sync_file(path, os.O_DIRECTORY)


def sync_file(path: Path, flags: int = 0) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_plain(path: str, flags: int) -> int:
    """A handle that follows no link and waits for no pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a plain file; a link, a device or an oversized file is damage."""
    try:
        with open(path, "rb", opener=_open_plain) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{path.name} is not a plain file")
            if found.st_size > max_bytes:
                raise DamagedError(f"{path.name} has {found.st_size} bytes, at most {max_bytes}")
            return stream.read()
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise DamagedError(f"{path.name}: {error.strerror}") from error
