"""Keys as they are pressed on the terminal, without Enter and without their echo.

The terminal is put back when the program ends or stops, and where its owner says so, as before it
is put aside with Ctrl-Z. It is left alone while another program has it: to touch it from the
background would stop this one.
"""

import os
import re
import select
import termios
import time
import tty
from contextlib import suppress

_SECONDS_BETWEEN_LOOKS = 0.1  # at the keys; chosen, unmeasured
_MOST_BYTES = 4096
"""Bytes of a look: all that Linux keeps of a terminal, so that no sequence is cut in two."""

# As terminals send arrows and F1: their last letter is that of a key.
_SEQUENCES = re.compile(r"\x1b(\[\[?[0-?]*[ -/]*[@-~]|O[A-Za-z])")


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

    def __enter__(self) -> "Keyboard":
        self._set()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def keys(self) -> str:
        """The keys pressed since the last look; looks ten times a second at most."""
        now = time.monotonic()
        if self._is_over or now - self._looked_at < _SECONDS_BETWEEN_LOOKS:
            return ""
        # A look is a system call, and a step of a small model takes a millisecond.
        self._looked_at = now
        self._set()  # a shell's `fg` need not send a signal
        # A read would wait for a key.
        if self._original is None or not select.select([self._handle], [], [], 0)[0]:
            return ""
        try:
            # As many as are there: keys that were held must not answer one by one for seconds.
            pressed = os.read(self._handle, _MOST_BYTES)
        except OSError:
            pressed = b""
        if not pressed:  # the terminal was closed
            self._is_over = True
        return _SEQUENCES.sub("", pressed.decode(errors="replace"))

    @property
    def handles(self) -> list[int]:
        """The handle to wait for keys at; empty where none can come."""
        return [] if self._is_over or self._original is None else [self._handle]

    def restore(self) -> None:
        """Put the terminal back for good."""
        # First, or a look at the keys would take the terminal again.
        self._is_over = True
        self._put_back()

    def _set(self) -> None:
        if self._is_over or self._original is not None or not _is_in_foreground(self._handle):
            return
        with suppress(termios.error):  # it was closed at this moment
            # Read anew each time: another program may have changed them meanwhile.
            original = termios.tcgetattr(self._handle)
            # At once: by its default tty waits for the output, and drops what was typed.
            tty.setcbreak(self._handle, termios.TCSANOW)
            self._original = original

    def _put_back(self) -> None:
        # Taken out in one step: the handler of a signal may come here, too.
        original, self._original = self._original, None
        if original is None or not _is_in_foreground(self._handle):
            return
        with suppress(termios.error):  # it was closed at this moment
            termios.tcsetattr(self._handle, termios.TCSANOW, original)

    def step_aside(self) -> None:
        """Put the terminal back for the shell, which is to have it for a while."""
        self._put_back()

    def come_back(self) -> None:
        """Have single keys again, where this program is the one in the foreground."""
        self._set()


def _is_in_foreground(handle: int) -> bool:
    """Whether the terminal is there, and this program is the one in its foreground."""
    try:
        return os.tcgetpgrp(handle) == os.getpgrp()
    except OSError:
        return False
