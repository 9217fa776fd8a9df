"""Two runs on one folder, locks of processes that are gone, and what loads the faces."""

import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from course import COURSES, Cases, Workshop, require
from trial import before, ended, when

FP32 = COURSES["fp32"]


def two_runs(shop: Workshop, count: int, _seed: int) -> Cases:
    """A second run on the folder of one that trains; a second one that starts at the same time."""
    yield "a second run while the first trains", lambda: _second(shop)
    for i in range(min(count, 6)):
        yield f"two starts at once, number {i + 1}", lambda: _at_once(shop)


def _second(shop: Workshop) -> str:
    folder = shop.new_folder()
    go = folder.parent / "go"

    def wait() -> None:
        while not go.exists():
            time.sleep(0.01)

    with ended(shop.start(FP32, folder, sabotage=when("save", 3, wait))) as first:
        while not any(event["event"] == "save" for event in first.events()):
            time.sleep(0.02)
        second = shop.train(FP32, folder)
        go.touch()
        outcome = first.end()
    require(second.code == 2, f"the second run ended with {second.code}: {second.told}")
    require(f"in use by process {first.pid}" in second.error, second.error)
    require(outcome.code == 0, f"the first run ended with {outcome.code}: {outcome.told}")
    shop.compare(FP32, folder)
    return "the second is refused, the first goes on"


def _at_once(shop: Workshop) -> str:
    folder = shop.new_folder()
    one = shop.start(FP32, folder)
    with ended(one), ended(shop.start(FP32, folder)) as other:
        outcomes = [one.end(), other.end()]
    codes = sorted(outcome.code for outcome in outcomes)
    require(codes == [0, 2], f"they ended with {codes}")
    shop.compare(FP32, folder)
    return "the second is refused, the first goes on"


def stale_locks(shop: Workshop, count: int, _seed: int) -> Cases:
    """Lock files that nobody holds."""
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    locks = (
        ("of a process that is gone", f"{gone} {os.uname().nodename}\n"),
        ("of a living process that does not hold it", f"{os.getppid()} {os.uname().nodename}\n"),
        ("of another machine", "17 elsewhere\n"),
        ("that is no text", "\xff\0\xfe" * 200),
    )
    for name, text in locks[:count]:
        yield name, functools.partial(_stale, shop, text)


def _stale(shop: Workshop, text: str) -> str:
    folder = shop.new_folder()
    outcome = shop.train(FP32, folder, until=4)
    require(outcome.code == 0, outcome.told)
    (folder / ".lock").write_text(text, encoding="latin-1")
    shop.finish(FP32, folder)
    return "the lock is taken over"


def loader(shop: Workshop, _count: int, _seed: int) -> Cases:
    """Faces are loaded by threads: none can be killed alone, and one that fails is told."""
    yield "there is no other process", lambda: _has_no_children(shop)
    yield "a batch cannot be made", lambda: _batch_fails(shop)


def _has_no_children(shop: Workshop) -> str:
    folder = shop.new_folder()
    report = folder.parent / "children"

    def look() -> None:
        tasks = Path("/proc/self/task")
        report.write_text(" ".join((task / "children").read_text() for task in tasks.iterdir()))

    outcome = shop.train(FP32, folder, sabotage=when("save", 3, look))
    require(outcome.code == 0, outcome.told)
    require(not report.read_text().strip(), f"it has the children {report.read_text()}")
    return "threads only, nothing to kill"


def _batch_fails(shop: Workshop) -> str:
    folder = shop.new_folder()

    def fail() -> None:
        require_name = threading.current_thread().name
        raise MemoryError(f"no memory for a batch in {require_name}")

    outcome = shop.train(FP32, folder, sabotage=before("mien.core.data.feed", "draw", fail, 5))
    require(outcome.code == 1, f"exit code {outcome.code}")
    require("no memory for a batch" in outcome.error, outcome.error)
    require(outcome.last_save >= 1, "nothing was saved before")
    shop.finish(FP32, folder)
    return "ends with the traceback, nothing saved is lost"
