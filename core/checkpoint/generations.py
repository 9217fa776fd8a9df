"""The complete saves of a model, `generations/<n>` in its folder: listed, added whole, pruned.

A new one is written as `.<n>.tmp` and gets its name when all of it is on the disk; an old one is
renamed to `.<n>.trash` before it is deleted. So a name without a dot never stands for a part, and
what a crash leaves is known by its name.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..system.durable_files import (
    DamagedError,
    discard,
    discard_leftovers,
    reading,
    sync_folder,
)
from .format import (
    MAX_COUNT,
    Generation,
    Manifest,
    read_generation,
    read_manifest,
    read_state,
    write_manifest,
)
from .state import TrainingState

FOLDER = "generations"
BACKUP = "backup"
"""Name of the copy of the best generation, which is kept apart from the others."""

_NAME = re.compile(r"\d{1,12}(-\d{1,6})?")
_LEFTOVER = re.compile(r"\.\d{1,12}(-\d{1,6})?\.(tmp|trash)")


def is_name(text: str) -> bool:
    """Whether a generation can have this name."""
    return _NAME.fullmatch(text) is not None


class Generations:
    """The generations of one model folder.

    Args:
        model_dir: The model folder; nothing needs to be in it yet.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir, self.path = model_dir, model_dir / FOLDER
        self.damaged: set[str] = set()
        """Names of those that were found not to be whole: never pruned, since a user may mend
        them."""

        self._sequence = 0
        """The highest place in the order of writing that was seen."""

    def names(self) -> list[str]:
        """Every generation, whole or not."""
        if not self.path.is_dir():
            return []
        return sorted(
            entry.name
            for entry in os.scandir(self.path)
            # A link may be a stranger's: what it leads to would be read, and pruned.
            if is_name(entry.name) and entry.is_dir(follow_symlinks=False)
        )

    def manifests(self, unreadable: list[str] | None = None) -> list[Manifest]:
        """Every readable manifest, newest first.

        Args:
            unreadable: Gets a sentence for each of the others.
        """
        manifests = []
        for name in self.names():
            try:
                manifests.append(read_manifest(self.path / name))
            except DamagedError as damage:
                self.damaged.add(name)
                if unreadable is not None:
                    unreadable.append(f"generation {name} is damaged ({damage})")
        # Not by name or time: a run that went back counts again, and copies change times.
        manifests.sort(key=lambda manifest: manifest.sequence, reverse=True)
        if manifests:
            # It never falls, even where the newest is deleted by hand: an old number would tie.
            self._sequence = max(self._sequence, manifests[0].sequence)
        return manifests

    def newest(self, passed_over: list[str]) -> tuple[Generation, Manifest] | None:
        """The newest that is whole, read into memory; None where none is.

        Args:
            passed_over: Gets a sentence for each that is damaged and newer, or has no manifest.
        """
        for manifest in self.manifests(passed_over):
            try:
                return read_generation(self.path / manifest.name, manifest), manifest
            except DamagedError as damage:
                self.damaged.add(manifest.name)
                passed_over.append(f"generation {manifest.name} is damaged ({damage})")
        return None

    def newest_until(self, latest: int) -> tuple[Path, Manifest, dict[str, Any]] | None:
        """Folder, manifest and state of the newest whole one, or of the backup, up to a total
        iteration; None where there is none so early."""
        candidates = [(self.path / manifest.name, manifest) for manifest in self.manifests()]
        with suppress(DamagedError):  # there is no backup, or none that helps
            backup = self.model_dir / BACKUP
            candidates.append((backup, read_manifest(backup)))
        # The backup may be older than any of the others, or a copy of the newest.
        candidates.sort(key=lambda candidate: candidate[1].sequence, reverse=True)
        for folder, manifest in candidates:
            if manifest.iterations <= latest:
                with suppress(DamagedError):
                    return folder, manifest, read_generation(folder, manifest).state
        return None

    def newest_state(self) -> dict[str, Any] | None:
        """The state of the newest that has a whole one, without a look at its tensors."""
        # Twice, since a run that goes on may delete what was listed before it is read.
        for manifest in (item for _ in range(2) for item in self.manifests()):
            with suppress(DamagedError):
                return read_state(self.path / manifest.name, manifest)[0]
        return None

    def find(self, name: str | None = None) -> tuple[Path, Manifest]:
        """The folder and manifest of a generation, or of the `backup`; None: of the newest.

        Raises:
            ValueError: There is none of this name, or its manifest is damaged.
        """
        unreadable: list[str] = []
        if name is None:
            manifests = self.manifests(unreadable)
            if not manifests:
                why = unreadable[0] if unreadable else "nothing has been saved in it yet"
                raise ValueError(f"model folder {self.model_dir} holds no save: {why}")
            return self.path / manifests[0].name, manifests[0]
        backup = self.model_dir / BACKUP
        names = self.names() + [BACKUP] * backup.is_dir()
        if name not in names:
            raise ValueError(
                f"model folder {self.model_dir} has no generation {name!r}; it has: "
                f"{', '.join(names) or 'none'}"
            )
        folder = backup if name == BACKUP else self.path / name
        try:
            with reading(self.model_dir):
                return folder, read_manifest(folder)
        except DamagedError as damage:
            raise ValueError(f"{folder} is damaged ({damage}); choose another") from damage

    @contextmanager
    def adding(self, iterations: int) -> Iterator[Path]:
        """Path at which the files of a new generation are put into a folder, then committed.

        Whatever is still there at the end is removed.
        """
        # Only now, so that a run which is refused leaves no empty folder.
        self.path.mkdir(exist_ok=True)
        temporary = self.path / f".{self._free_name(iterations)}.tmp"
        discard(temporary)
        try:
            yield temporary
        finally:
            discard(temporary)

    def commit(self, temporary: Path, state: dict[str, Any], file_names: frozenset[str]) -> str:
        """Make a generation of the files in a temporary folder, durably; its name.

        Raises:
            ValueError: The next start could not read it, or no number is left to order it by.
            OSError: The disk refuses.
        """
        if self._sequence >= MAX_COUNT:
            raise ValueError(f"its saves are numbered up to {MAX_COUNT}, the last number there is")
        # Not taken back where the save fails: the number may have reached the disk all the same.
        self._sequence += 1
        write_manifest(temporary, state, file_names, self._sequence)
        _refuse_unreadable(temporary)
        # The rename may reach the disk before the names in the folder do, unless they are first.
        sync_folder(temporary)
        name = temporary.name.removeprefix(".").removesuffix(".tmp")
        os.rename(temporary, self.path / name)
        sync_folder(self.path)
        return name

    def prune(self, num_kept: int) -> None:
        """Delete all whole generations but the newest: those of different iterations stay first.

        Two of one iteration must not push out the one before, which is the way back from a
        divergence.

        Raises:
            OSError: The disk refuses.
        """
        whole = [item for item in self.manifests() if item.name not in self.damaged]
        newest: dict[int, str] = {}
        for item in whole:
            newest.setdefault(item.iterations, item.name)
        # A stable sort: within both kinds the newest stay first.
        whole.sort(key=lambda item: newest[item.iterations] != item.name)
        for item in whole[num_kept:]:
            self.delete(item.name)

    def delete(self, name: str) -> None:
        """Delete a generation; OSError where the disk refuses."""
        trash = self.path / f".{name}.trash"
        os.rename(self.path / name, trash)  # a half-deleted one must not look whole
        shutil.rmtree(trash)

    def clean_up(self) -> None:
        """Remove what a killed run left half written or deleted, in the model folder too."""
        discard_leftovers(self.path.parent)
        if not self.path.is_dir():
            return
        for name in os.listdir(self.path):
            # By the whole form of the name: what a user has put there stays.
            if _LEFTOVER.fullmatch(name):
                discard(self.path / name)

    def _free_name(self, iterations: int) -> str:
        # Also a link or a file of this name is in the way of a rename, so no `names` here.
        taken = {name for name in os.listdir(self.path) if is_name(name)}
        name, number = str(iterations), 1
        while name in taken:
            number += 1
            name = f"{iterations}-{number}"
        return name


def _refuse_unreadable(generation: Path) -> None:
    """Refuse what was written where the next start would: by its own rules, less the hashes."""
    try:
        TrainingState.from_dict(read_state(generation, read_manifest(generation))[0])
    except DamagedError as damage:
        raise ValueError(f"what was written cannot be read again: {damage}") from damage
