"""Outlook of a run on several GPUs: from a step that was measured, or by a card's roofline."""

import math
from dataclasses import replace

import torch

from ..config import Config
from ..distribute.predict import Outlook, StepTime, between, outlook
from ..estimate.flops import meta_model, work_of
from ..estimate.links import Link, gpu_link
from ..estimate.roofline import CARDS, Card, card_named, stretch
from ..optim import overlap
from ..optim.optimizer import Update
from ..precision import Precision

_ASSUMED = "h100"
_GROWTH = 4  # the line between a rank's share and so many times the batch gives the larger ones


def outlook_of(
    config: Config,
    precision: Precision,
    card: Card,
    num_gpus: int,
    link: Link,
    measured_s: float | None = None,
) -> Outlook:
    """What several GPUs would bring to a run.

    Args:
        config: Settings of the run; its batch size is a number.
        precision: Precision of the network; gradients are sent in its type.
        card: Figures of one of the GPUs.
        num_gpus: Number of GPUs, at most the batch size.
        link: Slowest link between them.
        measured_s: Seconds of a step of one GPU with the whole batch; None: the roofline's.
    """
    batch_size = config.train.batch_size
    small, whole, large = (
        step_time(config, precision, card, size)
        for size in (math.ceil(batch_size / num_gpus), batch_size, _GROWTH * batch_size)
    )
    if measured_s is not None:
        computed_s = max(measured_s - whole.update_s, measured_s / 2)
        factor = computed_s / (whole.step_s - whole.update_s)
        update_s = measured_s - computed_s
        small, large = (_slowed(each, factor, update_s) for each in (small, large))
    return outlook(between(small, large), batch_size, num_gpus, link)


def step_time(config: Config, precision: Precision, card: Card, batch_size: int) -> StepTime:
    """The step of one GPU with so many faces a side, by what good libraries reach."""
    work = work_of(meta_model(config), batch_size)
    predicted = stretch(work, card)
    kind = overlap.choose(config.optimizer, precision, is_worth=overlap.pays(work))
    open_update_s = predicted.update_s if kind is Update else 0.0
    return StepTime(
        batch_size,
        predicted.step_s - predicted.update_s + open_update_s,
        predicted.backward_s,
        open_update_s,
        work.num_parameters * precision.compute.itemsize,
    )


def _slowed(step: StepTime, factor: float, update_s: float) -> StepTime:
    """A step whose computation takes so many times as long, with another time of the update."""
    computed_s = factor * (step.step_s - step.update_s)
    return replace(
        step,
        step_s=computed_s + update_s,
        backward_s=factor * step.backward_s,
        update_s=update_s,
    )


def outlook_at_start(
    config: Config, precision: Precision, device: torch.device, num_ranks: int
) -> Outlook | None:
    """What the ranks of a run bring, before any step was run: by figures of the card, or of an H100
    where there are none of it; None without a GPU, where nothing is known."""
    if device.type != "cuda":
        return None
    card = card_named(torch.cuda.get_device_name(device)) or CARDS[_ASSUMED]
    return outlook_of(config, precision, card, num_ranks, gpu_link())
