"""The README's figures, from the newest results file of each card; nothing is typed in by hand.

Run: ``mien bench report``.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .harness import RESULTS

BEGIN, END = "<!-- figures: `mien bench report` writes them -->", "<!-- end of figures -->"
LEARNING = RESULTS / "learning"


def newest_results() -> list[dict[str, Any]]:
    """The last results file of every card, by the time it was begun."""
    newest: dict[str, dict[str, Any]] = {}
    files = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    for content in sorted(files, key=lambda content: content["time_utc"]):
        newest[content["card"]] = content
    return list(newest.values())


def render() -> str:
    """All tables as Markdown."""
    return "\n".join(part for content in newest_results() for part in _card(content))


def _card(content: dict[str, Any]) -> Iterable[str]:
    dirty = ", with uncommitted changes" if content["dirty"] else ""
    yield (
        f"**{content['card']}**, {content['cores']} cores, torch {content['torch']}, commit "
        f"{content['commit']}{dirty}\n"
    )
    rows = content["rows"]
    yield from _table(
        "One training step (no data)",
        ["model", "batch", "precision", "engine", "EG/s", "EG per CPU s", "Python calls", "ops"],
        [
            [
                *(row["model"], row["batch_size"], row["precision"], row["engine"]),
                *(row["eg_per_s"], row["eg_per_cpu_s"], row["python_calls"], row["launches"]),
            ]
            for row in rows
            if row["kind"] == "step"
        ],
    )
    yield from _table(
        "Batches from the store (everything on), one thread",
        ["input px", "target px", "faces per CPU s"],
        [
            [row["input_px"], row["output_px"], round(row["faces_per_cpu_s"])]
            for row in rows
            if row.get("name") == "batches"
        ],
    )
    yield from _table(
        "First start-up against bare decoding",
        ["faces", "PNG px", "start s", "bare s", "ratio", "ratio in CPU s", "next start s"],
        [
            [
                *(row["num_faces"], row["png_px"], round(row["first_s"], 2)),
                round(min(row["bare_dali_s"], row["bare_opencv_s"]), 2),
                *(round(row[key], 2) for key in ("ratio", "cpu_ratio", "second_s")),
            ]
            for row in rows
            if row.get("name") == "first_start"
        ],
    )
    yield from _table(
        "The whole loop (data, logging, two previews and saves; short runs, so these weigh much)",
        ["model", "batch", "precision", "EG/s", "waiting for data", "iterations"],
        [
            [
                *(row["model"], row["batch_size"], row["precision"], row["eg_per_s"]),
                f"{100 * row['data_wait']:.1f} %",
                row["iterations"],
            ]
            for row in rows
            if row["kind"] == "train"
        ],
    )


def _table(title: str, head: list[str], body: list[list[Any]]) -> Iterable[str]:
    if not body:
        return
    yield f"*{title}*\n"
    yield _line(head)
    yield _line(["---"] * len(head))
    for cells in body:
        yield _line(cells)
    yield ""


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def update(readme: Path) -> None:
    """Put the tables between the README's two marks.

    Raises:
        ValueError: The file lacks the marks.
    """
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme} lacks the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n\n{render()}\n{END}{after}")
