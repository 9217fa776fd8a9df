"""From settings to everything that a training loop needs, checked in the order a user would."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import __version__, models
from ...kernels.augment import Landmarks
from ...models.autoencoder import Autoencoder
from ..config import Config, from_dict, merge, to_dict
from ..data.decode import thread_count
from ..data.feed import Feed
from ..data.landmarks import landmarks_of_sides
from ..data.preview_faces import PreviewFaces, load_preview_faces
from ..data.sides import SIDES, SideFaces, open_sides
from ..data.store import FaceStore
from ..run.checkpoint import Generation, ModelFolder, Saver
from ..run.log import Log, Reporter, open_log
from ..run.session import TrainingState, resolve_resume
from . import precision as precisions
from .losses import Loss
from .optim import Update
from .precision import Precision
from .step import TrainStep


@dataclass
class Run:
    """A training run, ready to go."""

    config: Config
    state: TrainingState
    model: Autoencoder
    step: TrainStep
    precision: Precision
    feed: Feed
    folder: ModelFolder
    saver: Saver
    log: Log
    preview_faces: PreviewFaces
    device: torch.device


@contextmanager
def open_run(given: dict[str, Any], reporter: Reporter) -> Iterator[Run]:
    """Prepare a run, and clean up after it.

    Args:
        given: What the user set, by section and key.
        reporter: Is told what was chosen, and warned.

    Raises:
        ValueError: A setting, a folder or the model folder is not usable; one line says why.
    """
    config = from_dict(given)
    if not config.save.model_dir:
        raise ValueError("no model folder given: add --model-dir FOLDER")
    with ExitStack() as stack:
        folder = stack.enter_context(
            ModelFolder(
                Path(config.save.model_dir).expanduser(),
                trainer=given.get("model", {}).get("trainer"),
                keep_generations=config.save.keep_generations,
            )
        )
        saved = folder.load()
        if saved is not None:
            config = _resumed(saved, given, reporter)
        while folder.warnings:
            reporter.warning(folder.warnings.pop(0))
        yield _prepare(config, saved, folder, reporter, stack)


def _resumed(saved: Generation, given: dict[str, Any], reporter: Reporter) -> Config:
    """The settings of a resumed run: the model's own where locked, the user's where free."""
    if saved.config is None:
        raise ValueError(
            f"{saved.path} holds no config.toml, so its settings are unknown; put it back, or "
            "choose another --model-dir"
        )
    config, changes, refusals = resolve_resume(saved.config, given)
    if refusals:
        raise ValueError(refusals[0])
    for change in changes:
        reporter.warning(change)
    return config


def _prepare(
    config: Config,
    saved: Generation | None,
    folder: ModelFolder,
    reporter: Reporter,
    stack: ExitStack,
) -> Run:
    config = _resolved(config)
    device = choose_device(config.train.device)
    precision = precisions.resolve(config.precision.mode, device)
    options = models.options_of(config.model.trainer, config.model.options)
    family = models.family(config.model.trainer)
    input_px, output_px = family.sizes(options)
    num_threads = thread_count(config.data.num_threads)
    faces = _open_faces(config, max(input_px, *output_px), device, reporter)
    model = models.build(
        config.model.trainer,
        learn_mask=config.loss.learn_mask,
        reflect_padding=config.model.reflect_padding,
        seed=config.train.seed,
        **config.model.options,
    )
    model.to(device)
    update = Update(model, config.optimizer, precision)
    state = _restore(config, saved, model, update)
    session = state.begin_session(config)
    stores = {side: opened.store for side, opened in faces.items()}
    feed = Feed(
        stores,
        config,
        input_px=input_px,
        output_px=output_px,
        device=device,
        dtype=precision.compute,
        num_threads=num_threads,
        landmarks=_landmarks(config, faces, device, reporter),
    )
    stack.callback(feed.close)
    preview_faces = load_preview_faces(
        {side: opened.trained_on for side, opened in faces.items()},
        config.data,
        count=config.preview.preview_images,
        input_px=input_px,
        output_px=output_px[-1],
        num_threads=num_threads,
    )
    folder.write_config(config)
    saver = stack.enter_context(Saver(folder))
    first_step = state.iterations + 1
    log = open_log(folder.path, session.number, enabled=config.save.logs, first_step=first_step)
    stack.callback(log.close)
    reporter.start(_facts(config, state, saved, stores, model, precision, device, num_threads))
    return Run(
        config=config,
        state=state,
        model=model,
        step=TrainStep(model, Loss(config.loss), update, precision),
        precision=precision,
        feed=feed,
        folder=folder,
        saver=saver,
        log=log,
        preview_faces=preview_faces,
        device=device,
    )


def choose_device(setting: str) -> torch.device:
    """The device that `train.device` leads to."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but no CUDA GPU is usable; `mien doctor` says why")
    on_gpu = setting != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _resolved(config: Config) -> Config:
    """All options of the family written out; the face folders absolute, to resume from anywhere."""
    options = models.options_of(config.model.trainer, config.model.options)
    paths = {}
    for side in SIDES:
        given = getattr(config.data, f"input_{side}")
        if not given:
            raise ValueError(f"no faces for side {side.upper()}: add --input-{side} FOLDER")
        paths[f"input_{side}"] = os.path.abspath(os.path.expanduser(given))
    resolved = {"data": paths, "model": {"options": dataclasses.asdict(options)}}
    return from_dict(merge(to_dict(config), resolved))


def _open_faces(
    config: Config, size_px: int, device: torch.device, reporter: Reporter
) -> dict[str, SideFaces]:
    """Both sides' faces; tells of what had to be left out."""
    data = config.data
    model_dir = Path(config.save.model_dir).expanduser()
    store_dir = Path(data.store_dir).expanduser() if data.store_dir else model_dir / "faces"
    faces = open_sides(
        data, size_px, store_dir=store_dir, device=device, progress=reporter.progress
    )
    for side, opened in faces.items():
        for warning in opened.store.warnings:
            reporter.warning(warning)
        for bad in opened.left_out:
            reporter.warning(f"skipped {bad.path}: {bad.reason}")
        if config.train.batch_size > opened.store.num_faces:
            raise ValueError(
                f"train.batch_size is {config.train.batch_size}, but side {side.upper()} has "
                f"{opened.store.num_faces} faces; use --batch-size {opened.store.num_faces} or "
                "less, or add faces"
            )
    return faces


def _landmarks(
    config: Config, faces: dict[str, SideFaces], device: torch.device, reporter: Reporter
) -> tuple[Landmarks, Landmarks] | None:
    """What faces are warped to, where they are warped to landmarks."""
    if not config.augment.warp_to_landmarks:
        return None
    if not config.augment.warp:
        reporter.warning("augment.warp is off, so augment.warp_to_landmarks does nothing")
        return None
    a, b = (faces[side].landmarks_fl2 for side in SIDES)
    return landmarks_of_sides((a, b), device)


def _restore(
    config: Config, saved: Generation | None, model: Autoencoder, update: Update
) -> TrainingState:
    """A new state, or the saved one with weights and optimizer put back."""
    if saved is None:
        return TrainingState(trainer=config.model.trainer)
    parameters = model.state_dict()
    if saved.model.keys() != parameters.keys():
        odd = sorted(saved.model.keys() ^ parameters.keys())[0]
        raise ValueError(f"{saved.path} does not fit this model: {odd} is in only one of them")
    for name, tensor in saved.model.items():
        if tensor.shape != parameters[name].shape:
            raise ValueError(f"{saved.path} does not fit this model: {name} has another shape")
        parameters[name].copy_(tensor)  # in place: keeps the memory format
    if saved.optimizer is not None:
        update.load(saved.optimizer)
    return TrainingState.from_dict(saved.state)


def _facts(
    config: Config,
    state: TrainingState,
    saved: Generation | None,
    stores: dict[str, FaceStore],
    model: Autoencoder,
    precision: Precision,
    device: torch.device,
    num_threads: int,
) -> dict[str, Any]:
    """The start-up lines: what runs, and which path each part takes."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    begin = f"resumes at iteration {state.iterations}" if saved else "is new"
    facts = {
        "mien": __version__,
        "model": f"{config.model.trainer} ({parameters:.1f} M parameters) in "
        f"{config.save.model_dir} {begin}",
        "device": f"{name}, {num_threads} CPU threads",
        "precision": f"{precision.name} ({precision.why})",
        "engine": "eager",
        "augment": f"libmien, {'CUDA' if on_gpu else 'C++ threads'}",
    }
    for side, store in stores.items():
        path = getattr(config.data, f"input_{side}")
        facts[f"faces_{side}"] = f"{store.num_faces} of {path}; {store.backend}; {store.why}"
    return facts
