"""From settings to everything that a training loop needs, checked in the order a user would."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import __version__, models
from ...kernels.augment import Landmarks
from ...models.alignment import MULTIPLE
from ...models.autoencoder import Autoencoder
from ..config import Config, from_dict, merge, model_settings, to_dict
from ..data.decode import thread_count
from ..data.feed import Feed
from ..data.landmarks import landmarks_of_sides
from ..data.preview_faces import PreviewLoader
from ..data.sides import SIDES, SideFaces, open_sides, warnings_of
from ..data.store import FaceStore, available_host_bytes
from ..faces.folder import skipped
from ..paths import expanded, refusals_told
from ..recipes import Recipe
from ..run.checkpoint import ModelFolder, Saver
from ..run.crash import reporting_crashes
from ..run.generation import Generation
from ..run.log import EVENTS, Log, LogError, NullLog, Reporter, open_log
from ..run.session import TrainingState, resolve_resume
from ..run.window import PreviewWindow
from . import divergence, memory, overlap, stages
from . import engine as engines
from . import precision as precisions
from .device import choose_device
from .engine import Engine
from .evaluate import Evaluation, measured_at, open_evaluation
from .losses import Loss
from .optim import Update, check_weights
from .pictures import Pictures
from .precision import Precision
from .ring import LossRing
from .schedule import ROLLBACK, SCHEDULE, SCHEDULE_SETTINGS, Schedule, begin_schedule, settle_rate
from .stages import Plan
from .step import TrainStep
from .transfer import load_weights
from .work import meta_model, work_of

_NUM_NAMED = 10


@dataclass
class Run:
    """A training run, ready to go."""

    config: Config
    state: TrainingState
    model: Autoencoder
    step: TrainStep
    engine: Engine
    precision: Precision
    schedule: Schedule
    feed: Feed
    plan: Plan | None
    """The recipe and where the run stands in it."""

    folder: ModelFolder
    saver: Saver
    log: Log
    pictures: Pictures
    evaluation: Evaluation | None
    device: torch.device

    def set_rate(self) -> None:
        """Have the next iteration's update take its rate."""
        self.step.update.set_rate(self.schedule.rate(self.state.iterations))


@contextmanager
def open_run(
    given: dict[str, Any],
    reporter: Reporter,
    recipe: Recipe | None = None,
    *,
    rate_factor: float | None = None,
) -> Iterator[Run]:
    """Prepare a run, and clean up after it.

    Args:
        given: What the user set, by section and key.
        reporter: Is told what was chosen, and warned.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        rate_factor: What the learning rate is multiplied with after rollbacks; None: as saved.

    Raises:
        ValueError: A setting, a folder or the model folder is not usable; one line says why.
    """
    config = from_dict(given)
    if not config.save.model_dir:
        raise ValueError("no model folder given: add --model-dir FOLDER")
    with ExitStack() as stack:
        folder = stack.enter_context(
            ModelFolder(
                expanded(config.save.model_dir),
                trainer=given.get("model", {}).get("trainer"),
                keep_generations=config.save.keep_generations,
            )
        )
        saved = folder.load()
        plan = stages.find_place(saved.state if saved else None, recipe)
        config = _config_of(saved, stages.settings_of_stage(given, plan), reporter)
        stages.check_figures(plan, config)
        _tell_warnings(folder, reporter)
        if saved and plan and plan.is_entered and plan.stage.snapshot:
            path = folder.snapshot()
            if path is not None:  # else a warning says why
                reporter.snapshot(iteration=saved.state["iterations"], path=path)
        _tell_warnings(folder, reporter)
        config = _resolved(config)
        device = choose_device(config.train.device, reporter.warning)
        try:
            with reporting_crashes(folder.path, config, reporter):
                with refusals_told():
                    run = _prepare(
                        config, saved, plan, rate_factor, folder, reporter, stack, device
                    )
                yield run
        except torch.OutOfMemoryError as error:
            precision = precisions.resolve(config.precision.mode, device)
            raise ValueError(memory.advice(config, precision, free_bytes(device))) from error


def _tell_warnings(folder: ModelFolder, reporter: Reporter) -> None:
    """Tell what the model folder has to say."""
    while folder.warnings:
        reporter.warning(folder.warnings.pop(0))


def _config_of(saved: Generation | None, given: dict[str, Any], reporter: Reporter) -> Config:
    return from_dict(given) if saved is None else resumed_config(saved, given, reporter)


def resumed_config(saved: Generation, given: dict[str, Any], reporter: Reporter) -> Config:
    """The settings of a resumed run: the model's own where locked, the user's where free."""
    if saved.config is None:
        raise ValueError(
            f"{saved.path} holds no config.toml, so its settings are unknown; put it back, or "
            "choose another --model-dir"
        )
    given = _with_absolute_paths(given)  # as they were saved, so that only a change is told
    begun_with = {"model": {"load_weights": ""}}
    if given.get("model", {}).get("load_weights"):
        reporter.warning(
            "model.load_weights does nothing here: it is for a new model, and this one resumes"
        )
    given = merge(given, begun_with)
    optimizer = settle_rate(saved, from_dict(saved.config), given.get("optimizer", {}), reporter)
    config, changes, refusals = resolve_resume(
        merge(saved.config, begun_with), merge(given, {"optimizer": optimizer})
    )
    if refusals:
        raise ValueError(refusals[0])
    for change in changes:
        reporter.warning(change)
    return config


def settings_of(
    given: dict[str, Any], reporter: Reporter, recipe: Recipe | None = None
) -> tuple[Config, Plan | None]:
    """The settings and the stage that training would have: of the model where there is one, which
    is only read.

    Raises:
        ValueError: As training would raise it.
    """
    saved, model_dir = None, from_dict(given).save.model_dir
    path = expanded(model_dir)
    if model_dir and (path / "generations").is_dir():
        trainer = given.get("model", {}).get("trainer")
        with ModelFolder(path, trainer=trainer, read_only=True) as folder:
            saved = folder.load()
    plan = stages.find_place(saved.state if saved else None, recipe)
    config = _config_of(saved, stages.settings_of_stage(given, plan), reporter)
    stages.check_figures(plan, config)
    return config, plan


def _prepare(
    config: Config,
    saved: Generation | None,
    plan: Plan | None,
    rate_factor: float | None,
    folder: ModelFolder,
    reporter: Reporter,
    stack: ExitStack,
    device: torch.device,
) -> Run:
    window = _open_window(config, stack)
    precision = precisions.resolve(config.precision.mode, device)
    overlap.choose(config.optimizer, precision)  # refuses what cannot be before faces are decoded
    engine_name, engine_why = engines.choose(config.train.engine, device)
    options = models.options_of(config.model.trainer, config.model.options)
    family = models.family(config.model.trainer)
    input_px, output_px = family.sizes(options)
    loss = Loss(config.loss, output_px, device)
    num_threads = thread_count(config.data.num_threads)
    on_gpu = device.type == "cuda"
    is_aligned = _is_on(config.precision.align_channels, on_gpu)
    if saved:  # before there is memory for weights that its settings may be far too large for
        with _fitting(saved):
            own = models.meta_model(config.model.trainer, **model_settings(config))
            check_weights(saved.model, own.state_dict())
    model, loaded = _make_model(config, is_new=saved is None, is_aligned=is_aligned)
    faces = _open_faces(config, max(input_px, *output_px), device, reporter)
    config = _with_batch_size(config, faces, precision, device)
    if plan:
        _check_later_stages(plan, config, faces, output_px, device)
    is_worth = on_gpu and overlap.pays(work_of(meta_model(config), config.train.batch_size))
    kind_of_update = overlap.choose(config.optimizer, precision, is_worth=is_worth)
    model.to(device)
    _set_libraries(precision, device, deterministic=config.train.deterministic)
    update = kind_of_update(model, config.optimizer, precision)
    state = _restore(config, saved, update)
    _settle_state(state, saved, plan, rate_factor, config)
    schedule = begin_schedule(state, config, plan.rate_factor if plan else 1.0)
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
        input_channels=MULTIPLE if is_aligned else 3,
        landmarks=_landmarks(config, faces, device, reporter),
    )
    stack.callback(feed.close)
    pictures = Pictures(
        config,
        model,
        precision,
        loader=PreviewLoader(
            config.data,
            has_mask=config.loss.penalized_mask_loss or config.loss.learn_mask,
            input_px=input_px,
            output_px=output_px[-1],
            num_threads=num_threads,
        ),
        faces={side: opened.trained_on for side, opened in faces.items()},
        folder=folder.path,
        window=window,
        warn=reporter.warning,
    )
    evaluation = open_evaluation(
        config,
        faces,
        input_px=input_px,
        output_px=output_px,
        num_threads=num_threads,
        warn=reporter.warning,
    )
    streams, is_small = config.train.decoder_streams, config.train.batch_size <= 16
    two_streams = streams == "two" or (streams == "auto" and is_small)
    # torch.compile knows no streams.
    side_stream = two_streams and on_gpu and engine_name != "compile"
    step = TrainStep(
        model,
        loss,
        update,
        LossRing(loss.num_values, device),
        side_stream=torch.cuda.Stream(device) if side_stream else None,
    )
    noise_seed = config.train.seed if model.is_noisy else None
    engine = engines.make(engine_name, step, feed, reporter.warning, noise_seed=noise_seed)
    folder.write_config(config)
    saver = stack.enter_context(Saver(folder))
    first_step = state.iterations + 1
    log = _open_log(config, folder.path, session.number, first_step, reporter)
    stack.callback(_close_log, log, reporter)
    events = folder.path / "logs" / f"session_{session.number}" / EVENTS
    reporter.keep_in(
        events=events if config.save.logs else None,
        log_file=Path(config.log.file) if config.log.file else None,
        level=config.log.level,
    )
    chosen = engine.name == engine_name
    engine_fact = f"{engine.name} ({engine_why if chosen else engine_name + ' cannot run here'})"
    reporter.start(
        _facts(config, state, saved, stores, update, precision, engine_fact, device, num_threads)
        | {"learning_rate": str(schedule)}
        | loaded
        | ({"stage": str(plan)} if plan else {})
        | _held_out_fact(faces, evaluation)
        | _frozen_fact(config, model, update)
    )
    return Run(
        config=config,
        state=state,
        model=model,
        step=step,
        engine=engine,
        precision=precision,
        schedule=schedule,
        feed=feed,
        plan=plan,
        folder=folder,
        saver=saver,
        log=log,
        pictures=pictures,
        evaluation=evaluation,
        device=device,
    )


def _open_log(
    config: Config, model_dir: Path, session: int, first_step: int, reporter: Reporter
) -> Log:
    """Where this session's scalars go; nowhere, and told, where the disk refuses."""
    try:
        return open_log(model_dir, session, enabled=config.save.logs, first_step=first_step)
    except LogError as error:
        reporter.warning(f"{error}; no events are written in this session")
        return NullLog()


def _close_log(log: Log, reporter: Reporter) -> None:
    try:
        log.close()
    except LogError as error:
        reporter.warning(f"{error}; the last events are lost")


def _settle_state(
    state: TrainingState,
    saved: Generation | None,
    plan: Plan | None,
    rate_factor: float | None,
    config: Config,
) -> None:
    """Have the state be that of this session: of its stage and losses, and after a rollback."""
    if plan is None:
        state.parts.pop(stages.PART, None)  # the recipe was left
    elif plan.is_entered and SCHEDULE_SETTINGS & plan.stage.set.get("optimizer", {}).keys():
        state.parts.pop(SCHEDULE, None)  # the same one again, from its beginning
    before = from_dict(saved.config) if saved and saved.config else config
    if before.loss != config.loss:
        state.lowest_mean_loss = None  # of other losses: no later one compares with it
    divergence.settle(state, before, config)
    if rate_factor is not None:
        state.parts[ROLLBACK] = {"rate_factor": rate_factor}
    elif before.optimizer.learning_rate != config.optimizer.learning_rate:
        state.parts.pop(ROLLBACK, None)  # the user has chosen another rate


_PATHS = {
    "model": ("load_weights",),
    "data": ("input_a", "input_b"),
    "loss": ("lpips_weights",),
    "log": ("file",),
    "evaluate": ("held_out_a", "held_out_b", "landmark_model", "embedding_model"),
    "preview": ("write_image", "timelapse_input_a", "timelapse_input_b", "timelapse_output"),
}
"""Settings that are paths, by section, less those of the model folder itself."""


def _resolved(config: Config) -> Config:
    """All options of the family written out; paths absolute, to resume from anywhere."""
    for side in SIDES:
        if not getattr(config.data, f"input_{side}"):
            raise ValueError(f"no faces for side {side.upper()}: add --input-{side} FOLDER")
    preview = config.preview
    if bool(preview.timelapse_input_a) != bool(preview.timelapse_input_b):
        given, lacks = ("a", "b") if preview.timelapse_input_a else ("b", "a")
        raise ValueError(
            f"a time-lapse shows both sides, and preview.timelapse_input_{lacks} is not set; add "
            f"--timelapse-input-{lacks} FOLDER, or leave --timelapse-input-{given} out"
        )
    options = models.options_of(config.model.trainer, config.model.options)
    written_out = {"model": {"options": dataclasses.asdict(options)}}
    return from_dict(merge(_with_absolute_paths(to_dict(config)), written_out))


def _with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """The same settings, by section and key, with every path that is given absolute."""
    paths = {
        section: {
            name: os.path.abspath(expanded(values[section][name]))
            for name in names
            if values.get(section, {}).get(name)
        }
        for section, names in _PATHS.items()
    }
    return merge(values, {section: found for section, found in paths.items() if found})


def _open_window(config: Config, stack: ExitStack) -> PreviewWindow | None:
    """Where the preview is shown, if it is asked for."""
    if not config.preview.window:
        return None
    window = PreviewWindow(config.preview.preview_scale)
    stack.callback(window.close)
    return window


def _make_model(
    config: Config, *, is_new: bool, is_aligned: bool
) -> tuple[Autoencoder, dict[str, str]]:
    """The model on the CPU, and what is to be told of weights that it began with."""
    seed = config.train.seed if is_new else None  # else all weights come from the checkpoint
    options = models.options_of(config.model.trainer, config.model.options)
    source = config.model.load_weights
    # An encoder that comes from another model needs no file of pretrained weights.
    pretrained = not (source and "encoder" in getattr(options, "load_layers", ()))
    model = models.build(
        config.model.trainer, seed=seed, pretrained=pretrained, **model_settings(config)
    )
    loaded = {}
    if is_new and source:
        loaded["loaded"] = load_weights(model, Path(source))
    if is_aligned:
        model.align(MULTIPLE)
    if config.train.freeze_weights:
        model.freeze()
    return model, loaded


def _open_faces(
    config: Config, size_px: int, device: torch.device, reporter: Reporter
) -> dict[str, SideFaces]:
    """Both sides' faces; tells of what had to be left out."""
    uses_mask = config.loss.penalized_mask_loss or config.loss.learn_mask
    data = config.data if uses_mask else dataclasses.replace(config.data, mask_type="none")
    model_dir = expanded(config.save.model_dir)
    store_dir = expanded(data.store_dir) if data.store_dir else model_dir / "faces"
    faces = open_sides(
        data,
        config.evaluate,
        size_px,
        store_dir=store_dir,
        device=device,
        progress=reporter.progress,
    )
    for opened in faces.values():
        for files in opened.left_out:
            names = [file.path.name for file in files[:_NUM_NAMED]]
            reporter.warning(skipped(files), count=len(files), files=names)
    for warning in warnings_of(faces, config.loss):
        reporter.warning(warning)
    return faces


def _with_batch_size(
    config: Config, faces: dict[str, SideFaces], precision: Precision, device: torch.device
) -> Config:
    """The settings with a batch size that each side can fill: as set, or the most that fits."""
    _check_batch_size(config, faces)
    if config.train.batch_size:
        return config
    free = free_bytes(device)
    largest = memory.footprint(config, precision).largest_batch(free)
    if not largest:
        raise ValueError(memory.advice(with_batch_size(config, 4), precision, free))
    return with_batch_size(config, min(largest, *(f.store.num_faces for f in faces.values())))


def _check_batch_size(config: Config, faces: dict[str, SideFaces]) -> None:
    batch_size = config.train.batch_size
    for side, opened in faces.items():
        if batch_size > opened.store.num_faces:
            raise ValueError(
                f"train.batch_size is {batch_size}, but side {side.upper()} has "
                f"{opened.store.num_faces} faces; use --batch-size {opened.store.num_faces} or "
                "less, or add faces"
            )


def _check_later_stages(
    plan: Plan,
    config: Config,
    faces: dict[str, SideFaces],
    output_px: Sequence[int],
    device: torch.device,
) -> None:
    """Refuse today what would end the run when its stage begins, days later."""
    for number in range(plan.place.stage + 1, len(plan.recipe.stages)):
        try:
            later = from_dict(merge(to_dict(config), plan.recipe.settings_of(number)))
            _check_batch_size(later, faces)
            engines.choose(later.train.engine, device)
            overlap.choose(later.optimizer, precisions.resolve(later.precision.mode, device))
            if later.loss != config.loss:
                Loss(later.loss, output_px, "cpu")
        except ValueError as error:
            raise ValueError(f"stage {plan.recipe.stages[number].name}: {error}") from error


def with_batch_size(config: Config, batch_size: int) -> Config:
    """The same settings with another batch size."""
    return from_dict(merge(to_dict(config), {"train": {"batch_size": batch_size}}))


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that this process may use for training."""
    if device.type != "cuda":
        return available_host_bytes()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


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


def _restore(config: Config, saved: Generation | None, update: Update) -> TrainingState:
    """A new state, or the saved one with weights and optimizer put back."""
    if saved is None:
        return TrainingState(trainer=config.model.trainer)
    with _fitting(saved):
        update.load_weights(saved.model)
        if saved.optimizer is not None:
            update.load(saved.optimizer)
    state = TrainingState.from_dict(saved.state)
    measured_at(state)  # what is not valid is refused now, and not at the first save
    return state


@contextmanager
def _fitting(saved: Generation) -> Iterator[None]:
    """Name the save, and the way to another, where its tensors are not those of the model."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{saved.path} does not fit this model: {error}; `mien model restore` goes back to "
            "another save"
        ) from error


def _is_on(setting: str, automatic: bool) -> bool:
    return setting == "on" or (setting == "auto" and automatic)


def _set_libraries(precision: Precision, device: torch.device, *, deterministic: bool) -> None:
    """How CUDA's libraries are to work in this process, and from when memory is measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    precision.apply()
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _facts(
    config: Config,
    state: TrainingState,
    saved: Generation | None,
    stores: dict[str, FaceStore],
    update: Update,
    precision: Precision,
    engine: str,
    device: torch.device,
    num_threads: int,
) -> dict[str, Any]:
    """The start-up lines: what runs, and which path each part takes."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    parameters = update.num_parameters / 1e6
    begin = f"resumes at iteration {state.iterations}" if saved else "is new"
    facts = {
        "mien": __version__,
        "model": f"{config.model.trainer} ({parameters:.1f} M parameters) in "
        f"{config.save.model_dir} {begin}",
        "device": f"{name}, {num_threads} CPU threads",
        "precision": f"{precision.name} ({precision.why})",
        "engine": engine,
        "augment": f"libmien, {'CUDA' if on_gpu else 'C++ threads'}",
    }
    for side, store in stores.items():
        path = getattr(config.data, f"input_{side}")
        facts[f"faces_{side}"] = f"{store.num_faces} of {path}; {store.backend}; {store.why}"
    return facts


def _held_out_fact(faces: dict[str, SideFaces], evaluation: Evaluation | None) -> dict[str, str]:
    """How many faces are never trained on, where there are any."""
    if evaluation is None:
        return {}
    told = ", ".join(
        f"{len(opened.held_out.faces)} of {side.upper()}" for side, opened in faces.items()
    )
    measured = " and ".join(str(len(each.inputs_nssc)) for each in evaluation.faces.values())
    return {"held_out": f"{told}, never trained on; {measured} of them measured at every save"}


def _frozen_fact(config: Config, model: Autoencoder, update: Update) -> dict[str, str]:
    """What is left as it is, where that was asked for."""
    if not config.train.freeze_weights:
        return {}
    if not model.frozen:
        return {"frozen": f"nothing: {config.model.trainer} names no layers to freeze"}
    parameters = update.frozen.num_parameters / 1e6
    names = ", ".join(model.frozen)
    return {
        "frozen": f"{parameters:.1f} M parameters of {names}, "
        "until --set train.freeze_weights=false"
    }
