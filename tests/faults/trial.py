"""One training in a process of its own, cheap enough to be killed hundreds of times.

A training takes seconds to start, nearly all of it imports. So this process imports everything once
and never trains itself; each trial is a fork of it (before any thread was started) that spoils
something first, by a *sabotage*, and then runs `mien train` as the command line does.
"""

import contextlib
import errno
import json
import os
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Sabotage = Callable[[], None]

TIMEOUT_S = 60.0


def warm_up() -> None:
    """Import all that a training does, with one thread for everything: a fork has no others."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    import torch._dynamo  # all custom operators ask for it at their first call
    from torch.utils import tensorboard  # noqa: F401

    from mien import models
    from mien.cli import train  # noqa: F401
    from mien.core.config import all_settings
    from mien.core.training import unattended  # noqa: F401

    all_settings()  # reads its own sources
    models.family("lightweight")


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    code: int
    """Its exit code; minus the number of the signal that ended it."""

    events: list[dict[str, Any]]
    error: str
    """What it wrote to the standard error."""

    seconds: float

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def told(self) -> str:
        """All that the user was told besides the events' figures."""
        reasons = [str(e.get("message") or e.get("reason") or "") for e in self.events]
        return "\n".join([*filter(None, reasons), self.error.strip()])

    @property
    def last_save(self) -> int:
        """The last iteration that was told to be saved; 0: none."""
        return max((e["iteration"] for e in self.events if e["event"] == "save"), default=0)


class Trial:
    """A training under way in a fork of this process."""

    def __init__(self, words: list[str], output: Path, sabotage: Sabotage | None = None) -> None:
        self._output = output
        for suffix in (".out", ".err"):  # the child may be killed before it writes
            output.with_suffix(suffix).touch()
        self._began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            self.pid = os.fork()
        if self.pid == 0:
            _train(words, output, sabotage)

    def events(self) -> list[dict[str, Any]]:
        """What it has told so far."""
        lines = self._output.with_suffix(".out").read_text().splitlines()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that was cut off
                found.append(json.loads(line))
        return found

    def kill(self) -> None:
        """End it as `kill -9` does."""
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, as SIGTERM does."""
        os.kill(self.pid, signal.SIGTERM)

    def end(self, kill_after_s: float | None = None) -> Outcome:
        """Wait for its end; kill it after so many seconds. One that hangs is killed by SIGABRT."""
        limit, number = TIMEOUT_S, signal.SIGABRT
        if kill_after_s is not None:
            limit, number = kill_after_s, signal.SIGKILL
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            left = self._began + limit - time.monotonic()
            if left <= 0:
                os.kill(self.pid, number)
                limit = float("inf")
            time.sleep(min(max(left, 0.0002), 0.002))
        return Outcome(
            code=os.waitstatus_to_exitcode(status),
            events=self.events(),
            error=self._output.with_suffix(".err").read_text(),
            seconds=time.monotonic() - self._began,
        )


def _train(words: list[str], output: Path, sabotage: Sabotage | None) -> None:
    """The child: never returns."""
    code = 1
    try:
        for number, suffix in ((1, ".out"), (2, ".err")):
            handle = os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
            os.close(handle)
        from mien.cli import main

        if sabotage:
            sabotage()
        code = main(words)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - what Python itself would do with it
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# What a sabotage is made of


def die_at_call(number: int) -> Sabotage:
    """Be killed just before, or half way through, the n-th call that changes the disk."""

    def act(_name: str, count: int, half: Callable[[], None]) -> None:
        if count == number:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: _watch_disk(act)


def kill_at_call(number: int, other: Path) -> Sabotage:
    """Kill the process whose number stands in a file just before the n-th call that changes the
    disk of this one; none where it has not left its number yet."""

    def act(_name: str, count: int, _half: Callable[[], None]) -> None:
        if count == number:
            with contextlib.suppress(FileNotFoundError):
                os.kill(int(other.read_text()), signal.SIGKILL)

    return lambda: _watch_disk(act)


def leave_pid(path: Path) -> Sabotage:
    """Leave the number of the process in a file."""

    def arm() -> None:
        path.write_text(str(os.getpid()))

    return arm


def count_calls(report: Path) -> Sabotage:
    """Count the calls that change the disk; the number is the size of the file ``report``."""
    handle = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def act(_name: str, _count: int, _half: Callable[[], None]) -> None:
        os.write(handle, b"x")

    return lambda: _watch_disk(act)


def fail_at_call(number: int, error: int, names: tuple[str, ...], *, lasts: bool) -> Sabotage:
    """Have the n-th call of these fail with an errno, once or from then on."""
    seen = 0

    def act(name: str, _count: int, _half: Callable[[], None]) -> None:
        nonlocal seen
        if name in names:
            seen += 1
            if seen == number or (lasts and seen > number):
                raise OSError(error, os.strerror(error))

    return lambda: _watch_disk(act)


LACKING: dict[str, tuple[str, str, int]] = {
    "permissions": ("os", "chmod", errno.EPERM),
    "flock": ("fcntl", "flock", errno.ENOLCK),
    "a flush of folders": ("os", "fsync", errno.EINVAL),
    "hard links": ("os", "link", errno.EPERM),
    "mapped files": ("mmap", "mmap", errno.ENODEV),
    "reserved room": ("os", "posix_fallocate", errno.EOPNOTSUPP),
    "copies of its own": ("os", "copy_file_range", errno.EXDEV),
}
"""What a disk may not have: the call, and how it is refused."""


def lack(*names: str) -> Sabotage:
    """Train on a disk that lacks some of `LACKING`."""

    def arm() -> None:
        import importlib

        for module, name, error in (LACKING[each] for each in names):
            place = importlib.import_module(module)
            setattr(place, name, _refused(getattr(place, name), name, error))

    return arm


def _refused(call: Callable[..., Any], name: str, error: int) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if name == "fsync" and not stat.S_ISDIR(os.fstat(args[0]).st_mode):
            return call(*args, **kwargs)
        raise OSError(error, os.strerror(error))

    return refuse


CALLS = ("rename", "replace", "fsync", "link", "unlink", "mkdir", "rmdir", "open", "ftruncate")


def _watch_disk(act: Callable[[str, int, Callable[[], None]], None]) -> None:
    """Call ``act`` with name and number before each call that changes the disk.

    Its last argument leaves what a write that is under way would leave: half of the file.
    """
    import builtins

    import safetensors.torch

    count = 0

    def watched(
        name: str, call: Callable[..., Any], half: Callable[..., None] | None = None
    ) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            act(name, count, lambda: half(*args, **kwargs) if half else None)
            return call(*args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    save_file, plain_open = safetensors.torch.save_file, builtins.open

    def half_of_it(tensors: Any, path: Path, **more: Any) -> None:
        save_file(tensors, path, **more)
        os.truncate(path, os.path.getsize(path) // 2)

    safetensors.torch.save_file = watched("save_file", save_file, half_of_it)
    watched_open = watched("write", plain_open)

    def open_to_write(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        chosen = watched_open if set(mode) & set("wxa+") else plain_open
        return chosen(file, mode, *args, **kwargs)

    builtins.open = open_to_write  # type: ignore[assignment]


def when(event: str, iteration: int, act: Callable[[], None]) -> Sabotage:
    """Do something once, when an event (`start`, `step`, `save`, `preview`) of this iteration or a
    later one is told."""

    def arm() -> None:
        from mien.core.console.reporter import Reporter

        tell, done = getattr(Reporter, event), False

        def told(self: Any, *args: Any, **fields: Any) -> None:
            nonlocal done
            tell(self, *args, **fields)
            if not done and fields.get("iteration", iteration) >= iteration:
                done = True
                act()

        setattr(Reporter, event, told)

    return arm


def before(owner: str, name: str, act: Callable[[], None], number: int = 1) -> Sabotage:
    """Do something just before the n-th call of a function of ``owner``: a module, or one of its
    classes as `module:Class`."""

    def arm() -> None:
        import importlib

        module, _, inner = owner.partition(":")
        place = importlib.import_module(module)
        place = getattr(place, inner) if inner else place
        call, count = getattr(place, name), 0

        def told(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                act()
            return call(*args, **kwargs)

        setattr(place, name, told)

    return arm


def both(one: Sabotage, other: Sabotage) -> Sabotage:
    """One sabotage and then another."""

    def arm() -> None:
        one()
        other()

    return arm


@contextlib.contextmanager
def ended(trial: Trial) -> Iterator[Trial]:
    """A trial that does not outlive a case that fails."""
    try:
        yield trial
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(trial.pid, os.WNOHANG)[0] == 0:
                trial.kill()
                os.waitpid(trial.pid, 0)
