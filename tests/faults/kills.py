"""`kill -9` at any moment: what was told to be saved is there, the resume is the same training.

Kills are chained: what one of them left is resumed by the next trial, which is killed in turn,
until the course is done. So each resume is judged by every save that follows it.
"""

import functools
import random
import shutil
from pathlib import Path

from course import COURSES, Cases, Course, Workshop, leftovers, newest, require
from trial import Outcome, Sabotage, count_calls, die_at_call


class _Chain:
    """One model folder after another, killed and resumed until its course is done."""

    def __init__(self, shop: Workshop, course: Course, moments: random.Random) -> None:
        self._shop, self._course, self._moments = shop, course, moments
        self._folder = shop.new_folder()
        self._straight = shop.straight(course)

    def kill(self, *, by_time: bool, is_last: bool) -> str:
        """Resume and be killed once, at a moment that comes before the end of the course."""
        seen = None
        while seen is None:
            if by_time:
                seen = self._resume(after_s=self._moments.uniform(0.0, self._straight.seconds))
            else:
                number = self._moments.randint(1, self._straight.num_calls)
                seen = self._resume(sabotage=die_at_call(number))
        if is_last and self._folder.exists():
            self._shop.finish(self._course, self._folder)
        return seen

    def _resume(
        self, *, after_s: float | None = None, sabotage: Sabotage | None = None
    ) -> str | None:
        """What the kill left; None where the course was done before it."""
        shop, course, folder = self._shop, self._course, self._folder
        done = newest(folder)
        outcome = shop.start(course, folder, sabotage=sabotage).end(kill_after_s=after_s)
        seen = None
        if outcome.was_killed:
            seen = _judge(shop, course, folder, outcome, done.iterations if done else 0)
        else:
            require(outcome.code == 0, f"ended with {outcome.code}: {outcome.told[-400:]}")
            require(not (left := leftovers(folder)), f"left over: {left}")
            shop.compare(course, folder)
        last = newest(folder)
        if last and last.iterations == course.until:
            shutil.rmtree(folder.parent)
            self._folder = shop.new_folder()
        return seen


def kills(shop: Workshop, count: int, seed: int) -> Cases:
    """Kills at random times, and at random ones of all calls that change the disk."""
    moments = random.Random(seed)
    for number, course in enumerate(COURSES.values()):
        share = count * (number + 1) // len(COURSES) - count * number // len(COURSES)
        chain = _Chain(shop, course, moments) if share else None
        for i in range(share):
            assert chain is not None
            by_time = i % 3 == 0  # the others strike while something is being written
            how = "at a random time" if by_time else "at a random call"
            last = i == share - 1
            yield (
                f"{course.name} {how}",
                functools.partial(chain.kill, by_time=by_time, is_last=last),
            )


def kills_in_a_stage_change(shop: Workshop, count: int, _seed: int) -> Cases:
    """Kills spread evenly over all calls from the end of a stage to the first saves of the next."""
    course = COURSES["stages"]
    before = shop.new_folder()
    outcome = shop.train(course, before, until=2)
    require(outcome.code == 0, outcome.told)
    counted, report = shop.copy(before), before.parent / "calls"
    shop.train(course, counted, until=5, sabotage=count_calls(report))
    num_calls = report.stat().st_size

    def killed_at(number: int) -> str:
        folder = shop.copy(before)
        outcome = shop.train(course, folder, until=5, sabotage=die_at_call(number))
        require(outcome.was_killed, f"was not killed at call {number}: {outcome.code}")
        seen = _judge(shop, course, folder, outcome, before=2)
        shop.finish(course, folder)
        return seen

    for i in range(count):
        number = 1 + i * (num_calls - 1) // max(count - 1, 1)
        yield f"call {number} of {num_calls}", functools.partial(killed_at, number)


def _judge(shop: Workshop, course: Course, folder: Path, killed: Outcome, before: int) -> str:
    """What a kill left, in words: nothing that was saved is lost, and what there is, is right."""
    require(not killed.error, f"told on the standard error: {killed.error[-400:]}")
    last = newest(folder)
    saved = last.iterations if last else 0
    told = max(before, killed.last_save)
    require(saved >= told, f"iteration {told} was saved, {saved} is left")
    if last:
        shop.compare(course, folder)
    if leftovers(folder):
        return "while something was being written"
    return "between two writes" if killed.events else "while starting"
