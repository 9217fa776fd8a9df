"""The host's lead over the device: some steps, and no more."""

import time
from collections import deque

import torch

from ..distribute.council import Council
from ..distribute.failure import Failure, RankLost

_STEPS_AHEAD = 32
"""Steps that the host runs ahead of a GPU at most: enough to keep it busy while a log is written.
Chosen on the CPU, unmeasured on a GPU."""

_LEAST_DEADLINE_S = 60.0
_DEADLINE_STEPS = 50
"""Seconds, and times the longest wait so far, in which a step must end that waits for other ranks.
Chosen, unmeasured on a GPU."""

_PAUSE_S = 0.002
"""Seconds between two looks at a step that other ranks take part in: a host that waits for a whole
lead of steps loses nothing by them. Unmeasured on a GPU."""

_SEARCH_PAUSE_S = 1.0
"""Seconds between two looks at whether the other ranks are there."""


class Pacing:
    """Keeps the host some steps ahead of a GPU, so that a signal is obeyed soon and times are true.

    A step in a graph waits for the other ranks with nobody watching, for ever if one has ended; so
    where there are others, it is watched here.

    Args:
        device: Device that trains; with a CPU there is nothing to wait for.
        council: Agreement with other ranks; None: there are none.
    """

    def __init__(self, device: torch.device, council: Council | None):
        self.on_gpu, self.council = device.type == "cuda", council
        self.ahead: deque[torch.cuda.Event] = deque()
        """The ends of the steps that the device has not been seen to reach."""

        self.longest_s = 0.0
        """The longest wait for a step so far, in seconds."""

    def wait(self) -> None:
        """Note the end of a step; wait where the host is too far ahead.

        Raises:
            RankLost: Another rank has ended, or the step does not end in time.
        """
        if not self.on_gpu:
            return
        # Blocking: a host that waits sleeps, and leaves its core to others, as to the saver.
        end = torch.cuda.Event(blocking=True)
        end.record()
        self.ahead.append(end)
        # Wait for the oldest step only: to wait for the newest would leave the GPU idle.
        if len(self.ahead) > _STEPS_AHEAD:
            oldest = self.ahead.popleft()
            if self.council is None:
                oldest.synchronize()
            else:
                self._watch(oldest, self.council)

    def _watch(self, end: torch.cuda.Event, council: Council) -> None:
        """Wait for the end of a step, as long as the other ranks are there."""
        began_at = searched_at = time.monotonic()
        deadline_s = max(_LEAST_DEADLINE_S, _DEADLINE_STEPS * self.longest_s)
        # Not `synchronize`, which nothing ends where the step waits for a lost rank.
        while not end.query():
            time.sleep(_PAUSE_S)
            now = time.monotonic()
            if now - searched_at > _SEARCH_PAUSE_S:
                searched_at = now
                lost = council.group.members.lost()
                if lost is not None:
                    raise lost
            if now - began_at > deadline_s:
                text = f"a step has not ended in {deadline_s:.0f} s: another rank hangs"
                raise RankLost(Failure(text, None))
        self.longest_s = max(self.longest_s, time.monotonic() - began_at)
