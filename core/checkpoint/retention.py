"""Copies of saves that outlive the newest generations: the backup and the snapshots.

    backup/                               the save with the lowest mean loss
    <model dir>_snapshot_<n>_iters/       a model folder of its own, beside this one

Both are copies with files of their own, never links: damage to a save must not reach them. All
functions raise OSError where the disk refuses, and leave what was there before.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..system.durable_files import (
    copy_files,
    discard,
    discard_leftovers,
    sync_folder,
    temporary_name,
    write_file,
)
from .format import CONFIG, MANIFEST
from .generations import BACKUP, FOLDER
from .pointer import write_pointer

_OLD_BACKUP, _NEW_BACKUP = ".backup.trash", ".backup.tmp"


def replace_backup(model_dir: Path, generation: Path) -> None:
    """Put a copy of a generation in the place of the backup.

    A kill at any moment leaves the old or the new one, under a name that `finish_backup` knows.
    """
    backup, old, new = (model_dir / name for name in (BACKUP, _OLD_BACKUP, _NEW_BACKUP))
    try:
        # First: whatever an earlier change has left would be in the way of this one.
        finish_backup(model_dir)
        # All of the copy before anything of the old one moves: a full disk is met here.
        copy_files(generation, new, os.listdir(generation))
        if backup.is_dir():
            os.rename(backup, old)  # no rename replaces a folder that holds something
        os.rename(new, backup)
        sync_folder(model_dir)
    except OSError:
        with suppress(OSError):  # it is tried again at the next one
            finish_backup(model_dir)
        raise
    discard(old)


def finish_backup(model_dir: Path) -> None:
    """Finish or undo what a crash left of a change of backups."""
    backup, old, new = (model_dir / name for name in (BACKUP, _OLD_BACKUP, _NEW_BACKUP))
    # Killed between the two renames, when neither had the name.
    if old.is_dir() and not backup.exists():
        os.rename(old, backup)
    for leftover in (old, new):
        discard(leftover)


def snapshot_path(model_dir: Path, iterations: int) -> Path:
    """Path of the snapshot of a total iteration; OSError where the folder is not known."""
    # Resolved, since `.` has no name for the number to stand behind.
    folder = model_dir.resolve()
    return folder.with_name(f"{folder.name}_snapshot_{iterations}_iters")


def write_snapshot(
    target: Path,
    generation: Path,
    file_names: Iterable[str],
    state: dict[str, Any],
    config: bytes | None,
) -> None:
    """Write a model folder with a copy of a generation, whole or not at all.

    Args:
        target: The folder, of which there is none.
        generation: Folder of the generation.
        file_names: Names of the files in it, less the manifest.
        state: State that it holds.
        config: The settings, as they are to stand in the model folder; None: none.
    """
    discard_leftovers(target.parent, of=target)
    new = temporary_name(target)
    try:
        (new / FOLDER).mkdir(parents=True)
        copy_files(generation, new / FOLDER / generation.name, (*file_names, MANIFEST))
        # A pointer of its own: the snapshot is a model folder that any command takes.
        write_pointer(new, generation.name, state)
        if config is not None:
            write_file(new / CONFIG, config)
        # From within: its name must not reach the disk before what it holds.
        sync_folder(new / FOLDER)
        sync_folder(new)
        os.rename(new, target)
        sync_folder(target.parent)
    finally:
        discard(new)
