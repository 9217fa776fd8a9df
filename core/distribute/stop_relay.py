"""Signals that end a run, passed on to all ranks as they come.

Python runs the handler of a signal between two of its instructions, and a rank may wait for minutes
within one: in a collective, for the faces that another one decodes. So a thread hears the signal
too, and leaves word of it in the store, where the thread of every other rank finds it.
"""

import select
import signal
import socket
import threading

import torch.distributed as dist

from ..console.stop import SIGNALS

_STOP = "stop"

_PAUSE_S = 0.5
"""Seconds between two looks at the store: how late a rank hears of a signal that another one got.
Chosen; a look takes some 0.1 ms on one machine, unmeasured over a network."""

_LEAVE_S = 2.0
"""Seconds for the thread to leave its last word. Chosen."""


class StopRelay:
    """Pass the first signal that ends a run on to all ranks, each of which gets it as its own.

    While entered, which the handlers of those signals must be already.

    Args:
        store: Keys and values that all ranks see.
    """

    def __init__(self, store: dist.Store):
        self._store = store
        self._heard, self._wakeup = socket.socketpair()
        for end in (self._heard, self._wakeup):
            # Python demands it of a handle for signals: what writes to it in C must never wait.
            end.setblocking(False)
        self._has_ended, self._lock = False, threading.Lock()
        self._fd_before = -1
        # A daemon, since it may hang where the store is out of reach.
        self._thread = threading.Thread(target=self._run, name="mien-stops", daemon=True)

    def __enter__(self) -> "StopRelay":
        # Written to by the handler in C, which runs at once, whatever the main thread waits for.
        # A full buffer is no fault: the first signal is all that counts.
        self._fd_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # From here on a signal would meet no handler, and end the process.
        with self._lock:
            self._has_ended = True
        # Before it is closed: the handler in C would write to whatever has its number next.
        signal.set_wakeup_fd(self._fd_before)
        self._wakeup.close()
        # What it has heard it still tells, unless the store is out of reach.
        self._thread.join(_LEAVE_S)

    def _run(self) -> None:
        is_told = False
        with self._heard:
            while True:
                # Without an end once a signal is told: then the store has nothing more to say.
                ready, _, _ = select.select([self._heard], [], [], None if is_told else _PAUSE_S)
                numbers = self._heard.recv(64) if ready else None
                if numbers == b"":
                    return
                if not is_told:
                    own = [number for number in numbers or b"" if number in SIGNALS]
                    is_told = self._is_told(own[0] if own else None)

    def _is_told(self, own: int | None) -> bool:
        """Whether all ranks know of a signal, or soon will; it may be this rank's own."""
        try:
            if own is not None:
                self._store.compare_set(_STOP, "", str(own))
                return True
            if not self._store.check([_STOP]):
                return False
            self._raise(int(self._store.get(_STOP)))
        except RuntimeError:  # the store went with the first rank, whose end ends all
            pass
        return True

    def _raise(self, number: int) -> None:
        with self._lock:
            if not self._has_ended:
                # To that thread: another one would leave it in a wait that it could be called from.
                signal.pthread_kill(threading.main_thread().ident or 0, number)
