"""How a session of training ended, and whether another follows."""

import json
from dataclasses import asdict, dataclass

from ..console.outcome import Outcome


@dataclass(frozen=True)
class End:
    """How a loop ended."""

    outcome: Outcome
    """How the training has ended, if nothing follows."""

    reason: str
    goes_on: bool = False
    """Whether another trainer follows: of the next stage, or after a rollback."""

    back_at: int | None = None
    """The model has gone back to the save of this iteration, to try again."""


@dataclass(frozen=True)
class Orders:
    """What the first rank tells the others at the end of a session."""

    outcome: Outcome
    goes_on: bool
    """Whether another session follows."""

    rate_factor: float | None
    """What the learning rate is to be multiplied with in it; None: as saved."""

    def to_json(self) -> str:
        """The orders in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Orders":
        """The orders that `to_json` gave."""
        values = json.loads(text)
        return cls(**values | {"outcome": Outcome(values["outcome"])})
