"""A launcher of ranks: a process for each GPU of this machine, watched until all have ended.

Standard input and output are the first rank's. What a rank writes to its standard error is relayed
line by line, with "rank 3: " before those of all but the first, and what mien itself says there in
several ranks is told once. A signal that ends a run is forwarded to every rank,
a request (SIGUSR1, SIGUSR2) to the first; a second Ctrl-C or SIGTERM kills them all. A rank that
outlives its launcher is sent SIGTERM by the kernel.
"""

import ctypes
import functools
import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from ..console.keyboard import Terminal
from ..console.outcome import Outcome
from ..system.signals import Handlers

_GRACE_S = 8.0
"""Seconds for the others to find out by themselves that a rank is lost, so that all have ended
within 10. Chosen: gloo takes 3 on a CPU, NCCL is unmeasured."""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INSISTENT = (signal.SIGINT, signal.SIGTERM)
_REQUESTS = (signal.SIGUSR1, signal.SIGUSR2)

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_libc = ctypes.CDLL(None)  # loaded here: a forked process must load nothing


@dataclass(frozen=True)
class Place:
    """What one rank trains on."""

    name: str
    """A GPU or the CPU, in words."""

    visible: str | None = None
    """Name in CUDA_VISIBLE_DEVICES; None: it is no GPU."""


@dataclass(frozen=True)
class Ended:
    """A rank that has ended."""

    rank: int
    place: Place
    pid: int
    code: int
    """Exit code; minus the number of the signal that ended it."""

    was_killed: bool = False
    """Whether the launcher has ended it."""

    complaints: tuple[str, ...] = ()
    """Lines that mien itself has written to its standard error."""

    def __str__(self) -> str:
        how = f"failed with exit code {self.code}"
        if self.code < 0:
            names = {each.value: each.name for each in signal.Signals}
            how = f"was ended by {names.get(-self.code, f'signal {-self.code}')}"
        return f"rank {self.rank} ({self.place.name}, pid {self.pid}) {how}"


def launch(
    command: Callable[[int], Sequence[str]],
    places: Sequence[Place],
    *,
    restarts: int,
    saved: Callable[[], str],
    report: Callable[[str], None],
) -> int:
    """Train on some places, and on those that are left where a rank is lost; the exit code.

    It is the first rank's. Where that was killed, it says how the run ended all the same: stopped,
    halted, or by the failure of another rank. After a second signal this process ends by it.

    Args:
        command: Gives the words that start a rank, by the number of the restart, from 0.
        places: Place of each rank.
        restarts: Times to go on from the last save.
        saved: Gives what is saved, as a clause.
        report: Called with a line about how the run ended where no rank has one.
    """
    # Not torchrun as a library, which ends with 1 and a traceback after a clean save.
    with Launcher() as launcher:
        for restart in itertools.count():
            ended = launcher.run(command(restart), places, restart)
            # After a stop none is lost: a signal ends a rank that does not listen yet.
            lost = None if launcher.stopped_by else lost_rank(ended)
            _relay_complaints(ended, lost)
            if lost is None:
                break
            # Without the lost one's: a GPU that has failed would most likely fail again.
            places = [place for place in places if place is not lost.place]
            goes_on = restart < restarts and places
            left = ", ".join(place.name for place in places)
            follows = f"restart {restart + 1} of {restarts} goes on with {left}"
            if _first(ended).code != Outcome.HALTED:  # else it has said so itself
                report(f"{lost}; {saved()}; {follows if goes_on else 'start again to go on'}")
            elif goes_on:
                report(follows)
            if not goes_on:
                break
    # By the signal itself, so that a shell or a scheduler sees what has ended it.
    if launcher.insisted_by:
        signal.signal(launcher.insisted_by, signal.SIG_DFL)
        os.kill(os.getpid(), launcher.insisted_by)
    if launcher.stopped_by and _first(ended).code < 0:  # it did not listen yet
        report(f"{launcher.stopped_by.name} received before training began")
    return exit_code(ended, stopped=launcher.stopped_by is not None)


def lost_rank(ended: Sequence[Ended]) -> Ended | None:
    """The rank whose loss has ended the others: one ended by a signal, else the first that crashed;
    None: the run has ended as it should, or has said itself why not."""
    if _first(ended).code in (Outcome.DONE, Outcome.STOPPED):
        return None
    failed = [each for each in ended if not each.was_killed and each.code not in list(Outcome)]
    return min(failed, key=lambda each: each.code >= 0, default=None)


def exit_code(ended: Sequence[Ended], *, stopped: bool) -> int:
    """Exit code of a run whose ranks have ended in this order."""
    code = _first(ended).code
    if code >= 0:
        return code
    if stopped:
        return Outcome.STOPPED
    return next((each.code for each in ended if each.code > 0), Outcome.HALTED)


def _first(ended: Iterable[Ended]) -> Ended:
    return next(each for each in ended if each.rank == 0)


class Launcher:
    """Starts ranks and watches them; while entered, it has the signals of this process."""

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        """The first signal that ends a run."""

        self.insisted_by: signal.Signals | None = None
        """A second one, upon which the ranks were killed."""

        self._ranks: list[_Rank] = []
        """Ranks under way."""

        self._has_insisted = False
        self._terminal = Terminal(0)
        self._handlers = Handlers(
            dict.fromkeys(_ENDING, self._stop) | dict.fromkeys(_REQUESTS, self._request)
        )

    def __enter__(self) -> "Launcher":
        self._handlers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.__exit__()
        # A first rank that was killed has left it without echo.
        self._terminal.restore()

    def run(self, command: Sequence[str], places: Sequence[Place], restart: int = 0) -> list[Ended]:
        """Start a rank in each place; the ranks in the order of their ends, once all have ended.

        Args:
            command: Words that start a rank.
            places: Place of each rank.
            restart: Number of times that ranks of this run have been started before.
        """
        ended: list[Ended] = []
        deadline: float | None = None
        with selectors.DefaultSelector() as selector:
            self._start(command, places, restart, selector)
            started = self._ranks
            while self._ranks:
                left_s = None if deadline is None else max(deadline - time.monotonic(), 0)
                # Each once, in order: a rank has two handles.
                ready = {key.data: None for key, _ in selector.select(left_s)}
                for each in (rank.look() for rank in ready):
                    if each is None:
                        continue
                    ended.append(each)
                    # A new list and no removal: a signal's handler may be walking the old one.
                    self._ranks = [rank for rank in self._ranks if rank.number != each.rank]
                    if deadline is None and _ends_others(each):
                        deadline = time.monotonic() + _GRACE_S
                if deadline is not None and time.monotonic() >= deadline:
                    self._kill()
                    # Moved on: a deadline that is past would have this loop spin.
                    deadline += _GRACE_S
        # Only now: until then the others can see how a process has ended.
        for rank in started:
            rank.reap()
        return ended

    def _start(
        self,
        command: Sequence[str],
        places: Sequence[Place],
        restart: int,
        selector: selectors.BaseSelector,
    ) -> None:
        variables = _variables(places, restart)
        for number, place in enumerate(places):
            stream = subprocess.DEVNULL if number else None
            process = subprocess.Popen(
                command,
                env=os.environ | variables | {"RANK": str(number), "LOCAL_RANK": str(number)},
                stdin=stream,
                stdout=stream,
                stderr=subprocess.PIPE,
                preexec_fn=functools.partial(_end_with, os.getpid()),
            )
            self._ranks = [*self._ranks, _Rank(number, place, process, selector)]
        if self.stopped_by:  # meanwhile
            # Again to those that had it: a rank notes a signal once.
            self._send(self.stopped_by, self._ranks)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._has_insisted and received in _INSISTENT:
            self.insisted_by = received
            self._kill()
            return
        # Not by a terminal that is closed: shells send that signal several times.
        self._has_insisted |= received in _INSISTENT
        self.stopped_by = self.stopped_by or received
        self._send(received, self._ranks)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self._send(signal.Signals(number), self._ranks[:1])

    def _send(self, number: signal.Signals, ranks: Iterable["_Rank"]) -> None:
        for rank in ranks:
            rank.send(number)

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.was_killed = True
            rank.send(signal.SIGKILL)


class _Rank:
    """A rank under way.

    Args:
        number: Number of the rank.
        place: Place that it trains on.
        process: Process whose standard error is a pipe.
        selector: Selector that wakes the launcher when it has written or ended.
    """

    def __init__(
        self,
        number: int,
        place: Place,
        process: subprocess.Popen[bytes],
        selector: selectors.BaseSelector,
    ) -> None:
        self.number, self.place, self.process = number, place, process
        self.was_killed = False
        assert process.stderr is not None
        self._selector, self._stderr = selector, process.stderr
        # A handle that can be waited for like a pipe, and never becomes another process's.
        self._handle = os.pidfd_open(process.pid)
        self._rest = b""
        self._complaints: list[str] = []
        # Half a line of one rank must not hold up what the others write.
        os.set_blocking(self._stderr.fileno(), False)
        for handle in (self._handle, self._stderr):
            # Both wake the launcher: a rank may end without a word, or write and go on.
            selector.register(handle, selectors.EVENT_READ, self)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; one that has ended stays as it is."""
        signal.pidfd_send_signal(self._handle, number)

    def look(self) -> Ended | None:
        """Relay what it has written; how it ended, where it has."""
        # First: what it has written before its end is there by then.
        # Without reaping it, so that the other ranks can see how it has ended.
        end = os.waitid(os.P_PIDFD, self._handle, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if not self._stderr.closed:
            self._relay(is_last=end is not None)
        if end is None:
            return None
        code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        self._selector.unregister(self._handle)
        complaints = tuple(self._complaints)
        return Ended(self.number, self.place, self.process.pid, code, self.was_killed, complaints)

    def reap(self) -> None:
        """Let go of the process, which has ended."""
        self.process.wait()
        os.close(self._handle)

    def _relay(self, *, is_last: bool) -> None:
        written = b""
        with suppress(BlockingIOError):  # more may follow, of a process that it started
            while written := os.read(self._stderr.fileno(), 1 << 16):
                *lines, self._rest = (self._rest + written).split(b"\n")
                for line in lines:
                    self._print(line)
            is_last = True
        if is_last:
            self._selector.unregister(self._stderr)
            self._stderr.close()
            if self._rest:
                self._print(self._rest)

    def _print(self, line: bytes) -> None:
        # A library may write anything: bytes that are no UTF-8 must not end the relay.
        text = line.decode(errors="backslashreplace")
        if text.startswith("mien "):
            self._complaints.append(text)
            if self.number > 0:
                return  # until it is known whether the first has said the same
        _relay(self.number, text)


def _relay(rank: int, line: str) -> None:
    """Print a line of a rank."""
    name = f"rank {rank}: "
    if rank == 0 or line.startswith(name):
        name = ""
    sys.stderr.write(f"{name}{line}\n")
    sys.stderr.flush()


def _relay_complaints(ended: Sequence[Ended], lost: Ended | None) -> None:
    """Print what mien has said in other ranks than the first: each line once, and nothing of a rank
    that was lost, of which the launcher knows most."""
    told: set[str] = set()
    for rank in sorted(ended, key=lambda each: each.rank):
        for line in rank.complaints:
            is_of_lost = lost is not None and f"pid {lost.pid}" in line
            if rank.rank > 0 and line not in told and not is_of_lost:
                _relay(rank.rank, line)
            told.add(line)


def _variables(places: Sequence[Place], restart: int) -> dict[str, str]:
    """What torchrun would have in the environment of all ranks, and the GPUs that they see."""
    # A free one of the system's choice, so that two runs on a machine do not meet.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    variables = {
        "WORLD_SIZE": str(len(places)),
        "LOCAL_WORLD_SIZE": str(len(places)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # By which the words of one start are kept from those of another.
        "TORCHELASTIC_RESTART_COUNT": str(restart),
    }
    visible = [place.visible for place in places if place.visible is not None]
    if visible:
        if "CUDA_VISIBLE_DEVICES" not in os.environ:
            # As nvidia-smi numbers them; else the fastest would be the first.
            variables["CUDA_DEVICE_ORDER"] = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
    if "OMP_NUM_THREADS" not in os.environ:
        # Else each of them would take all cores.
        num_cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = str(max(num_cores // len(places), 1))
    return variables


def _ends_others(ended: Ended) -> bool:
    """Whether the other ranks cannot go on; one that is done may only be earlier than they are."""
    is_good = ended.code in (Outcome.DONE, Outcome.HALTED, Outcome.STOPPED)
    return ended.rank == 0 or not is_good


def _end_with(launcher: int) -> None:
    """Have the kernel send this process SIGTERM when its launcher ends."""
    # SIGTERM, upon which a rank saves before it ends.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it has ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)
