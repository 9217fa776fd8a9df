"""Files of a model folder: written so that a power cut leaves the old or the new one, and read as
what a stranger may have made."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

_DAMAGE = {errno.ENOENT, errno.ELOOP, errno.EIO, errno.EISDIR, errno.ENXIO}


class DamagedError(Exception):
    """Why a file or generation cannot be used."""


def copy_files(source: Path, target: Path) -> None:
    """Make a folder of the same plain files, durably: hard links where the disk has them."""
    target.mkdir()
    for entry in os.scandir(source):
        if entry.is_file(follow_symlinks=False):
            copy_file(Path(entry.path), target / entry.name)
    sync_folder(target)


def copy_file(source: Path, target: Path) -> None:
    """The same plain file under another name: a hard link where the disk has them."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)
        sync_file(target)


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


@contextmanager
def open_regular(path: Path, max_bytes: int) -> Iterator[BufferedReader]:
    """A plain file, open; a link, a device or an oversized file is damage."""
    try:
        with open(path, "rb", opener=_open_plain) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{path.name} is not a plain file")
            if found.st_size > max_bytes:
                raise DamagedError(f"{path.name} has {found.st_size} bytes, at most {max_bytes}")
            yield stream
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise DamagedError(f"{path.name}: {error.strerror}") from error


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a plain file."""
    with open_regular(path, max_bytes) as stream:
        return stream.read()


def hash_regular(path: Path, max_bytes: int) -> tuple[int, str]:
    """Size and SHA-256 of a plain file, however large."""
    with open_regular(path, max_bytes) as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), sha256
