"""Folders from a stranger: pipes, sockets and links where a run reads and writes.

Opened without care, a pipe is waited for until the process is killed, which a trial's limit of time
shows. Each start here goes on, or is refused in one line; what a link leads to is never touched.
"""

import functools
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from course import COURSES, Cases, Workshop, newest, require
from disks import halts_or_goes_on

FP32 = COURSES["fp32"]
SAVED = 3
"""Iterations of the folder that is spoilt."""

NAMES = (
    "generations/.4.tmp",
    "generations/.2.trash",
    "generations/7",
    ".backup.tmp",
    ".backup.trash",
    "backup",
    f".mien-{'0' * 8}-{'0' * 16}.tmp",
    "preview.png",
    "previews",
    "previews/4.jpg",
    ".lock",
    ".owner",
    "faces/.aaaa-1.part",
    "faces/aaaa.faces",
    "logs/session_2/events.jsonl",
    "logs/session_1/train/events.out.tfevents.1",
    "timelapse",
    "config.toml",
    "state.json",
    "../model_snapshot_4_iters",
)
"""Places in and beside a model folder that a run opens, makes or removes."""


def _pipe(path: Path, _diary: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, _diary: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # a socket's name is short
        made.bind(path.name)
        os.fchdir(here)
        os.close(here)


def _link(path: Path, diary: Path) -> None:
    path.symlink_to(diary)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "a pipe": _pipe,
    "a socket": _socket,
    "a link": _link,
}


def pipes(shop: Workshop, count: int, _seed: int) -> Cases:
    """Every place with every kind of file that is none."""
    whole = shop.new_folder()
    outcome = shop.train(FP32, whole, until=SAVED)
    require(outcome.code == 0, outcome.told)
    cases = [(name, kind) for kind in KINDS for name in NAMES]
    for name, kind in cases[:: max(len(cases) // (6 * count), 1)]:
        yield f"{name}: {kind}", functools.partial(_start_beside, shop, whole, name, kind)


def _start_beside(shop: Workshop, whole: Path, name: str, kind: str) -> str:
    folder = shop.copy(whole)
    diary = shop.root / "diary.txt"
    diary.write_text("mine")
    path = Path(os.path.normpath(folder / name))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    KINDS[kind](path, diary)
    outcome = shop.train(
        FP32, folder, "--snapshot-interval", "4", "--set", "log.level='debug'", until=SAVED + 3
    )
    seen = halts_or_goes_on(outcome)
    require(diary.read_text() == "mine", "the diary was written to")
    if "snapshot" in name:  # it is none that could be compared
        path.unlink(missing_ok=True)
    if outcome.code == 0:
        shop.compare(FP32, folder)
        last = newest(folder)
        require(last is not None and last.iterations == SAVED + 3, "it fell short")
    shutil.rmtree(folder.parent)
    return seen
