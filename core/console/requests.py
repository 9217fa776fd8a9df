"""Requests of the user while training goes on: by signals, and by keys on terminal or window.

SIGINT, SIGTERM, SIGHUP, Enter    finish the step, save and stop (`stop`)
SIGUSR1, s                        save now; with it comes a preview
SIGUSR2, r                        a preview now
m                                 the preview with its mask as a tint, or as it was
SIGRTMIN                          look at what `left_request` has in the model folder
SIGTSTP (Ctrl-Z)                  save, free the GPU, then stop until SIGCONT
p, space                          save, free the GPU and wait for the same key, or SIGCONT; then
                                  only c, Enter and ? mean anything else
c                                 a menu that changes settings
?                                 the keys

A signal that was ignored when the program started stays so.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from ..system.output import Output
from ..system.signals import Handlers
from .keyboard import Keyboard
from .settings_menu import SettingsMenu
from .stop import StopRequest

Request = Literal["save", "preview", "redraw", "look", "keys", "pause", "sheet"]
"""Kinds of request: to save, to preview the present model, to redraw what was seen last, to look at
what was left in the model folder, to name the keys, to pause or to go on, to draw a sheet."""

PAUSE, RESUME, SHEET = "pause", "resume", "sheet"
"""Words that other processes leave to pause training, to have it go on, and to have a sheet drawn;
what else they leave is a change of a setting."""

_LEFT: dict[str, Request] = {PAUSE: "pause", SHEET: "sheet"}

_SIGNALS: dict[signal.Signals, Request] = {
    signal.SIGUSR1: "save",
    signal.SIGUSR2: "preview",
    signal.SIGRTMIN: "look",
}
_KEYS: dict[str, Request] = {
    **{"s": "save", "r": "preview", "m": "redraw", "?": "keys"},
    **{"p": "pause", " ": "pause"},
}
_ANSWERS = {
    "s": "Saving after this step...",
    "r": "Drawing a preview after this step...",
    "m": "Drawing the preview with its mask the other way...",
    **dict.fromkeys("p ", "Pausing after this step: saving, then its memory is freed..."),
    "\n": "Saving after this step, then training ends...",
}
_IN_PAUSE = "Paused: p or space goes on, c changes a setting, Enter ends"
HELP = (
    "Keys: s saves, r renews the preview, m shows its mask the other way, c changes a setting, "
    "p or space pauses and frees its memory, as Ctrl-Z does, Enter saves and ends, ? names the keys"
)


def requests_among(texts: Iterable[str]) -> set[Request]:
    """The requests among what other processes have left for a training."""
    return {_LEFT[text] for text in texts if text in _LEFT}


def changes_among(texts: Iterable[str]) -> list[str]:
    """The changes of settings among what other processes have left, as ``section.key=value``."""
    return [text for text in texts if text not in (PAUSE, RESUME, SHEET)]


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

        self.echo: Callable[[str], None] = lambda _text: None
        """Function that answers a key at once."""

        self.menu: SettingsMenu | None = None
        """Menu of the settings of the present session; None where it could not be shown."""

        self._can_suspend = False
        """Whether Ctrl-Z pauses training now; else it stops the process at once."""

        self._is_paused = False
        """Whether training is paused, or about to be."""

        self.is_suspended = False
        """Whether a pause that was asked for is to stop the process, as Ctrl-Z does."""

        self._changes: list[str] = []
        self._left_in_pause: list[str] = []
        self._pending: set[Request] = set()
        self._keyboard: Keyboard | None = None
        self._handlers = Handlers(
            dict.fromkeys(_SIGNALS, self._note)
            | {signal.SIGTSTP: self._suspend, signal.SIGCONT: self._continue}
        )

    def __enter__(self) -> "Requests":
        self.stop.__enter__()
        self._handlers.__enter__()
        # Through `Output`: a stream that is closed, or not there, is no terminal.
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

    @property
    def has_keyboard(self) -> bool:
        """Whether the terminal's keys come here."""
        return self._keyboard is not None

    def begin_session(self, menu: SettingsMenu | None, *, can_suspend: bool) -> None:
        """Take requests for a session.

        Args:
            menu: Menu of its settings; None where that could not be shown.
            can_suspend: Whether Ctrl-Z pauses it.
        """
        self.menu, self._can_suspend, self._is_paused = menu, can_suspend, False
        # Of a pause that the session before did not come to, since it had gone back to a save.
        self.is_suspended &= "pause" in self._pending

    def begin_pause(self) -> None:
        """Take keys as those of a pause."""
        self._is_paused = True
        if self.menu is not None:
            self.menu.close()  # or it would take the key that ends the pause

    def take_changes(self) -> list[str]:
        """The changes entered in the menu since this was last called, as ``section.key=value``."""
        taken, self._changes = self._changes, []
        return taken

    def take_left_in_pause(self) -> list[str]:
        """The changes that other processes left during a pause, as ``section.key=value``."""
        taken, self._left_in_pause = self._left_in_pause, []
        return taken

    def take(self) -> set[Request]:
        """The requests since this was last called."""
        if self._keyboard is not None:
            self.press(self._keyboard.keys())
        if not self._pending:
            return set()
        # A signal between these two names adds to the set that is handed out.
        taken, self._pending = self._pending, set()
        if self.is_suspended and "pause" in taken:
            self.echo(_ANSWERS["p"])  # Ctrl-Z is answered here: its handler must not write
        return taken

    def press(self, keys: str) -> None:
        """Take in keys; those that mean nothing do nothing."""
        if self.menu is not None and self.menu.is_open:
            self._changes += self.menu.press(keys)
            return
        # Enter is a carriage return in a window.
        for place, key in enumerate(keys.lower().replace("\r", "\n")):
            if key in _ANSWERS and not self._is_paused:
                self.echo(_ANSWERS[key])
            if key == "c" and self.menu is not None:
                self.menu.open()
                self.press(keys[place + 1 :])  # the menu's, in the case that they were typed in
                return
            if key == "\n":
                self.stop.signal_name = self.stop.signal_name or "Enter"
            elif key in _KEYS:
                self._pending.add(_KEYS[key])
                # Pressed twice before it is looked at, it is as it was.
                self.mask_is_toggled ^= key == "m" and not self._is_paused

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # A note and no more: this runs between any two instructions of the program.
        self._pending.add(_SIGNALS[signal.Signals(number)])

    def wait(
        self,
        left: Callable[[], list[str]],
        keys: Callable[[], str] = str,
        every_s: float | None = None,
    ) -> None:
        """Wait for the end of a pause, by a key, a signal or what is left, without using the CPU.

        Args:
            left: Called where another process has left requests; gives their texts.
            keys: Gives keys that were pressed elsewhere, as in a window.
            every_s: Seconds after which these are looked at again; None: there are none.
        """
        with _woken_by_signals() as reader:
            # Only here, with all saved and the GPU free.
            if self.is_suspended:
                self._stop_here()
            while not self._is_over(left, keys):
                handles = self._keyboard.handles if self._keyboard is not None else []
                # A signal since the last look has written to the pipe, and ends this wait as well.
                ready, _, _ = select.select([reader, *handles], [], [], every_s)
                if reader in ready:
                    # Emptied, or the bytes of signals that were seen would end every later wait.
                    os.read(reader, 4096)
        self._is_paused = self.is_suspended = False

    def _is_over(self, left: Callable[[], list[str]], keys: Callable[[], str]) -> bool:
        """Whether the pause has been ended since this was last called."""
        self.press(keys())
        requests = self.take()
        if requests - {"pause", "look"}:  # nothing that is asked of a training can be done
            self.echo(_IN_PAUSE)
        # The stop last: a key that was taken just now may have asked for it.
        texts = left() if "look" in requests else []
        self._left_in_pause += changes_among(texts)
        is_resumed = "pause" in requests or RESUME in texts
        return is_resumed or self.stop.signal_name is not None

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        # A second one does not wait for the save, and where nothing is trained there is none.
        if self._is_paused or self.is_suspended or not self._can_suspend:
            self._stop_here()
        else:
            self.is_suspended = True
            self._pending.add("pause")

    def _stop_here(self) -> None:
        """Stop the process, until SIGCONT, as its shell expects it of Ctrl-Z."""
        if self._keyboard is not None:
            self._keyboard.step_aside()
        # The default action, which does nothing where no shell could ever have it go on.
        self._handlers.set(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # stops here
        self._handlers.set(signal.SIGTSTP, self._suspend)

    def _continue(self, _number: int, _frame: FrameType | None) -> None:
        if self._keyboard is not None:
            self._keyboard.come_back()
        if self._is_paused:
            self._pending.add("pause")


@contextmanager
def _woken_by_signals() -> Iterator[int]:
    """A handle that can be read once a signal has come."""
    reader, writer = os.pipe()
    # Python demands it: what writes to it in C must never wait.
    os.set_blocking(writer, False)
    # No other thread is told of signals, or may ask to be.
    is_main = threading.current_thread() is threading.main_thread()
    # A full pipe is no fault: one byte is enough to wake.
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False) if is_main else -1
    try:
        yield reader
    finally:
        if is_main:
            # Before it is closed: the handler in C would write to whatever has its number next.
            signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
