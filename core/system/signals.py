"""Handlers of signals for a while, less those that whoever started the program has it ignore."""

import signal
from collections.abc import Callable, Mapping
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class Handlers:
    """Call a handler at each signal while entered; one that was ignored before stays ignored.

    `nohup`, `trap '' HUP` and a script's `&` leave a signal ignored in what they start, which is
    then meant to outlive it.
    """

    def __init__(self, handlers: Mapping[signal.Signals, Handler]) -> None:
        self._handlers = handlers
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Handlers":
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def set(self, number: signal.Signals, handler: Handler | signal.Handlers) -> None:
        """Have a signal call another handler from now on; nothing where it stays ignored."""
        if number in self._before:
            signal.signal(number, handler)
