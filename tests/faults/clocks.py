"""Clocks that jump: training, saves and status lines do not mind."""

import functools
import time
from collections.abc import Callable

from course import COURSES, Cases, Course, Workshop, require
from disks import halts_or_goes_on
from trial import Sabotage, when

DAY_S, YEAR_S = 86_400.0, 365 * 86_400.0
JUMPS = {
    "back a day": -DAY_S,
    "forward a day": DAY_S,
    "forward a year": YEAR_S,
    "to 1970": -time.time(),
}
CLOCKS = ("time", "monotonic", "perf_counter")


def jumps(shop: Workshop, count: int, _seed: int) -> Cases:
    """Each clock jumps in training; the model is the straight run's all the same."""
    cases = [
        (course, clock, jump)
        for course in (COURSES["fp32"], COURSES["stages"])
        for clock in CLOCKS
        for jump in JUMPS
    ]
    for course, clock, jump in cases[:: max(len(cases) // min(count, len(cases)), 1)]:
        yield (
            f"{course.name}: {clock} {jump}",
            functools.partial(_jump, shop, course, clock, JUMPS[jump]),
        )


def _jump(shop: Workshop, course: Course, clock: str, seconds: float) -> str:
    folder = shop.new_folder()
    outcome = shop.train(course, folder, sabotage=_at_iteration_3(clock, seconds))
    seen = halts_or_goes_on(outcome)
    require(outcome.code == 0, f"exit code {outcome.code}: {outcome.told}")
    shop.compare(course, folder)
    require(outcome.last_save == course.until, f"the last save was {outcome.last_save}")
    for event in outcome.events:
        if event["event"] == "step":
            require(event["seconds_left"] >= 0, f"{event['seconds_left']} s left")
            require(0 <= event["data_wait"] <= 1, f"waited {event['data_wait']}")
            require(event["eg_per_s"] > 0, f"{event['eg_per_s']} EG/s")
    return seen


def _at_iteration_3(name: str, seconds: float) -> Sabotage:
    def jump() -> None:
        clock: Callable[[], float] = getattr(time, name)
        setattr(time, name, lambda: clock() + seconds)

    def arm() -> None:
        from mien.core.console.reporter import Reporter

        defaults = Reporter.__init__.__kwdefaults__
        defaults["clock"] = lambda: time.time()  # the one that jumps
        when("save", 3, jump)()

    return arm
