"""Files of a model folder: written so that a power cut leaves the old or the new one, and read as
what a stranger may have made."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TextIO

_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO, errno.EISDIR, errno.ENXIO}
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
}


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


def open_plain(path: str | Path, flags: int, *, follows_links: bool = False) -> int:
    """A handle of a plain file, which is made where the flags say so; to be the `opener` of `open`.

    Nothing is waited for, and nothing is opened to find out what it is: a pipe blocks its reader
    for ever, and some devices act when they are opened.

    Args:
        path: The file.
        flags: Those of `os.open`.
        follows_links: For a file that the user has named. What a folder holds may be a stranger's
            link to anywhere.

    Raises:
        OSError: There is something else in its place, or the disk refuses.
    """
    with suppress(FileNotFoundError):  # it is made, or the next call tells
        _refuse_odd(path, os.stat(path, follow_symlinks=follows_links))
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follows_links else os.O_NOFOLLOW)
    handle = os.open(path, flags, 0o666)
    try:
        _refuse_odd(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _refuse_odd(path: str | Path, found: os.stat_result) -> None:
    """OSError for all but a plain file."""
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        text = f"it is {_KINDS.get(kind, 'something else')}, not a plain file"
        raise OSError(errno.ENXIO, text, str(path))


def open_for_reading(path: str | Path, *, follows_links: bool = False) -> BufferedReader:
    """A plain file, open to be read; OSError as `open_plain`."""
    opener = partial(open_plain, follows_links=follows_links)
    return open(path, "rb", opener=opener)


def open_for_append(path: str | Path, *, follows_links: bool = False) -> TextIO:
    """A plain file, open to have whole lines of text added; OSError as `open_plain`."""
    opener = partial(open_plain, follows_links=follows_links)
    return open(path, "a", encoding="utf-8", buffering=1, opener=opener)


@contextmanager
def open_regular(path: Path, max_bytes: int) -> Iterator[BufferedReader]:
    """A plain file, open; a link, a device or an oversized file is damage."""
    try:
        with open_for_reading(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > max_bytes:
                raise DamagedError(f"{path.name} has {size} bytes, at most {max_bytes}")
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
