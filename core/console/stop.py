"""Stop of a run: the present step is finished and saved; requested twice, the process ends.

A terminal that is closed (SIGHUP) requests it but once, however often: shells and session managers
send it several times, and the save after the first one must not be cut short by the next.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..system.signals import Handlers

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INSISTENT = (signal.SIGINT, signal.SIGTERM)
"""Signals of which a second one ends the process."""


class Interrupted(KeyboardInterrupt):
    """What a signal raises while there is nothing to finish and nothing to save."""


class StopRequest:
    """A request that training ends after its present step, and a save.

    While entered, a signal is noted as one in `signal_name`; a second one ends the process.

    Args:
        should_stop: Function that is called between steps, in the thread that trains, and makes
            the request when it returns true; None: none.
        can_insist: Whether a second signal ends the process; else it is nothing. Of one among
            several processes: it may come to each twice, and whoever started them can end them.
    """

    def __init__(
        self, should_stop: Callable[[], bool] | None = None, *, can_insist: bool = True
    ) -> None:
        self._signal_name: str | None = None
        self._should_stop, self._can_insist = should_stop, can_insist
        self.when_noted: list[Callable[[], None]] = []
        """Functions called at every signal, for what must not be left undone if another one
        follows."""

        self._handlers = Handlers(dict.fromkeys(SIGNALS, self._note))
        self.is_abrupt = False
        """Whether a signal raises `Interrupted` now."""

        self.is_idle = False
        """Whether there is nothing to finish and all is saved, as in a pause."""

    @property
    def signal_name(self) -> str | None:
        """Name of the signal or key that stops it, or "a request"; None: it goes on."""
        # Asked only while it goes on: a request that was made is not taken back.
        if self._signal_name is None and self._should_stop is not None and self._should_stop():
            self._signal_name = "a request"
        return self._signal_name

    @signal_name.setter
    def signal_name(self, name: str) -> None:
        self._signal_name = name

    def __enter__(self) -> "StopRequest":
        self._handlers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.__exit__()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Interrupted` at a signal inside, even out of a call that would wait for ever."""
        self.is_abrupt = True
        try:
            # One that has come already must not wait until all is opened.
            if self.signal_name:
                raise Interrupted(self._why())
            yield
        finally:
            self.is_abrupt = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._can_insist and self._signal_name is not None:
            return
        if self._can_insist and number in _INSISTENT:
            # A save that hangs must not make the program one that cannot be stopped.
            for each in _INSISTENT:
                self._handlers.set(each, signal.SIG_DFL)
        self._signal_name = self._signal_name or signal.Signals(number).name
        # Nothing here may wait: this runs between any two instructions of the program.
        for action in self.when_noted:
            action()
        if self.is_abrupt:
            self.is_abrupt = False  # the clean-up that follows is let finish
            raise Interrupted(self._why())

    def _why(self) -> str:
        return f"{self.signal_name} received before training began"
