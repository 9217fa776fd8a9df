"""Every figure in docs/figures.md, and one a card in the README, from each card's newest results.

Nothing is typed in by hand. Run: ``mien bench report``.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.estimate.flops import work_of
from ..core.estimate.roofline import ceiling
from ..core.system.durable_files import replace_file
from .ceilings import card_of
from .compare import name as name_of
from .harness import all_results, identity
from .variants import variant

BEGIN, END = "<!-- figures: `mien bench report` writes them -->", "<!-- end of figures -->"


def newest_results(folder: Path | None = None) -> list[dict[str, Any]]:
    """The last results file of every card, by the time it was begun.

    folder: where to look; None: in `RESULTS`.
    """
    return list({content["card"]: content for content in all_results(folder)}.values())


def render(folder: Path | None = None) -> str:
    """All tables of the results in a folder as Markdown; None: of those in `RESULTS`."""
    return "\n".join(part for content in newest_results(folder) for part in _card(content))


def _title(content: dict[str, Any]) -> str:
    dirty = ", with uncommitted changes" if content["dirty"] else ""
    return (
        f"**{content['card']}**, {content['cores']} cores, torch {content['torch']}, commit "
        f"{content['commit']}{dirty}"
    )


def _headline(content: dict[str, Any]) -> str:
    """The card with its fastest training step, and what plain PyTorch did in the same run."""
    steps = [
        row
        for row in content["rows"]
        if row["kind"] == "step" and "without" not in row and row.get("eg_per_s")
    ]
    ours = [row for row in steps if row["engine"].startswith("mien-")]
    if not ours:
        return _title(content)
    best = max(ours, key=lambda row: row["eg_per_s"])
    same = ("model", "batch_size", "precision")
    plain = [
        f"; plain PyTorch in the same run: {row['eg_per_s']}"
        for row in steps
        if row["engine"] == "plain-torch" and all(row[key] == best[key] for key in same)
    ]
    return (
        f"{_title(content)}:\na training step of `{best['model']}`, batch {best['batch_size']}, "
        f"{best['precision']}: {best['eg_per_s']} EG/s{''.join(plain[:1])}"
    )


def _card(content: dict[str, Any]) -> Iterable[str]:
    yield f"{_title(content)}\n"
    rows = [row for row in content["rows"] if "error" not in row]
    whole = [row for row in rows if "without" not in row]
    yield from _steps([row for row in whole if row["kind"] == "step"])
    yield from _loop([row for row in whole if row["kind"] == "train"])
    yield from _ceilings(content.get("ceilings"))
    yield from _kernels([row for row in rows if row["kind"] == "kernel"])
    yield from _data([row for row in rows if row["kind"] == "data"])
    yield from _ablation([row for row in rows if row["kind"] in ("step", "train")])
    yield from _models([row for row in rows if row["kind"] == "model"])
    yield from _rooflines([row for row in rows if row["kind"] == "roofline"])


def _ceilings(ceilings: dict[str, Any] | None) -> Iterable[str]:
    if not ceilings:
        return
    gemms = ceilings["gemm_tflops"]
    edge = ceilings["gemm_edge"]
    yield from _table(
        "What this card can do: a copy (read and write), square products, the models' convolutions",
        ["copy GB/s", *(f"{mode} {edge}^3 TFLOP/s" for mode in gemms)],
        [[ceilings["copy_gb_s"], *gemms.values()]],
    )
    phases: dict[str, dict[str, float]] = {}
    for row in ceilings["convolutions"]:
        phases.setdefault(row["shape"], {})[row["phase"]] = row["tflops"]
    precision = {row["precision"] for row in ceilings["convolutions"]}
    yield from _table(
        f"Convolutions in {', '.join(sorted(precision))}, TFLOP/s",
        ["faces x channels x px -> channels, taps/stride", "forward", "data gradient", "weight's"],
        [
            [shape, *(found.get(phase, "") for phase in ("forward", "data", "weight"))]
            for shape, found in phases.items()
        ],
    )


def _kernels(rows: list[dict[str, Any]]) -> Iterable[str]:
    ours = [row for row in rows if row["variant"] == "mien"]
    yield from _table(
        "Kernels (times faster than the same in PyTorch, eager and compiled; of losses, times as "
        "long as SSIM and MSE)",
        [
            *("kernel", "case", "ms", "GB/s", "TFLOP/s", "share of ceiling", "eager", "compiled"),
            "to SSIM+MSE",
        ],
        [
            [
                *(row["kernel"], _case(row), row["median_ms"]),
                *(_known(row, key) for key in ("gb_per_s", "tflops")),
                _percent(row.get("share_of_ceiling")),
                *(_known(row, f"speedup_over_torch_{how}") for how in ("eager", "compile")),
                _known(row, "ratio"),
            ]
            for row in ours
        ],
    )
    yield from _table(
        "Where mien's kernels lose",
        ["kernel", "case", "to", "times as fast"],
        [
            [
                *(row["kernel"], _case(row), name),
                row["speedup_over_" + name.replace("-", "_")],
            ]
            for row in ours
            for name in row.get("loses_to", [])
        ],
    )


def _steps(rows: list[dict[str, Any]]) -> Iterable[str]:
    head = ["model", "batch", "precision", "engine", "EG/s", "EG per CPU s", "share of ceiling"]
    yield from _table(
        "One training step (no data)",
        [*head, "Python calls", "launches"],
        [
            [
                *(row["model"], row["batch_size"], row["precision"], row["engine"]),
                *(row["eg_per_s"], _known(row, "eg_per_cpu_s")),
                _percent(row.get("share_of_ceiling")),
                *(_known(row, key) for key in ("python_calls", "launches")),
            ]
            for row in rows
        ],
    )


def _data(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield from _table(
        "Batches from the store (everything on), one thread",
        ["input px", "target px", "faces in", "faces per s", "faces per CPU s"],
        [
            [
                *(row["input_px"], row["output_px"], row.get("placement", "")),
                *(_whole(row["faces_per_wall_s"]), _whole(row["faces_per_cpu_s"])),
            ]
            for row in rows
            if row["name"] == "batches"
        ],
    )
    yield from _table(
        "First start-up against bare decoding",
        ["faces", "PNG px", "start s", "bare s", "ratio", "ratio in CPU s", "next start s"],
        [
            [
                *(row["num_faces"], row["png_px"], round(row["first_s"], 2)),
                round(min(v for k, v in row.items() if k in ("bare_dali_s", "bare_opencv_s")), 2),
                *(round(row[key], 2) for key in ("ratio", "cpu_ratio", "second_s")),
            ]
            for row in rows
            if row["name"] == "first_start"
        ],
    )


def _loop(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield from _table(
        "The whole loop: data, logging, previews and saves (on a CPU a few iterations only)",
        [
            "model",
            "batch",
            "precision",
            "engine",
            "saves",
            "EG/s",
            "waiting for data",
            "iterations",
        ],
        [
            [
                *(row["model"], row["batch_size"], row["precision"], row["engine"]),
                *(
                    _known(row, "saves"),
                    row["eg_per_s"],
                    _percent(row["data_wait"]),
                    row["iterations"],
                ),
            ]
            for row in rows
        ],
    )


def _ablation(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Rows that leave something out, each beside the same row that leaves nothing out."""
    whole = {identity(row): row for row in rows if "without" not in row}
    body = []
    for row in rows:
        rest = {key: value for key, value in row.items() if key != "without"}
        full = whole.get(identity(rest))
        if "without" in row and full:
            share = row["eg_per_s"] / full["eg_per_s"]
            body.append(
                [
                    *(row["kind"], row["model"], row["batch_size"], row["precision"]),
                    *(row["engine"], row["without"], row["eg_per_s"], full["eg_per_s"]),
                    f"{100 * (share - 1):+.1f} %",
                ]
            )
    head = ["of", "model", "batch", "precision", "engine", "without", "EG/s", "EG/s with", "change"]
    yield from _table("Each lever off, one at a time", head, body)


def _models(rows: list[dict[str, Any]]) -> Iterable[str]:
    figures = {
        "M parameters": "parameters_m",
        "s to make it": "build_s",
        "MiB to make it": "build_mib",
        "GPU MiB at batch 16": "gpu_mib_16",
        "at batch 64": "gpu_mib_64",
        "launches forward": "launches_forward",
        "backward": "launches_backward",
    }
    yield from _table(
        "Every model: what it takes to make it, GPU memory by estimate in bf16, launches of the "
        "network in a step",
        ["model", *figures],
        [[row["model"], *(_known(row, key) for key in figures.values())] for row in rows],
    )


def _rooflines(rows: list[dict[str, Any]]) -> Iterable[str]:
    """EG/s by model and card: ceiling / stretch at every batch size."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        text = f"{row['ceiling_eg_per_s']} / {row['stretch_eg_per_s']}"
        cells.setdefault((row["model"], row["of"]), {})[row["batch_size"]] = text
    sizes = sorted({row["batch_size"] for row in rows})
    yield from _table(
        "Computed, not measured: EG/s of a step in bf16 at its roofline / with the best kernels",
        ["model", "card", *(f"batch {size}" for size in sizes)],
        [[*key, *(found.get(size, "") for size in sizes)] for key, found in cells.items()],
    )


def _case(row: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in row["case"].items())


def _known(row: dict[str, Any], key: str) -> Any:
    """A figure, or nothing where it was not measured."""
    return "" if row.get(key) is None else row[key]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _whole(value: float | None) -> Any:
    return "" if value is None else round(value)


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


def update(readme: Path, docs: Path) -> None:
    """Write ``figures.md`` and ``figures.png`` in ``docs``, and the README's between its two marks.

    ``docs`` is as the README names it.

    Raises:
        ValueError: The README lacks the marks, or is not there.
    """
    if not readme.is_file():
        raise ValueError(f"there is no {readme} here: run `mien bench report` in mien's own folder")
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme} lacks the lines {BEGIN} and {END}")
    docs.mkdir(exist_ok=True)
    picture, everything = docs / "figures.png", docs / "figures.md"
    text = f"# Figures\n\nWritten by `mien bench report`.\n\n{render()}"
    replace_file(everything, text.encode())
    headlines = "\n\n".join(map(_headline, newest_results()))
    figures = f"{headlines}\n\nAll figures: [{everything}]({everything}).\n"
    if draw(newest_results(), picture):
        figures = f"![EG/s and the roofline's ceiling]({picture})\n\n{figures}"
    replace_file(readme, f"{before}{BEGIN}\n\n{figures}\n{END}{after}".encode())


def draw(contents: list[dict[str, Any]], picture: Path) -> bool:
    """EG/s of every step and loop as bars, one panel a card, each bf16 bar beside its ceiling.

    False, and no picture, where there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(content, _bars(content)) for content in contents]
    panels = [(content, bars) for content, bars in panels if bars]
    if not panels:
        return False
    heights = [1 + 0.32 * len(bars) for _, bars in panels]
    figure, grid = pyplot.subplots(
        len(panels), 1, figsize=(10, sum(heights) + 0.6), height_ratios=heights, squeeze=False
    )
    for axis, (content, bars) in zip(grid[:, 0], panels, strict=True):
        for place, (_, eg_per_s, bound, color) in enumerate(bars):
            axis.barh(place, eg_per_s, height=0.7, color=color)
            text = f"{eg_per_s:,.4g}"
            if bound is not None:
                axis.plot([bound, bound], [place - 0.42, place + 0.42], color="black", linewidth=2)
                text += f"  ({100 * eg_per_s / bound:.0f} % of {bound:,.4g})"
            beside = axis.get_yaxis_transform()  # x in shares of the panel's width
            axis.text(1.01, place, text, va="center", fontsize=8, transform=beside)
        axis.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
        axis.invert_yaxis()
        axis.set(title=f"{content['card']}, commit {content['commit']}")
        axis.grid(alpha=0.3, axis="x")
        axis.set_axisbelow(True)
    grid[-1, 0].set_xlabel("EG/s; the black mark is the roofline's ceiling in bf16")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    pyplot.close(figure)
    replace_file(picture, stream.getvalue())
    return True


def _bars(content: dict[str, Any]) -> list[tuple[str, float, float | None, str]]:
    """(label, EG/s, ceiling, colour) of every step and loop that leaves nothing out."""
    card = card_of(content["ceilings"]) if content.get("ceilings") else None
    bars = []
    for row in content["rows"]:
        if row["kind"] not in ("step", "train") or "without" in row or "error" in row:
            continue
        bound = None
        if card and row["precision"] == "bf16":
            work = work_of(variant(row["model"]).meta_model(), row["batch_size"])
            bound = ceiling(work, card).eg_per_s
        color = "tab:gray" if row["engine"].startswith("plain") else _COLORS[row["kind"]]
        bars.append((name_of(row), row["eg_per_s"], bound, color))
    return bars


_COLORS = {"step": "tab:blue", "train": "tab:orange"}
