"""One of two ranks is killed or stopped at any moment: the other ends with it and says why, nothing
that was saved is lost, and the resume is the same training.
"""

import dataclasses
import functools
import itertools
import os
import random
import select
import shutil
import time
from pathlib import Path

from course import KEEP_ALL, Cases, Course, Straight, Workshop, leftovers, newest, require
from trial import (
    TIMEOUT_S,
    Outcome,
    Sabotage,
    Trial,
    count_calls,
    die_at_call,
    kill_at_call,
    leave_pid,
)

_COURSE = Course("two ranks", 10)

_ENDS_WITHIN_S = 10.0
"""Seconds within which a rank that has lost the other one must have ended."""


class _Chain:
    """One model folder after another, trained by two ranks of which one is killed."""

    def __init__(self, shop: Workshop, moments: random.Random) -> None:
        self._shop, self._moments = shop, moments
        self._folder = shop.new_folder()
        self._straight = _straight(shop)
        self._numbers = itertools.count()

    def kill(self, rank: int, *, by_time: bool) -> str:
        """Resume and have a rank killed once, before the end of the course."""
        seen = None
        while seen is None:
            seen = self._resume(rank, by_time=by_time)
        return seen

    def _resume(self, victim: int, *, by_time: bool) -> str | None:
        """What the kill left; None where the course was done before it."""
        shop, folder = self._shop, self._folder
        done = newest(folder)
        number = self._moments.randint(1, self._straight.num_calls)
        sabotages = {} if by_time else self._at_call(victim, number)
        trials = shop.start_ranks(_COURSE, folder, sabotages=sabotages)
        if by_time:
            _wait_for("start", trials)
            time.sleep(self._moments.uniform(0.0, self._straight.seconds))
            trials[victim].kill()
        killed = trials[victim].end()
        killed_at = time.monotonic()
        survivor = trials[1 - victim].end()
        seen = None
        if killed.was_killed and survivor.code != 0:
            require(time.monotonic() - killed_at < _ENDS_WITHIN_S, "the survivor took too long")
            seen = self._judge(victim, trials, survivor, done.iterations if done else 0)
        else:
            require({killed.code, survivor.code} <= {0, -9}, f"{killed.told} {survivor.told}")
        last = newest(folder)
        if last:
            shop.compare(_COURSE, folder)
        if last and last.iterations == _COURSE.until:
            shutil.rmtree(folder.parent)
            self._folder = shop.new_folder()
        return seen

    def _at_call(self, victim: int, number: int) -> dict[int, Sabotage]:
        """What kills a rank when the first one is about to change the disk for the n-th time."""
        if victim == 0:
            return {0: die_at_call(number)}
        pid = self._folder.parent / f"pid{next(self._numbers)}"
        return {0: kill_at_call(number, pid), 1: leave_pid(pid)}

    def _judge(self, victim: int, trials: list[Trial], survivor: Outcome, before: int) -> str:
        require(survivor.code == 3, f"the survivor ended with {survivor.code}: {survivor.told}")
        name = f"rank {victim} (pid {trials[victim].pid})"
        lines = [line for line in survivor.told.splitlines() if name in line]
        require(len(lines) == 1, f"told of {name}: {survivor.told[-400:]}")
        require("Traceback" not in survivor.error, survivor.error[-400:])
        require(not list(self._folder.glob("crash_report*")), "a survivor has written a report")
        last = newest(self._folder)
        events = trials[0].events()
        told = max([before, *(e["iteration"] for e in events if e["event"] == "save")])
        saved = last.iterations if last else 0
        require(saved >= told, f"iteration {told} was saved, {saved} is left")
        what = "while something was being written" if leftovers(self._folder) else "between writes"
        return f"rank {victim} lost {what}"


def kills(shop: Workshop, count: int, seed: int) -> Cases:
    """Kill either rank at random times, and at random calls by which the first one changes the
    disk: most of these are part of a save."""
    chain = _Chain(shop, random.Random(seed))
    for number in range(count):
        rank, by_time = number % 2, number % 4 < 2
        how = "at a random time" if by_time else "at a random call of the first"
        yield f"rank {rank} {how}", functools.partial(chain.kill, rank, by_time=by_time)


def stops(shop: Workshop, count: int, seed: int) -> Cases:
    """Send SIGTERM soon after the first save to the second rank, to the first, to both; kill the
    process that has started them."""
    moments = random.Random(seed)

    def stop(ranks: tuple[int, ...]) -> str:
        folder = shop.new_folder()
        trials = shop.start_ranks(_COURSE, folder)
        _wait_for("save", trials)
        time.sleep(moments.uniform(0.0, 0.05))
        for rank in ranks:
            trials[rank].stop()
        first, second = (trial.end() for trial in trials)
        require(first.code == second.code, f"{first.code}: {first.told}; {second.told}")
        require(first.code in (0, 4), f"ended with {first.code}: {first.told}")
        require(not (left := leftovers(folder)), f"left over: {left}")
        last = newest(folder)
        saved, stopped = last.iterations if last else 0, first.events[-1]["iteration"]
        require(saved == stopped, f"stopped at {stopped}, {saved} is saved")
        _straight(shop)  # what it is compared with
        shop.compare(_COURSE, folder)
        return "done before" if first.code == 0 else "stopped together"

    for number in range(count):
        if number % 4 == 3:
            yield "the starter is killed", functools.partial(_lose_starter, shop)
            continue
        ranks = ((1,), (0,), (0, 1))[number % 4]
        yield f"SIGTERM to {' and '.join(map(str, ranks))}", functools.partial(stop, ranks)


def _lose_starter(shop: Workshop) -> str:
    """Kill the starter of two ranks after their first save: they save and end by themselves."""
    folder = shop.new_folder()
    starter = shop.start(_COURSE, folder, "--gpus", "2")
    # Its ranks are no forks: each imports everything anew.
    _wait_for("save", [starter], 4 * TIMEOUT_S)
    ranks = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
    handles = [os.pidfd_open(int(pid)) for pid in ranks]
    starter.kill()
    for handle in handles:
        # Ten seconds and more on a machine that has ten times as much to do as it has cores.
        ended, _, _ = select.select([handle], [], [], TIMEOUT_S)
        require(bool(ended), "a rank has outlived its starter")
        os.close(handle)
    stop = starter.end().events[-1]
    require(stop.get("exit_code") in (0, 4), f"the last event is {stop}")
    require(not (left := leftovers(folder)), f"left over: {left}")
    last = newest(folder)
    require(last is not None and last.iterations == stop["iteration"], f"{stop} is not saved")
    _straight(shop)
    shop.compare(_COURSE, folder)
    return "done before" if stop["exit_code"] == 0 else "saved and ended without their starter"


def _straight(shop: Workshop) -> Straight:
    """The course of two ranks, undisturbed, and how long it takes from its start report."""

    def train(folder: Path, report: Path) -> Outcome:
        sabotages = {0: count_calls(report)}
        trials = shop.start_ranks(_COURSE, folder, *KEEP_ALL, sabotages=sabotages)
        began = _wait_for("start", trials)
        first, second = (trial.end() for trial in trials)
        require(second.code == 0, f"rank 1: {second.told}")
        return dataclasses.replace(first, seconds=time.monotonic() - began)

    return shop.straight(_COURSE, train)


def _wait_for(event: str, trials: list[Trial], timeout_s: float = TIMEOUT_S) -> float:
    """The moment at which the first rank reports an event."""
    until = time.monotonic() + timeout_s
    while not any(told["event"] == event for told in trials[0].events()):
        require(time.monotonic() < until, f"no {event} is told")
        time.sleep(0.005)
    return time.monotonic()
