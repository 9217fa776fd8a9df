"""Prepare a run: from settings to all that its loop needs, checked in the order a user would."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ... import models
from ...kernels.augment import Landmarks
from ...models.alignment import MULTIPLE
from ...models.autoencoder import Autoencoder
from .. import precision as precisions
from ..checkpoint.format import Generation
from ..checkpoint.known_paths import KnownPaths
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.saver import Saver
from ..checkpoint.state import TrainingState
from ..config import Config, from_dict, merge, model_settings, to_dict
from ..config.path_settings import paths_in
from ..config.recipes import Recipe
from ..console.crash_report import reporting_crashes
from ..console.reporter import EVENTS, Log, LogError, Notice, NullLog, Reporter, open_log
from ..data.decode import thread_count
from ..data.feed import Feed
from ..data.landmarks import landmarks_of_sides
from ..data.sides import SIDES, SideFaces, open_sides, warnings_of
from ..data.store import available_host_bytes
from ..evaluate.evaluate import Evaluation, measured_at, open_evaluation
from ..faces.folder import skipped
from ..history.history import BATCH_SIZE_TAG
from ..losses.weighted import Loss
from ..optim import fused_dense, overlap
from ..optim.lr_schedule import ROLLBACK, SCHEDULE, SCHEDULE_SETTINGS, Schedule, begin_schedule
from ..optim.optimizer import Update, check_weights
from ..precision import Precision
from ..preview.faces import PreviewLoader
from ..preview.previewer import Pictures
from ..preview.window import PreviewWindow
from ..system.paths import refusals_told
from . import batch_size as batch_sizes
from . import divergence, memory
from . import engine as engines
from . import recipe_progress as stages
from .build import build_model, build_step, has_aligned_channels
from .devices import choose_device
from .engine import Engine
from .recipe_progress import Plan
from .resolve import Overrides, Resolved, resolve
from .startup import start_report
from .step import TrainStep

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
    overrides: Overrides,
    reporter: Reporter,
    recipe: Recipe | None = None,
    *,
    rate_factor: float | None = None,
) -> Iterator[Run]:
    """Prepare a run, and clean up after it.

    Args:
        overrides: What the user set.
        reporter: Is told what was chosen, and warned.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        rate_factor: What the learning rate is multiplied with after rollbacks; None: as saved.

    Raises:
        ValueError: A setting, a folder or the model folder is not usable; one line says why.
    """
    model_dir = overrides.model_dir
    if model_dir is None:
        raise ValueError("no model folder given: add --model-dir FOLDER")
    with ExitStack() as stack:
        folder = stack.enter_context(ModelFolder(model_dir, trainer=overrides.trainer))
        saved = folder.load()
        resolved = resolve(overrides, saved, recipe, _known_paths(folder, saved).trust)
        folder.keep_generations = resolved.config.save.keep_generations
        tell(reporter, resolved.notices)
        _tell_warnings(folder, reporter)
        plan = resolved.plan
        if saved and plan and plan.is_entered and plan.stage.snapshot:
            path = folder.snapshot()
            if path is not None:  # else a warning says why
                reporter.snapshot(iteration=saved.state["iterations"], path=path)
        _tell_warnings(folder, reporter)
        with _ready(resolved, saved, rate_factor, folder, reporter, stack) as run:
            _remember_paths(resolved, run, reporter)
            yield run


@contextmanager
def open_rehearsal(
    overrides: Overrides, reporter: Reporter, recipe: Recipe | None, scratch: Path
) -> Iterator[Run]:
    """The run that `open_run` would prepare, of the same model, which is only read: whatever a run
    writes goes to an empty folder.

    Raises:
        ValueError: As `open_run` would raise it.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(ModelFolder(scratch / "model"))
        saved, resolved = _read_model(overrides, recipe)
        tell(reporter, resolved.notices)
        config = resolved.config
        _check_paths(config, is_new=saved is None)
        decoded = Path(config.data.store_dir or Path(config.save.model_dir or scratch, "faces"))
        trial = {
            "data": {"store_dir": ""},
            "save": {"logs": False},
            "log": {"file": ""},
            "preview": {
                **{"window": False, "write_image": ""},
                **dict.fromkeys(("timelapse_input_a", "timelapse_input_b", "timelapse_output"), ""),
            },
        }
        resolved = replace(resolved, config=from_dict(merge(to_dict(config), trial)))
        with _ready(resolved, saved, None, folder, reporter, stack, decoded) as run:
            yield run


def settings_of(overrides: Overrides, recipe: Recipe | None = None) -> Resolved:
    """The settings and the stage that training would have: of the model where there is one, which
    is only read.

    Raises:
        ValueError: As training would raise it.
    """
    return _read_model(overrides, recipe)[1]


def tell(reporter: Reporter, notices: list[Notice]) -> None:
    """Tell what there is to tell of the settings."""
    for notice in notices:
        (reporter.warning if notice.is_warning else reporter.notice)(notice.text)


def _read_model(overrides: Overrides, recipe: Recipe | None) -> tuple[Generation | None, Resolved]:
    """The model in the folder that is given, where there is one, and the settings with it."""
    model_dir = overrides.model_dir
    if model_dir is None or not (model_dir / "generations").is_dir():
        return None, resolve(overrides, None, recipe)
    with ModelFolder(model_dir, trainer=overrides.trainer, read_only=True) as folder:
        saved = folder.load()
        resolved = resolve(overrides, saved, recipe, _known_paths(folder, saved).trust)
        damage = [Notice(text, is_warning=True) for text in folder.warnings]
    return saved, replace(resolved, notices=[*damage, *resolved.notices])


def _known_paths(folder: ModelFolder, saved: Generation | None) -> KnownPaths:
    """Paths of the model's settings that count here without being set again."""
    return KnownPaths(folder.path, str(saved.state.get("run_id")) if saved else "")


def _remember_paths(resolved: Resolved, run: Run, reporter: Reporter) -> None:
    """Have the paths of this run count at later starts without being given again."""
    pairs = [
        (".".join(place), path)
        for config in (resolved.kept, resolved.config)
        for place, path in paths_in(to_dict(config), config.model.trainer).items()
    ]
    problem = KnownPaths(run.folder.path, run.state.run_id).remember(pairs)
    if problem:
        reporter.notice(
            f"paths that lie outside the model folder cannot be remembered ({problem}); the next "
            "start will ask for them again"
        )


def _tell_warnings(folder: ModelFolder, reporter: Reporter) -> None:
    """Tell what the model folder has to say."""
    while folder.warnings:
        reporter.warning(folder.warnings.pop(0))


@contextmanager
def _ready(
    resolved: Resolved,
    saved: Generation | None,
    rate_factor: float | None,
    folder: ModelFolder,
    reporter: Reporter,
    stack: ExitStack,
    earlier_faces: Path | None = None,
) -> Iterator[Run]:
    """The run, and what is told where it fails."""
    config = resolved.config
    _check_paths(config, is_new=saved is None)
    device = choose_device(config.train.device, reporter.warning)
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    try:
        with reporting_crashes(folder.path, config, reporter):
            with refusals_told():
                run = _prepare(
                    resolved, saved, rate_factor, folder, earlier_faces, reporter, stack, device
                )
            yield run
    except torch.OutOfMemoryError as error:
        precision = precisions.resolve(config.precision.mode, device)
        raise ValueError(memory.advice(config, precision, free_bytes(device))) from error


def _prepare(
    resolved: Resolved,
    saved: Generation | None,
    rate_factor: float | None,
    folder: ModelFolder,
    earlier_faces: Path | None,
    reporter: Reporter,
    stack: ExitStack,
    device: torch.device,
) -> Run:
    config, plan = resolved.config, resolved.plan
    window = _open_window(config, stack)
    precision = precisions.resolve(config.precision.mode, device)
    overlap.choose(config.optimizer, precision)  # refuses what cannot be before faces are decoded
    engine_name, engine_why = engines.choose(config.train.engine, device)
    fused_dense.check(config.optimizer, engine_name)
    input_px, output_px = _sizes(config)
    loss = Loss(config.loss, output_px, device)
    if saved:  # before there is memory for weights that its settings may be far too large for
        with _fitting(saved):
            own = models.meta_model(config.model.trainer, **model_settings(config))
            check_weights(saved.model, own.state_dict())
    model, loaded = build_model(config, device, is_new=saved is None)
    size_px, faces_dir = max(input_px, *output_px), folder.path / "faces"
    faces = _open_faces(config, size_px, faces_dir, earlier_faces, device, reporter)
    num_faces = {side: opened.store.num_faces for side, opened in faces.items()}
    batch = batch_sizes.choose(config, num_faces, precision, lambda: free_bytes(device))
    as_set, config = config, batch_sizes.with_batch_size(config, batch.size)
    if plan:
        _check_later_stages(plan, config, num_faces, output_px, device)
    _set_libraries(device, deterministic=config.train.deterministic)
    step = build_step(config, model, device, loss=loss)
    state = _restore(config, saved, step.update)
    _settle_state(state, resolved.before or config, plan, rate_factor, config)
    schedule = begin_schedule(state, config, plan.rate_factor if plan else 1.0)
    _report_batch_size(state, batch, reporter)
    state.begin_session(as_set, batch_size=batch.size)
    feed = _open_feed(config, faces, device, precision, reporter)
    stack.callback(feed.close)
    pictures, evaluation = _open_pictures(config, model, faces, precision, folder, window, reporter)
    noise_seed = config.train.seed if model.is_noisy else None
    engine = engines.make(engine_name, step, feed, reporter.warning, noise_seed=noise_seed)
    folder.write_config(resolved.kept)
    run = Run(
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
        saver=stack.enter_context(Saver(folder)),
        log=_open_logs(config, folder.path, state, reporter, stack),
        pictures=pictures,
        evaluation=evaluation,
        device=device,
    )
    engine_why = engine_why if engine.name == engine_name else f"{engine_name} cannot run here"
    threads = thread_count(config.data.num_threads)
    reporter.start(*start_report(run, faces, batch, engine_why, threads, loaded))
    return run


def _sizes(config: Config) -> tuple[int, tuple[int, ...]]:
    """Edges of the model's input and outputs, in px."""
    options = models.options_of(config.model.trainer, config.model.options)
    return models.family(config.model.trainer).sizes(options)


def _report_batch_size(
    state: TrainingState, batch: batch_sizes.BatchSize, reporter: Reporter
) -> None:
    """Say where auto has chosen another batch size than the last session's."""
    if batch.bound and state.sessions and state.session.batch_size != batch.size:
        before = state.session.batch_size
        reporter.notice(f"auto has chosen batch size {batch.size}; the last session had {before}")


def _open_feed(
    config: Config,
    faces: dict[str, SideFaces],
    device: torch.device,
    precision: Precision,
    reporter: Reporter,
) -> Feed:
    """Open the feed, from which the batches come."""
    input_px, output_px = _sizes(config)
    return Feed(
        {side: opened.store for side, opened in faces.items()},
        config,
        input_px=input_px,
        output_px=output_px,
        device=device,
        dtype=precision.compute,
        num_threads=thread_count(config.data.num_threads),
        input_channels=MULTIPLE if has_aligned_channels(config, device) else 3,
        landmarks=_landmarks(config, faces, device, reporter),
    )


def _open_pictures(
    config: Config,
    model: Autoencoder,
    faces: dict[str, SideFaces],
    precision: Precision,
    folder: ModelFolder,
    window: PreviewWindow | None,
    reporter: Reporter,
) -> tuple[Pictures, Evaluation | None]:
    """The preview, and where faces are held out the measuring of the model by them."""
    input_px, output_px = _sizes(config)
    num_threads = thread_count(config.data.num_threads)
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
    return pictures, evaluation


def _open_logs(
    config: Config,
    model_dir: Path,
    state: TrainingState,
    reporter: Reporter,
    stack: ExitStack,
) -> Log:
    """Open this session's log; its events and lines are kept in their files from now on."""
    log = _open_log(config, model_dir, state, reporter)
    stack.callback(_close_log, log, reporter)
    events = model_dir / "logs" / f"session_{state.session.number}" / EVENTS
    reporter.keep_in(
        events=events if config.save.logs else None,
        log_file=Path(config.log.file) if config.log.file else None,
        level=config.log.level,
    )
    return log


def _open_log(config: Config, model_dir: Path, state: TrainingState, reporter: Reporter) -> Log:
    """Open the log of scalars; where the disk refuses, a warning is given and none are kept."""
    number, done = state.session.number, state.iterations
    try:
        log = open_log(model_dir, number, enabled=config.save.logs, first_step=done + 1)
        log.scalars({BATCH_SIZE_TAG: state.session.batch_size}, done)
    except LogError as error:
        reporter.warning(f"{error}; no events are written in this session")
        return NullLog()
    return log


def _close_log(log: Log, reporter: Reporter) -> None:
    try:
        log.close()
    except LogError as error:
        reporter.warning(f"{error}; the last events are lost")


def _settle_state(
    state: TrainingState,
    before: Config,
    plan: Plan | None,
    rate_factor: float | None,
    config: Config,
) -> None:
    """Have the state be that of this session: of its stage and losses, and after a rollback."""
    if plan is None:
        state.parts.pop(stages.PART, None)  # the recipe was left
    elif plan.is_entered and SCHEDULE_SETTINGS & plan.stage.set.get("optimizer", {}).keys():
        state.parts.pop(SCHEDULE, None)  # the same one again, from its beginning
    if before.loss != config.loss:
        state.lowest_mean_loss = None  # of other losses: no later one compares with it
    divergence.settle(state, before, config)
    if rate_factor is not None:
        state.parts[ROLLBACK] = {"rate_factor": rate_factor}
    elif before.optimizer.learning_rate != config.optimizer.learning_rate:
        state.parts.pop(ROLLBACK, None)  # the user has chosen another rate


def _check_paths(config: Config, *, is_new: bool) -> None:
    """Refuse a run without faces, and half a time-lapse."""
    for side in SIDES:
        if not getattr(config.data, f"input_{side}"):
            where = f"; {config.save.model_dir} holds no model yet" if is_new else ""
            raise ValueError(f"no faces for side {side.upper()}: add --input-{side} FOLDER{where}")
    preview = config.preview
    if bool(preview.timelapse_input_a) != bool(preview.timelapse_input_b):
        given, lacks = ("a", "b") if preview.timelapse_input_a else ("b", "a")
        raise ValueError(
            f"a time-lapse shows both sides, and preview.timelapse_input_{lacks} is not set; add "
            f"--timelapse-input-{lacks} FOLDER, or leave --timelapse-input-{given} out"
        )


def _open_window(config: Config, stack: ExitStack) -> PreviewWindow | None:
    """Open the window that shows the preview, if it is asked for."""
    if not config.preview.window:
        return None
    window = PreviewWindow(config.preview.preview_scale)
    stack.callback(window.close)
    return window


def _open_faces(
    config: Config,
    size_px: int,
    faces_dir: Path,
    earlier_dir: Path | None,
    device: torch.device,
    reporter: Reporter,
) -> dict[str, SideFaces]:
    """Open both sides' faces, and report what had to be left out."""
    uses_mask = config.loss.penalized_mask_loss or config.loss.learn_mask
    data = config.data if uses_mask else dataclasses.replace(config.data, mask_type="none")
    faces = open_sides(
        data,
        config.evaluate,
        size_px,
        store_dir=Path(data.store_dir or faces_dir),
        earlier_dir=earlier_dir,
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


def _check_later_stages(
    plan: Plan,
    config: Config,
    num_faces: dict[str, int],
    output_px: Sequence[int],
    device: torch.device,
) -> None:
    """Refuse today what would end the run when its stage begins, days later."""
    for number in range(plan.place.stage + 1, len(plan.recipe.stages)):
        try:
            later = from_dict(merge(to_dict(config), plan.recipe.settings_of(number)))
            batch_sizes.check(later, num_faces)
            engine_name, _ = engines.choose(later.train.engine, device)
            fused_dense.check(later.optimizer, engine_name)
            overlap.choose(later.optimizer, precisions.resolve(later.precision.mode, device))
            if later.loss != config.loss:
                Loss(later.loss, output_px, "cpu")
        except ValueError as error:
            raise ValueError(f"stage {plan.recipe.stages[number].name}: {error}") from error


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


def _set_libraries(device: torch.device, *, deterministic: bool) -> None:
    """How CUDA's libraries are to work in this process, and from when memory is measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
