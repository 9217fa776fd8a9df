"""What is reported before the first iteration: the settings that decide the result, and the path
that each part takes; as fields for programs and as lines for people."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ... import __version__
from ..config import SAVE_ITERATIONS, SAVE_SECONDS, Config, LossConfig, OptimizerConfig
from ..config.live import live_values
from ..console.start_panel import Rows
from ..data.sides import SideFaces
from ..distribute.sharded import ShardedUpdate
from ..distribute.update import MirroredUpdate
from ..estimate.links import host_link
from ..optim.fused_dense import described
from ..optim.lr_schedule import Schedule
from ..system.printable import plural
from . import memory
from .batch_size import BatchSize
from .devices import threads_in_words
from .resolve import Change
from .scaling import outlook_at_start
from .training_setup import TrainingSetup


@dataclass(frozen=True)
class Chosen:
    """What was found and chosen while a step was built."""

    faces: dict[str, SideFaces]
    batch: BatchSize
    engine_why: str
    """How the engine was chosen."""

    loaded: str
    """What a new model began with, in words; empty: with nothing."""


def start_report(
    setup: TrainingSetup, chosen: Chosen, changes: list[Change], num_threads: int
) -> tuple[dict[str, Any], Rows]:
    """The fields of the start, and the rows of its panel.

    Args:
        setup: Ready to go.
        chosen: What was found and chosen for it.
        changes: Settings that are other than in the last session.
        num_threads: Threads that decode and augment.
    """
    config, faces, batch = setup.config, chosen.faces, chosen.batch
    changes = [*changes, *_change_by_auto(setup, batch)]
    fields = {
        **_fields_of_settings(config),
        **_fields_of_setup(setup, faces, batch),
        "num_threads": num_threads,
        "live": live_values(config),
        "load_weights": config.model.load_weights or None,
        "changes": [
            {"name": each.name, "old": each.old, "new": each.new, "note": each.note or None}
            for each in changes
        ],
    }
    lines = {
        "trainer": f"{config.model.trainer}, {fields['input_px']} px in, "
        f"{', '.join(map(str, fields['output_px']))} px out",
        "batch": f"{batch.size} a side ({batch.why})",
        "losses": _losses(fields["losses"], config.loss),
        "mask": _mask(config),
        "crop": f"{config.data.centering}, coverage {config.data.coverage:g} %, vertical offset "
        f"{config.data.vertical_offset} %",
        "augment": _augmentation(config),
        "optimizer": _optimizer(config.optimizer, setup.schedule),
        "precision": f"{setup.precision.name} ({setup.precision.why})",
        "EMA": _average(config),
        "saves": _saves(config),
        **_lines_of_parts(setup, faces, fields, chosen.engine_why),
        **({"loaded": chosen.loaded} if chosen.loaded else {}),
    }
    names = ["changed", *[""] * len(changes)]
    # Not strict: without changes the name has no row.
    return fields, [*lines.items(), *zip(names, map(str, changes), strict=False)]


def _average(config: Config) -> str:
    """The average of the weights that is shown and exported."""
    if config.optimizer.optimizer == "schedule-free":
        return "off, but schedule-free averages the weights by itself"
    return f"of the weights, decay {config.train.ema:g}" if config.train.ema else "off"


def _change_by_auto(setup: TrainingSetup, batch: BatchSize) -> Iterator[Change]:
    """The batch size that auto has chosen, where the last session had another."""
    # The session before is the last but one: the present one is in the list already.
    before = [session.batch_size for session in setup.state.sessions[-2:-1]]
    if batch.bound and before and before[0] != batch.size:
        text = f"{before[0]} -> {batch.size}"
        yield Change("train.batch_size", before[0], batch.size, text, "auto has chosen it")


def _fields_of_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the result, as they are set."""
    data, loss, augment = config.data, config.loss, config.augment
    return {
        "trainer": config.model.trainer,
        "options": config.model.options,
        "mask_type": data.mask_type,
        "penalized_mask_loss": loss.penalized_mask_loss,
        "learn_mask": loss.learn_mask,
        "eye_multiplier": loss.eye_multiplier,
        "mouth_multiplier": loss.mouth_multiplier,
        "centering": data.centering,
        "coverage": data.coverage,
        "vertical_offset": data.vertical_offset,
        "warp": augment.warp,
        "warp_to_landmarks": augment.warp_to_landmarks,
        "flip": augment.flip,
        "color": augment.color,
        "optimizer": config.optimizer.optimizer,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "clipping_value": config.optimizer.clipping_value,
        "weight_decay": config.optimizer.weight_decay,
        "gradient_accumulation": config.optimizer.gradient_accumulation,
        "ema": config.train.ema,
        "save_interval": config.save.save_interval,
        "save_minutes": config.save.save_minutes,
        "snapshot_interval": config.save.snapshot_interval,
        "seed": config.train.seed,
        "input_a": _folders(config.data.input_a),
        "input_b": _folders(config.data.input_b),
    }


def _optimizer(config: OptimizerConfig, schedule: Schedule) -> str:
    """The rule and its rate; what bounds, decays or gathers gradients, where anything does."""
    clipped = f"gradients clipped by {config.gradient_clipping} at {config.clipping_value:g}"
    parts = {
        f"{config.optimizer}, learning rate {schedule}": True,
        clipped: config.gradient_clipping != "none",
        f"weight decay {config.weight_decay:g}": config.weight_decay > 0.0,
        f"{config.gradient_accumulation} iterations an update": config.gradient_accumulation > 1,
    }
    return ", ".join(text for text, is_told in parts.items() if is_told)


def _folders(texts: tuple[str, ...]) -> str | list[str]:
    """The folders of a side: one as a text, several as a list."""
    return texts[0] if len(texts) == 1 else list(texts)


def _fields_of_setup(
    setup: TrainingSetup, faces: dict[str, SideFaces], batch: BatchSize
) -> dict[str, Any]:
    """What the session has come to be: of the model, the state, the device."""
    loss, schedule, model = setup.step.loss, setup.schedule, setup.model
    held_out = setup.evaluation and {
        side: {
            "count": len(opened.held_out.faces),
            "measured": len(setup.evaluation.faces[side].inputs_nssc),
        }
        for side, opened in faces.items()
    }
    return {
        "mien": __version__,
        "model_dir": setup.config.save.model_dir,
        "iteration": setup.state.iterations,
        "session": setup.state.session.number,
        "parameters": setup.step.update.num_parameters,
        "input_px": model.input_px,
        "output_px": list(model.output_px),
        "batch_size": batch.size,
        "batch_size_bound": batch.bound,
        "losses": [{"name": name, "weight": weight} for name, weight in loss.weights.items()],
        "mask_loss": next(iter(loss.mask_weights), None),
        # The rate that the warm-up rises to: the first one of all may be near 0.
        "learning_rate": schedule.base_rate * schedule.factor,
        # Apart from the rate: a program that compares runs must not take it for a setting.
        "learning_rate_is_found": schedule.source == "found",
        "warmup_steps": schedule.config.warmup_steps,
        "schedule": schedule.config.schedule,
        "precision": setup.precision.name,
        "device": setup.device.type,
        "device_name": _device_name(setup.device),
        "engine": setup.engine.name,
        **({"gpus": setup.council.ranks.size} if setup.council else {}),
        "faces_a": faces["a"].store.num_faces,
        "faces_b": faces["b"].store.num_faces,
        "held_out": held_out,
        "frozen": list(model.frozen),
        "stage": setup.progress
        and {
            "recipe": setup.progress.recipe.name,
            "name": setup.progress.stage.name,
            "number": setup.progress.stage_state.stage + 1,
            "count": len(setup.progress.recipe.stages),
        },
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _losses(losses: list[dict[str, Any]], config: LossConfig) -> str:
    # In percent, as the settings are written.
    words = [f"{loss['name']} {100 * loss['weight']:g} %" for loss in losses]
    if config.penalized_mask_loss:
        words.append(f"eyes x {config.eye_multiplier}, mouth x {config.mouth_multiplier}")
    if config.learn_mask:
        words.append(f"{config.mask_loss_function} of the mask")
    return ", ".join(words)


def _mask(config: Config) -> str:
    uses = [
        words
        for is_on, words in (
            (config.loss.penalized_mask_loss, "errors count only inside"),
            (config.loss.learn_mask, "learned"),
        )
        if is_on
    ]
    return f"{config.data.mask_type} ({', '.join(uses) or 'not used'})"


def _augmentation(config: Config) -> str:
    augment = config.augment
    switches = {
        "warp": augment.warp,
        # Without the warp its kind has no say.
        "warp to landmarks": augment.warp and augment.warp_to_landmarks,
        "flip": augment.flip,
        "color": augment.color,
    }
    return ", ".join(f"{name} {'on' if is_on else 'off'}" for name, is_on in switches.items())


def _saves(config: Config) -> str:
    save = config.save
    if save.save_minutes:
        minutes = f"{save.save_minutes:g} minutes"
        return f"every {plural(save.save_minutes, 'minute', minutes)}"
    if save.save_interval:
        iterations = f"{save.save_interval} iterations"
        return f"every {plural(save.save_interval, 'iteration', iterations)}"
    return f"every {SAVE_ITERATIONS} iterations, but at least {SAVE_SECONDS:g} s apart"


def _lines_of_parts(
    setup: TrainingSetup, faces: dict[str, SideFaces], fields: dict[str, Any], engine_why: str
) -> dict[str, str]:
    """Path that each part takes."""
    parameters, iterations = fields["parameters"] / 1e6, setup.state.iterations
    # By the count and not by the folder: one that was refused before its first save is new.
    begin = f"resumes at iteration {iterations}" if iterations else "is new"
    place = f" in {fields['model_dir']}" if fields["model_dir"] else ""
    libmien = "CUDA" if setup.device.type == "cuda" else "C++ threads"
    lines = {
        "mien": __version__,
        "model": f"{parameters:.1f} M parameters{place}; it {begin}",
        "device": f"{fields['device_name']}, {threads_in_words(fields['num_threads'])}",
        "engine": f"{setup.engine.name} ({engine_why})",
        "kernels": f"libmien, {libmien}",
    }
    if setup.council is not None:
        ranks, is_sharded = setup.council.ranks, isinstance(setup.step.update, ShardedUpdate)
        moved = "its slice of the weights" if is_sharded else "all weights"
        lines["ranks"] = (
            f"{ranks.size}, {ranks.local_size} of them on this machine; {setup.feed.count} "
            f"{plural(setup.feed.count, 'face a side is', 'faces a side are')} this one's; "
            f"each moves {moved}"
        )
    for side, opened in faces.items():
        store = opened.store
        lines[f"faces {side}"] = f"{opened.described}; {store.backend}; {store.why}"
    if setup.progress:
        lines["stage"] = str(setup.progress)
    if fields["held_out"]:
        held_out = fields["held_out"]
        counts = ", ".join(f"{held_out[side]['count']} of {side.upper()}" for side in held_out)
        measured = " and ".join(str(each["measured"]) for each in held_out.values())
        lines["held out"] = f"{counts}, never trained on; {measured} of them measured at every save"
    if setup.config.train.freeze_weights:
        lines["frozen"] = _frozen(setup)
    if setup.config.optimizer.fused_dense:
        update = setup.step.update
        # Of the layers that the switch took: those below its least size are updated as ever.
        sizes = [
            master.numel()
            for name, master in zip(update.names, update.master_weights, strict=True)
            if name in update.low_rank
        ]
        lines["dense layers"] = described(len(sizes), sum(sizes))
    if setup.step.update.is_on_host:
        lines["state"] = _state_on_host(setup)
    if setup.council is not None:
        ranks = setup.council.ranks
        outlook = outlook_at_start(setup.config, setup.precision, setup.device, ranks)
        if outlook:
            lines["scaling"] = f"{outlook}; predicted"
    return lines


def _state_on_host(setup: TrainingSetup) -> str:
    """Place of master weights and moments, where that is not the GPU."""
    trained = sum(parameter.numel() for parameter in setup.step.parameters)
    link = host_link(setup.device.index or 0)
    update = setup.step.update
    num_holders = update.num_holders if isinstance(update, MirroredUpdate) else 1
    told = memory.host_state(setup.config, setup.precision, trained, link, num_holders=num_holders)
    return f"in host memory: {told}"


def _frozen(setup: TrainingSetup) -> str:
    """What is left as it is."""
    # Said all the same: the user has asked for it, and would wait for a faster step.
    if not setup.model.frozen:
        return f"nothing: {setup.config.model.trainer} names no layers to freeze"
    parameters = setup.step.update.frozen.num_parameters / 1e6
    return f"{parameters:.1f} M parameters of {', '.join(setup.model.frozen)}"
