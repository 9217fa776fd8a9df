"""Requests of the user while training goes on: by signals, and by keys on terminal or window.

SIGINT, SIGTERM, SIGHUP, Enter    finish the step, save and stop (`stop`)
SIGUSR1, s                        save now; with it comes a preview
SIGUSR2, r                        a preview now
m                                 the preview with its mask as a tint, or as it was

A signal that was ignored when the program started stays so.
"""

import signal
import sys
from types import FrameType
from typing import Literal

from ..system.output import Output
from ..system.signals import Handlers
from .keyboard import Keyboard
from .stop import StopRequest

Request = Literal["save", "preview", "redraw"]
"""Kinds of request: to save, to preview the present model, to redraw what was seen last."""

_SIGNALS: dict[signal.Signals, Request] = {signal.SIGUSR1: "save", signal.SIGUSR2: "preview"}
_KEYS: dict[str, Request] = {"s": "save", "r": "preview", "m": "redraw"}


class Requests:
    """Note signals and keys while entered, until they are taken.

    Args:
        stop: Request to end, which may come in other ways than these; None: a new one.
        has_keys: Whether the terminal's keys are this process's, if a terminal is there.
    """

    def __init__(self, stop: StopRequest | None = None, *, has_keys: bool = True) -> None:
        self._has_keys = has_keys
        self.stop = StopRequest() if stop is None else stop
        self.mask_is_toggled = False
        """The mask is to be shown as a tint where it is set not to be, and the other way round."""

        self._pending: set[Request] = set()
        self._keyboard: Keyboard | None = None
        self._handlers = Handlers(dict.fromkeys(_SIGNALS, self._note))

    def __enter__(self) -> "Requests":
        self.stop.__enter__()
        self._handlers.__enter__()
        if self._has_keys and all(Output(stream).isatty() for stream in (sys.stdin, sys.stdout)):
            self._keyboard = Keyboard(sys.stdin.fileno())
            self._keyboard.__enter__()
            # A second signal ends the process at once, and would leave the terminal without echo.
            self.stop.when_noted.append(self._keyboard.restore)
        return self

    def __exit__(self, *_: object) -> None:
        if self._keyboard is not None:
            self._keyboard.__exit__()
        self._handlers.__exit__()
        self.stop.__exit__()

    def take(self) -> set[Request]:
        """The requests since this was last called."""
        if self._keyboard is not None:
            self.press(self._keyboard.keys())
        if not self._pending:
            return set()
        # A signal between these two names adds to the set that is handed out.
        taken, self._pending = self._pending, set()
        return taken

    def press(self, keys: str) -> None:
        """Take in keys; those that mean nothing do nothing."""
        for key in keys.lower():
            if key in "\r\n":
                self.stop.signal_name = self.stop.signal_name or "Enter"
            elif key in _KEYS:
                self._pending.add(_KEYS[key])
                # Pressed twice before it is looked at, it is as it was.
                self.mask_is_toggled ^= key == "m"

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._pending.add(_SIGNALS[signal.Signals(number)])
