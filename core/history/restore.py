"""Return, by hand, to a save that is kept: the backup, a generation, or another copy.

The order makes a kill at any moment leave the old or the restored state in use, and loses nothing:

    1. what will be replaced gets a second name (a copy, where the disk has no hard links) in
       `archived_<time>/`, which gets its own name when it is whole
    2. a copy of the restored save is written as the newest generation; its name is the moment of
       change
    3. the logs are marked with what is undone (see `undone`); the previews of what is undone, the
       generations that are archived now, and logs that the restored state does not know, leave

The same command again finishes what a kill interrupted.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.format import (
    CONFIG,
    MANIFEST,
    MAX_JSON_BYTES,
    STATE,
    Manifest,
    check_generation,
    read_json,
    read_state,
)
from ..checkpoint.generations import BACKUP, FOLDER, Generations
from ..checkpoint.model_folder import PREVIEW, PREVIEWS, SHEET, ModelFolder
from ..checkpoint.owner import InUseError
from ..checkpoint.pointer import write_pointer
from ..checkpoint.state import TrainingState, session_number
from ..preview.kept import KeptPreviews
from ..system.durable_files import (
    DamagedError,
    link_file,
    link_files,
    read_regular,
    replace_file,
    sync_folder,
    temporary_name,
)
from .undone import mark_undone


@dataclass(frozen=True)
class Restored:
    """What was done."""

    iterations: int
    generation: str
    """Name of the one in use now."""

    archive: Path | None
    """Path of the archive of what was replaced; None where nothing was."""

    archived: list[str]
    """Names of what is in it."""


def restore(
    path: Path, *, generation: str = BACKUP, snapshot: Path | None = None, force: bool = False
) -> Restored:
    """Have another save be the one in use.

    Args:
        path: The model folder.
        generation: Name of one of its generations, or `backup`.
        snapshot: A snapshot of the model, or another copy of its folder, in place of those.
        force: Even where the copy is of another run.

    Raises:
        ValueError: The save is missing, damaged, or of another model; a run holds the folder; the
            disk refuses. The state in use is then whole: as it was, or restored.
    """
    if not path.is_dir():
        raise ValueError(f"model folder {path} does not exist")
    try:
        with ModelFolder(path) as folder:
            source, manifest = _source(folder, generation, snapshot)
            # Before anything changes: a damaged save must not take the place of a whole one.
            state = _whole(source, manifest)
            _refuse_other_model(folder, source, manifest, force=force)
            return _restored(folder, source, manifest, state)
    except OSError as error:
        raise ValueError(
            f"cannot restore in {path}: {error.strerror or error}; mend that and give the same "
            "command again"
        ) from error
    except InUseError as error:
        raise ValueError(f"model folder {path} was taken by {error}; stop that run") from error


def _source(folder: ModelFolder, name: str, snapshot: Path | None) -> tuple[Path, Manifest]:
    if snapshot is not None:
        # A generation by itself says nothing of which model it was copied from.
        if (snapshot / MANIFEST).is_file():
            raise ValueError(
                f"{snapshot} is one save, and --snapshot takes a copy of a whole model folder; of "
                "this model's own saves --generation NAME chooses one"
            )
        with ModelFolder(snapshot, read_only=True) as other:
            return other.generations.find()
    if name == BACKUP and not (folder.path / BACKUP).exists():
        raise ValueError(
            f"model folder {folder.path} has no backup yet; give --generation NAME or --snapshot "
            "FOLDER"
        )
    return folder.generations.find(name)


def _whole(source: Path, manifest: Manifest) -> TrainingState:
    """The state of a save that is whole; ValueError where it is damaged."""
    try:
        check_generation(source, manifest)
        values, _ = read_state(source, manifest)
    except DamagedError as damage:
        raise ValueError(
            f"{source} is damaged ({damage}) and cannot be restored; choose another by "
            "--generation NAME or --snapshot FOLDER"
        ) from damage
    return TrainingState.from_dict(values)


def _refuse_other_model(
    folder: ModelFolder, source: Path, manifest: Manifest, *, force: bool
) -> None:
    held = _identity(folder)
    if held is None:
        return
    trainer, run_id = held
    # Never, not even by force: weights of another family do not fit the settings.
    if manifest.trainer != trainer:
        raise ValueError(
            f"{source} is a model of {manifest.trainer}, and {folder.path} holds one of {trainer}; "
            "choose a copy of this model"
        )
    if manifest.run_id != run_id and not force:
        raise ValueError(
            f"{source} is of another run ({manifest.run_id}) than {folder.path} ({run_id}); choose "
            "a copy of this model, or add --force"
        )


def _identity(folder: ModelFolder) -> tuple[str, str] | None:
    """Trainer and run of the model in a folder; None where nothing in it says so."""
    manifests = folder.generations.manifests()
    if manifests:
        return manifests[0].trainer, manifests[0].run_id
    try:
        pointer = read_json(folder.path / STATE)
    except DamagedError:
        return None
    trainer, run_id = pointer.get("trainer"), pointer.get("run_id")
    return (trainer, run_id) if isinstance(trainer, str) and isinstance(run_id, str) else None


def _restored(
    folder: ModelFolder, source: Path, manifest: Manifest, state: TrainingState
) -> Restored:
    generations = folder.generations
    manifests = generations.manifests()
    newest = manifests[0] if manifests else None
    in_use = newest if newest and _is_copy(generations.path, newest, manifest) else None
    # By the order of writing: after a way back, higher iterations may be older.
    replaced = [other.name for other in manifests if other.sequence > manifest.sequence]
    # Whatever its number: what is in use now is always kept.
    if newest and in_use is None:
        replaced = sorted({*replaced, newest.name})
    if in_use is not None and in_use.name in replaced:
        replaced.remove(in_use.name)
    unreadable = sorted(set(generations.names()) - {other.name for other in manifests})
    logs = _unknown_logs(folder.path / "logs", state)
    archive = None
    if replaced or unreadable or logs or in_use is None:
        # Before anything changes: a kill from here on leaves two names for each save.
        archive = _archive(folder.path, replaced)
    if in_use is None:
        name = folder.save_again(source, manifest, state.to_dict())
    else:
        name = in_use.name
        # The save is in use already, as after a restore that was killed behind its copy.
        write_pointer(folder.path, name, state.to_dict())
    pictures: list[str] = []
    if archive is not None:
        pictures = _move_previews(folder.path, archive, manifest.iterations)
        # After the change: marks of a restore that did not happen would hide good iterations.
        mark_undone(folder.path, state)
        _move_out(generations, replaced, unreadable, archive)
        _move_logs(logs, archive)
    if CONFIG in manifest.files:
        replace_file(
            folder.path / CONFIG, read_regular(generations.path / name / CONFIG, MAX_JSON_BYTES)
        )
    archived = [*replaced, *unreadable, *(f"logs/{log.name}" for log in logs), *pictures]
    return Restored(manifest.iterations, name, archive, archived)


def _is_copy(generations: Path, newest: Manifest, manifest: Manifest) -> bool:
    """Whether the generation in use is whole and the same save as another."""
    if newest.files != manifest.files:
        return False
    try:
        check_generation(generations / newest.name, newest)
    except DamagedError:
        return False
    return True


def _archive(path: Path, names: list[str]) -> Path:
    """A new folder in the model's with a copy of its generations of these names, durable."""
    stem = time.strftime("archived_%Y%m%d_%H%M%S")
    archive, number = path / stem, 1
    # Two restores may fall into one second.
    while archive.exists():
        number += 1
        archive = path / f"{stem}-{number}"
    part = temporary_name(archive)
    (part / FOLDER).mkdir(parents=True)
    for name in names:
        # Links do: these generations are deleted under their old name, and never written to.
        link_files(path / FOLDER / name, part / FOLDER / name)
    for name in (STATE, CONFIG):
        if (path / name).is_file() and not (path / name).is_symlink():
            link_file(path / name, part / name)
    sync_folder(part / FOLDER)
    sync_folder(part)
    # Only now its name: an archive that is there is whole.
    os.rename(part, archive)
    sync_folder(path)
    return archive


def _move_out(
    generations: Generations, replaced: list[str], unreadable: list[str], archive: Path
) -> None:
    """Take generations away that are archived; one that cannot be read moves there as it is."""
    for name in replaced:
        # Its files live on under their second name in the archive.
        generations.delete(name)
    for name in unreadable:
        os.rename(generations.path / name, archive / FOLDER / name)
    sync_folder(archive / FOLDER)
    sync_folder(generations.path)


def _move_previews(path: Path, archive: Path, iterations: int) -> list[str]:
    """Take away preview and sheet, and previews of later saves than the one in use; the names of
    them."""
    moved = [name for name in (PREVIEW, SHEET) if (path / name).is_file()]
    kept = KeptPreviews(path / PREVIEWS)
    later = [kept.path(each).name for each in kept.iterations() if each > iterations]
    if later:
        (archive / PREVIEWS).mkdir(exist_ok=True)
        moved += [f"{PREVIEWS}/{name}" for name in later]
    for name in moved:
        os.rename(path / name, archive / name)
    return moved


def _unknown_logs(logs: Path, state: TrainingState) -> list[Path]:
    """The log folders of sessions that a state does not know."""
    if not logs.is_dir():
        return []
    known = {session.number for session in state.sessions}
    first = min(known, default=0)  # it stands for all sessions up to it
    numbered = ((session_number(entry.name), entry) for entry in sorted(logs.iterdir()))
    return [
        entry
        for number, entry in numbered
        if number is not None and number > first and number not in known
    ]


def _move_logs(logs: list[Path], archive: Path) -> None:
    for log in logs:
        (archive / "logs").mkdir(exist_ok=True)
        os.rename(log, archive / "logs" / log.name)
