"""How a session of training ended, and whether another follows."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..config import nested
from ..console.outcome import Outcome


@dataclass(frozen=True)
class Change:
    """A free setting that was changed while training went on."""

    section: str
    name: str
    old: Any
    new: Any
    by: str
    """Source of it: keyboard or page."""

    @property
    def full_name(self) -> str:
        """Section and name, as `--set` takes them."""
        return f"{self.section}.{self.name}"


def settings_of(changes: Iterable[Change]) -> dict[str, dict[str, Any]]:
    """The new values by section and key; of one setting the last one."""
    return nested({(change.section, change.name): change.new for change in changes})


@dataclass(frozen=True)
class End:
    """How a loop ended."""

    outcome: Outcome
    """How the training has ended, if nothing follows."""

    reason: str
    goes_on: bool = False
    """Whether another trainer follows: of the next stage, after a rollback, a change or a pause."""

    back_at: int | None = None
    """The model has gone back to the save of this iteration, to try again."""

    changes: tuple[Change, ...] = ()
    """Settings that the user has changed, with which the next session begins."""

    pauses: bool = False
    """Whether the next session is to wait for the end of a pause."""


@dataclass(frozen=True)
class Orders:
    """What the first rank tells the others at the end of a session."""

    outcome: Outcome
    goes_on: bool
    """Whether another session follows."""

    rate_factor: float | None
    """What the learning rate is to be multiplied with in it; None: as saved."""

    pauses: bool = False
    """Whether a pause comes first, at whose end other orders are announced."""

    def to_json(self) -> str:
        """The orders in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Orders":
        """The orders that `to_json` gave."""
        values = json.loads(text)
        # JSON knows only the number of an outcome.
        return cls(**values | {"outcome": Outcome(values["outcome"])})
