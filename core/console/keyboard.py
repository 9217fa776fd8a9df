"""Keys as they are pressed on the terminal, without Enter and without their echo.

The terminal is put back when the program ends, stops or is put aside with Ctrl-Z, and left alone
while another program has it: to touch it from the background would stop this one.
"""

import os
import select
import signal
import termios
import time
import tty
from contextlib import suppress
from types import FrameType

from ..system.signals import Handlers

_SECONDS_BETWEEN_LOOKS = 0.1  # at the keys; chosen, unmeasured


class Terminal:
    """Attributes of the terminal behind a handle as they are now, to be put back."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._original: list | None = None
        with suppress(termios.error):  # it is no terminal
            self._original = termios.tcgetattr(handle)

    def restore(self) -> None:
        """Put the terminal back, where this program is the one in its foreground."""
        if self._original is not None and _is_in_foreground(self._handle):
            with suppress(termios.error):  # it was closed at this moment
                termios.tcsetattr(self._handle, termios.TCSANOW, self._original)


class Keyboard:
    """Make the terminal behind a handle give single keys, while entered."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._original: list | None = None
        """Attributes that the terminal had before; None while it has them."""

        self._is_over = False
        self._looked_at = 0.0
        self._handlers = Handlers(
            {signal.SIGTSTP: self._step_aside, signal.SIGCONT: self._come_back}
        )

    def __enter__(self) -> "Keyboard":
        self._handlers.__enter__()
        self._set()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        self._handlers.__exit__()

    def keys(self) -> str:
        """The keys pressed since the last look; looks ten times a second at most."""
        now = time.monotonic()
        if self._is_over or now - self._looked_at < _SECONDS_BETWEEN_LOOKS:
            return ""
        # A look is a system call, and a step of a small model takes a millisecond.
        self._looked_at = now
        self._set()  # a shell's `fg` need not send a signal
        if self._original is None or not select.select([self._handle], [], [], 0)[0]:
            return ""
        try:
            # As many as are there: keys that were held must not answer one by one for seconds.
            return os.read(self._handle, 64).decode(errors="replace")
        except OSError:  # the terminal was closed
            self._is_over = True
            return ""

    def restore(self) -> None:
        """Put the terminal back for good."""
        self._is_over = True
        self._put_back()

    def _set(self) -> None:
        if self._is_over or self._original is not None or not _is_in_foreground(self._handle):
            return
        with suppress(termios.error):  # it was closed at this moment
            # Read anew each time: another program may have changed them meanwhile.
            original = termios.tcgetattr(self._handle)
            tty.setcbreak(self._handle, termios.TCSANOW)
            self._original = original

    def _put_back(self) -> None:
        original, self._original = self._original, None
        if original is None or not _is_in_foreground(self._handle):
            return
        with suppress(termios.error):  # it was closed at this moment
            termios.tcsetattr(self._handle, termios.TCSANOW, original)

    def _step_aside(self, number: int, _frame: FrameType | None) -> None:
        self._put_back()
        # The default action, which stops the process as its shell expects.
        self._handlers.set(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops here, until SIGCONT

    def _come_back(self, _number: int, _frame: FrameType | None) -> None:
        if not self._is_over:
            self._handlers.set(signal.SIGTSTP, self._step_aside)
            self._set()


def _is_in_foreground(handle: int) -> bool:
    """Whether the terminal is there, and this program is the one in its foreground."""
    try:
        return os.tcgetpgrp(handle) == os.getpgrp()
    except OSError:
        return False
