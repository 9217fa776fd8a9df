"""How fast a training step of each model can be on each card: see `core.estimate.roofline`.

*Fused*: the same with `optimizer.fused_dense`.

Run: ``mien bench roofline``.
"""

from collections.abc import Iterator
from typing import Any

from ..core.estimate.flops import work_of
from ..core.estimate.roofline import CARDS, Card, ceiling, stretch
from ..core.optim.fused_dense import LEAST
from .harness import rounded
from .variants import names, variant

BATCH_SIZES = (16, 64, 256)


def rows(measured: Card | None = None) -> Iterator[dict[str, Any]]:
    """What a step of each model does, then one row a model, card and batch size.

    measured: this machine's card, predicted for besides `CARDS`.
    """
    cards = [*CARDS.values(), *([measured] if measured else [])]
    for name in names():
        model = variant(name).meta_model()
        one = work_of(model, 1)
        yield {
            "kind": "work",
            "model": name,
            "parameters_m": round(one.num_parameters / 1e6, 2),
            "forward_gflop_per_face": round(one.flops("forward") / one.num_faces / 1e9, 3),
            "step_gflop_per_face": round(one.flops() / one.num_faces / 1e9, 3),
            "activation_mb_per_face": round(one.activation_bytes / one.num_faces / 1e6, 2),
            "weight_mb_per_step": round(one.weight_bytes / 1e6, 1),
        }
        for batch_size in BATCH_SIZES:
            work = work_of(model, batch_size)
            fused = work.with_fused_dense(LEAST)
            for card in cards:
                best = ceiling(work, card)
                yield {
                    "kind": "roofline",
                    "model": name,
                    "batch_size": batch_size,
                    "of": card.name,
                    "precision": "bf16",
                    "ceiling_eg_per_s": rounded(best.eg_per_s),
                    "stretch_eg_per_s": rounded(stretch(work, card).eg_per_s),
                    "fused_ceiling_eg_per_s": rounded(ceiling(fused, card).eg_per_s),
                    "fused_stretch_eg_per_s": rounded(stretch(fused, card).eg_per_s),
                    "binds": best.binds,
                }
