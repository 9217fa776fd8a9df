"""What each preset asks of a GPU, computed: its memory, and the speed that no step can pass.

Nothing of it is measured: memory is that of `core.training.memory`, EG/s are the roofline's, in
bf16. `mien preset list` shows what this writes.

Run: ``make docs``.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ..core import precision as precisions
from ..core.config import from_dict, merge, presets
from ..core.estimate.flops import meta_model, work_of
from ..core.training.build import sizes_of
from ..core.training.memory import footprint
from .harness import rounded
from .roofline import CARDS, ceiling

PAGE = Path(__file__).parents[1] / "docs/choosing.md"
BEGIN, END = "<!-- costs: `make docs` writes them -->", "<!-- end of costs -->"


def cost_of(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sizes in px, parameters in millions, MiB and EG/s of a preset at its batch size."""
    # Weights that were pretrained cost what others do, and need a file.
    untrained = {"model": {"options": {"enc_load_weights": False}}}
    is_known = "enc_load_weights" in settings.get("model", {}).get("options", {})
    config = from_dict(merge(settings, untrained) if is_known else settings)
    batch_size = config.train.batch_size
    model = meta_model(config)
    precision = precisions.resolve("bf16", torch.device("cpu"))
    work = work_of(model, batch_size)
    return {
        "input_px": sizes_of(config)[0],
        "output_px": sizes_of(config)[1][-1],
        "parameters_m": rounded(work.num_parameters / 1e6, 3),
        "batch_size": batch_size,
        "memory_mib": round(footprint(config, precision).at(batch_size).total_mib),
        "roofline_eg_per_s": {
            name: round(ceiling(work, card).eg_per_s) for name, card in CARDS.items()
        },
    }


def costs() -> dict[str, dict[str, Any]]:
    """The cost of every preset that comes with mien, by its name."""
    packaged = [preset for preset in presets.available() if not preset.is_own]
    return {preset.name: cost_of(preset.settings) for preset in packaged}


def table(costs_by_name: dict[str, dict[str, Any]]) -> str:
    """The costs in Markdown, one line a preset."""
    head = ["preset", "trainer", "px", "parameters", "batch", "GPU memory"]
    head += [f"EG/s, {card.name}" for card in CARDS.values()]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for name, cost in costs_by_name.items():
        speeds = [f"{cost['roofline_eg_per_s'][card]:,}" for card in CARDS]
        sizes = f"{cost['input_px']} → {cost['output_px']}"
        memory = f"{cost['memory_mib'] / 1024:.1f} GiB"
        parameters, batch = f"{cost['parameters_m']:g} M", str(cost["batch_size"])
        trainer = presets.load(name).trainer
        lines.append([f"`{name}`", trainer, sizes, parameters, batch, memory, *speeds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def update() -> None:
    """Compute everything anew, and put it into the package and the page."""
    computed = costs()
    (presets.PACKAGED / "costs.json").write_text(json.dumps(computed, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(computed)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    update()
