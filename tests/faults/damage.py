"""Damage to each kind of file in a model folder, of each kind.

The newest generation that is whole is used, and the user is told; or the start is refused in one
line. A damaged file of a generation stays as it is.
"""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from course import COURSES, Cases, Workshop, newest, require
from disks import halts_or_goes_on

FP32 = COURSES["fp32"]
SAVED = 4
"""Iterations of the folder that is damaged; two generations, 4 and 3, and a backup."""


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[min(len(content) // 3, 200)] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HARMS: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "a bit flipped": _flip_bit,
    "emptied": _empty,
    "a folder": _replace_by_folder,
    "a broken link": _replace_by_link,
    "a pipe": _replace_by_pipe,
    "deleted": Path.unlink,
}

IN_GENERATION = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.toml",
    "manifest.json",
)
ELSEWHERE = (
    "state.json",
    "config.toml",
    "backup/model.safetensors",
    "backup/manifest.json",
    ".lock",
    "faces/*.faces",
    "logs/session_*/train/events.*",
    "preview.png",
)


def damaged_files(shop: Workshop, count: int, _seed: int) -> Cases:
    """Every kind of file with every kind of damage; then whole folders."""
    whole = shop.new_folder()
    outcome = shop.train(FP32, whole, until=SAVED)
    require(outcome.code == 0, outcome.told)
    require((whole / "backup").is_dir(), "the course made no backup")
    files = [f"generations/{SAVED}/{name}" for name in IN_GENERATION] + list(ELSEWHERE)
    cases = [(file, harm) for file in files for harm in HARMS]
    if count < len(cases):  # other files with other harms
        cases = cases[:: len(cases) // (6 * count)]
    for file, harm in cases:
        yield f"{file}: {harm}", functools.partial(_start_on_damage, shop, whole, file, harm)
    names = ("preview.png", "logs", "faces", "backup", "generations")
    for name in names[:count]:
        yield (
            f"{name}: a file or folder of that name",
            functools.partial(_start_on_another_kind, shop, whole, name),
        )
    yield "every generation damaged", functools.partial(_start_on_ruins, shop, whole)


def _start_on_damage(shop: Workshop, whole: Path, pattern: str, harm: str) -> str:
    folder = shop.copy(whole)
    path = next(iter(sorted(folder.glob(pattern))), None)
    require(path, f"the run has left no {pattern} to damage")
    HARMS[harm](path)
    is_in_generation = pattern.startswith("generations/")
    before = _content(path.parent) if is_in_generation else None
    used = SAVED - 1 if is_in_generation else SAVED
    outcome = shop.train(FP32, folder, until=SAVED + 2)
    seen = halts_or_goes_on(outcome)
    if outcome.code == 0:
        _began_after(outcome, used)
        if is_in_generation:
            require(f"generation {SAVED} is damaged" in outcome.told, f"not told: {outcome.told}")
            require("nothing was deleted" in outcome.told, f"not told: {outcome.told}")
    if is_in_generation:
        require(_content(path.parent) == before, "what was damaged was changed")
        seen = "uses the generation before, and says so"
        shutil.rmtree(path.parent)  # it is no save that could be compared
    elif outcome.code == 0:
        seen = "goes on from the newest"
    if pattern.startswith("backup/") and (folder / "backup").exists():
        shutil.rmtree(folder / "backup")
    if outcome.code == 0:
        shop.compare(FP32, folder)
    else:
        if harm == "a broken link":
            path.unlink()  # it is what was refused, and by this reader too
        require(newest(folder).iterations >= SAVED, "the refusal cost a save")
    shutil.rmtree(folder.parent)
    return seen


def _start_on_another_kind(shop: Workshop, whole: Path, name: str) -> str:
    """A file stands where a folder was, or a folder where a file was."""
    folder = shop.copy(whole)
    path = folder / name
    if path.is_dir():
        path.rename(folder.parent / "aside")
        path.write_text("mine")
    else:
        path.unlink()
        path.mkdir()
        (path / "diary.txt").write_text("mine")
    outcome = shop.train(FP32, folder, until=SAVED + 2)
    seen = halts_or_goes_on(outcome)
    if name == "generations":
        require(outcome.code in (2, 3), "trained although the generations are gone")
    elif outcome.code == 0:
        _began_after(outcome, SAVED)
    if name == "preview.png":
        require((path / "diary.txt").read_text() == "mine", "the diary is lost")
    shutil.rmtree(folder.parent)
    return seen


def _start_on_ruins(shop: Workshop, whole: Path) -> str:
    folder = shop.copy(whole)
    for path in (folder / "generations").glob("*/model.safetensors"):
        _flip_bit(path)
    before = _content(folder / "generations")
    outcome = shop.train(FP32, folder)
    require(outcome.code == 2, f"exit code {outcome.code}")
    require("holds no whole save" in outcome.error, outcome.error)
    require(_content(folder / "generations") == before, "something was changed")
    return halts_or_goes_on(outcome)


def _began_after(outcome, iteration: int) -> None:
    """The first event that has an iteration is of the one after this."""
    first = next(event["iteration"] for event in outcome.events if event["event"] == "save")
    require(first == iteration + 1, f"began with {first}, not after {iteration}")


def _content(folder: Path) -> dict[str, bytes | str]:
    """Every plain file's bytes by name, and what else there is."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "other"
        found[str(path)] = path.read_bytes() if plain else kind
    return found
