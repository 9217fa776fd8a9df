"""Agreement of the ranks: the first one decides, and all act at the same iteration.

All ranks run the same loop and meet a few times a second, at an iteration that the first one named
at the meeting before; so what they do together never hangs on the clock or on a signal of one. A
stop that any rank was asked for is obeyed by all. Where the first rank has something to do that
needs the others (a save, an end), they attend: they wait for its calls until it has them go on.
"""

import enum
import signal
import time
from dataclasses import dataclass

from ..console.stop import StopRequest
from .group import Group

_PACE_S = 0.3
"""Seconds between two meetings, about: how soon a stop is obeyed. A meeting takes 0.8 ms on two
ranks of one CPU; unmeasured with GPUs."""

_MOST_AHEAD = 1024
"""Iterations to the next meeting, at most: no more than a loss buffer holds between two logs."""

# Above the numbers of signals, of which Linux has 64.
_A_REQUEST = 1000
"""Number of a stop that came by no signal."""


class Call(enum.IntEnum):
    """What the first rank has the others do while they attend."""

    GO_ON = 1
    """Train, up to the next meeting."""

    GATHER = 2
    """Bring what a save needs of every rank."""

    SEARCH = 3
    """Take part in the search for a learning rate."""

    STEP = 4
    """Make an update of that search, of which the number follows."""

    SEARCHED = 5
    """Put back what the search has moved."""

    RATE = 6
    """Take the learning rate that was found, which follows as text."""

    END = 7
    """Leave the loop; how it has ended follows as text."""


@dataclass(frozen=True)
class Crew:
    """The ranks of a run, over all its sessions."""

    group: Group
    stop: StopRequest
    """Request to end of this rank."""

    def council(self, iterations: int) -> "Council":
        """Agreement on a session that begins after so many iterations."""
        return Council(self.group, self.stop, iterations)


class Council:
    """Meetings of the ranks of one session.

    Args:
        group: Ranks of the run.
        stop: Request to end of this rank; it becomes that of all.
        iterations: Total iterations before the session's first one.
    """

    def __init__(self, group: Group, stop: StopRequest, iterations: int):
        self.group, self.stop = group, stop
        self.ranks = group.ranks
        self.next_meeting = iterations + 1
        self.peak_mib = 0
        """Peak memory of the rank that takes most."""

        self._met_at = iterations
        self._met_s = time.monotonic()

    def is_due(self, iterations: int) -> bool:
        """Whether the ranks meet after so many iterations."""
        return iterations >= self.next_meeting

    def meet(
        self, iterations: int, *, wants_others: bool = False, ahead: int = 1, peak_mib: int = 0
    ) -> bool:
        """Meet after so many iterations; whether the others attend now.

        Args:
            iterations: Total iterations.
            wants_others: Whether the first rank has something for the others to do.
            ahead: Iterations after which an event follows that the first rank knows of.
            peak_mib: Peak memory of this rank.
        """
        # The first rank alone says when: of the others 0, which the largest of all passes over.
        following = iterations + self._pace(iterations, ahead) if self.ranks.is_first else 0
        # One collective for all four: a meeting costs its latency, not its bytes.
        own = [self._stop_number(), int(wants_others), following, peak_mib]
        stop_number, attended, self.next_meeting, self.peak_mib = self.group.max(own)
        self._obey(stop_number)
        # A stop makes them attend, too: what it is followed by, the first rank says.
        return bool(attended or stop_number)

    def call(self, call: Call, number: int = 0) -> None:
        """Have the others, who attend, do something; for the first rank."""
        # Every word carries stops: what the first rank calls for may take long.
        *_, stop_number = self.group.max([call, number, self._stop_number()])
        self._obey(stop_number)

    def go_on(self, iterations: int) -> None:
        """Have the others train on, up to the next iteration; for the first rank."""
        self.call(Call.GO_ON, iterations + 1)
        self.next_meeting = iterations + 1
        # What was done meanwhile is no measure of how long iterations take.
        self._met_at, self._met_s = iterations, time.monotonic()

    def await_call(self) -> tuple[Call, int]:
        """What the first rank has this one do, and the number that goes with it."""
        # Zeros, so that the largest is what the first rank says.
        call, number, stop_number = self.group.max([0, 0, self._stop_number()])
        self._obey(stop_number)
        if call == Call.GO_ON:
            self.next_meeting = number
        return Call(call), number

    def _pace(self, iterations: int, ahead: int) -> int:
        """Iterations to the next meeting."""
        now = time.monotonic()
        count, seconds = iterations - self._met_at, now - self._met_s
        self._met_at, self._met_s = iterations, now
        # By the speed since the last meeting: iterations take from a millisecond to seconds.
        by_time = int(_PACE_S * count / seconds) if count and seconds > 0 else 1
        return max(1, min(by_time, ahead, _MOST_AHEAD))

    def _stop_number(self) -> int:
        """The stop of this rank as a number; 0: none."""
        name = self.stop.signal_name
        if name is None:
            return 0
        return signal.Signals[name] if name in signal.Signals.__members__ else _A_REQUEST

    def _obey(self, number: int) -> None:
        """Take a stop that another rank was asked for as one's own."""
        # One that this rank was asked for itself stays, for it names what its user did.
        if number and not self.stop.signal_name:
            is_signal = number != _A_REQUEST
            self.stop.signal_name = signal.Signals(number).name if is_signal else "a request"
