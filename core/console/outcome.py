"""How a training ends."""

from enum import IntEnum


class Outcome(IntEnum):
    """How a training has ended; the value is the exit code of `mien train`."""

    DONE = 0
    """All iterations, or all stages, are done."""

    # Not 1, by which a failure of mien itself ends.
    MISTAKE = 2
    """A setting or a folder cannot be used."""

    HALTED = 3
    """Training must not go on: it has diverged, or the disk takes no more."""

    STOPPED = 4
    """The user has requested it; the state is saved."""
