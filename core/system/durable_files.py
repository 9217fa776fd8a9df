"""Files of a model folder: written so that a power cut leaves the old or the new one, and read as
what a stranger may have made."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path

# Errors about this one file. All others (EACCES, EMFILE) may pass and say nothing of it.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO, errno.EISDIR, errno.ENXIO}
_NOT_OFFERED = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP}
"""How a disk says that it does not flush folders. A failure to flush one is told otherwise."""

_TEMPORARY = re.compile(r"\.mien-[0-9a-f]{8}-[0-9a-f]{16}\.tmp")
_FICLONE = 0x40049409  # from <linux/fs.h>
_COPY_BYTES = 1 << 20
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
}


Content = bytes | Sequence[bytes | memoryview]
"""What a file is to hold, in one piece or in many."""


class DamagedError(Exception):
    """Reason that a file or generation cannot be used."""


class OddFileError(OSError):
    """Error of a plain file whose place something else takes; its ``strerror`` names that."""


def temporary_name(path: Path) -> Path:
    """A name beside a file or folder, under which a new one is made before it takes that place.

    No other call gives it, and nobody but mien names a file so: nothing of the user's is there.
    """
    return path.with_name(f"{_mark(path)}{secrets.token_hex(8)}.tmp")


def _mark(path: Path) -> str:
    """First letters of the temporary names of a path; short, as a name may have 255 bytes."""
    return f".mien-{zlib.crc32(os.fsencode(path.name)):08x}-"


def discard_leftovers(folder: Path, *, of: Path | None = None) -> None:
    """Remove what a kill has left under temporary names in a folder.

    Args:
        folder: A folder that no other process of mien writes to; nothing where there is none.
        of: The one path of it that is the caller's own, where others are written to.
    """
    mark = "" if of is None else _mark(of)
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if name.startswith(mark) and _TEMPORARY.fullmatch(name):
                discard(folder / name)


def discard(path: Path) -> None:
    """Remove what a crash, or a stranger, left under the name of a temporary file or folder.

    What cannot be removed stays: making the new one then says why.
    """
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Make a folder with independent copies of these plain files of another, durably."""
    target.mkdir()
    for name in names:
        copy_file(source / name, target / name)
    sync_folder(target)


def copy_file(source: Path, target: Path) -> None:
    """Make a durable copy of a plain file that no write to the other one reaches.

    On a disk that can (Btrfs, XFS, bcachefs, ZFS) both share the blocks that are equal: the copy
    takes no time and no room.
    """
    with open_for_reading(source) as old, open(target, "xb") as new:
        # Never a hard link: what damages the one file must not reach the other.
        if not _clone(old.fileno(), new.fileno()):
            shutil.copyfileobj(old, new, _COPY_BYTES)
        new.flush()
        os.fsync(new.fileno())


def _clone(old: int, new: int) -> bool:
    """Whether the disk itself has copied all of an open file into a new one; else it is empty."""
    with suppress(OSError):  # another disk, or one that has no such thing
        fcntl.ioctl(new, _FICLONE, old)
        return True
    # By the kernel, which copies within the disk where its file system can.
    size = copied = os.fstat(old).st_size
    with suppress(OSError):  # the plain copy meets a full disk again, and tells
        while copied := os.copy_file_range(old, new, size):
            size -= copied
        if not size:
            return True
    os.ftruncate(new, 0)
    for handle in (old, new):
        os.lseek(handle, 0, os.SEEK_SET)
    return False


def link_files(source: Path, target: Path) -> None:
    """Give all plain files of a folder that is to go a place in a new one, durably.

    They are hard links, or copies where the disk has no links.
    """
    target.mkdir()
    for entry in os.scandir(source):
        if entry.is_file(follow_symlinks=False):
            link_file(Path(entry.path), target / entry.name)
    sync_folder(target)


def link_file(source: Path, target: Path) -> None:
    """Give a plain file a second name, or a copy of it where the disk has no hard links."""
    try:
        # The name itself, were it a link: what it leads to is not ours to name.
        os.link(source, target, follow_symlinks=False)
    except OSError:
        copy_file(source, target)


def write_file(path: Path, content: Content, mode: int = 0o666) -> None:
    """Write a new file, durably; it has its name only once it is whole. Its permissions are those
    of ``mode`` that the umask leaves.

    Raises:
        OSError: FileExistsError where there is anything of this name, or the disk refuses.
    """
    try:
        # What has no name yet vanishes with a crash: there is nothing to clean up.
        handle = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode)
    except OSError:  # no files without a name here, or what the next call will tell
        _write_named_file(path, content, mode)
        return
    # The folder is left to whoever has written its last file: one flush serves them all.
    with open(handle, "wb") as stream:
        stream.writelines([content] if isinstance(content, bytes) else content)
        stream.flush()
        os.fsync(handle)
        try:  # what `src_dir_fd` is, does not matter: with it, the link in /proc is followed
            os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=handle)
        except FileExistsError:
            raise
        except OSError:  # no hard links here, or no /proc
            _write_named_file(path, content, mode)


def _write_named_file(path: Path, content: Content, mode: int) -> None:
    """The same on a disk that has no files without a name: a kill leaves a temporary one."""
    temporary = temporary_name(path)
    try:
        # With its permissions from the start: a private file must at no moment be open to others.
        with open(temporary, "xb", opener=partial(os.open, mode=mode)) as stream:
            stream.writelines([content] if isinstance(content, bytes) else content)
            stream.flush()
            os.fsync(stream.fileno())
        _name_new(temporary, path)
    finally:
        discard(temporary)


def _name_new(temporary: Path, path: Path) -> None:
    """Give a whole file its name; FileExistsError where there is anything of this name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # In two steps, where there are no hard links: no rename refuses to replace.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)


def move_file(source: Path, target: Path) -> None:
    """Give a file another name on the same disk; at every moment it has one of them.

    Raises:
        OSError: FileExistsError where there is anything of this name, or the disk refuses.
    """
    _name_new(source, target)
    # It is gone already where it was renamed.
    source.unlink(missing_ok=True)


def replace_file(path: Path, content: Content, mode: int = 0o666) -> None:
    """Put a file in the place of another in one step, durably; a link there is replaced itself.

    Raises:
        OSError: OddFileError where a device or a folder is in its place, or the disk refuses.
    """
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if stat.S_IFMT(found.st_mode) in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR):
            _refuse_odd(path, found)
    temporary = temporary_name(path)
    try:
        # By a name after all: no link takes the place of a file that is there.
        write_file(temporary, content, mode)
        os.replace(temporary, path)
    finally:
        discard(temporary)
    sync_folder(path.parent)


def write_output(path: Path, content: Content, *, force: bool) -> None:
    """Write a file that the user has named, whole or not at all; where a link leads, not over it.

    Args:
        path: The file, whose folder is there.
        content: All of it.
        force: Put it in the place of an older one, too.

    Raises:
        OSError: OddFileError where there is anything but a plain file, or as `write_file`.
    """
    if force:
        with checked_output(path, force=True) as temporary:
            write_file(temporary, content)
    else:
        # Without a temporary name, which a kill would leave; a disk may insist on one.
        path = path.resolve()
        discard_leftovers(path.parent, of=path)
        write_file(path, content)
        sync_folder(path.parent)


@contextmanager
def checked_output(path: Path, *, force: bool) -> Iterator[Path]:
    """Temporary name of a file that the user has named, to be written, read back and judged.

    It becomes the file where the block ends without an error; else all stays as it was.

    Args:
        path: The file, whose folder is there.
        force: Put it in the place of an older one, too.

    Raises:
        OSError: As `write_output`.
    """
    # Before the rename, which would replace the user's link by the file.
    path = path.resolve()
    if force:
        with suppress(FileNotFoundError):
            _refuse_odd(path, os.lstat(path))
    discard_leftovers(path.parent, of=path)
    temporary = temporary_name(path)
    try:
        yield temporary
        if force:
            os.replace(temporary, path)
        else:
            _name_new(temporary, path)
    finally:
        discard(temporary)
    sync_folder(path.parent)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside a file or folder that the user has named, to make it in.

    It is on the same disk, so that what it holds can be renamed; in the end it is gone, unless it
    was moved away itself.
    """
    discard_leftovers(path.parent, of=path)
    folder = temporary_name(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        discard(folder)


def set_permissions(path: Path, mode: int) -> None:
    """Set the permissions of a file or folder: a courtesy, which many disks do not offer."""
    with suppress(OSError):
        os.chmod(path, mode)


def sync_folder(path: Path) -> bool:
    """Flush a folder, so that the names in it survive a power cut.

    Returns:
        False where the disk has no such thing, as some network and FUSE disks have not.

    Raises:
        OSError: It failed.
    """
    try:
        sync_file(path, os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        return False
    return True


def sync_file(path: Path, flags: int = 0) -> None:
    """Flush what was written to a file."""
    # For reading is enough: a flush is of the file, not of the handle.
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
        flags: Flags of `os.open`.
        follows_links: True for a file that the user has named. What a folder holds may be a
            stranger's link to anywhere.

    Raises:
        OSError: OddFileError where something else is in its place, or the disk refuses.
    """
    with suppress(FileNotFoundError):  # it is made, or the next call tells
        _refuse_odd(path, os.stat(path, follow_symlinks=follows_links))
    # Without waiting for the other end of a pipe that was put there since the look at it.
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follows_links else os.O_NOFOLLOW)
    handle = os.open(path, flags, 0o666)
    try:
        # Once more, and now of the handle: the name may have gone to something else since the look
        # at it.
        _refuse_odd(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _refuse_odd(path: str | Path, found: os.stat_result) -> None:
    """Refuse all but a plain file."""
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        name, word = os.path.basename(path), _KINDS.get(kind, "something else")
        raise OddFileError(errno.ENXIO, f"{name} is {word}, not a plain file", str(path))


def open_for_reading(path: str | Path, *, follows_links: bool = False) -> BufferedReader:
    """A plain file, open to be read; OSError as `open_plain`."""
    opener = partial(open_plain, follows_links=follows_links)
    return open(path, "rb", opener=opener)


@contextmanager
def open_regular(path: Path, max_bytes: int) -> Iterator[BufferedReader]:
    """A plain file, open; a link, a device or an oversized file is damage."""
    try:
        with open_for_reading(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > max_bytes:
                raise DamagedError(f"{path.name} has {size} bytes, at most {max_bytes}")
            yield stream
    except OddFileError as error:
        raise DamagedError(error.strerror) from error
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
        # As many as were hashed: the file may have grown since it was opened.
        return stream.tell(), sha256


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the disk's refusal to read something, which is no damage, into one line.

    Args:
        path: What is named where the disk names nothing.

    Raises:
        ValueError: In place of OSError.
    """
    try:
        yield
    except OSError as error:
        name = error.filename or path
        raise ValueError(f"cannot read {name}: {error.strerror}; mend that first") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusal to write something into one line.

    Args:
        path: The file or folder that the user has named, whatever is written on the way.

    Raises:
        ValueError: In place of OSError.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
