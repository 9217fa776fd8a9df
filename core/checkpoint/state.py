"""State of a training, apart from its tensors: counters, sessions, lowest loss.

A *session* is one start of the training program on a model. The state is written with every save as
plain JSON and is read back strictly: a wrong type, a missing or an unknown key is refused.

The table of sessions does not grow for ever. The newest 1,000 have an entry each, and the newest
100 of them their settings; the first entry stands for all sessions up to its number together: their
iterations added up, the start of the first, the mean of their batch sizes.
"""

import dataclasses
import math
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ...models.fields import MAX_COUNT, setting
from ..config import Config, nested, settings_in, to_dict, without_private
from ..system.printable import plural
from ..system.saved_values import MAX_SECONDS, Record, record, require

SCHEMA = 1

_MOST_SESSIONS, _MOST_WITH_SETTINGS = 1000, 100  # 0.4 MiB of JSON, of the 16 that are read

_LOGS = re.compile(r"session_([1-9]\d{0,11})", re.ASCII)


IMPORTED = "imported"
"""Name of the part of a state that another program began."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Facts about the program that a model was imported from."""

    last_session: int = setting(0, low=0)
    """Number of its last session; 0: there was none."""

    lowest_loss: float | None = None
    """The lowest mean loss as that program counts it, which compares with none of mien's."""


@dataclass(kw_only=True)
class Session:
    """One start of the training program."""

    number: int = setting(dataclasses.MISSING, low=1)
    started: float = setting(dataclasses.MISSING, low=0, high=MAX_SECONDS)
    """Seconds since 1970."""
    batch_size: int = setting(dataclasses.MISSING, low=1)
    logs: bool
    iterations: int = setting(0, low=0)
    settings: dict[str, dict[str, Any]] = setting({})
    """The free settings, by section, as they were in this session; empty for an old one."""


@dataclass(kw_only=True)
class _FacesSeen:
    """Faces seen of each side."""

    a: int = setting(0, low=0)
    b: int = setting(0, low=0)


@dataclass(kw_only=True)
class TrainingState:
    """State that is saved of a run besides tensors and settings."""

    run_id: str = field(
        default_factory=lambda: uuid.uuid4().hex,
        metadata={"pattern": "[0-9a-f]{32}", "form": "32 hex digits"},
    )
    trainer: str
    iterations: int = setting(0, low=0)
    """Iterations of all sessions together."""
    faces_seen: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    """Faces seen of each side; also the number of the next face, which fixes its random numbers."""
    lowest_mean_loss: float | None = None
    """The lowest mean, between two saves, of loss A + loss B; None before the first save."""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Plain values that parts of the run keep under their names, such as the loss scaler's."""
    sessions: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        # No fields, so that no save holds them: a mean begins anew at every save and start.
        self._loss_sum, self._loss_count = 0.0, 0

    def part(self, name: str, kind: type[Record], **highest: int) -> Record | None:
        """The object of a dataclass that a part of the run has saved; None where it has none.

        Args:
            name: Name of the part.
            kind: Dataclass whose fields are its keys.
            highest: Highest numbers by field.

        Raises:
            ValueError: What is saved is not that.
        """
        if name not in self.parts:
            return None
        return record(kind, self.parts[name], f"parts.{name}", **highest)

    @property
    def imported(self) -> Imported:
        """Facts about the program that the model was imported from.

        Raises:
            ValueError: What is saved of it is not that.
        """
        return self.part(IMPORTED, Imported) or Imported()

    @property
    def session(self) -> Session:
        """The present session."""
        return self.sessions[-1]

    def begin_session(
        self, config: Config, started: float | None = None, *, batch_size: int | None = None
    ) -> Session:
        """The new session, entered in the list; its number is the highest so far + 1.

        Args:
            config: Settings of the session.
            started: Seconds since 1970; None: now.
            batch_size: What auto has chosen; None: as set.

        Raises:
            ValueError: The state is of another family, or its counts would pass what can be saved.
        """
        if config.model.trainer != self.trainer:
            raise ValueError(f"the state is of {self.trainer}, not of {config.model.trainer}")
        values = settings_in(without_private(to_dict(config)))
        now = time.time() if started is None else started
        session = Session(
            # Not the count: numbers name folders of logs, and early ones are folded into one.
            number=max((old.number for old in self.sessions), default=0) + 1,
            # A clock that is far off must not make a state that the next start refuses.
            started=min(max(now, 0.0), MAX_SECONDS),
            batch_size=config.train.batch_size if batch_size is None else batch_size,
            logs=config.save.logs,
            settings=nested({spec.place: value for spec, value in values if not spec.locked}),
        )
        # At the start: at the end, after days, the last save would be refused.
        self._refuse_to_pass_the_counts(session, config.train.iterations)
        self.sessions = _folded([*self.sessions, session])
        return session

    def _refuse_to_pass_the_counts(self, session: Session, iterations: int) -> None:
        """Refuse what could not be saved before anything is trained."""
        faces = max(self.faces_seen.values()) + iterations * session.batch_size
        if max(self.iterations + iterations, faces, session.number) > MAX_COUNT:
            num_faces, num_sessions = self.faces_seen["a"], session.number - 1
            raise ValueError(
                f"the model counts {self.iterations} {plural(self.iterations, 'iteration')}, "
                f"{num_faces} {plural(num_faces, 'face')} and "
                f"{num_sessions} {plural(num_sessions, 'session')}, and {iterations} more "
                f"{plural(iterations, 'iteration')} would pass the largest count, {MAX_COUNT}; "
                "give fewer --iterations, or begin a new model"
            )

    def advance(self, iterations: int = 1) -> None:
        """Count iterations of the present session, and the faces that they showed."""
        self.iterations += iterations
        self.session.iterations += iterations
        for side in self.faces_seen:
            self.faces_seen[side] += iterations * self.session.batch_size

    def add_losses(self, total: float, count: int = 1) -> None:
        """Take in the sum of (loss A + loss B) over ``count`` iterations."""
        self._loss_sum += total
        self._loss_count += count

    def close_interval(self) -> tuple[float | None, bool]:
        """Mean of (loss A + loss B) since the last call, and whether a backup is due.

        To be called before each save, so that the saved state holds the new lowest mean. The first
        mean of a model is only recorded; a later one that is lower is worth a backup.
        """
        if self._loss_count == 0:
            return None, False
        mean = self._loss_sum / self._loss_count
        self._loss_sum, self._loss_count = 0.0, 0
        # A mean that is none would be the lowest for ever.
        if not math.isfinite(mean):
            return mean, False
        lowest = self.lowest_mean_loss
        if lowest is None or mean < lowest:
            self.lowest_mean_loss = mean
        return mean, lowest is not None and mean < lowest

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; sessions without an iteration are left out."""
        # One without an iteration is a start that was refused, or stopped at once.
        trained = [session for session in self.sessions if session.iterations]
        return {"schema": SCHEMA} | dataclasses.asdict(dataclasses.replace(self, sessions=trained))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingState":
        """The state that `to_dict` gave.

        Raises:
            ValueError: On an unknown schema (made by a newer version) or any value out of order.
        """
        schema = values.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise ValueError(
                f"the saved state has schema {schema}, this version of mien reads {SCHEMA}: it "
                "was made by a newer version; update mien"
            )
        # By `type`: True would pass for schema 1.
        require(type(schema) is int and schema == SCHEMA, "schema", str(SCHEMA), schema)
        state = record(cls, {key: value for key, value in values.items() if key != "schema"})
        is_a_name = len(state.trainer) <= 64 and state.trainer.isprintable()
        require(is_a_name, "trainer", "a name", state.trainer)
        record(_FacesSeen, state.faces_seen, "faces_seen")
        for name, part in state.parts.items():
            require(isinstance(part, dict), f"parts.{name}", "an object", part)
        numbers = [session.number for session in state.sessions]
        # They name folders of logs: one number twice would mix two sessions' losses.
        require(numbers == sorted(set(numbers)), "session numbers", "rising", numbers)
        state.sessions = _folded(state.sessions)
        return state


def session_number(folder: str) -> int | None:
    """The number of the session that has a folder of logs of this name; None where none has."""
    match = _LOGS.fullmatch(folder)
    return int(match[1]) if match else None


def _folded(sessions: list[Session]) -> list[Session]:
    """The same sessions in a table of bounded size; see the top of this file."""
    for old in sessions[:-_MOST_WITH_SETTINGS]:
        old.settings = {}
    # One entry less of the newest, since the early ones together take it.
    early, recent = sessions[: 1 - _MOST_SESSIONS], sessions[1 - _MOST_SESSIONS :]
    if len(early) < 2:
        return sessions
    iterations = sum(old.iterations for old in early)
    faces = sum(old.iterations * old.batch_size for old in early)
    together = Session(
        number=early[-1].number,
        started=early[0].started,
        # The mean over iterations: times the iterations it still gives the faces that were seen.
        batch_size=max(round(faces / iterations), 1) if iterations else early[-1].batch_size,
        logs=any(old.logs for old in early),
        iterations=min(iterations, MAX_COUNT),
    )
    return [together, *recent]
