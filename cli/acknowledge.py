"""Word at once that a signal was heard, in a handler that must not wait."""

import contextlib
import os
import select

from ..core.console.stop import StopRequest


def acknowledge(stop: StopRequest) -> None:
    """Say at once that a signal was heard: the save that follows may take a while."""
    if stop.is_abrupt or stop.is_idle:  # a line of its own follows
        return
    line = (
        f"mien train: {stop.signal_name} received: the step is finished and saved, please wait; "
        "the same again ends at once, without a save\n"
    )
    # Nothing that might wait may be done within a handler.
    writable = select.poll()
    with contextlib.suppress(OSError, ValueError):
        writable.register(2, select.POLLOUT)
        if any(state & select.POLLOUT for _, state in writable.poll(0)):
            # Not through sys.stderr, in the middle of whose own work the signal may have come.
            os.write(2, line.encode())
