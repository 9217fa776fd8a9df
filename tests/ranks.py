"""Ranks of a run as forked processes on this machine, which talk over gloo."""

import io
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mien.cli import main
from mien.core.distribute.group import open_group
from mien.core.distribute.ranks import from_environment

_PATIENCE_S = 120.0


@dataclass
class Rank:
    """A process that was started as a rank."""

    pid: int
    err: Path
    _output: int
    out: str = ""
    """What it has printed, as far as it was waited for."""

    _handle: int = field(init=False)

    def __post_init__(self) -> None:
        self._handle = os.pidfd_open(self.pid)

    def wait_for(self, text: str, timeout_s: float = _PATIENCE_S) -> None:
        """Wait until it has printed a text."""
        until = time.monotonic() + timeout_s
        while text not in self.out:
            ready, _, _ = select.select([self._output], [], [], max(until - time.monotonic(), 0))
            piece = os.read(self._output, 1 << 16) if ready else b""
            if not piece:
                raise TimeoutError(f"no {text!r} in {self.out}{self.err.read_text()}")
            self.out += piece.decode()

    def wait(self, timeout_s: float = _PATIENCE_S) -> int:
        """Exit code; of a process that a signal has ended the signal's number, negative."""
        ended, _, _ = select.select([self._handle], [], [], max(timeout_s, 0))
        if not ended:
            raise TimeoutError(f"rank of pid {self.pid} has not ended: {self.err.read_text()}")
        os.close(self._handle)
        with open(self._output) as output:
            self.out += output.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """End it by SIGKILL, if it has not ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def start(num_ranks: int, run: Callable[[], int], folder: Path) -> list[Rank]:
    """Start ranks that each call ``run`` and end with the exit code that it returns.

    What they print as errors goes to files in a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for number in range(num_ranks):
        place = {
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        err = folder / f"{number}.err"
        err.write_text("")
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ |= {name: str(value) for name, value in place.items()}
            _run_child(run, writing, err)
        os.close(writing)
        ranks.append(Rank(pid, err, reading))
    return ranks


def _run_child(run: Callable[[], int], output: int, err: Path) -> None:
    """Be a rank, and leave nothing of the test's process to its end."""
    torch.set_num_threads(1)
    for number, handle in enumerate(
        (os.open(os.devnull, os.O_RDONLY), output, os.open(err, os.O_WRONLY))
    ):
        os.dup2(handle, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
    try:
        code = run()
    except:  # noqa: E722  a child must not go on as the test that it was forked from
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_all(ranks: list[Rank], timeout_s: float = _PATIENCE_S) -> list[int]:
    """Exit codes of all ranks; where they take longer, all are killed."""
    until = time.monotonic() + timeout_s
    try:
        return [rank.wait(until - time.monotonic()) for rank in ranks]
    except TimeoutError:
        for rank in ranks:
            rank.kill()
        raise


def train(num_ranks: int, argv: list[str], folder: Path) -> list[Rank]:
    """Ranks that run `mien train` with these words."""
    return start(num_ranks, lambda: main(argv), folder)


def call(num_ranks: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Results of a function of the connected group, on every rank: tensors and plain values."""

    def run() -> int:
        place = from_environment()
        assert place is not None
        group = open_group(place)
        result = io.BytesIO()
        torch.save(function(group, *args), result)
        (folder / f"{place.rank}.result").write_bytes(result.getvalue())
        group.close()
        return 0

    ranks = start(num_ranks, run, folder)
    codes = wait_all(ranks)
    assert codes == [0] * num_ranks, [rank.err.read_text() for rank in ranks]
    return [torch.load(folder / f"{number}.result") for number in range(num_ranks)]
