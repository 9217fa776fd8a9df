"""The owner file of a model folder, on a disk whose flock does not do: one run at a time there too.

`.owner` is made by whoever finds none, in one step (O_EXCL), and removed at the end of its run. It
holds "<pid> <host> <machine> <start>": the machine is its boot and the space of its process numbers
(a container has its own), the start tells a process from a later one of the same number. The run
writes it again every 15 s, its heartbeat.

One that was left behind is taken over:

    of this machine     when its process is gone
    of another one      when its last heartbeat is older than 5 minutes, by the disk's own clock

A run whose file was taken over, after a pause of minutes, notices before its next save and ends.
Whoever removes a file renames it first and looks at it once more: one that was renewed meanwhile is
put back.
"""

import os
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..system.durable_files import DamagedError, discard, open_plain, read_regular
from ..system.processes import is_running, process_space, start_of

OWNER = ".owner"
RENEW_SECONDS, STALE_SECONDS = 15.0, 300.0
"""Seconds between two signs of life of an owner, and after which a silent one is given up: twenty
missed ones. Chosen, unmeasured."""

# The longest line that `_WORDS` takes has 543.
MAX_OWNER_BYTES = 1000
_TRIES = 5
# Neither 0 nor a minus as a number: to the system these stand for groups of processes.
_WORDS = re.compile(r"([1-9]\d{0,9}) (\S{1,255})(?: (\S{1,255}) (\d{1,20}))?", re.ASCII)


@dataclass(frozen=True)
class Owner:
    """A process that uses, or has used, a model folder."""

    pid: int
    host: str
    machine: str
    """Boot and process numbers (`process_space`); empty in a lock file of an earlier mien, which
    names the host alone."""

    start: int
    """Start of the process, in ticks since the machine was booted; 0 where it is not known."""

    @classmethod
    def of_this_process(cls) -> "Owner":
        """What this process writes of itself."""
        pid = os.getpid()
        return cls(pid, _host(), process_space(), start_of(pid) or 0)

    @classmethod
    def from_words(cls, words: str) -> "Owner | None":
        """The process that was written down in such words; None where they are others."""
        match = _WORDS.fullmatch(words)
        return cls(int(match[1]), match[2], match[3] or "", int(match[4] or 0)) if match else None

    @property
    def words(self) -> str:
        """What stands for the process in an owner file, and in a lock file."""
        return f"{self.pid} {self.host} {self.machine} {self.start}"

    @property
    def line(self) -> bytes:
        """What an owner file holds."""
        return f"{self.words}\n".encode()

    @property
    def is_here(self) -> bool:
        """Whether its process can be looked for."""
        # By the name alone only where nothing better was written down: containers and cloned
        # machines share one, and a machine may be given another.
        if not self.machine:
            return self.host == _host()
        return self.machine == process_space()

    @property
    def is_running(self) -> bool:
        """Whether its process is there; of another machine this cannot be seen and is False."""
        return self.is_here and is_running(self.pid, self.start)

    @property
    def place(self) -> str:
        """Machine or container of its process, in words."""
        if self.is_here:
            return "this machine"
        return self.host if self.host != _host() else f"another machine or container {self.host}"

    def __str__(self) -> str:
        words = f"process {self.pid}" + ("" if self.is_here else f" on {self.place}")
        # The file may be anybody's, and the words go to a terminal.
        return words if words.isprintable() else "an unknown process"


@dataclass(frozen=True)
class _Found:
    """An owner file as it was found."""

    owner: Owner | None
    """Process that it names; None where it names none of mien's."""

    renewed_at: float
    """Time of its last heartbeat, by the disk's clock."""

    @classmethod
    def at(cls, path: Path) -> "_Found | None":
        """What is found at a path; None where there is nothing."""
        try:
            # Before it is read: what is written in between makes a later look differ.
            renewed_at = os.lstat(path).st_mtime
        except FileNotFoundError:
            return None
        return cls(_owner_in(path), renewed_at)


class InUseError(Exception):
    """The folder is another run's; the message names its process.

    Args:
        owner: The process; None where the owner file names none, or none yet.
    """

    def __init__(self, owner: Owner | None) -> None:
        super().__init__("an unknown process" if owner is None else str(owner))
        self.owner = owner


def _host() -> str:
    """Name of this host, as one word, which it need not be."""
    return re.sub(r"\s", "-", socket.gethostname())


def read_owner(folder: Path) -> Owner | None:
    """Process that the owner file of a folder names; None where there is none, or none of
    mien's."""
    return _owner_in(folder / OWNER)


def _owner_in(path: Path) -> Owner | None:
    try:
        line = read_regular(path, MAX_OWNER_BYTES).decode(errors="replace")
    except (OSError, DamagedError):
        return None
    # Half a line is none: it would name another process.
    owner = Owner.from_words(line.removesuffix("\n")) if line.endswith("\n") else None
    return owner if owner is not None and owner.machine else None


class OwnerFile:
    """The owner file of this process in a folder, renewed by a thread until `release`.

    Raises:
        InUseError: Another run has the folder.
        OSError: The file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / OWNER
        self._own = Owner.of_this_process()
        self._take()
        self._confirming = threading.Lock()
        self._ended = threading.Event()
        # A daemon: a process that fails must not live on by its heartbeat.
        self._heart = threading.Thread(target=self._beat, name="mien-owner", daemon=True)
        self._heart.start()

    def confirm(self) -> None:
        """Renew the file; InUseError where another run has taken the folder over meanwhile."""
        # Not the heart and a save at once: where the file is gone, either would meet the other's.
        with self._confirming:
            try:
                self._renew()
                # Twice: who took the file for stale may have moved it away under the first write.
                self._renew()
            except FileNotFoundError:  # removed by hand, and nobody has begun since
                self._take()

    def release(self) -> None:
        """End the heartbeat, and remove the file where it is still this process's; once."""
        if self._ended.is_set():
            return
        self._ended.set()
        # A beat under way would write the file anew after it was removed.
        self._heart.join()
        with suppress(OSError):
            found = _Found.at(self._path)
            if found is not None and found.owner == self._own:
                self._clear_away(found)

    def _beat(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with suppress(OSError, InUseError):  # a save, which matters, meets both
                self.confirm()

    def _renew(self) -> None:
        handle = open_plain(self._path, os.O_RDWR)
        try:
            if os.pread(handle, MAX_OWNER_BYTES, 0) != self._own.line:
                raise InUseError(read_owner(self._path.parent))
            # The same bytes: the new time of the file is the sign of life.
            os.pwrite(handle, self._own.line, 0)
            os.fsync(handle)
        finally:
            os.close(handle)

    def _take(self) -> None:
        for _ in range(_TRIES):
            with suppress(FileExistsError):
                self._make()
                return
            found = _Found.at(self._path)
            if found is not None:
                if not self._is_stale(found):
                    raise InUseError(found.owner)
                self._clear_away(found)
        raise InUseError(None)  # one that is just starting

    def _make(self) -> None:
        """Make the file, in one step; FileExistsError where there is one."""
        handle = open_plain(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.write(handle, self._own.line)
            os.fsync(handle)
        except OSError:
            # As on a full disk: an empty one would keep everybody out for minutes.
            discard(self._path)
            raise
        finally:
            os.close(handle)

    def _is_stale(self, found: _Found) -> bool:
        # Of an empty file, too, its age decides: whoever makes one writes it a moment later.
        if found.owner is not None and found.owner.is_here:
            return not found.owner.is_running
        # The disk's clock against itself: two hosts' clocks may be minutes apart.
        return self._now() - found.renewed_at > STALE_SECONDS

    def _now(self) -> float:
        """The time by the disk's clock, which need not be this machine's."""
        probe = self._own_name("now")
        discard(probe)
        try:
            os.close(open_plain(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            return os.lstat(probe).st_mtime
        finally:
            discard(probe)

    def _clear_away(self, found: _Found) -> None:
        """Remove a file that was found; not one that was renewed, or put there, since."""
        aside = self._own_name("stale")
        discard(aside)
        try:
            # Renamed before it is looked at: between a look and a removal another could come.
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if _Found.at(aside) == found:
            discard(aside)
        else:
            os.rename(aside, self._path)

    def _own_name(self, purpose: str) -> Path:
        # Of this process alone: two that clear away at the same time must not meet in one name.
        return self._path.with_name(f"{OWNER}.{process_space()}.{os.getpid()}.{purpose}")
