"""One run at a time in a folder: by flock, by an owner file where there is none, in every race."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mien.core.checkpoint import lock as locks
from mien.core.checkpoint import model_folder
from mien.core.checkpoint import owner as owners
from mien.core.checkpoint.lock import LOCK, acquire, owner_in_words
from mien.core.checkpoint.lock_owner import RequestError, lock_owner, send_request
from mien.core.checkpoint.model_folder import ModelFolder, SaveError
from mien.core.checkpoint.owner import OWNER, Owner, read_owner
from mien.core.checkpoint.state import TrainingState
from mien.core.system import mounts, processes


def _save(folder: ModelFolder, iterations: int) -> Path:
    state = TrainingState(trainer="original", iterations=iterations)
    return folder.save({"weight": torch.full((5,), float(iterations))}, None, state.to_dict())


@pytest.fixture
def no_flock(monkeypatch):
    """A disk without flock."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


# Two runs that meet


def test_a_lock_file_that_was_removed_as_it_was_locked_locks_nothing(tmp_path, monkeypatch):
    """One run ends and removes its new folder between another's opening and locking of the file."""
    path = tmp_path / "m"
    first, take, is_first_time = ModelFolder(path), locks._lock_or_own, [True]

    def end_first(handle: int, folder: Path):
        if is_first_time:
            is_first_time.clear()
            first.close()
            assert not path.exists()
        return take(handle, folder)

    monkeypatch.setattr(locks, "_lock_or_own", end_first)
    second = acquire(path)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        acquire(path)
    second.release()


def test_a_folder_is_removed_only_with_the_lock_file_that_is_held(tmp_path):
    path = tmp_path / "m"
    folder = ModelFolder(path)
    os.rename(path / LOCK, tmp_path / "aside")
    (path / LOCK).write_text("of another run")
    folder.close()
    assert (path / LOCK).read_text() == "of another run"


RACE = """
import os, sys
from pathlib import Path
from mien.core.checkpoint.model_folder import ModelFolder

path, marker, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
held = 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(count):
    try:
        folder = ModelFolder(path)
    except ValueError as error:
        assert "in use" in str(error) or "being made or removed" in str(error), error
        continue
    with folder:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))  # fails where another run is in, too
        held += 1
        os.unlink(marker)
print(held, flush=True)
"""


@pytest.mark.parametrize("has_flock", [True, False])
def test_two_processes_are_never_in_one_folder_at_once(tmp_path, has_flock):
    """Each makes and removes the folder all the time, which is when locks are lost."""
    refuse = (
        "import errno, fcntl\n"
        "def refuse(*_): raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.flock = refuse\n"
    )
    words = [sys.executable, "-c", ("" if has_flock else refuse) + RACE]
    words += [str(tmp_path / "m"), str(tmp_path / "marker"), "60"]
    racers = [
        subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    told = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], told
    assert sum(int(held) for held, _ in told) > 0


def test_a_lock_file_that_was_replaced_is_noticed_before_the_next_save(tmp_path):
    path = tmp_path / "m"
    with ModelFolder(path) as first:
        _save(first, 1)
        (path / LOCK).unlink()  # the user takes it for a leftover
        _save(first, 2)
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            acquire(path)
        (path / LOCK).unlink()
        with ModelFolder(path) as second:
            second.load()
            _save(second, 3)
            text = f"process {os.getpid()} has taken it; stop that run and start again"
            with pytest.raises(SaveError, match=text):
                _save(first, 3)
            assert sorted(os.listdir(path / "generations")) == ["2", "3"]
            _save(second, 4)


# Whose process it is


def test_a_run_is_this_machines_whatever_the_machine_is_called_since(tmp_path, monkeypatch):
    with ModelFolder(tmp_path / "m") as folder:
        monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
        found = lock_owner(folder.path)
        assert (found.pid, found.is_here, found.is_running) == (os.getpid(), True, True)
        assert owner_in_words(folder.path) == f"process {os.getpid()}"
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}; stop that run, or"):
            acquire(folder.path)


@pytest.fixture
def other_container(monkeypatch):
    """A container of this machine, or a clone of it, of the same name: its process numbers are
    others."""
    monkeypatch.setattr(owners, "process_space", lambda: "another-boot.1")


def test_a_run_of_another_container_of_this_name_is_left_alone(tmp_path, other_container):
    """Its number means another process here, which must be neither named nor asked."""
    name = socket.gethostname()
    (tmp_path / LOCK).write_text(f"{os.getpid()} {name} this-boot.2 1\n")
    with open(tmp_path / LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = lock_owner(tmp_path)
        assert (found.is_here, found.is_running) == (False, False)
        with pytest.raises(RequestError, match=f"another container, that is called {name} too"):
            send_request(tmp_path, "stop")
        text = f"in use by process {os.getpid()} on another machine or container {name}; "
        with pytest.raises(ValueError, match=text):
            acquire(tmp_path)


def test_a_run_from_before_a_restart_of_the_machine_trains_no_more(tmp_path):
    """Another process has its number by now, and the lock is free."""
    (tmp_path / LOCK).write_text(f"{os.getpid()} {socket.gethostname()} boot-before.1 1\n")
    found = lock_owner(tmp_path)
    assert (found.is_here, found.is_running) == (True, False)
    with pytest.raises(RequestError, match="nothing trains"):
        send_request(tmp_path, "stop")


def test_a_lock_file_of_an_earlier_version_is_read(tmp_path):
    """It names no machine: the host's name has to do."""
    name = socket.gethostname()
    with open(tmp_path / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for line, place in ((f"{os.getpid()} {name}", ""), ("17 elsewhere", " on elsewhere")):
            for paused in ("", " paused"):
                (tmp_path / LOCK).write_text(f"{line}{paused}\n")
                found = lock_owner(tmp_path)
                assert (found.is_here, found.is_running) == (not place, not place)
                remedy = ", which is paused; have it go on" if paused else "; stop that run, or"
                text = f"in use by process {found.pid}{place}{remedy}"
                with pytest.raises(ValueError, match=text):
                    acquire(tmp_path)


@pytest.mark.usefixtures("no_flock")
def test_a_process_of_another_user_that_proc_hides_has_its_folder(tmp_path, monkeypatch):
    this = Owner.of_this_process()
    (tmp_path / OWNER).write_bytes(Owner(2**22 - 1, this.host, this.machine, 5).line)

    def refuse(_pid: int, _number: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(processes, "stat_of", lambda _pid: None)
    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(ValueError, match=f"in use by process {2**22 - 1}; stop that run"):
        acquire(tmp_path)


# Disks whose flock other machines do not see


def test_a_run_of_another_machine_is_seen_though_the_lock_is_free_here(tmp_path):
    (tmp_path / OWNER).write_bytes(_elsewhere().line)
    text = (
        r"in use by process 17 on elsewhere; stop that run, wait 5 minutes where it has ended "
        r"already, or choose another model folder"
    )
    with pytest.raises(ValueError, match=text):
        acquire(tmp_path)
    assert read_owner(tmp_path) == _elsewhere()


def test_a_run_of_another_machine_that_is_silent_is_shut_out_should_it_wake(tmp_path):
    (tmp_path / OWNER).write_bytes(_elsewhere().line)
    os.utime(tmp_path / OWNER, (time.time() - MINUTES_10,) * 2)
    lock = acquire(tmp_path)
    # By this it notices before its next save; a flock alone would not reach it.
    assert read_owner(tmp_path) == Owner.of_this_process()
    lock.release()
    assert os.listdir(tmp_path) == [LOCK]


def _mounted(place: Path, kind: str, options: str) -> str:
    name = str(place).replace(" ", "\\040")
    return f"27 1 8:1 / / rw - ext4 /dev/sda rw\n40 27 0:50 / {name} rw - {kind} srv:/x {options}\n"


@pytest.mark.parametrize(
    ("kind", "options", "is_shared"),
    [
        ("ext4", "rw", True),
        ("fuseblk", "rw", True),
        ("ceph", "rw", True),
        ("nfs4", "rw,vers=4.2,local_lock=none", True),
        ("nfs", "rw,vers=3,nolock,local_lock=all", False),
        ("nfs", "rw,vers=3,local_lock=flock", False),
        ("nfs", "rw,vers=3,local_lock=posix", True),
        ("lustre", "rw,flock", True),
        ("lustre", "rw,localflock", False),
        ("fuse.sshfs", "rw", False),
        ("cifs", "rw", False),
    ],
)
def test_a_disk_that_may_hide_locks_has_an_owner_file_too(
    tmp_path, kind, options, is_shared, monkeypatch
):
    place = tmp_path / "a disk"
    (tmp_path / "mounts").write_text(_mounted(place, kind, options) + "torn\n")
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mounts")
    # One test's folder may have the name of another's.
    monkeypatch.setattr(model_folder, "_WARNED_OF_DISK", set())
    with ModelFolder(place / "m") as folder:
        assert (read_owner(folder.path) is None) == is_shared
        assert [each for each in folder.warnings if "hide a lock" in each] == folder.warnings
        assert bool(folder.warnings) != is_shared
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            acquire(folder.path)
    assert not (folder.path / OWNER).exists()


def test_of_disks_at_one_place_the_last_counts(tmp_path, monkeypatch):
    text = _mounted(tmp_path, "nfs", "local_lock=all") + _mounted(tmp_path, "ext4", "rw")
    (tmp_path / "mounts").write_text(text)
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mounts")
    assert mounts.shares_flock(tmp_path / "m")
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "none")
    assert mounts.shares_flock(tmp_path / "m")


# Disks without flock


@pytest.mark.usefixtures("no_flock")
def test_without_flock_an_owner_file_keeps_others_out(tmp_path):
    path = tmp_path / "m"
    with ModelFolder(path) as folder:
        assert [warning for warning in folder.warnings if "has no flock" in warning]
        assert read_owner(path) == Owner.of_this_process()
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            ModelFolder(path)
        assert owner_in_words(path) == f"process {os.getpid()}"
        found = lock_owner(path)
        assert (found.pid, found.is_here, found.is_running) == (os.getpid(), True, True)
        _save(folder, 1)
    assert not (path / OWNER).exists()
    assert owner_in_words(path) is None
    with ModelFolder(path) as again:
        assert again.warnings == [], "what the disk lacks is told once"
        assert [thread.name for thread in threading.enumerate()].count("mien-owner") == 1
    assert "mien-owner" not in [thread.name for thread in threading.enumerate()]
    ModelFolder(tmp_path / "unused").close()
    assert not (tmp_path / "unused").exists()


def test_a_run_on_another_way_to_the_disk_that_has_no_flock_is_seen(tmp_path):
    (tmp_path / OWNER).write_bytes(Owner.of_this_process().line)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        acquire(tmp_path)


def _gone() -> Owner:
    """A process of this machine that has ended; its number may be another's by now."""
    words = [sys.executable, "-c", "import os; print(os.getpid())"]
    pid = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    this = Owner.of_this_process()
    return Owner(pid, this.host, this.machine, this.start - 1)


def _reused() -> Owner:
    """A process that has ended, whose number is now that of this one."""
    this = Owner.of_this_process()
    return Owner(this.pid, this.host, this.machine, this.start - 1)


def _elsewhere() -> Owner:
    return Owner(17, "elsewhere", "another-boot.1", 5)


MINUTES_10 = 600.0


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize(
    ("content", "age_s", "is_taken_over"),
    [
        pytest.param(lambda: _gone().line, 0.0, True, id="its process is gone"),
        pytest.param(lambda: _reused().line, 0.0, True, id="its number is another's"),
        pytest.param(lambda: _elsewhere().line, 0.0, False, id="another machine's heart beats"),
        pytest.param(lambda: _elsewhere().line, MINUTES_10, True, id="another machine's is old"),
        pytest.param(lambda: b"torn", 0.0, False, id="half written just now"),
        pytest.param(lambda: b"torn", MINUTES_10, True, id="half written long ago"),
        pytest.param(lambda: b"", MINUTES_10, True, id="empty, long ago"),
        pytest.param(lambda: b"1 \x1b[31m x 3\n", 0.0, False, id="a stranger's"),
    ],
)
def test_an_owner_file_is_taken_over_by_rule(tmp_path, content, age_s, is_taken_over):
    (tmp_path / OWNER).write_bytes(content())
    os.utime(tmp_path / OWNER, (time.time() - age_s,) * 2)
    if is_taken_over:
        lock = acquire(tmp_path)
        assert read_owner(tmp_path) == Owner.of_this_process()
        lock.release()
    else:
        text = r"in use by (process 17 on elsewhere|an unknown process); "
        with pytest.raises(ValueError, match=text):
            acquire(tmp_path)
        assert (tmp_path / OWNER).read_bytes() == content()
    assert sorted(os.listdir(tmp_path)) == sorted([LOCK] + [OWNER] * (not is_taken_over))


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize(
    ("stale", "fresh"),
    [
        pytest.param(_elsewhere().line, Owner(18, "quicker", "another-boot.1", 6).line, id="taken"),
        pytest.param(_elsewhere().line, _elsewhere().line, id="renewed"),
        pytest.param(b"", b"", id="being made"),
    ],
)
def test_of_two_that_find_a_stale_owner_file_one_gets_it(stale, fresh, tmp_path, monkeypatch):
    """It is another's, or alive again, between this one's look and its removal."""
    (tmp_path / OWNER).write_bytes(stale)
    os.utime(tmp_path / OWNER, (0, 0))
    clear_away = owners.OwnerFile._clear_away

    def be_late(self: owners.OwnerFile, found: object) -> None:
        (tmp_path / OWNER).write_bytes(fresh)
        clear_away(self, found)

    monkeypatch.setattr(owners.OwnerFile, "_clear_away", be_late)
    with pytest.raises(ValueError, match=r"in use by (process 1[78] on|an unknown process)"):
        acquire(tmp_path)
    assert (tmp_path / OWNER).read_bytes() == fresh
    assert sorted(os.listdir(tmp_path)) == [LOCK, OWNER]


@pytest.mark.usefixtures("no_flock")
def test_a_run_notices_that_its_file_was_moved_away_as_it_renewed_it(tmp_path, monkeypatch):
    """Minutes passed without a sign of life; it must not save then."""
    lock, write, other = acquire(tmp_path), os.pwrite, _elsewhere()

    def be_taken_over(handle: int, content: bytes, offset: int) -> int:
        (tmp_path / OWNER).unlink()
        (tmp_path / OWNER).write_bytes(other.line)
        return write(handle, content, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", be_taken_over)
        with pytest.raises(owners.InUseError, match="17 on elsewhere"):
            lock.confirm()
    lock.release()
    assert read_owner(tmp_path) == other


@pytest.mark.usefixtures("no_flock")
def test_a_run_does_not_remove_what_takes_the_place_of_its_file(tmp_path, monkeypatch):
    lock, rename, other = acquire(tmp_path), os.rename, _elsewhere()

    def be_late(source: Path, target: Path) -> None:
        if source.name == OWNER:
            source.write_bytes(other.line)
        rename(source, target)

    monkeypatch.setattr(os, "rename", be_late)
    lock.release()
    assert read_owner(tmp_path) == other


@pytest.mark.usefixtures("no_flock")
def test_a_save_and_the_heart_make_a_file_that_is_gone_but_once(tmp_path, monkeypatch):
    """Neither may meet the other's and take it for that of another run."""
    lock, make, made, failed = acquire(tmp_path), owners.OwnerFile._make, [], []

    def confirm() -> None:
        try:
            lock.confirm()
        except owners.InUseError as error:
            failed.append(error)

    def confirm_beside(self: owners.OwnerFile) -> None:
        if not made:
            made.append(threading.Thread(target=confirm))
            made[0].start()
            # In vain, since it waits as it must; else it would be the first to make the file.
            made[0].join(0.1)
        make(self)

    monkeypatch.setattr(owners.OwnerFile, "_make", confirm_beside)
    (tmp_path / OWNER).unlink()
    confirm()
    made[0].join()
    lock.release()
    assert failed == []


@pytest.mark.usefixtures("no_flock")
def test_a_full_disk_leaves_no_empty_owner_file(tmp_path, monkeypatch):
    """It would keep the next start out for five minutes."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ValueError, match="No space left"):
            acquire(tmp_path)
    acquire(tmp_path).release()


@pytest.mark.usefixtures("no_flock")
def test_the_heart_beats_and_renews_the_file(tmp_path, monkeypatch):
    beaten, confirm = threading.Event(), owners.OwnerFile.confirm

    def beat(self: owners.OwnerFile) -> None:
        os.utime(tmp_path / OWNER, (0, 0))
        confirm(self)
        beaten.set()

    monkeypatch.setattr(owners.OwnerFile, "confirm", beat)
    monkeypatch.setattr(owners, "RENEW_SECONDS", 0.001)
    lock = acquire(tmp_path)
    assert beaten.wait(300)
    lock.release()
    assert not (tmp_path / OWNER).exists()


@pytest.mark.usefixtures("no_flock")
def test_a_run_whose_folder_was_taken_over_ends_before_it_saves(tmp_path):
    path = tmp_path / "m"
    with ModelFolder(path) as folder:
        _save(folder, 1)
        (path / OWNER).unlink()  # by hand: nobody has taken it
        _save(folder, 2)
        assert read_owner(path) == Owner.of_this_process()
        (path / OWNER).write_bytes(_elsewhere().line)
        before = (path / "state.json").read_bytes()
        with pytest.raises(SaveError, match="process 17 on elsewhere has taken it"):
            _save(folder, 3)
        assert (path / "state.json").read_bytes() == before
        assert sorted(os.listdir(path / "generations")) == ["1", "2"]
    assert read_owner(path) == _elsewhere(), "it is not this run's to remove"
