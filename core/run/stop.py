"""Being told to stop: the present step is finished and saved; told twice, the process ends."""

import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """While entered, a signal is noted in `signal_name`; a second one ends the process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """Also the name of a key, where one was pressed to stop."""

        self.when_noted: list[Callable[[], None]] = []
        """Called at the first signal: what must not be left undone if a second one follows."""

        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        for action in self.when_noted:
            action()
