"""The streams that a user reads. What becomes of them does not become of the run.

Any error of such a stream means that its reader is gone: EIO of a terminal that was closed, ENOSPC
of a full disk behind `> log`, EPIPE of a program that has seen enough. What follows is dropped.
"""

import errno
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_PATIENCE_MS = 1000
"""Milliseconds to wait for a reader of the output. Chosen, unmeasured."""

_STANDARD = (1, 2)


class OutputLost(Exception):
    """Loss of an output that nobody reads any more, and for which the command was called."""

    def __init__(self, error: OSError | ValueError) -> None:
        super().__init__(getattr(error, "strerror", None) or str(error))
        self.reader_has_left = isinstance(error, BrokenPipeError)


class Output:
    """A text stream whose reader may leave; in all else it is like the stream that it writes to.

    Args:
        stream: Stream to guard; None where the program was started without one (`>&-`).
    """

    def __init__(self, stream: "TextIO | Output | None") -> None:
        # Not through another one, which would take the error for itself.
        self.stream: TextIO | None = stream.stream if isinstance(stream, Output) else stream
        self._is_lost = self.stream is None
        self._why: OutputLost | None = None
        self._may_wait, self._is_writing = True, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        try:
            return not self._is_lost and self.stream is not None and self.stream.isatty()
        except ValueError:  # it was closed
            return False

    def write(self, text: str) -> int:
        """Write what the stream's encoding has, and escapes for the rest."""
        stream = self.stream
        if stream is not None:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            # A terminal in ASCII would end the run at the first name that it has no sign for.
            shown = text.encode(encoding, "backslashreplace").decode(encoding)
            self._attempt(lambda: stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if self.stream is not None:
            self._attempt(self.stream.flush)

    def require(self) -> None:
        """Make sure that all that was written has been taken.

        Raises:
            OutputLost: It was not.
        """
        self.flush()
        if self._why is not None:
            raise self._why

    def hurry(self) -> None:
        """Wait no more for a reader that does not read, now and from now on.

        May be called by the handler of a signal, also of one that came while this waits.
        """
        self._may_wait = False
        if self._is_writing and self._is_stuck():
            self._lose()

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._is_lost:
            return
        if not self._may_wait and self._is_stuck():
            self._lose()
            return
        self._is_writing = True
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._why = OutputLost(error)
            self._lose()
        finally:
            self._is_writing = False

    def _lose(self) -> None:
        """Drop all that follows; what is still in a buffer goes nowhere when the program ends."""
        self._is_lost = True
        with suppress(OSError, ValueError):
            handle = self._handle()
            if handle in _STANDARD:
                _lead_nowhere(handle)

    def _is_stuck(self) -> bool:
        """Whether a write would wait, and still would after a second."""
        try:
            # Not `select`, which takes no handle above 1023.
            waiting = select.poll()
            waiting.register(self._handle(), select.POLLOUT)
            return not waiting.poll(_PATIENCE_MS)
        except (OSError, ValueError):  # it is no file
            return False

    def _handle(self) -> int:
        return -1 if self.stream is None else self.stream.fileno()


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Make the program's own output and error output such streams, inside the context."""
    _open_missing()
    before = sys.stdout, sys.stderr
    own = Output(before[0]), Output(before[1])
    sys.stdout, sys.stderr = own
    try:
        yield
    finally:  # whoever has put other streams in their place meanwhile keeps those
        if sys.stdout is own[0]:
            sys.stdout = before[0]
        if sys.stderr is own[1]:
            sys.stderr = before[1]


class _Silence:
    """Error output of the process that leads nowhere while at least one thread wants it so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._kept: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1
            # The first one silences, the last one ends it: the handle is the whole process's.
            if self._count == 1:
                with suppress(OSError):  # the process has none
                    # By the handle: libraries write to it, past `sys.stderr`.
                    self._kept = os.dup(2)
                    _lead_nowhere(2)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._kept is not None:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._kept = None


_silence = _Silence()


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Keep what libraries print by themselves on the error output from the user, meanwhile.

    libpng names what it finds in a stranger's file there, control characters and all, and has a
    line for every damaged one; what is wrong comes back as an error, too. Nothing of mien's own is
    to be printed there at the same time.
    """
    with _silence:
        yield


def _open_missing() -> None:
    """Have the standard handles that the program was started without lead nowhere.

    Else a file that is opened later gets such a number, and what libraries print goes into it.
    """
    for handle in (0, *_STANDARD):
        try:
            os.fstat(handle)
        except OSError as error:
            if error.errno == errno.EBADF:
                _lead_nowhere(handle)


def _lead_nowhere(handle: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    # The lowest free number was the missing one itself.
    if nowhere == handle:
        # As every standard handle: programs that are started from here expect to have it.
        os.set_inheritable(handle, True)
    else:
        os.dup2(nowhere, handle)
        os.close(nowhere)
