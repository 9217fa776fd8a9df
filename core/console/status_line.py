"""The status line of a run: its text, and its place at the bottom of a terminal."""

import time
from collections.abc import Iterator
from typing import Any, Required, TextIO, TypedDict, cast

from ..system.output import Output
from .report import Report
from .start_panel import Rows, framed

_BAR = " | "


class StatusLine:
    """A status at the bottom of a terminal, as much of it as fits; others scroll by above."""

    def __init__(self, stream: Output) -> None:
        # Here: without a terminal rich is never imported.
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        # As text and not as markup: a name of a folder may hold brackets.
        self._text = Text
        self._console = Console(file=cast(TextIO, stream), force_terminal=True, highlight=False)
        self._live = Live(
            console=self._console,
            # No thread: the line changes when a step is reported, and at no other time.
            auto_refresh=False,
            # The guarded streams stay in place: rich would put its own before them.
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self.hint = ""
        """Last part of the line, where there is room."""

        self._status, self._prompt = "", ""

    def update(self, text: str) -> None:
        """Show a status."""
        self._status = text
        self._draw()

    def prompt(self, text: str) -> None:
        """Show a prompt in the place of the status, until it is empty."""
        if text != self._prompt:
            self._prompt = text
            self._draw()

    def _draw(self) -> None:
        # With the first step: before, a bar of progress has this place.
        if not self._live.is_started:
            self._live.start()
        # Asked each time: the user may have made the terminal narrower.
        width = self._console.width
        # Of a long prompt the end, where the letters appear that are typed.
        shown = self._prompt[-width:] or fitted(self._status, width, self.hint)
        self._live.update(self._text(shown), refresh=True)

    def write(self, text: str) -> None:
        # Not folded by rich: a path that is broken into lines can be neither copied nor clicked.
        self._console.print(self._text(text), soft_wrap=True)

    def write_panel(self, rows: Rows) -> None:
        self._console.print(framed(rows))

    def close(self) -> None:
        self.prompt("")  # of a menu that is open: the last status stays
        self._live.stop()


class StepFields(TypedDict, total=False):
    """Position of a training, as a report of a step says it; what is not known is None."""

    iteration: Required[int]
    """Total iteration."""

    loss_a: Required[float]
    loss_b: Required[float]
    eg_per_s: Required[float]
    """Faces trained per second, both sides."""

    data_wait: Required[float]
    """Share of the time that the step waited for data, 0 to 1."""

    memory_mib: float | None
    """Peak memory of the device; of several, the largest."""

    learning_rate: float | None
    """Learning rate of that iteration."""

    session_iterations: int | None
    """Number of these that are of this session."""

    elapsed_s: float | None
    """Seconds since the session's first iteration."""

    saving: float | None
    """Share of that time for which saves held training up, 0 to 1."""

    drawing: float | None
    """The same of the images and metrics that are made with them."""

    seconds_left: float | None
    """Seconds until the last iteration of the session or of its stage."""

    seconds_to_save: float | None
    """Seconds until the next save, about."""

    gpus: int | None
    """Number of ranks that train together; absent: one, and then there is no exchange."""

    exchange: float | None
    """Share of the time that the exchange took, 0 to 1."""


_OF_RANKS = ("gpus", "exchange")


def complete(fields: StepFields) -> dict[str, Any]:
    """The fields of a step with a None for each that is not given, but those of several ranks."""
    names = (name for name in StepFields.__annotations__ if name not in _OF_RANKS)
    return dict.fromkeys(names) | dict(fields)


def step_report(fields: dict[str, Any], at: float) -> Report:
    """The report of a step.

    Args:
        fields: All fields, as `complete` gives them.
        at: Time of the step, in seconds since 1970.
    """
    return Report.of("step", at, "info", [status_text(fields)], fields)


def status_text(fields: dict[str, Any]) -> str:
    """The status line of a step's fields: parts between bars, those that matter most first."""
    return _BAR.join(_parts(fields))


def fitted(text: str, width: int, hint: str = "") -> str:
    """The first parts of a status line, as many as a terminal of this width holds in one line; a
    hint follows where one more part fits."""
    parts = text.split(_BAR)
    # The losses stay, however narrow the terminal is.
    while len(parts) > 1 and len(_BAR.join(parts)) > width:
        parts.pop()
    with_hint = _BAR.join([*parts, hint])
    return with_hint if hint and len(with_hint) <= width else _BAR.join(parts)


def _parts(fields: dict[str, Any]) -> Iterator[str]:
    yield (
        f"[#{fields['iteration']:05d}] Loss A: {fields['loss_a']:.5f}, "
        f"Loss B: {fields['loss_b']:.5f}"
    )
    yield f"EG/s {fields['eg_per_s']:.1f}"
    if fields["seconds_left"] is not None:
        yield f"left {long_duration(fields['seconds_left'])}"
    if fields["seconds_to_save"] is not None:
        yield f"save in {long_duration(fields['seconds_to_save'])}"
    yield f"wait {100 * fields['data_wait']:.1f} %"
    if "gpus" in fields:
        shared = fields["exchange"]
        exchange = "" if shared is None else f", exchange {100 * shared:.0f} %"
        yield f"gpus {fields['gpus']}{exchange}"
    if fields["memory_mib"] is not None:
        yield f"{fields['memory_mib']:.0f} MiB"
    if fields["session_iterations"] is not None and fields["elapsed_s"] is not None:
        yield f"{fields['session_iterations']} in {duration(fields['elapsed_s'])}"


def clock(at: float) -> str:
    """The time of day as a plain line begins with it; at: seconds since 1970."""
    return time.strftime("[%H:%M:%S] ", time.localtime(at))


def long_duration(seconds: float) -> str:
    """Time that is left, as 0:12:33; from a day on as 3 d 4 h."""
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h" if hours >= 24 else duration(seconds)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:12:33; hours may pass 99."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
