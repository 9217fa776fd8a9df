"""What each preset asks of a GPU, computed: its memory, and the speed that no step can pass.

Nothing of it is measured: memory is that of `core.training.memory`, EG/s are the roofline's, in
bf16. `mien preset list` shows what this writes.

Run: ``make docs``.
"""

import json
from typing import Any

import torch

from ..core import precision as precisions
from ..core.config import from_dict, merge, presets
from ..core.estimate.flops import meta_model, work_of
from ..core.training.build import sizes_of
from ..core.training.memory import footprint
from .harness import rounded
from .roofline import CARDS, ceiling


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


if __name__ == "__main__":
    print(json.dumps(costs(), indent=1))
