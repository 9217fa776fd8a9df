"""A model folder: everything that is kept of a run, each part whole or absent.

    config.toml          settings as last resolved, for people to read
    state.json           the pointer: which generation is in use, the run's counts, the lowest loss
    generations/<n>/     model.safetensors  optimizer.safetensors  state.json  config.toml
                         ema.safetensors, the average of the weights where there is one
                         manifest.json (size and SHA-256 of the others, and the order of writing)
    backup/              the same of the save with the lowest mean loss
    archived_<time>/     what `restore` replaced: generations, state.json, config.toml, logs
    preview.png          what the model makes of some faces
    sheet.png            the same as a sheet to judge by, drawn on request
    previews/<n>.jpg     the same of earlier saves, thinned out, to be compared
    .lock                held (flock) by the process that trains; see `lock` for disks without it

<n> is the total iteration; a second, different save at the same iteration is <n>-2, <n>-3, ...
A generation never changes once it has its name. It is written as `.<n>.tmp`: each file, then the
manifest, is flushed to the disk, then the folder, then the folder gets its name, and the pointer is
replaced last. So a crash at any moment leaves the earlier generations as they were. Which one is
newest is decided by the manifests' `sequence`, not by <n>: a run that went back to an earlier
generation counts through the same iterations again. Saves of different iterations are kept before
two of one iteration. Copies of a generation (the backup, snapshots beside the folder) are files of
their own: damage to a save does not reach them.

A folder may come from a stranger. It is data: nothing in it is run, every size is checked before it
is read, and a link in it is refused, since a run would write to where it leads.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, to_toml
from ..system.durable_files import (
    DamagedError,
    copy_files,
    read_regular,
    reading,
    replace_file,
    sync_folder,
    write_file,
)
from ..system.paths import DISK_REMEDIES
from . import retention
from .format import (
    CONFIG,
    MAX_JSON_BYTES,
    STATE,
    Generation,
    Manifest,
    Tensors,
    metadata_of,
    parse_json,
    tensor_files,
    write_tensors,
)
from .generations import BACKUP, FOLDER, Generations
from .lock import LOCK, Lock, acquire
from .owner import OWNER, InUseError
from .pointer import is_same_save, read_pointer, write_pointer

PREVIEW, PREVIEWS, SHEET = "preview.png", "previews", "sheet.png"

State = dict[str, Any]

_WARNED_OF_DISK: set[Path] = set()
"""Folders of whose disk's limits this process has warned; every stage of a run opens its folder."""

_CONFIG_HEADING = (
    "# The settings that this model goes on with. Change them by --set or --configfile, or by\n"
    "# flags for one session: what is edited here is not read back.\n\n"
)


class SaveError(RuntimeError):
    """A save did not reach the disk; the message says why, and what the last complete one is."""


@dataclass(frozen=True)
class _Current:
    """The generation in use, to which a copy or an equal save refers."""

    name: str
    file_names: frozenset[str]
    state: bytes


class ModelFolder:
    """The folder of one model, locked against other runs until `close`.

    Raises:
        ValueError: Where the folder holds something else, is in use, is not writable, or holds a
            model of another trainer.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        trainer: str | None = None,
        keep_generations: int = 2,
        read_only: bool = False,
    ) -> None:
        if keep_generations < 1:
            raise ValueError(f"keep_generations must be at least 1, got {keep_generations}")
        self.path = Path(path)
        self.warnings: list[str] = []
        """Sentences for the user, appended by `load` and `save`."""
        self.keep_generations = keep_generations
        self.generations = Generations(self.path)
        self._lock: Lock | None = None
        self._config: bytes | None = None
        self._current: _Current | None = None
        self.last_complete: int | None = None
        """Total iteration of the save that is whole for certain, for the message of a failure."""

        # Before the lock, so that a folder of other things gets no file of mien's.
        _refuse_foreign(self.path, read_only=read_only)
        self._is_made_here = not read_only and not os.path.exists(self.path)
        if not read_only:
            self._lock = acquire(self.path)
        try:
            with reading(self.path):
                if self._lock is not None:
                    self._warn_of_disk(self._lock)
                    retention.finish_backup(self.path)
                    self.generations.clean_up()
                _refuse_other_model(self.generations, trainer)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ModelFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; the folder may then be used by another run."""
        if self._lock is not None:
            if self._is_made_here:  # for nothing, where the run was refused
                with suppress(OSError):  # the lock must go, and why the run has ended is the news
                    self._lock.remove_folder()
            self._lock.release()
            self._lock = None

    @property
    def is_new(self) -> bool:
        """True where nothing has been saved in the folder yet."""
        return not self.generations.names() and not (self.path / STATE).exists()

    def write_config(self, config: Config) -> None:
        """Put the resolved settings into the folder, and into every generation from now on."""
        self._require_lock()
        self._config = (_CONFIG_HEADING + to_toml(config)).encode()
        with self._save_errors():
            replace_file(self.path / CONFIG, self._config)

    def load(self) -> Generation | None:
        """The newest generation that is whole, read into memory; None where nothing was saved.

        A damaged one is passed over, left as it is, and named in `warnings`.

        Raises:
            ValueError: Where there are saves but none is whole, or a newer version made them.
        """
        passed_over: list[str] = []
        with reading(self.path):
            newest = self.generations.newest(passed_over)
            if newest is not None:
                self._set_current(*newest, passed_over)
                return newest[0]
        if not self.is_new:
            why = passed_over[0] if passed_over else "its generations are missing"
            raise ValueError(
                f"model folder {self.path} holds no whole save: {why}; put back a copy of its "
                "generations folder, or choose another model folder"
            )
        return None

    def newest_state(self) -> dict[str, Any] | None:
        """The state of the newest save, without a look at its tensors; None: nothing was saved.

        Raises:
            ValueError: Where there are saves but none has a whole state, or a newer version made
                them.
        """
        with reading(self.path):
            state = self.generations.newest_state()
            if state is not None or self.is_new:
                return state
        raise ValueError(
            f"model folder {self.path} holds no save whose state can be read; put back a copy of "
            "its generations folder"
        )

    def save(
        self, model: Tensors, optimizer: Tensors | None, state: State, ema: Tensors | None = None
    ) -> Path:
        """The folder of a new complete generation, durable on disk when this returns.

        The tensors are on the CPU and detached. ``state`` is plain JSON with at least `run_id`,
        `trainer` and `iterations`. What was saved last is not written twice.

        Raises:
            SaveError: Where the disk refuses; all earlier saves are as they were.
        """
        self._require_lock()
        state_bytes = json.dumps(state, indent=1, allow_nan=False).encode()
        metadata = metadata_of(state)
        tensors = tensor_files(model, optimizer, ema)
        texts = {STATE: state_bytes} | ({} if self._config is None else {CONFIG: self._config})
        file_names = frozenset(tensors | texts)
        current = self._current
        if current and (current.file_names, current.state) == (file_names, state_bytes):
            return self.generations.path / current.name
        with self._save_errors(), self.generations.adding(state["iterations"]) as temporary:
            temporary.mkdir()
            for file_name, content in tensors.items():
                write_tensors(temporary / file_name, content, metadata)
            for file_name, text in texts.items():
                write_file(temporary / file_name, text)
            name = self._commit(temporary, state, file_names)
        self._current = _Current(name, file_names, state_bytes)
        self.last_complete = state["iterations"]
        self._prune()
        return self.generations.path / name

    def back_up(self, generation: Path) -> None:
        """Put a copy of a generation in the place of the backup.

        Where the disk refuses, the backup before stays, and `warnings` says why: the model itself
        is saved.
        """
        self._require_lock()
        try:
            retention.replace_backup(self.path, generation)
        except OSError as error:
            self._warn(
                f"cannot renew {self.path / BACKUP}: {error.strerror or error}; {_advice(error)}; "
                "training goes on with the backup as it was"
            )

    def snapshot(self) -> Path | None:
        """A model folder beside this one, `<model dir>_snapshot_<n>_iters`, with a copy of the
        generation that was loaded or saved last. One that is there already is left as it is.

        None where there can be none, and `warnings` says why: the model itself is saved.
        """
        self._require_lock()
        assert self.last_complete is not None
        target = None
        try:
            target = retention.snapshot_path(self.path, self.last_complete)
            if not os.path.lexists(target):
                assert self._current is not None
                retention.write_snapshot(
                    target,
                    self.generations.path / self._current.name,
                    self._current.file_names,
                    parse_json(STATE, self._current.state),
                    self._config,
                )
                return target
            if is_same_save(target, self.path):
                return target
            self._warn(f"{target} is there already and was left as it is; no snapshot was made")
        except OSError as error:
            self._warn(
                f"cannot write snapshot {target or 'beside ' + str(self.path)}: "
                f"{error.strerror or error}; {_advice(error)}, or "
                "leave snapshots out (--snapshot-interval 0); training goes on without it"
            )
        return None

    def go_back(self, latest: int) -> int | None:
        """Have the newest whole save up to a total iteration be the one in use; its iteration.

        Saves after it stay, until later ones push them out. None: there is none so early.

        Raises:
            SaveError: Where the disk refuses.
        """
        self._require_lock()
        newest = self.generations.newest_until(latest)
        if newest is None:
            return None
        folder, manifest, state = newest
        if [manifest] != self.generations.manifests()[:1]:
            with self._save_errors():
                self.save_again(folder, manifest, state)
            self._prune()
        return manifest.iterations

    def save_again(self, source: Path, manifest: Manifest, state: dict[str, Any]) -> str:
        """Write a generation that is kept somewhere as the newest one of this folder; its name.

        Until it has its name the one before is in use, from then on this one.

        Raises:
            OSError: The disk refuses.
        """
        self._require_lock()
        with self.generations.adding(manifest.iterations) as temporary:
            copy_files(source, temporary, manifest.files)
            name = self._commit(temporary, state, frozenset(manifest.files))
        self._current = None  # it may be of another run, whose equal state is no equal save
        self.last_complete = manifest.iterations
        return name

    def _set_current(
        self, generation: Generation, manifest: Manifest, passed_over: list[str]
    ) -> None:
        """Have a loaded generation be the current one, and warn of what was passed over for it."""
        pointer = self._pointer()
        if pointer is not None and not (self.generations.path / pointer).is_dir():
            passed_over.append(f"generation {pointer} is missing")
        for sentence in passed_over:
            self._warn(
                f"{sentence}; generation {generation.name} of iteration {manifest.iterations} is "
                "used, and nothing was deleted"
            )
        # The bytes, and not what was parsed: a save is the same where they are.
        state = read_regular(generation.path / STATE, MAX_JSON_BYTES)
        self._current = _Current(generation.name, frozenset(manifest.files), state)
        self.last_complete = manifest.iterations
        if self._config is None and CONFIG in manifest.files:
            self._config = read_regular(generation.path / CONFIG, MAX_JSON_BYTES)

    def _pointer(self) -> str | None:
        """The generation that the pointer names; None where it is not there, or is damaged."""
        try:
            return read_pointer(self.path)
        except DamagedError as damage:
            self._warn(f"{self.path / STATE} is damaged ({damage}); the next save replaces it")
            return None

    def _commit(self, temporary: Path, state: dict[str, Any], file_names: frozenset[str]) -> str:
        """Make a generation of the files in a temporary folder, and the current one; its name."""
        assert self._lock is not None
        # As late as can be: where the lock file was removed, another run may have begun.
        self._lock.confirm()
        name = self.generations.commit(temporary, state, file_names)
        write_pointer(self.path, name, state)
        return name

    def _prune(self) -> None:
        try:
            self.generations.prune(self.keep_generations)
        except OSError as error:  # the new save is complete all the same
            self._warn(f"cannot delete old generations in {self.path}: {error.strerror or error}")

    def _warn_of_disk(self, lock: Lock) -> None:
        """Warn once in a process of what the disk of a folder that is trained in cannot do."""
        if self.path in _WARNED_OF_DISK:
            return
        _WARNED_OF_DISK.add(self.path)
        if lock.notice:
            self._warn(lock.notice)
        with suppress(OSError):  # a failure, which the first save will meet
            if not sync_folder(self.path):
                self._warn(
                    f"the disk of {self.path} does not flush folders: a power cut may cost the "
                    "newest save; a crash of the program costs nothing"
                )

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"model folder {self.path} was opened read-only, or is closed")

    @contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Turn what prevents a save into one line that says what to do."""
        try:
            yield
        except (OSError, InUseError, ValueError) as error:
            last = self.last_complete
            saved = f"the last complete save is iteration {last}"
            if last is None:
                saved = "nothing has been saved yet"
            reason = _reason(error)
            raise SaveError(f"cannot save to {self.path}: {reason}: {saved}") from error


def _refuse_foreign(path: Path, *, read_only: bool) -> None:
    """Refuse a path that is no folder, and one that holds other things than a model, or links."""
    try:  # in one call: another run may be making or removing the folder
        # A disk that is mounted for one model has this folder at its root.
        names = set(os.listdir(path)) - {"lost+found"}
    except NotADirectoryError as error:
        raise ValueError(f"model folder {path} is a file; choose a folder") from error
    except FileNotFoundError as error:
        if read_only:
            raise ValueError(f"model folder {path} does not exist") from error
        names = set()
    except OSError as error:
        raise ValueError(f"cannot read model folder {path}: {error.strerror}") from error
    links = sorted(path / name for name in names if os.path.islink(path / name))
    if not read_only:
        # The saves need no such look: their files are opened by calls that follow no link.
        for name in ("logs", "timelapse", PREVIEWS):
            links += _links_in(path / name)
    if links:
        raise ValueError(
            f"{links[0]} is a link, which a model folder may not hold: put what it leads to "
            "in its place"
        )
    # A lock is enough: a run that was killed before its first save leaves no more than that.
    if names and not names & {LOCK, OWNER, FOLDER}:
        remedy = "give that of a model" if read_only else "choose a new or empty folder"
        raise ValueError(f"model folder {path} is not empty and holds no model; {remedy}")


def _refuse_other_model(generations: Generations, trainer: str | None) -> None:
    """Refuse a folder with saves of a newer version, or of another family than is to be trained."""
    manifests = generations.manifests()
    if trainer is not None and manifests and manifests[0].trainer != trainer:
        held = manifests[0].trainer
        raise ValueError(
            f"model folder {generations.model_dir} holds a model of {held}, not of {trainer}; "
            f"choose another --model-dir, or --trainer {held}"
        )


def _reason(error: OSError | InUseError | ValueError) -> str:
    """What prevented a save, and what to do."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}; {_advice(error)} and start again"
    if isinstance(error, InUseError):
        return f"{error} has taken it; stop that run and start again"
    return f"{error}; choose another --model-dir"


def _advice(error: OSError) -> str:
    """What the user can do about the disk's refusal."""
    remedies = DISK_REMEDIES | {
        errno.EACCES: "make the folder writable",
        errno.ENAMETOOLONG: "give --model-dir a shorter name",
        # By `OddFileError`, of what stands in the place of a file.
        errno.ENXIO: "remove it",
    }
    return remedies.get(error.errno or 0, "check the disk")


def _links_in(folder: Path) -> list[Path]:
    """Every link below a folder of the model's that a run writes into under known names."""
    return sorted(
        Path(place, name)
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if os.path.islink(os.path.join(place, name))
    )
