"""What `mien train --summary` prints: layers, totals, work and memory of a model."""

from dataclasses import asdict
from typing import Any

from ..core import precision
from ..core.config import Config
from ..core.distribute.ranks import Ranks
from ..core.estimate.flops import meta_model, work_of
from ..core.estimate.summary import Layer, Summary, summarize
from ..core.training import memory
from ..core.training.build import check_ranks
from ..core.training.devices import choose_device, free_bytes
from .lines import complain, tell, tell_json

_USUAL_BATCH_SIZE = 16


def print_summary(config: Config, num_ranks: int, *, as_json: bool) -> None:
    """Tell what the configured model consists of and what training it takes.

    Args:
        config: Settings of the run.
        num_ranks: Ranks that are to divide its batch; memory is told for the one with most of it.
        as_json: Tell it as one line of JSON.

    Raises:
        ValueError: The settings do not go together with so many ranks.
    """
    model = meta_model(config)
    found = summarize(model)
    device = choose_device(config.train.device, lambda text: complain("train", text))
    on_gpu = device.type == "cuda"
    mode = config.precision.mode
    policy = precision.resolve(mode, device) if on_gpu else precision.expected(mode)
    free = free_bytes(device) if on_gpu else None
    ranks = Ranks(size=num_ranks)
    check_ranks(config, ranks)
    need = memory.footprint(config, policy, num_ranks=num_ranks)
    batch_size = config.train.batch_size
    if not batch_size:
        limit = config.train.auto_batch_limit
        fits = (need.largest_batch(free, limit) if free else 0) or _USUAL_BATCH_SIZE
        batch_size = num_ranks * fits
    share = ranks.share(batch_size).count  # the first rank's, than which no other is larger
    needed = need.at(share)
    step_gflop = work_of(model, batch_size).flops() / 1e9
    facts: dict[str, Any] = {
        "trainer": config.model.trainer,
        "input_px": model.input_px,
        "output_px": model.output_px,
        "parameters": found.num_parameters,
        "parameters_not_trained": found.num_frozen,
        "macs_per_face": found.macs,
        "batch_size": batch_size,
        "ranks": num_ranks,
        "batch_size_of_a_rank": share,
        "step_gflop": round(step_gflop, 3),
        "precision": policy.name,
        "gpu_memory_mib": round(needed.total_mib),
        "free_mib": None if free is None else round(free / memory.MIB),
        "fits": None if free is None else needed.total_bytes <= memory.USABLE_SHARE * free,
    }
    if as_json:
        tables = {
            "subnetworks": [_as_dict(layer, "name", "kind") for layer in found.subnetworks],
            "layers": [_as_dict(layer) for layer in found.layers],
        }
        tell_json(facts | tables, indent=None)
        return
    told = str(needed) if free is None else memory.describe(needed, free)
    tell(*_table(found), "", *_totals(facts, told))


def _as_dict(layer: Layer, *left_out: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(layer).items() if key not in left_out}


def _table(found: Summary) -> list[str]:
    """A line for each sub-network, and under it one for each of its layers."""
    rows = [("", "", "output", "parameters", "MACs a face")]
    for whole in found.subnetworks:
        rows.append((whole.subnetwork, "", _shape(whole), *_numbers(whole)))
        rows += [
            (f"  {layer.name}", layer.kind, _shape(layer), *_numbers(layer))
            for layer in found.layers
            if layer.subnetwork == whole.subnetwork
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]:>{widths[4]}}"
        for row in rows
    ]


def _shape(layer: Layer) -> str:
    return " x ".join(map(str, layer.shape))


def _numbers(layer: Layer) -> tuple[str, str]:
    return f"{layer.parameters:,}", f"{layer.macs:,}"


def _totals(facts: dict[str, Any], told_of_memory: str) -> list[str]:
    outputs = ", ".join(map(str, facts["output_px"]))
    frozen = facts["parameters_not_trained"]
    macs, num_ranks = facts["macs_per_face"], facts["ranks"]
    divided = f", {facts['batch_size_of_a_rank']} of it on a rank" if num_ranks > 1 else ""
    of_each = f"of each of {num_ranks} ranks: " if num_ranks > 1 else ""
    return [
        f"model        {facts['trainer']}, {facts['input_px']} px in, {outputs} px out",
        f"parameters   {facts['parameters']:,}"
        + (f", of which {frozen:,} are not trained" if frozen else ""),
        f"MACs a face  {macs['a']:,} of A, {macs['b']:,} of B",
        f"step         {facts['step_gflop']:,.1f} GFLOP at batch size {facts['batch_size']}"
        f"{divided}",
        f"GPU memory   {of_each}{told_of_memory} ({facts['precision']})",
    ]
