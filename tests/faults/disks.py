"""Disks that are full, read-only or failing, and a process that may open no more files.

Each ends in one line, with exit code 3 where the model cannot be saved and 2 where the run cannot
even begin, or in a warning where what cannot be written is not the model. When the disk is mended,
the resume is the same training.
"""

import contextlib
import errno
import functools
import itertools
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from course import COURSES, SKIPPED, Cases, Course, Workshop, leftovers, newest, require
from trial import LACKING, Outcome, Sabotage, before, fail_at_call, lack, when

FP32, STAGES = COURSES["fp32"], COURSES["stages"]
DISK = "size=64m"
FROM_LIBRARIES = ("libpng ", "[ WARN:", "Error in cpuinfo")
"""How lines begin that libpng, OpenCV and PyTorch print by themselves."""

MOMENTS = {
    "at the first save": ("mien.core.checkpoint.model_folder:ModelFolder", "save", 1),
    "at a later save": ("mien.core.checkpoint.model_folder:ModelFolder", "save", 4),
    "at a generation's manifest": ("mien.core.checkpoint.generations", "write_manifest", 3),
    "at the pointer": ("mien.core.checkpoint.pointer", "_content", 3),
    "at a backup": ("mien.core.checkpoint.model_folder:ModelFolder", "back_up", 1),
    "at a snapshot": ("mien.core.checkpoint.model_folder:ModelFolder", "snapshot", 2),
    "at the settings": ("mien.core.checkpoint.model_folder:ModelFolder", "write_config", 1),
    "at the event file": ("mien.core.console.tensorboard:TensorBoardLog", "__init__", 1),
    "at an event": ("mien.core.console.tensorboard:TensorBoardLog", "scalars", 3),
    "at the events' flush": ("mien.core.console.tensorboard:TensorBoardLog", "flush", 3),
    "at the preview": ("mien.core.preview.previewer", "save_png", 3),
    "at the faces of A": ("mien.core.data.store:_RawFile", "__init__", 1),
    "at the faces of B": ("mien.core.data.store:_RawFile", "keep", 2),
}


def halts_or_goes_on(outcome: Outcome) -> str:
    """How a disturbed run ended, in words; it must have told why, in a line."""
    require("Traceback" not in outcome.error, f"a traceback: {outcome.error[-600:]}")
    require(outcome.code in (0, 2, 3), f"exit code {outcome.code}: {outcome.told[-400:]}")
    lines = [line for line in outcome.error.splitlines() if not line.startswith(FROM_LIBRARIES)]
    require(len(lines) <= 1, f"more than a line: {outcome.error[-400:]}")
    if outcome.code == 0:
        warned = any(event["event"] == "warning" for event in outcome.events)
        return "warns and goes on" if warned else "goes on"
    require(outcome.told.strip(), "nothing was told")
    return {2: "refuses in a line", 3: "halts in a line"}[outcome.code]


def full(shop: Workshop, count: int, seed: int) -> Cases:
    """A disk that another program fills to the brim, or nearly so, at each of the moments."""
    for number, (moment, place) in enumerate(_sampled(MOMENTS, count)):
        room = (0, 4096, 1 << 20)[(number + seed) % 3]
        course = STAGES if moment == "at a snapshot" else FP32
        yield f"{moment}, {room} bytes left", functools.partial(_fill, shop, course, place, room)


def _fill(shop: Workshop, course: Course, place: tuple[str, str, int], room: int) -> str:
    with mounted(shop, DISK) as disk:
        if disk is None:
            return f"{SKIPPED}no disk can be mounted here"
        model_dir = disk / "model"
        filler = disk / "filler"
        fill = before(place[0], place[1], lambda: _occupy(filler, room), place[2])
        outcome = shop.train(course, model_dir, sabotage=fill)
        require(filler.exists(), "the disk was never filled")
        seen = halts_or_goes_on(outcome)
        _is_not_lost(model_dir, outcome)
        filler.unlink()
        _resume(shop, course, model_dir)
        return seen


def _occupy(filler: Path, room: int) -> None:
    """Take all of a disk but so many bytes."""
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * (1 << 16))
            file.flush()
    free = shutil.disk_usage(filler.parent).free
    os.truncate(filler, max(filler.stat().st_size + free - room, 0) // 4096 * 4096)


def read_only(shop: Workshop, count: int, _seed: int) -> Cases:
    """A disk that is read-only from the start, or is made so while the run goes on."""
    moments = {
        "before the start": None,
        **{
            moment: place
            for moment, place in MOMENTS.items()
            if moment in ("at a later save", "at the preview", "at an event", "at the settings")
        },
    }
    for moment, place in _sampled(moments, count):
        yield moment, functools.partial(_lock_up, shop, place)


def _lock_up(shop: Workshop, place: tuple[str, str, int] | None) -> str:
    with mounted(shop, DISK) as disk:
        if disk is None:
            return f"{SKIPPED}no disk can be mounted here"
        model_dir = disk / "model"
        outcome = shop.train(FP32, model_dir, until=2)
        require(outcome.code == 0, outcome.told)
        sabotage = before(*place[:2], lambda: _lock(disk), place[2]) if place else None
        if place is None:
            _lock(disk)
        outcome = shop.train(FP32, model_dir, sabotage=sabotage)
        subprocess.run(["umount", "--lazy", disk], check=True)
        seen = halts_or_goes_on(outcome)
        _is_not_lost(model_dir, outcome, before=2)
        _resume(shop, FP32, model_dir)
        return seen


def _lock(disk: Path) -> None:
    """Lay the same disk, read-only, over itself: files that are open stay writable.

    Between the two steps a file of a save may have been opened, which the second one is refused
    for until it is closed.
    """
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    remount = ["mount", "-o", "remount,ro,bind", str(disk)]
    for _ in range(100):
        done = subprocess.run(remount, capture_output=True, text=True, check=False)
        if not done.returncode:
            return
        time.sleep(0.01)
    raise OSError(f"{disk} cannot be made read-only: {done.stderr.strip()}")


def failing_fsync(shop: Workshop, count: int, seed: int) -> Cases:
    """The n-th flush to the disk fails, once or from then on."""
    numbers = [*range(1, 24)] + random.Random(seed).sample(range(24, 90), 12)
    for number in numbers[:: max(len(numbers) // min(count, len(numbers)), 1)]:
        for lasts in (False, True):
            how = "from then on" if lasts else "once"
            yield (
                f"flush {number}, {how}",
                functools.partial(_fail, shop, number, errno.EIO, ("fsync",), lasts),
            )


def failing_calls(shop: Workshop, count: int, seed: int) -> Cases:
    """The n-th of another kind of call fails, for each kind of error that a disk has."""
    choice = random.Random(seed)
    names = ("rename", "replace", "link", "mkdir", "unlink", "rmdir", "open", "write", "save_file")
    errors = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ESTALE)
    for i in range(min(count, 48)):
        name, error = names[i % len(names)], choice.choice(errors)
        number, lasts = choice.randint(1, 12), bool(choice.getrandbits(1))
        how = "from then on" if lasts else "once"
        yield (
            f"{name} {number} with {errno.errorcode[error]}, {how}",
            functools.partial(_fail, shop, number, error, (name,), lasts),
        )


def _fail(shop: Workshop, number: int, error: int, names: tuple[str, ...], lasts: bool) -> str:
    model_dir = shop.new_folder()
    outcome = shop.train(FP32, model_dir, sabotage=fail_at_call(number, error, names, lasts=lasts))
    seen = halts_or_goes_on(outcome)
    _is_not_lost(model_dir, outcome)
    if "skipped" in outcome.told:  # a face could not be read: it is a training of other faces
        require(outcome.code == 0, f"exit code {outcome.code}: {outcome.told[-400:]}")
        require(not (left := leftovers(model_dir)), f"left over: {left}")
        return "leaves a face out, says so and goes on"
    _resume(shop, FP32, model_dir)
    return seen


def lacking(shop: Workshop, count: int, _seed: int) -> Cases:
    """Disks that have no permissions, no locks or no links: network, FAT and FUSE disks."""
    cases = [tuple(LACKING)] + [(name,) for name in LACKING]
    for names in cases[:count]:
        course = STAGES if len(names) > 1 else FP32
        label = "all of them" if len(names) > 1 else names[0]
        yield f"lacks {label}", functools.partial(_train_on_less, shop, course, names)


def _train_on_less(shop: Workshop, course: Course, names: tuple[str, ...]) -> str:
    """Train half of a course, then the rest; nothing but a line may tell it from the straight run.

    What is refused twice over, flock and the flush of folders, is told once.
    """
    model_dir = shop.new_folder()
    for until in (course.until // 2, course.until):
        outcome = shop.train(course, model_dir, until=until, sabotage=lack(*names))
        seen = halts_or_goes_on(outcome)
        require(outcome.code == 0, f"exit code {outcome.code}: {outcome.told[-400:]}")
        told = outcome.told.count(f"the disk of {model_dir}")
        expected = ("flock" in names) + ("a flush of folders" in names)
        require(told == expected, f"told {told} times, not {expected}: {outcome.told[-400:]}")
        require(not (left := leftovers(model_dir)), f"left over: {left}")
        require(any((model_dir / "faces").glob("*.faces")), "no decoded faces were kept")
    last = newest(model_dir)
    require(last is not None and last.iterations == course.until, "it fell short")
    shop.compare(course, model_dir)
    return seen


def no_handles(shop: Workshop, count: int, _seed: int) -> Cases:
    """Hardly any more files may be opened, from the start or from some iteration on."""
    cases = [("start", room) for room in range(0, 12)]
    cases += [("step", room) for room in range(0, 6)]
    for event, room in cases[:: max(len(cases) // min(count, len(cases)), 1)]:
        sabotage = _limit(room) if event == "start" else when("step", 3, _limit(room))
        yield f"{room} handles left at the {event}", functools.partial(_starve, shop, sabotage)


def _limit(room: int) -> Callable[[], None]:
    def act() -> None:
        taken = {int(name) for name in os.listdir("/proc/self/fd")}
        free = (number for number in range(1 << 16) if number not in taken)
        limit = next(itertools.islice(free, room, None))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    return act


def _starve(shop: Workshop, sabotage: Sabotage) -> str:
    model_dir = shop.new_folder()
    outcome = shop.train(FP32, model_dir, sabotage=sabotage)
    seen = halts_or_goes_on(outcome)
    _is_not_lost(model_dir, outcome)
    _resume(shop, FP32, model_dir)
    return seen


def _is_not_lost(model_dir: Path, outcome: Outcome, before: int = 0) -> None:
    last = newest(model_dir)
    saved, told = last.iterations if last else 0, max(outcome.last_save, before)
    require(saved >= told, f"iteration {told} was saved, {saved} is left")


def _resume(shop: Workshop, course: Course, model_dir: Path) -> None:
    """Finish the course, where it is not done already."""
    last = newest(model_dir)
    if last is None or last.iterations < course.until:
        shop.finish(course, model_dir)
    else:
        shop.compare(course, model_dir)


@contextlib.contextmanager
def mounted(shop: Workshop, options: str) -> Iterator[Path | None]:
    """A small disk in memory; None where this process may mount none."""
    disk = shop.new_folder().parent / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
    done = (
        subprocess.run(command, capture_output=True, check=False) if shutil.which("mount") else None
    )
    if done is None or done.returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _sampled(cases: dict, count: int) -> list[tuple]:
    """At most so many of the cases, evenly spread."""
    pairs = list(cases.items())
    return pairs[:: -(-len(pairs) // min(count, len(pairs)))]
