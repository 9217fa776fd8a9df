"""The status line of a run: its text, and its place at the bottom of a terminal."""

import time
from typing import Any, TextIO, cast

from ..system.output import Output
from .report import Report


class StatusLine:
    """A status at the bottom of a terminal (folded where it is narrow), others scroll by above."""

    def __init__(self, stream: Output) -> None:
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

    def update(self, text: str) -> None:
        # With the first step: before, a bar of progress has this place.
        if not self._live.is_started:
            self._live.start()
        self._live.update(self._text(text), refresh=True)

    def write(self, text: str) -> None:
        # Not folded by rich: a path that is broken into lines can be neither copied nor clicked.
        self._console.print(self._text(text), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def step_report(fields: dict[str, Any], at: float) -> Report:
    """The report of a step.

    Args:
        fields: Arguments of `Reporter.step`.
        at: Time of the step, in seconds since 1970.
    """
    return Report.of("step", at, "info", [status_text(fields, at)], fields)


def status_text(fields: dict[str, Any], now: float) -> str:
    """The status line of a step's fields, those of `Reporter.step`."""
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    text = (
        f"[{clock}] [#{fields['iteration']:05d}] Loss A: {fields['loss_a']:.5f}, "
        f"Loss B: {fields['loss_b']:.5f} | EG/s {fields['eg_per_s']:.1f}"
        f" | wait {100 * fields['data_wait']:.1f} %"
    )
    if "gpus" in fields:
        text += f" | gpus {fields['gpus']}"
        if fields["exchange"] is not None:
            text += f", exchange {100 * fields['exchange']:.0f} %"
    if fields["memory_mib"] is not None:
        text += f" | {fields['memory_mib']:.0f} MiB"
    if fields["session_iterations"] is not None and fields["elapsed_s"] is not None:
        text += f" | {fields['session_iterations']} in {duration(fields['elapsed_s'])}"
    if fields["seconds_left"] is not None:
        text += f" | left {duration(fields['seconds_left'])}"
    return text


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:12:33; hours may pass 99."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
