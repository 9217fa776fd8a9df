"""The picture files of a folder: which count, which are passed over, and which two folders share.

Files named .png count, links to files too; where there are none, the pack of faces that DeepFaceLab
makes, else JPEGs. JPEGs beside others do not, nor do sub-folders unless they are asked for: what
lies there is counted to be told, up to a bound.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..system.paths import expanded
from ..system.printable import plural

JPEG_SUFFIXES = (".jpg", ".jpeg")
PACK_NAME = "faceset.pak"
PACK_SUFFIX = ".pak"
SUB_FOLDERS_FLAG = "--sub-folders"

_KINDS = {".png": "PNG", **dict.fromkeys(JPEG_SUFFIXES, "JPEG")}
_NUM_NAMED = 5
_MAX_ENTRIES = 20_000
"""Sub-folders and entries in them that are looked at. Chosen, unmeasured."""


@dataclass(frozen=True)
class PassedOver:
    """Pictures of a folder that are not looked at.

    num_jpegs: in the folder itself, beside PNGs or a pack. subfolders: those that hold PNGs, or
    JPEGs where none holds a PNG (kind), at any depth. num_deeper: pictures of that kind in them;
    is_whole: there are no more than these.
    """

    num_jpegs: int = 0
    subfolders: tuple[str, ...] = ()
    num_deeper: int = 0
    kind: str = "PNG"
    is_whole: bool = True

    def notice(self, *, has_flag: bool = False) -> str:
        """What is not used, and what to do, as a sentence; empty where all is used. has_flag:
        whether the command can read sub-folders."""
        if not self.counts:
            return ""
        remedies = []
        if self.subfolders:
            flag = f"add {SUB_FOLDERS_FLAG}, or " if has_flag else ""
            remedies.append(f"{flag}put the faces into one folder")
        if self.num_jpegs:
            remedies.append("give JPEGs of DeepFaceLab a folder of their own")
        are = plural(self.num_deeper + self.num_jpegs, "is", "are")
        return f"{' and '.join(self.counts)} {are} not used: {'; '.join(remedies)}"

    def instead(self, *, has_flag: bool = False) -> str:
        """What a folder that holds no PNG holds in their place, and what to do; has_flag: whether
        the command can read sub-folders."""
        if self.subfolders:
            num_folders = len(self.subfolders)
            count = self._count if self.kind == "PNG" else self._deeper
            flag = f", add {SUB_FOLDERS_FLAG}" if has_flag else ""
            return (
                f"; its {self._names} {plural(num_folders, 'holds', 'hold')} {count}: give "
                f"{plural(num_folders, 'that one', 'one of them')}{flag}, or put the faces into "
                "one folder"
            )
        return ": give the folder that holds the face PNGs"

    @property
    def counts(self) -> list[str]:
        """What is not used, in a few words each."""
        words = [f"{self._deeper} in its {self._names}"] if self.subfolders else []
        own = f"{self.num_jpegs} {plural(self.num_jpegs, 'JPEG')}"
        return [*words, own] if self.num_jpegs else words

    @property
    def _deeper(self) -> str:
        return f"{self._count} {plural(self.num_deeper, self.kind)}"

    @property
    def _count(self) -> str:
        return str(self.num_deeper) if self.is_whole else f"more than {self.num_deeper}"

    @property
    def _names(self) -> str:
        some = ", ".join(self.subfolders[:_NUM_NAMED])
        more = ", ..." if len(self.subfolders) > _NUM_NAMED else ""
        return f"{plural(len(self.subfolders), 'sub-folder')} {some}{more}"


def list_pictures(
    path: str | os.PathLike[str], *, side: str | None = None, sub_folders: bool | None = None
) -> list[Path]:
    """The .png files of a folder, sorted by name; links to files count.

    Where it has none, its faceset.pak, which may be given itself, too; else its JPEGs.
    side: "a" or "b", for the texts. sub_folders: whether those of its sub-folders count too, sorted
    by folder; None: the command has no such choice. Raises ValueError, one line, where there is no
    such folder, no such file in it, or PNGs and a pack.
    """
    if sub_folders:
        holders = _holders(expanded(path))
        if holders:
            return [file for holder in holders for file in list_pictures(holder, side=side)]
    folder = expanded(path)
    name = name_of(folder, side)
    if not folder.exists():
        raise ValueError(f"{name} does not exist: give the folder that holds the face PNGs")
    # Given itself: a pack that was renamed is not found by its folder.
    if folder.suffix.lower() == PACK_SUFFIX and folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"{name} is a file: give the folder that holds the face PNGs")
    try:
        entries = _entries(folder)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None
    kind = _kind_used(entries)
    # Both may be the same faces, unpacked: to train on either silently would be a guess.
    if entries["pack"] and entries["PNG"]:
        raise ValueError(
            f"{name} holds {PACK_NAME} and {len(entries['PNG'])} "
            f"{plural(len(entries['PNG']), 'PNG')}: put either into a folder of its own"
        )
    if not entries[kind]:
        others = _passed_over(folder, entries)
        raise ValueError(f"{name} holds no PNG{others.instead(has_flag=sub_folders is False)}")
    # Sorted: numbers of faces, and so what is drawn of a seed, must not depend on the disk.
    return [folder / file for file in sorted(entries[kind])]


def passed_over(path: str | os.PathLike[str], *, sub_folders: bool = False) -> PassedOver:
    """The pictures of a folder, and of its sub-folders unless these are read, too, that are not
    looked at."""
    folder = expanded(path)
    try:
        others = _passed_over(folder, _entries(folder))
        return PassedOver(num_jpegs=others.num_jpegs) if sub_folders else others
    except OSError:  # a pack, or it is gone since its pictures were listed
        return PassedOver()


def overlap_of_sides(
    folders_a: Sequence[str], folders_b: Sequence[str], *, sub_folders: bool = False
) -> str | None:
    """How any folder of one side shares faces with any of the other, in words; None where none
    does."""
    found = (
        overlap(a, b, sub_folders=sub_folders) for a, b in itertools.product(folders_a, folders_b)
    )
    return next(filter(None, found), None)


def overlap(
    folder_a: str | os.PathLike[str],
    folder_b: str | os.PathLike[str],
    *,
    sub_folders: bool = False,
    may_nest: bool = False,
) -> str | None:
    """How two folders share faces, in words; None where they do not.

    They share them where they are one folder, where one lies inside the other (unless they may
    nest), or where files of both are one file by another name (links).
    """
    path_a, path_b = (expanded(path).resolve() for path in (folder_a, folder_b))
    if path_a == path_b:
        return f"both use the folder {path_a}"
    for inner, outer in ((path_a, path_b), (path_b, path_a)):
        # Sub-folders are passed over, but a user who nests sides has most likely slipped.
        if outer in inner.parents and not may_nest:
            return f"{inner} lies inside {outer}"
    # By number and not by name: sets are often put together of links.
    numbers_a, numbers_b = (set(_file_numbers(path, sub_folders)) for path in (path_a, path_b))
    shared = numbers_a & numbers_b
    if shared:
        return f"{path_a} and {path_b} share {len(shared)} {plural(len(shared), 'file')}"
    return None


def name_of(folder: Path | str, side: str | None) -> str:
    """A folder as it is named in texts."""
    return f"side {side.upper()}: {folder}" if side else str(folder)


def _entries(folder: Path, most: int | None = None) -> dict[str, list[str]]:
    """Names in a folder by what they are: PNG, JPEG, pack, folder, other; up to so many."""
    names: dict[str, list[str]] = {kind: [] for kind in ("PNG", "JPEG", "pack", "folder", "other")}
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, most):
            names[_kind(entry)].append(entry.name)
    return names


def _kind(entry: os.DirEntry[str]) -> str:
    name = entry.name.lower()
    try:
        # Parts of files under way, and what other systems leave (`._face.png`).
        if name.startswith("."):
            return "other"
        # A link to a folder may lead in a circle, or out to the whole disk.
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        kind = "pack" if name == PACK_NAME else _KINDS.get(os.path.splitext(name)[1], "")
        return kind if kind and entry.is_file() else "other"
    except OSError:  # a link that leads to itself
        return "other"


def _holders(folder: Path) -> list[Path]:
    """A folder and all below it, sorted, of which each holds pictures; links are not followed."""
    holders = []
    # Not recursion, whose limit a stranger's nesting may be made to meet.
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        holder = waiting.pop()
        try:
            entries = _entries(holder)
        except OSError as error:
            raise ValueError(f"{holder} cannot be read: {error.strerror or error}") from None
        if entries[_kind_used(entries)]:
            holders.append(holder)
        waiting += [holder / name for name in entries["folder"]]
    return sorted(holders)


def _kind_used(entries: dict[str, list[str]]) -> str:
    """What of a folder holds its faces."""
    return next((kind for kind in ("PNG", "pack", "JPEG") if entries[kind]), "PNG")


def _passed_over(folder: Path, entries: dict[str, list[str]]) -> PassedOver:
    holding: dict[str, dict[str, int]] = {"PNG": {}, "JPEG": {}}
    left = _MAX_ENTRIES
    # The next one last, so that they come sorted.
    waiting = sorted(entries["folder"], reverse=True)
    while waiting and left > 0:
        name = waiting.pop()
        try:
            inner = _entries(folder / name, left)
        except OSError:
            continue
        # The folder itself counts, so that thousands of empty ones are bounded as well.
        left -= 1 + sum(map(len, inner.values()))
        for kind, counts in holding.items():
            if inner[kind]:
                counts[name] = len(inner[kind])
        waiting += (os.path.join(name, each) for each in sorted(inner["folder"], reverse=True))
    kind = "PNG" if holding["PNG"] else "JPEG"
    return PassedOver(
        num_jpegs=len(entries["JPEG"]) if _kind_used(entries) != "JPEG" else 0,
        subfolders=tuple(holding[kind]),
        num_deeper=sum(holding[kind].values()),
        kind=kind,
        is_whole=left > 0,
    )


def _file_numbers(folder: Path, sub_folders: bool) -> Iterator[tuple[int, int]]:
    """Device and number of each picture: the same for every name of one file."""
    for path in list_pictures(folder, sub_folders=sub_folders):
        status = path.stat()
        yield status.st_dev, status.st_ino
