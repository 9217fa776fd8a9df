"""A model folder: everything that is kept of a run, each part whole or absent.

    config.toml          settings as last resolved, for people to read
    state.json           the pointer: which generation is in use, and the run's main figures
    generations/<n>/     model.safetensors  optimizer.safetensors  state.json  config.toml
                         manifest.json (size and SHA-256 of the others, and the order of writing)
    backup/              the same of the save with the lowest mean loss
    archived_<time>/     what `restore` replaced: generations, state.json, config.toml, logs
    preview.png          what the model makes of some faces
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
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import Config, to_toml
from ..system.durable_files import (
    DamagedError,
    copy_files,
    discard,
    read_regular,
    replace_file,
    sync_folder,
    write_file,
)
from .format import (
    CONFIG,
    MANIFEST,
    MAX_COUNT,
    MAX_JSON_BYTES,
    MODEL,
    OPTIMIZER,
    STATE,
    Generation,
    Manifest,
    metadata_of,
    most_tensor_bytes,
    parse_json,
    read_generation,
    read_json,
    read_manifest,
    read_state,
    read_tensor_file,
    read_tensors,
    write_manifest,
    write_tensors,
)
from .lock import LOCK, Lock, acquire
from .owner import OWNER, InUseError
from .state import TrainingState

BACKUP, _OLD_BACKUP, _NEW_BACKUP = "backup", ".backup.trash", ".backup.tmp"
PREVIEW = "preview.png"
POINTER_KEYS = ("schema", "run_id", "trainer", "iterations", "sessions", "lowest_mean_loss")

_NAME = re.compile(r"\d{1,12}(-\d{1,6})?")
_LEFTOVER = re.compile(r"\.\d{1,12}(-\d{1,6})?\.(tmp|trash)")
_TOLD_OF: set[Path] = set()
"""Folders whose disk's limits this process has told of; every stage of a run opens its folder."""

_CONFIG_HEADING = (
    "# The settings that this model goes on with. Change them by --set or --configfile, or by\n"
    "# flags for one session: what is edited here is not read back.\n\n"
)


class SaveError(RuntimeError):
    """A save did not reach the disk; the message says why, and what the last complete one is."""


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
        self._generations = self.path / "generations"
        self._lock: Lock | None = None
        self._config: bytes | None = None
        self._damaged: set[str] = set()
        self._current: tuple[str, frozenset[str], bytes] | None = None
        self._last_complete: int | None = None
        self._sequence = 0
        _refuse_foreign(self.path, read_only=read_only)
        self._is_made_here = not read_only and not os.path.exists(self.path)
        if not read_only:
            self._lock = acquire(self.path)
        try:
            with self._reading():
                self._tell_of_disk()
                self._sweep()
                self._refuse_other_trainer(trainer)
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
                with suppress(OSError):  # the lock must go, and it is the run's end that is told
                    self._lock.remove_folder()
            self._lock.release()
            self._lock = None

    @property
    def is_new(self) -> bool:
        """True where nothing has been saved in the folder yet."""
        return not self.names() and not (self.path / STATE).exists()

    def write_config(self, config: Config) -> None:
        """Put the resolved settings into the folder, and into every generation from now on."""
        self._require_lock()
        self._config = (_CONFIG_HEADING + to_toml(config)).encode()
        with self._reporting():
            replace_file(self.path / CONFIG, self._config)

    def load(self) -> Generation | None:
        """The newest generation that is whole, read into memory; None where nothing was saved.

        A damaged one is passed over, left as it is, and told of in `warnings`.

        Raises:
            ValueError: Where there are saves but none is whole, or a newer version made them.
        """
        with self._reading():
            return self._load()

    def _load(self) -> Generation | None:
        passed_over: list[str] = []
        for manifest in self.manifests(passed_over):
            try:
                generation = read_generation(self._generations / manifest.name, manifest)
            except DamagedError as damage:
                self._damaged.add(manifest.name)
                passed_over.append(f"generation {manifest.name} is damaged ({damage})")
                continue
            self._adopt(generation, manifest, passed_over)
            return generation
        if not self.is_new:
            why = passed_over[0] if passed_over else "its generations are missing"
            raise ValueError(
                f"model folder {self.path} holds no whole save: {why}; put back a copy of its "
                "generations folder, or choose another --model-dir"
            )
        return None

    def newest_state(self) -> dict[str, Any] | None:
        """The state of the newest save, without a look at its tensors; None: nothing was saved.

        Raises:
            ValueError: Where there are saves but none has a whole state, or a newer version made
                them.
        """
        with self._reading():
            # Twice, since a run that goes on may delete what was listed before it is read.
            for manifest in (found for _ in range(2) for found in self.manifests([])):
                try:
                    return read_state(self._generations / manifest.name, manifest)[0]
                except DamagedError:
                    continue
            if self.is_new:
                return None
        raise ValueError(
            f"model folder {self.path} holds no save whose state can be read; put back a copy of "
            "its generations folder"
        )

    def save(
        self, model: dict[str, Tensor], optimizer: dict[str, Tensor] | None, state: dict[str, Any]
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
        tensors = {MODEL: model} | ({} if optimizer is None else {OPTIMIZER: optimizer})
        texts = {STATE: state_bytes} | ({} if self._config is None else {CONFIG: self._config})
        file_names = frozenset(tensors | texts)
        if self._current is not None and self._current[1:] == (file_names, state_bytes):
            return self._generations / self._current[0]
        with self._reporting():
            self._generations.mkdir(exist_ok=True)
            name = self._free_name(state["iterations"])
            temporary = self._generations / f".{name}.tmp"
            discard(temporary)
            temporary.mkdir()
            try:
                for file_name, content in tensors.items():
                    write_tensors(temporary / file_name, content, metadata)
                for file_name, text in texts.items():
                    write_file(temporary / file_name, text)
                self._publish(temporary, name, state, file_names)
            finally:
                discard(temporary)
        self._current = (name, file_names, state_bytes)
        self._last_complete = state["iterations"]
        self._retire()
        return self._generations / name

    def back_up(self, generation: Path) -> None:
        """Put a copy of a generation in the place of the backup.

        Where the disk refuses, the backup before stays, and `warnings` says why: the model itself
        is saved.
        """
        self._require_lock()
        backup, old, new = (self.path / name for name in (BACKUP, _OLD_BACKUP, _NEW_BACKUP))
        try:
            self._settle_backup()
            copy_files(generation, new, os.listdir(generation))
            if backup.is_dir():
                os.rename(backup, old)
            os.rename(new, backup)
            sync_folder(self.path)
        except OSError as error:
            with suppress(OSError):  # it is tried again at the next one
                self._settle_backup()
            self._warn(
                f"cannot renew {backup}: {error.strerror or error}; {_advice(error)}; training "
                "goes on with the backup as it was"
            )
        else:
            discard(old)

    def snapshot(self) -> Path | None:
        """A model folder beside this one, `<model dir>_snapshot_<n>_iters`, with a copy of the
        generation that was loaded or saved last. One that is there already is left as it is.

        None where there can be none, and `warnings` says why: the model itself is saved.
        """
        self._require_lock()
        target = None
        try:
            folder = self.path.resolve()
            target = folder.with_name(f"{folder.name}_snapshot_{self._last_complete}_iters")
            if not os.path.lexists(target):
                self._write_snapshot(target)
                return target
            if _is_same(target / STATE, self.path / STATE):
                return target
            self._warn(f"{target} is there already and was left as it is; no snapshot was made")
        except OSError as error:
            self._warn(
                f"cannot write snapshot {target or 'beside ' + str(self.path)}: "
                f"{error.strerror or error}; {_advice(error)}, or "
                "leave snapshots out (--snapshot-interval 0); training goes on without it"
            )
        return None

    def _write_snapshot(self, target: Path) -> None:
        """Write a model folder with a copy of the generation in use; OSError where that fails."""
        assert self._current is not None
        name, file_names, state_bytes = self._current
        new = target.with_name(f".{target.name}.tmp")
        discard(new)
        try:
            (new / "generations").mkdir(parents=True)
            place = new / "generations" / name
            copy_files(self._generations / name, place, (*file_names, MANIFEST))
            write_file(new / STATE, _pointer_to(name, parse_json(STATE, state_bytes)))
            if self._config is not None:
                write_file(new / CONFIG, self._config)
            sync_folder(new / "generations")
            sync_folder(new)
            os.rename(new, target)
            sync_folder(target.parent)
        finally:
            discard(new)

    def go_back(self, latest: int) -> int | None:
        """Have the newest whole save up to a total iteration be the one in use; its iteration.

        Saves after it stay, until later ones retire them. None: there is none so early.

        Raises:
            SaveError: Where the disk refuses.
        """
        self._require_lock()
        candidates = [(self._generations / found.name, found) for found in self.manifests([])]
        newest = candidates[0][1].sequence if candidates else 0
        backup = self.path / BACKUP
        try:
            candidates.append((backup, read_manifest(backup)))
        except DamagedError:
            pass  # there is none, or none that helps
        candidates.sort(key=lambda candidate: candidate[1].sequence, reverse=True)
        for folder, manifest in candidates:
            if manifest.iterations > latest:
                continue
            try:
                state = read_generation(folder, manifest).state
            except DamagedError:
                continue
            if manifest.sequence < newest:
                with self._reporting():
                    self.save_again(folder, manifest, state)
                self._retire()
            return manifest.iterations
        return None

    def save_again(self, source: Path, manifest: Manifest, state: dict[str, Any]) -> str:
        """Write a generation that is kept somewhere as the newest one of this folder; its name.

        Until it has its name the one before is in use, from then on this one.

        Raises:
            OSError: The disk refuses.
        """
        self._require_lock()
        self._generations.mkdir(exist_ok=True)
        name = self._free_name(manifest.iterations)
        temporary = self._generations / f".{name}.tmp"
        discard(temporary)
        try:
            copy_files(source, temporary, manifest.files)
            self._publish(temporary, name, state, frozenset(manifest.files))
        finally:
            discard(temporary)
        self._current = None
        self._last_complete = manifest.iterations
        return name

    # What is in the folder

    def names(self) -> list[str]:
        """Every generation, whole or not."""
        if not self._generations.is_dir():
            return []
        return sorted(
            entry.name
            for entry in os.scandir(self._generations)
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        )

    def point_to(self, name: str, state: dict[str, Any]) -> None:
        """Write down, for people and programs, which generation is in use; OSError as above."""
        replace_file(self.path / STATE, _pointer_to(name, state))

    def find(self, name: str | None = None) -> tuple[Path, Manifest]:
        """The folder and manifest of a generation, or of the `backup`; None: of the newest.

        Raises:
            ValueError: There is none of this name, or its manifest is damaged.
        """
        unreadable: list[str] = []
        if name is None:
            found = self.manifests(unreadable)
            if not found:
                why = unreadable[0] if unreadable else "nothing has been saved in it yet"
                raise ValueError(f"model folder {self.path} holds no save: {why}")
            return self._generations / found[0].name, found[0]
        has_backup = (self.path / BACKUP).is_dir()
        if name not in self.names() and not (name == BACKUP and has_backup):
            names = self.names() + [BACKUP] * has_backup
            raise ValueError(
                f"model folder {self.path} has no generation {name!r}; it has: "
                f"{', '.join(names) or 'none'}"
            )
        folder = self.path / BACKUP if name == BACKUP else self._generations / name
        try:
            with self._reading():
                return folder, read_manifest(folder)
        except DamagedError as damage:
            raise ValueError(f"{folder} is damaged ({damage}); choose another") from damage

    def manifests(self, unreadable: list[str]) -> list[Manifest]:
        """Every readable manifest, newest first; a sentence for each of the others."""
        manifests = []
        for name in self.names():
            try:
                manifests.append(read_manifest(self._generations / name))
            except DamagedError as damage:
                self._damaged.add(name)
                unreadable.append(f"generation {name} is damaged ({damage})")
        manifests.sort(key=lambda manifest: manifest.sequence, reverse=True)
        if manifests:
            self._sequence = max(self._sequence, manifests[0].sequence)
        return manifests

    def _pointer(self) -> str | None:
        """The generation that the top state.json names; None where there is no such file."""
        path = self.path / STATE
        if not path.exists():
            return None
        try:
            name = read_json(path).get("generation")
        except DamagedError as damage:
            self._warn(f"{path} is damaged ({damage}); the next save replaces it")
            return None
        return name if isinstance(name, str) and _NAME.fullmatch(name) else None

    def _adopt(self, generation: Generation, manifest: Manifest, passed_over: list[str]) -> None:
        """Take up a loaded generation as the one in use, and tell what was passed over for it."""
        pointer = self._pointer()
        if pointer is not None and not (self._generations / pointer).is_dir():
            passed_over.append(f"generation {pointer} is missing")
        for sentence in passed_over:
            self._warn(
                f"{sentence}; generation {generation.name} of iteration {manifest.iterations} is "
                "used, and nothing was deleted"
            )
        state = read_regular(generation.path / STATE, MAX_JSON_BYTES)
        self._current = (generation.name, frozenset(manifest.files), state)
        self._last_complete = manifest.iterations
        if self._config is None and CONFIG in manifest.files:
            self._config = read_regular(generation.path / CONFIG, MAX_JSON_BYTES)

    def _refuse_other_trainer(self, trainer: str | None) -> None:
        manifests = self.manifests([])
        if trainer is not None and manifests and manifests[0].trainer != trainer:
            held = manifests[0].trainer
            raise ValueError(
                f"model folder {self.path} holds a model of {held}, not of {trainer}; choose "
                f"another --model-dir, or --trainer {held}"
            )

    # Writing

    def _free_name(self, iterations: int) -> str:
        taken = {name for name in os.listdir(self._generations) if _NAME.fullmatch(name)}
        name, number = str(iterations), 1
        while name in taken:
            number += 1
            name = f"{iterations}-{number}"
        return name

    def _publish(
        self, temporary: Path, name: str, state: dict[str, Any], file_names: frozenset[str]
    ) -> None:
        """Make a generation of the files in a temporary folder, and the one in use."""
        assert self._lock is not None
        self._lock.confirm()
        if self._sequence >= MAX_COUNT:
            raise ValueError(f"its saves are numbered up to {MAX_COUNT}, the last number there is")
        self._sequence += 1
        write_manifest(temporary, state, file_names, self._sequence)
        _refuse_unreadable(temporary)
        sync_folder(temporary)
        os.rename(temporary, self._generations / name)
        sync_folder(self._generations)
        self.point_to(name, state)

    def _settle_backup(self) -> None:
        """Finish or undo what a crash left of a change of backups."""
        backup, old, new = (self.path / name for name in (BACKUP, _OLD_BACKUP, _NEW_BACKUP))
        if old.is_dir() and not backup.exists():
            os.rename(old, backup)
        for leftover in (old, new):
            discard(leftover)

    def _retire(self) -> None:
        """Delete all whole generations but the newest ones that are kept: those of different
        iterations first, so that two of one iteration do not push the one before out."""
        try:
            whole = [item for item in self.manifests([]) if item.name not in self._damaged]
            newest: dict[int, str] = {}
            for item in whole:
                newest.setdefault(item.iterations, item.name)
            whole.sort(key=lambda item: newest[item.iterations] != item.name)
            for name in (item.name for item in whole[self.keep_generations :]):
                trash = self._generations / f".{name}.trash"
                os.rename(self._generations / name, trash)  # a half-deleted one must not look whole
                shutil.rmtree(trash)
        except OSError as error:  # the new save is complete all the same
            self._warn(f"cannot delete old generations in {self.path}: {error.strerror or error}")

    def _sweep(self) -> None:
        """Remove what a crashed run left half written or half deleted."""
        if self._lock is None or not self._generations.is_dir():
            return
        self._settle_backup()
        for name in os.listdir(self._generations):
            if _LEFTOVER.fullmatch(name):
                discard(self._generations / name)

    def _tell_of_disk(self) -> None:
        """Tell once in a process what the disk of a folder that is trained in cannot do."""
        if self._lock is None or self.path in _TOLD_OF:
            return
        _TOLD_OF.add(self.path)
        if self._lock.notice:
            self._warn(self._lock.notice)
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
    def _reading(self) -> Iterator[None]:
        """Turn the disk's refusal to read, which is no damage, into one line."""
        try:
            yield
        except OSError as error:
            name = error.filename or self.path
            raise ValueError(f"cannot read {name}: {error.strerror}; mend that first") from error

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn what prevents a save into one line that says what to do."""
        try:
            yield
        except (OSError, InUseError, ValueError) as error:
            last = self._last_complete
            left = (
                "nothing has been saved yet"
                if last is None
                else f"the last complete save is iteration {last}"
            )
            if isinstance(error, OSError):
                reason = f"{error.strerror or error}; {_advice(error)} and start again"
            elif isinstance(error, InUseError):
                reason = f"{error} has taken it; stop that run and start again"
            else:
                reason = f"{error}; choose another --model-dir"
            raise SaveError(f"cannot save to {self.path}: {reason}: {left}") from error


def _refuse_foreign(path: Path, *, read_only: bool) -> None:
    """Refuse a path that is no folder, and one that holds other things than a model, or links."""
    try:  # in one call: another run may be making or removing the folder
        names = set(os.listdir(path)) - {"lost+found"}
    except NotADirectoryError as error:
        raise ValueError(f"model folder {path} is a file; choose another --model-dir") from error
    except FileNotFoundError as error:
        if read_only:
            raise ValueError(f"model folder {path} does not exist") from error
        names = set()
    except OSError as error:
        raise ValueError(f"cannot read model folder {path}: {error.strerror}") from error
    links = sorted(path / name for name in names if os.path.islink(path / name))
    if not read_only:
        links += _links_in(path / "logs") + _links_in(path / "timelapse")
    if links:
        raise ValueError(
            f"{links[0]} is a link, which a model folder may not hold: put what it leads to "
            "in its place"
        )
    if names and not names & {LOCK, OWNER, "generations"}:
        raise ValueError(
            f"model folder {path} is not empty and holds no model; choose a new or empty folder"
        )


def _refuse_unreadable(generation: Path) -> None:
    """Refuse what was written where the next start would: by its own rules, less the hashes."""
    try:
        TrainingState.from_dict(read_state(generation, read_manifest(generation))[0])
    except DamagedError as damage:
        raise ValueError(f"what was written cannot be read again: {damage}") from damage


def _advice(error: OSError) -> str:
    """What the user can do about the disk's refusal."""
    return {
        errno.ENOSPC: "free space",
        errno.EDQUOT: "free space",
        errno.EROFS: "make the disk writable",
        errno.EACCES: "make the folder writable",
        errno.EMFILE: "raise `ulimit -n`",
        errno.ENAMETOOLONG: "give --model-dir a shorter name",
        errno.ENXIO: "remove it",
    }.get(error.errno or 0, "check the disk")


def _links_in(folder: Path) -> list[Path]:
    """Every link below a folder of the model's that a run writes into under known names."""
    return sorted(
        Path(place, name)
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if os.path.islink(os.path.join(place, name))
    )


def _pointer_to(name: str, state: dict[str, Any]) -> bytes:
    """What the top state.json says when this generation is in use."""
    pointer = {key: state[key] for key in POINTER_KEYS if key in state} | {"generation": name}
    return json.dumps(pointer, indent=1).encode()


def _is_same(one: Path, other: Path) -> bool:
    """Whether two pointers are to the same state, under whatever name."""
    try:
        first, second = (read_json(path) for path in (one, other))
    except (DamagedError, OSError):
        return False
    return first | {"generation": None} == second | {"generation": None}


def read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """A model's tensors as saved, and its family where that is told.

    ``path`` is a model folder (its newest whole generation is read), a generation's folder or a
    safetensors file.

    Raises:
        ValueError: There is none of these, or it is damaged.
    """
    try:
        if path.is_file():
            return read_tensor_file(path)
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            max_bytes = most_tensor_bytes(read_state(path, manifest)[1])
            return read_tensors(path, MODEL, manifest, max_bytes), manifest.trainer
    except (OSError, DamagedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read weights from {path}: {reason}") from error
    if not (path / "generations").is_dir():
        raise ValueError(
            f"no weights in {path}: it must be a model folder, a generation of one, or a "
            "model.safetensors"
        )
    with ModelFolder(path, read_only=True) as folder:
        generation = folder.load()
    if generation is None:
        raise ValueError(f"nothing has been saved in model folder {path} yet; load from another")
    return generation.model, generation.state.get("trainer")
