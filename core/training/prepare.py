"""Preparation of a session: from the settings to all that a trainer needs.

What is wrong is found in the order in which a user would look: settings, folders, faces, memory.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import precision as precisions
from ..checkpoint.format import Generation
from ..checkpoint.generations import FOLDER
from ..checkpoint.known_paths import KnownPaths
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.saver import Saver
from ..checkpoint.state import TrainingState
from ..config import Config, from_dict, merge, to_dict
from ..config.path_settings import paths_in
from ..config.recipes import Recipe
from ..console.crash_report import reporting_crashes
from ..console.reporter import Notice, Reporter
from ..data.decode import thread_count
from ..losses.weighted import Loss
from ..optim.lr_schedule import Schedule, begin_schedule
from ..optim.optimizer import Update
from ..system.paths import refusals_told
from . import batch_size as batch_sizes
from . import engine as engines
from . import memory
from .build import build_model, build_step, check_step, sizes_of
from .devices import choose_device, free_bytes
from .outputs import open_images, open_logs, open_window, report_warnings
from .recipe_progress import RecipeProgress
from .resolve import Overrides, Resolved, resolve
from .resume import check_fit, restore, settle_state
from .startup import start_report
from .training_data import check_folders, open_faces, open_feed
from .training_setup import TrainingSetup


@dataclass(frozen=True)
class _Start:
    """What a session starts from."""

    resolved: Resolved
    saved: Generation | None
    """Save to go on from; None: a new model."""

    folder: ModelFolder
    """Folder that is written to."""

    rate_factor: float | None = None
    """Factor of the learning rate after rollbacks; None: as saved."""

    decoded_faces: Path | None = None
    """Folder of decoded faces that is only read."""


@contextmanager
def open_setup(
    overrides: Overrides,
    reporter: Reporter,
    recipe: Recipe | None = None,
    *,
    rate_factor: float | None = None,
) -> Iterator[TrainingSetup]:
    """Open everything for a session of training, and close it afterwards.

    Args:
        overrides: What the user set.
        reporter: Reports what was chosen, and warns.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        rate_factor: What the learning rate is multiplied with after rollbacks; None: as saved.

    Raises:
        ValueError: A setting, a folder or the model folder is not usable; one line says why.
    """
    model_dir = overrides.model_dir
    if model_dir is None:
        raise ValueError("no model folder given: add --model-dir FOLDER")
    with ExitStack() as stack:
        # The lock first: what is read below must not change under another run.
        folder = stack.enter_context(ModelFolder(model_dir, trainer=overrides.trainer))
        saved = folder.load()
        resolved = resolve(overrides, saved, recipe, _known_paths(folder, saved).trust)
        # Known only now: the setting may be the model's own, which lies in the folder.
        folder.keep_generations = resolved.config.save.keep_generations
        report_notices(reporter, resolved.notices)
        report_warnings(folder, reporter)
        progress = resolved.progress
        # The end of the stage before is kept, since the next one may spoil it.
        if saved and progress and progress.is_entered and progress.stage.snapshot:
            path = folder.snapshot()
            if path is not None:  # else a warning says why
                reporter.snapshot(iteration=saved.state["iterations"], path=path)
        report_warnings(folder, reporter)
        start = _Start(resolved, saved, folder, rate_factor)
        with _built(start, reporter, stack) as setup:
            # At the end: paths of a start that was refused are not to be trusted later.
            _remember_paths(resolved, setup, reporter)
            yield setup


@contextmanager
def open_dry_run(
    overrides: Overrides, reporter: Reporter, recipe: Recipe | None, scratch: Path
) -> Iterator[TrainingSetup]:
    """Open what `open_setup` would, of the same model, which is only read.

    Args:
        overrides: What the user set.
        reporter: Reports what was chosen, and warns.
        recipe: Stages to train in.
        scratch: Empty folder, to which all goes that is written.

    Raises:
        ValueError: As `open_setup` would raise it.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(ModelFolder(scratch / "model"))
        saved, resolved = _read_model(overrides, recipe)
        report_notices(reporter, resolved.notices)
        config = resolved.config
        check_folders(config, is_new=saved is None)
        # Faces that training decoded are read; what a dry run decodes is thrown away with the rest.
        decoded = Path(config.data.store_dir or Path(config.save.model_dir or scratch, "faces"))
        without_outputs = {
            "data": {"store_dir": ""},
            "save": {"logs": False},
            "log": {"file": ""},
            "preview": {
                **{"window": False, "write_image": ""},
                **dict.fromkeys(("timelapse_input_a", "timelapse_input_b", "timelapse_output"), ""),
            },
        }
        resolved = replace(resolved, config=from_dict(merge(to_dict(config), without_outputs)))
        start = _Start(resolved, saved, folder, decoded_faces=decoded)
        with _built(start, reporter, stack) as setup:
            yield setup


def settings_of(overrides: Overrides, recipe: Recipe | None = None) -> Resolved:
    """The settings and the stage that training would have: of the model where there is one, which
    is only read.

    Raises:
        ValueError: As training would raise it.
    """
    return _read_model(overrides, recipe)[1]


def report_notices(reporter: Reporter, notices: list[Notice]) -> None:
    """Report what a user should know of the settings."""
    for notice in notices:
        (reporter.warning if notice.is_warning else reporter.notice)(notice.text)


def _read_model(overrides: Overrides, recipe: Recipe | None) -> tuple[Generation | None, Resolved]:
    """The model in the folder that is given, where there is one, and the settings with it."""
    model_dir = overrides.model_dir
    # Without `generations` there is no save, whatever else lies in the folder.
    if model_dir is None or not (model_dir / FOLDER).is_dir():
        return None, resolve(overrides, None, recipe)
    with ModelFolder(model_dir, trainer=overrides.trainer, read_only=True) as folder:
        saved = folder.load()
        resolved = resolve(overrides, saved, recipe, _known_paths(folder, saved).trust)
        damage = [Notice(text, is_warning=True) for text in folder.warnings]
    return saved, replace(resolved, notices=[*damage, *resolved.notices])


def _known_paths(folder: ModelFolder, saved: Generation | None) -> KnownPaths:
    """Paths of the model's settings that count here without being set again."""
    return KnownPaths(folder.path, str(saved.state.get("run_id")) if saved else "")


def _remember_paths(resolved: Resolved, setup: TrainingSetup, reporter: Reporter) -> None:
    """Have the paths of this session count at later starts without being given again."""
    pairs = [
        (".".join(place), path)
        # Both: paths by flags stand in the session's record, where `mien timelapse` meets them.
        for config in (resolved.kept, resolved.config)
        for place, path in paths_in(to_dict(config), config.model.trainer).items()
    ]
    problem = KnownPaths(setup.folder.path, setup.state.run_id).remember(pairs)
    if problem:
        reporter.notice(
            f"paths that lie outside the model folder cannot be remembered ({problem}); the next "
            "start will ask for them again"
        )


@contextmanager
def _built(start: _Start, reporter: Reporter, stack: ExitStack) -> Iterator[TrainingSetup]:
    """The parts of the session; what goes wrong with them, now or later, is put into words."""
    config = start.resolved.config
    check_folders(config, is_new=start.saved is None)
    device = choose_device(config.train.device, reporter.warning)
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    try:
        with reporting_crashes(start.folder.path, config, reporter):
            with refusals_told():
                setup = _build(start, device, reporter, stack)
            yield setup
    except torch.OutOfMemoryError as error:
        precision = precisions.resolve(config.precision.mode, device)
        raise ValueError(memory.advice(config, precision, free_bytes(device))) from error


def _build(
    start: _Start, device: torch.device, reporter: Reporter, stack: ExitStack
) -> TrainingSetup:
    """The parts of the session, built and opened.

    What can be refused at a glance is refused first: to decode the faces may take minutes.
    """
    config, progress, folder = start.resolved.config, start.resolved.progress, start.folder
    window = open_window(config, stack)
    precision = precisions.resolve(config.precision.mode, device)
    engine_name, engine_why = check_step(config, device)
    loss = Loss(config.loss, sizes_of(config)[1], device)
    if start.saved:
        # Before the model is made: settings of a far larger one would take the memory first.
        check_fit(config, start.saved)
    model, loaded = build_model(config, device, is_new=start.saved is None)
    faces = open_faces(
        config,
        device,
        reporter,
        faces_dir=folder.path / "faces",
        earlier_dir=start.decoded_faces,
    )
    num_faces = {side: opened.store.num_faces for side, opened in faces.items()}
    # Only now: auto takes what memory the faces have left.
    batch = batch_sizes.choose(config, num_faces, precision, lambda: free_bytes(device))
    config = batch_sizes.with_batch_size(config, batch.size)
    if progress:
        _check_later_stages(progress, config, num_faces, device)
    _set_libraries(device, deterministic=config.train.deterministic)
    step = build_step(config, model, device, loss=loss)
    state, schedule = _begin_session(start, config, step.update, batch, reporter)
    feed = open_feed(config, faces, device, precision, reporter)
    # Closed before the model folder, whose decoded faces its threads may be reading.
    stack.callback(feed.close)
    images, evaluation = open_images(
        config, model, faces, precision, folder, state.run_id, window, reporter
    )
    noise_seed = config.train.seed if model.is_noisy else None
    engine = engines.make(engine_name, step, feed, reporter.warning, noise_seed=noise_seed)
    # Late: a start that was refused has changed nothing in the model folder.
    folder.write_config(start.resolved.kept)
    setup = TrainingSetup(
        config=config,
        state=state,
        model=model,
        step=step,
        engine=engine,
        precision=precision,
        schedule=schedule,
        feed=feed,
        progress=progress,
        folder=folder,
        saver=stack.enter_context(Saver(folder)),
        log=open_logs(config, folder.path, state, reporter, stack),
        images=images,
        evaluation=evaluation,
        device=device,
    )
    engine_why = engine_why if engine.name == engine_name else f"{engine_name} cannot run here"
    threads = thread_count(config.data.num_threads)
    reporter.start(*start_report(setup, faces, batch, engine_why, threads, loaded))
    return setup


def _begin_session(
    start: _Start,
    config: Config,
    update: Update,
    batch: batch_sizes.BatchSize,
    reporter: Reporter,
) -> tuple[TrainingState, Schedule]:
    """The state of the session that begins, new or as saved, and its learning rates.

    ``config`` has the batch size that was chosen; the record of the session keeps the one that was
    set, so that auto chooses again at the next start.
    """
    resolved, progress = start.resolved, start.resolved.progress
    state = restore(config, start.saved, update)
    settle_state(state, resolved.before or config, progress, start.rate_factor, config)
    schedule = begin_schedule(state, config, progress.rate_factor if progress else 1.0)
    if batch.bound and state.sessions and state.session.batch_size != batch.size:
        before = state.session.batch_size
        reporter.notice(f"auto has chosen batch size {batch.size}; the last session had {before}")
    state.begin_session(resolved.config, batch_size=batch.size)
    return state, schedule


def _check_later_stages(
    progress: RecipeProgress, config: Config, num_faces: dict[str, int], device: torch.device
) -> None:
    """Refuse today what would end the training when its stage begins, days later."""
    for number in range(progress.stage_state.stage + 1, len(progress.recipe.stages)):
        try:
            later = from_dict(merge(to_dict(config), progress.recipe.settings_of(number)))
            batch_sizes.check(later, num_faces)
            check_step(later, device)
            if later.loss != config.loss:
                Loss(later.loss, sizes_of(config)[1], "cpu")
        except ValueError as error:
            raise ValueError(f"stage {progress.recipe.stages[number].name}: {error}") from error


def _set_libraries(device: torch.device, *, deterministic: bool) -> None:
    """How CUDA's libraries are to work in this process, and from when memory is measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Benchmarks choose by time, and another choice adds in another order.
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling memory that is written anyway costs time and makes no result more certain.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
