"""The model and the training step that moves it, built from the settings."""

from pathlib import Path

import torch

from ... import models
from ...models.alignment import MULTIPLE
from ...models.autoencoder import Autoencoder
from .. import precision as precisions
from ..checkpoint.warm_start import load_weights
from ..config import Config, model_settings
from ..distribute.group import Group
from ..distribute.ranks import ALONE, Ranks
from ..distribute.sharded import ShardedUpdate
from ..distribute.update import MirroredUpdate
from ..estimate.flops import configured_work, meta_model
from ..exchange.keras_import import read_any_weights
from ..losses.weighted import Loss
from ..optim import fused_dense, overlap
from ..optim.arrivals import arrival_order
from ..optim.optimizer import Update
from . import engine as engines
from . import micro_batch as micro_batches
from .loss_buffer import LossBuffer
from .micro_batch import MicroBatchStep
from .scaling import is_sharding_faster
from .step import SharedStep, TrainStep

_SMALL_BATCH = 16
"""Faces of a side up to which one decoder leaves a GPU room for the other as well. Chosen from the
sizes of the products; unmeasured on a GPU."""


def build_model(
    config: Config, device: torch.device, *, is_new: bool = True
) -> tuple[Autoencoder, str]:
    """The model, on the CPU, as it is trained on a device; and what it began with, in words.

    Args:
        config: Settings of the run.
        device: Device on which it is going to be trained.
        is_new: Whether it begins with weights of its own, or those of another model, and not with
            those of a save.

    Returns:
        The model, and the weights that it has from another model; empty where it has none.

    Raises:
        ValueError: The other model cannot be read or does not fit; one line says why.
    """
    seed = config.train.seed if is_new else None  # else all weights come from the checkpoint
    options = models.options_of(config.model.trainer, config.model.options)
    source = config.model.load_weights
    # An encoder that comes from another model needs no file of pretrained weights.
    pretrained = not (source and "encoder" in getattr(options, "load_layers", ()))
    # On the CPU, where the weights are drawn: a seed gives the same ones with and without a GPU.
    model = models.build(
        config.model.trainer, seed=seed, pretrained=pretrained, **model_settings(config)
    )
    loaded = load_weights(model, Path(source), read_any_weights) if is_new and source else ""
    # After weights were taken over, which are those of the plain model.
    if has_aligned_channels(config, device):
        model.align(MULTIPLE)
    if config.train.freeze_weights:
        model.freeze()
    return model, loaded


def has_aligned_channels(config: Config, device: torch.device) -> bool:
    """Whether channels are padded to what tensor cores take."""
    setting = config.precision.align_channels
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def build_step(
    config: Config,
    model: Autoencoder,
    device: torch.device,
    *,
    loss: Loss | None = None,
    kind_of_update: type[Update] | None = None,
    group: Group | None = None,
) -> TrainStep:
    """The training step of a model, on its device, and the precision of this process with it.

    Args:
        config: Settings of the run; its batch size is a number, not auto.
        model: Trained in place; moved to the device.
        device: Device on which it is trained.
        loss: What is minimised; None: what the settings lead to.
        kind_of_update: What moves the weights; None: what the settings lead to.
        group: Ranks that train it together; None: this process alone.

    Raises:
        ValueError: The settings do not go together, or not with the device; one line says why.
    """
    precision = precisions.resolve(config.precision.mode, device)
    # Before anything runs on the device: TF32 is a switch of the process.
    precision.apply()
    # Before the update is made, which keeps views of the parameters where they lie by then.
    model.to(device)
    ranks = group.ranks if group else ALONE
    # Again: when the settings were checked, auto had not chosen the batch yet.
    micro_batches.check(config, ranks)
    # With micro-batches their tree sums over the ranks, each of which moves all weights.
    if group is not None and not config.train.micro_batch:
        update = _shared_update(config, model, precision, group)
    else:
        kind = kind_of_update or _kind_of_update(config, precision, device)
        update = kind(model, config.optimizer, precision, config.train.ema)
    loss = loss or Loss(config.loss, model.output_px, device)
    stream = torch.cuda.Stream(device) if _has_two_streams(config, device, ranks) else None
    shared = _shared_step(config, device, group) if group else None
    buffer = LossBuffer(loss.num_values, device)
    if config.train.micro_batch:
        sizes = {"size": config.train.micro_batch, "batch_size": config.train.batch_size}
        return MicroBatchStep(model, loss, update, buffer, stream, shared, **sizes)
    return TrainStep(model, loss, update, buffer, stream, shared)


def _kind_of_update(
    config: Config, precision: precisions.Precision, device: torch.device
) -> type[Update]:
    """The update that the settings lead to, of one process."""
    if config.train.micro_batch:
        # Weights must not move before the gradients of all micro-batches are summed.
        return Update
    # On a CPU there is nothing to overlap with.
    is_worth = device.type == "cuda" and overlap.pays(
        configured_work(config, config.train.batch_size)
    )
    return overlap.choose(config.optimizer, precision, is_worth=is_worth)


def _shared_update(
    config: Config, model: Autoencoder, precision: precisions.Precision, group: Group
) -> Update:
    """The update that the settings lead to, of several ranks."""
    kind = ShardedUpdate if _is_sharded(config, model, precision, group) else MirroredUpdate
    # Gradients are sent during the backward pass anyway; auto leaves the weights for afterwards.
    overlaps = overlap.choose(config.optimizer, precision) is overlap.OverlappedUpdate
    # Of the model without memory: all ranks must send in one order, already in the first step.
    order = arrival_order(meta_model(config))
    ema = config.train.ema
    return kind(
        model, config.optimizer, precision, ema, group=group, order=order, overlaps=overlaps
    )


def _is_sharded(
    config: Config, model: Autoencoder, precision: precisions.Precision, group: Group
) -> bool:
    """Whether each rank moves its own slice of the weights."""
    if config.train.distribution != "auto":
        return config.train.distribution == "sharded"
    device = next(model.parameters()).device
    is_wanted = group.ranks.is_first and is_sharding_faster(config, precision, device, group.ranks)
    return bool(group.max([int(is_wanted)])[0])  # one answer for ranks that see other links


def _shared_step(config: Config, device: torch.device, group: Group) -> SharedStep:
    """Weight of this rank in a step that the ranks take together."""
    batch_size = config.train.batch_size
    return SharedStep(group, group.ranks.share(batch_size).weight(batch_size), device)


def _has_two_streams(config: Config, device: torch.device, ranks: Ranks) -> bool:
    """Whether B's decoder runs on a stream of its own, at the time of A's."""
    streams = config.train.decoder_streams
    # What this GPU computes at once, which may be a part of the batch.
    faces = config.train.micro_batch or ranks.share(config.train.batch_size).count
    is_wanted = streams == "two" or (streams == "auto" and faces <= _SMALL_BATCH)
    # torch.compile knows no streams.
    return (
        is_wanted
        and device.type == "cuda"
        and engines.choose(config.train.engine, device)[0] != "compile"
    )


def sizes_of(config: Config) -> tuple[int, tuple[int, ...]]:
    """Edges of the model's input and outputs, in px."""
    options = models.options_of(config.model.trainer, config.model.options)
    return models.family(config.model.trainer).sizes(options)


def check_step(config: Config, device: torch.device, ranks: Ranks = ALONE) -> tuple[str, str]:
    """Name of the engine that runs the step, and why that, before anything is built.

    Args:
        config: Settings of the run.
        device: Device on which it trains.
        ranks: Place of this process among those that train together.

    Raises:
        ValueError: Settings of the step do not go together, or not with the device; one line says
            why.
    """
    # Made for its refusals alone.
    overlap.choose(config.optimizer, precisions.resolve(config.precision.mode, device))
    name, why = engines.choose(config.train.engine, device)
    fused_dense.check(config.optimizer, name)
    check_ranks(config, ranks)
    return name, why


def check_ranks(config: Config, ranks: Ranks) -> None:
    """Refuse settings that do not go together with the ranks of a run.

    Args:
        config: Settings of the run.
        ranks: Place of a process among those that train together, or are to.

    Raises:
        ValueError: Names the setting and what to change, in one line.
    """
    micro_batches.check(config, ranks)
    if config.train.batch_size:  # else auto chooses one that is large enough
        ranks.share(config.train.batch_size)
    if ranks.size > 1 and config.optimizer.fused_dense:
        raise ValueError(
            "optimizer.fused_dense is on, whose gradients are never in memory, so that ranks "
            "cannot sum them; set it to false to train on several GPUs"
        )
