"""Terminals that are closed, and outputs that take nothing more, at every moment of a training.

A closed terminal sends SIGHUP: the step is finished and saved. Where that is ignored, as under
nohup, the run goes on, as it does where a disk behind an output is full or its reader has left.
"""

import fcntl
import functools
import itertools
import json
import os
import select
import signal
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course import COURSES, Cases, Course, Workshop, newest, require
from trial import Outcome, Sabotage, Trial, both, ended, when

FP32, STAGES = COURSES["fp32"], COURSES["stages"]
_MOMENTS = {
    "before the first step": (FP32, "start", 0),
    "at a status line": (FP32, "step", 4),
    "at the first save": (FP32, "save", 1),
    "at a later save": (FP32, "save", 5),
    "at a preview": (FP32, "preview", 3),
    "at the last status line": (FP32, "step", FP32.until),
    "at a change of stages": (STAGES, "stage", 0),
    "at a snapshot": (STAGES, "snapshot", 1),
}
_ENDS = ("standard", "error", "both")
_GOES_ON = "goes on"


def closed(shop: Workshop, count: int, _seed: int) -> Cases:
    """A terminal that is closed at each moment, with and without its signal."""
    cases = [(moment, ignores) for moment in _MOMENTS for ignores in (False, True)]
    for moment, ignores in cases[:: max(len(cases) // min(count, len(cases)), 1)]:
        how = "SIGHUP is ignored" if ignores else "SIGHUP is sent"
        yield f"{moment}, {how}", functools.partial(_close, shop, *_MOMENTS[moment], ignores)


def _close(shop: Workshop, course: Course, event: str, iteration: int, ignores: bool) -> str:
    folder = shop.new_folder()
    master, slave = os.openpty()
    asking, asked = os.pipe()

    def wait_for_the_end() -> None:
        os.write(asked, b"x")
        gone = select.poll()
        gone.register(slave, 0)
        gone.poll()

    arm = both(_on_terminal(master, slave, ignores), when(event, iteration, wait_for_the_end))
    trial = _start(shop, course, folder, arm, as_json=False)
    os.close(slave)
    os.close(asked)
    with ended(trial):
        _read_until(master, asking)
        os.close(master)
        os.close(asking)
        outcome = trial.end()
    if event == "start" and not ignores:
        require(outcome.code == 4, f"ended with {outcome.code}")
        require(newest(folder) is None, "something was saved")
        seen = "ends before its first step"
    else:
        seen = _judge(folder, course, outcome, iteration, goes_on=ignores)
    if seen == _GOES_ON:
        shop.compare(course, folder)
    else:
        shop.finish(course, folder)
    return seen


def _on_terminal(master: int, slave: int, ignores: bool) -> Sabotage:
    """Be a program in front of a terminal."""

    def arm() -> None:
        os.close(master)
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for handle in (0, 1, 2):
            os.dup2(slave, handle)
        # Whatever this campaign itself was started with.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores else signal.SIG_DFL)

    return arm


def _read_until(master: int, asking: int) -> None:
    """Read what a terminal shows until it is asked to close, or nobody writes any more."""
    while True:
        ready, _, _ = select.select([master, asking], [], [])
        if asking in ready:
            return
        os.read(master, 4096)


def unwritable(shop: Workshop, count: int, _seed: int) -> Cases:
    """Outputs that take nothing more from each moment on, for each reason."""
    ways = {"the disk is full": _fill, "it was closed": _shut, "its reader left": _leave}
    cases = list(itertools.product(_MOMENTS, ways))
    for number, (moment, why) in enumerate(cases[:: max(len(cases) // min(count, len(cases)), 1)]):
        end, as_json = _ENDS[(number + number // 3) % 3], number % 2 == 0
        yield (
            f"{moment}, {why}: {end}",
            functools.partial(_spoil, shop, *_MOMENTS[moment], ways[why], end, as_json),
        )


def _spoil(
    shop: Workshop,
    course: Course,
    event: str,
    iteration: int,
    way: Callable[[int], None],
    end: str,
    as_json: bool,
) -> str:
    folder = shop.new_folder()
    handles = {"standard": (1,), "error": (2,), "both": (1, 2)}[end]

    def spoil() -> None:
        for handle in handles:
            way(handle)

    trial = _start(shop, course, folder, when(event, iteration, spoil), as_json=as_json)
    seen = _judge(folder, course, trial.end(), iteration, goes_on=True)
    shop.compare(course, folder)
    return seen


def _fill(handle: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, handle)
    os.close(full)


def _shut(handle: int) -> None:
    """Have every write be refused as one to a closed handle is.

    Its number stays taken: else a file that a save opens at that moment would get it.
    """
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, handle)
    os.close(nowhere)


def _leave(handle: int) -> None:
    reading, writing = os.pipe()
    os.dup2(writing, handle)
    os.close(writing)
    os.close(reading)


def _start(
    shop: Workshop, course: Course, folder: Path, sabotage: Sabotage, *, as_json: bool
) -> Trial:
    words = shop.words(course, folder, course.until)
    if not as_json:
        words.remove("--json")
    return Trial(words, folder.parent / "output", sabotage)


def _judge(folder: Path, course: Course, outcome: Outcome, iteration: int, *, goes_on: bool) -> str:
    """What was seen; the run must have saved all that it trained."""
    last, told = newest(folder), _kept_events(folder)
    require(not list(folder.glob("crash_report_*")), "a failure of mien itself")
    require(told[-1]["event"] == "stop", f"the last event was {told[-1]}")
    require(told[-1]["exit_code"] == outcome.code, f"ended with {outcome.code}: {outcome.error}")
    require(last is not None and last.iterations >= iteration, "the last step was lost")
    assert last is not None
    require(last.iterations == told[-1]["iteration"], "it was told otherwise")
    if goes_on or last.iterations == course.until:
        require(outcome.code == 0, f"ended with {outcome.code}: {told[-1]}")
        require(last.iterations == course.until, f"ended at iteration {last.iterations}")
        return _GOES_ON
    require(outcome.code == 4, f"ended with {outcome.code}: {told[-1]}")
    return "saves and stops"


def _kept_events(folder: Path) -> list[dict[str, Any]]:
    """The events of the newest session."""
    (path, *_) = sorted(folder.glob("logs/session_*/events.jsonl"), reverse=True)
    return [json.loads(line) for line in path.read_text().splitlines()]
