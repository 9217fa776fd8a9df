"""Outlook of a run on several GPUs: from a step that was measured, or by a card's roofline."""

import math
from dataclasses import replace

import torch

from ..config import Config
from ..distribute.predict import Outlook, StepTime, between, choose, outlook
from ..distribute.ranks import Ranks
from ..estimate.flops import configured_work
from ..estimate.links import NETWORK, Link, gpu_link
from ..estimate.roofline import CARDS, Card, card_named, stretch
from ..optim import overlap
from ..optim.optimizer import Update
from ..precision import Precision

_ASSUMED = "h100"
_GROWTH = 4  # the line between a rank's share and so many times the batch gives the larger ones


def outlook_of(
    config: Config,
    precision: Precision,
    device: torch.device,
    card: Card,
    num_gpus: int,
    link: Link,
    measured_s: float | None = None,
    measured_batch: int | None = None,
) -> Outlook:
    """What several GPUs would bring to a run.

    Args:
        config: Settings of the run; its batch size is a number.
        precision: Precision of the network; gradients are sent in its type.
        device: Device like those of the run.
        card: Figures of it.
        num_gpus: Number of GPUs, at most the batch size.
        link: Slowest link between them.
        measured_s: Seconds of a step of one GPU; None: the roofline's.
        measured_batch: Faces of each side in that step; None: the whole batch.
    """
    batch_size = config.train.batch_size
    small, measured, large = (
        step_time(config, precision, device, card, size)
        # A rank's share and much more than the batch: between them lies all that is asked for.
        for size in (
            math.ceil(batch_size / num_gpus),
            measured_batch or batch_size,
            _GROWTH * batch_size,
        )
    )
    if measured_s is not None:
        small, large = (_as_measured(each, measured, measured_s) for each in (small, large))
    return outlook(between(small, large), batch_size, num_gpus, link)


def step_time(
    config: Config, precision: Precision, device: torch.device, card: Card, batch_size: int
) -> StepTime:
    """The step of one device with so many faces a side, by what good libraries reach."""
    work = configured_work(config, batch_size)
    predicted = stretch(work, card)
    is_worth = device.type == "cuda" and overlap.pays(work)
    kind = overlap.choose(config.optimizer, precision, is_worth=is_worth)
    # As the run itself would choose: beside the backward pass an update adds no time of its own.
    hidden_s = 0.0 if kind is Update else predicted.update_s
    return StepTime(
        batch_size,
        predicted.step_s - hidden_s,
        predicted.backward_s,
        predicted.update_s,
        work.num_parameters * precision.compute.itemsize,
        hidden_s,
    )


def measured_step_time(
    config: Config, precision: Precision, device: torch.device, card: Card, measured_s: float
) -> StepTime:
    """The step of one device with the whole batch, which takes as long as it was measured to."""
    predicted = step_time(config, precision, device, card, config.train.batch_size)
    return _as_measured(predicted, predicted, measured_s)


def _as_measured(step: StepTime, measured: StepTime, measured_s: float) -> StepTime:
    """A predicted step, by how much longer than predicted the measured one took."""
    # The update is as predicted, since its bytes are known, as long as that leaves the half.
    open_s = min(measured.update_s - measured.hidden_s, measured_s / 2)
    factor = (measured_s - open_s) / measured.computed_s
    return replace(
        step,
        step_s=factor * step.computed_s + open_s,
        backward_s=factor * step.backward_s,
        update_s=open_s + step.hidden_s,
    )


def outlook_at_start(
    config: Config, precision: Precision, device: torch.device, ranks: Ranks
) -> Outlook | None:
    """What the ranks of a run bring, before any step was run: by figures of the card, or of an H100
    where there are none of it; None without a GPU, where nothing is known."""
    if device.type != "cuda":
        return None
    card, link = _card_of(device), _link_of(ranks)
    return outlook_of(config, precision, device, card, ranks.size, link)


def is_sharding_faster(
    config: Config, precision: Precision, device: torch.device, ranks: Ranks
) -> bool:
    """Whether ranks that each update a share of the weights are predicted to be faster than ranks
    that update all; false without a GPU, where nothing is known."""
    if device.type != "cuda":
        return False
    largest_share = math.ceil(config.train.batch_size / ranks.size)
    one = step_time(config, precision, device, _card_of(device), largest_share)
    return choose(one, ranks.size, _link_of(ranks)).distribution == "sharded"


def _card_of(device: torch.device) -> Card:
    return card_named(torch.cuda.get_device_name(device)) or CARDS[_ASSUMED]


def _link_of(ranks: Ranks) -> Link:
    """The slowest link between the ranks."""
    return gpu_link() if ranks.local_size == ranks.size else NETWORK
