"""Files: opened without waiting, copied without sharing, put in place whole or not at all."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mien.core.system.durable_files import (
    OddFileError,
    checked_output,
    copy_file,
    discard,
    discard_leftovers,
    open_for_reading,
    open_plain,
    replace_file,
    set_permissions,
    sync_folder,
    temporary_name,
    write_file,
    write_output,
)


def _refuse(error: int):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return refuse


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


ODD = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a folder": os.mkdir,
    "a link": lambda path: path.symlink_to(path.with_name("elsewhere")),
}


# Opening


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_RDWR])
def test_what_is_no_plain_file_is_refused_by_name_and_not_waited_for(
    tmp_path, monkeypatch, kind, flags
):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    (tmp_path / "elsewhere").write_text("mine")
    ODD[kind](Path("odd"))
    with pytest.raises(OddFileError) as caught:
        open_plain(Path("odd"), flags)
    assert caught.value.strerror == f"odd is {kind}, not a plain file"
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_device_is_not_even_opened(monkeypatch):
    monkeypatch.setattr(os, "open", pytest.fail)
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with pytest.raises(OddFileError, match="null is a device"):
            open_plain("/dev/null", flags, follows_links=True)


def test_what_took_the_place_of_a_plain_file_at_the_last_moment_is_closed_again(
    tmp_path, monkeypatch
):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"mine")
    plain_open, handles = os.open, []

    def swap(_path: str, flags: int, mode: int = 0o777) -> int:
        handles.append(plain_open(tmp_path / "pipe", flags, mode))
        return handles[-1]

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(OddFileError, match="file is a pipe"):
        open_for_reading(tmp_path / "file")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handles[0])


def test_a_link_that_the_user_has_named_is_followed(tmp_path):
    (tmp_path / "file").write_bytes(b"one\n")
    (tmp_path / "link").symlink_to("file")
    with open_for_reading(tmp_path / "link", follows_links=True) as stream:
        assert stream.read() == b"one\n"


# Copies


WAYS = {
    "by the disk": {},
    "by the kernel": {"fcntl.ioctl": _refuse(errno.EOPNOTSUPP)},
    "in pieces": {
        "fcntl.ioctl": _refuse(errno.EOPNOTSUPP),
        "os.copy_file_range": _refuse(errno.EXDEV),
    },
    "by a kernel that gives up half way": {
        "fcntl.ioctl": _refuse(errno.EOPNOTSUPP),
        "os.copy_file_range": lambda _old, new, size: os.write(new, b"x" * 7) if size > 7 else 0,
    },
    "by a kernel that copies nothing": {
        "fcntl.ioctl": _refuse(errno.EOPNOTSUPP),
        "os.copy_file_range": lambda *_: 0,
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_a_copy_is_a_file_of_its_own_and_flushed(tmp_path, monkeypatch, way, size):
    content = os.urandom(size)
    (tmp_path / "old").write_bytes(content)
    for name, call in WAYS[way].items():
        module, _, function = name.partition(".")
        monkeypatch.setattr({"os": os, "fcntl": fcntl}[module], function, call)
    flushed, fsync = [], os.fsync

    def spy(handle: int) -> None:
        flushed.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    copy_file(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == content
    assert flushed == [(tmp_path / "new").stat().st_ino]
    with open(tmp_path / "old", "r+b") as stream:
        stream.write(b"damage")
    assert (tmp_path / "new").read_bytes() == content


def test_a_copy_takes_no_place_and_follows_no_link(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "taken").write_bytes(b"mine")
    with pytest.raises(OddFileError, match="link is a link"):
        copy_file(tmp_path / "link", tmp_path / "new")
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "old", tmp_path / "taken")
    assert (tmp_path / "taken").read_bytes() == b"mine"


# Whole or not at all

DISKS = {
    "a usual disk": {},
    "no nameless files": {"open": True},
    "no hard links": {"link": True},
}


@pytest.fixture(params=DISKS)
def disk(request, monkeypatch):
    """A disk with files without a name, one without, and one that cannot give them a name."""
    plain_open = os.open

    def named_only(path: str, flags: int, *more: int, **how: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return plain_open(path, flags, *more, **how)

    if "open" in DISKS[request.param]:
        monkeypatch.setattr(os, "open", named_only)
    if "link" in DISKS[request.param]:
        monkeypatch.setattr(os, "link", _refuse(errno.EPERM))


@pytest.mark.usefixtures("disk")
def test_a_new_file_takes_no_other_ones_place(tmp_path):
    path = tmp_path / "new"
    write_file(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(FileExistsError):
        write_file(path, b"other")
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.usefixtures("disk")
def test_a_file_has_its_name_only_once_it_is_whole(tmp_path, monkeypatch):
    """A kill then leaves none, and the same call makes it anew."""
    fsync, names = os.fsync, []

    def look(handle):
        names.extend(os.listdir(tmp_path))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_file(tmp_path / "new", b"mine")
    assert "new" not in names
    for name in names:
        (tmp_path / name).write_text("of a kill")
    discard_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_judged_bad_replaces_nothing(tmp_path, force):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def judge_bad():
        with checked_output(path, force=force) as temporary:
            write_file(temporary, b"new")
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        judge_bad()
    assert (os.listdir(tmp_path), path.read_bytes()) == (["file"], b"old")
    with pytest.raises(FileExistsError), checked_output(path, force=False) as temporary:
        write_file(temporary, b"new")
    assert (os.listdir(tmp_path), path.read_bytes()) == (["file"], b"old")
    with checked_output(path, force=True) as temporary:
        write_file(temporary, b"new")
    assert (os.listdir(tmp_path), path.read_bytes()) == (["file"], b"new")


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failure_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path, monkeypatch, error):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", _refuse(error))
    for write in (
        lambda: replace_file(tmp_path / "file", b"new"),
        lambda: write_output(tmp_path / "file", b"new", force=True),
        lambda: write_file(tmp_path / "other", b"new"),
        lambda: write_output(tmp_path / "other", b"new", force=False),
    ):
        with pytest.raises(OSError, match=os.strerror(error)):
            write()
        assert os.listdir(tmp_path) == ["file"]
        assert (tmp_path / "file").read_bytes() == b"old"


def test_a_kill_while_a_file_is_written_leaves_nothing(tmp_path):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mien.core.system.durable_files import write_output\n"
        "fsync = os.fsync\n"
        "def wait(handle):\n"
        "    fsync(handle)\n"
        "    print('written', flush=True)\n"
        "    sys.stdin.read()\n"
        "os.fsync = wait\n"
        "write_output(Path(sys.argv[1]), b'x' * 1000, force=True)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out.bin")]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder"])
def test_an_output_is_put_in_the_place_of_plain_files_only(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    ODD[kind](Path("out"))
    with pytest.raises(OddFileError, match=f"out is {kind}"):
        write_output(Path("out"), b"new", force=True)
    with pytest.raises(FileExistsError):
        write_output(Path("out"), b"new", force=False)
    with pytest.raises(OddFileError, match="null is a device"):
        replace_file(Path("/dev/null"), b"new")
    assert os.listdir() == ["out"]


def test_an_output_goes_where_a_link_leads(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_output(tmp_path / "link", b"new", force=True)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    replace_file(tmp_path / "link", b"of a model folder")
    assert (tmp_path / "file").read_bytes() == b"new", "what a folder holds is not followed"


@pytest.mark.parametrize("kind", ODD)
def test_leftovers_of_a_kill_are_removed_whatever_they_are(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").write_text("mine")
    for name in ("file", "other"):
        ODD[kind](temporary_name(Path(name)))
    discard_leftovers(Path(), of=Path("file"))
    assert len(os.listdir()) == 2, "what another process is writing stays"
    discard_leftovers(Path())
    assert os.listdir() == ["elsewhere"]
    assert Path("elsewhere").read_text() == "mine"
    discard(Path("nothing"))
    discard_leftovers(Path("nothing"))


@pytest.mark.parametrize("force", [False, True])
def test_an_output_sweeps_what_a_kill_has_left_of_it(tmp_path, force):
    for name in ("file", "other"):
        temporary_name(tmp_path / name).write_bytes(b"half")
    write_output(tmp_path / "file", b"whole", force=force)
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"half", b"whole"]


def test_no_file_of_the_user_s_stands_for_a_temporary_one(tmp_path):
    names = [".file.tmp", ".file.part", "file.tmp", ".mien-mine.tmp", f".mien-{'0' * 24}.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        write_output(tmp_path / "file", b"new", force=True)
    discard_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "file"])
    assert {(tmp_path / name).read_text() for name in names} == {"mine"}


def test_a_temporary_name_fits_where_the_name_itself_does(tmp_path):
    (tmp_path / ("n" * 255)).write_bytes(b"old")
    replace_file(tmp_path / ("n" * 255), b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


# Disks that lack things


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP])
def test_a_disk_may_have_no_flush_of_folders_but_not_of_files(tmp_path, monkeypatch, error):
    assert sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", _refuse(error))
    assert not sync_folder(tmp_path)
    with pytest.raises(OSError, match=os.strerror(error)):
        write_file(tmp_path / "file", b"new")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_flush_that_fails_is_a_failure(tmp_path, monkeypatch, error):
    monkeypatch.setattr(os, "fsync", _refuse(error))
    with pytest.raises(OSError, match=os.strerror(error)):
        sync_folder(tmp_path)


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_permissions_are_a_courtesy(tmp_path, monkeypatch, error):
    monkeypatch.setattr(os, "chmod", _refuse(error))
    set_permissions(tmp_path, 0o700)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
