"""Preparation of a session: from the settings to all that a trainer needs.

What is wrong is found in the order in which a user would look: settings, folders, faces, memory.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ...models.autoencoder import Autoencoder
from .. import precision as precisions
from ..checkpoint.format import Generation
from ..checkpoint.generations import FOLDER
from ..checkpoint.known_paths import KnownPaths
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.saver import Saver
from ..checkpoint.state import TrainingState
from ..config import Config, from_dict, merge, to_dict
from ..config.path_settings import each_path, paths_in
from ..config.recipes import Recipe
from ..console.crash_report import reporting_crashes
from ..console.reporter import Notice, Reporter
from ..data.sides import SideFaces
from ..distribute.council import Crew
from ..distribute.failure import RankLost
from ..distribute.group import Group
from ..distribute.ranks import ALONE, Ranks
from ..losses.weighted import Loss
from ..optim.lr_schedule import Schedule, begin_schedule
from ..optim.optimizer import Update
from ..preview.window import PreviewWindow
from ..system.paths import refusals_told
from ..system.threads import thread_count
from . import batch_size as batch_sizes
from . import engine as engines
from . import memory
from .build import build_model, build_step, check_ranks, check_step, sizes_of
from .devices import choose_device, free_bytes
from .libraries import library_settings
from .outputs import open_images, open_logs, report_warnings
from .recipe_progress import RecipeProgress
from .resolve import Overrides, Resolved, resolve
from .resume import check_fit, restore, settle_state
from .shared_start import follow_start, notices_of_parts, share_start, with_own_threads
from .startup import Chosen, start_report
from .training_data import check_folders, open_faces, open_feed
from .training_setup import StepSetup, TrainingSetup
from .turns import in_turn


@dataclass(frozen=True)
class _Start:
    """What a session starts from."""

    resolved: Resolved
    saved: Generation | None
    """Save to go on from; None: a new model."""

    faces_dir: Path
    """Folder of decoded faces, which are kept for the next start."""

    rate_factor: float | None = None
    """Factor of the learning rate after rollbacks; None: as saved."""

    decoded_faces: Path | None = None
    """Folder of decoded faces that is only read."""

    crew: Crew | None = None
    """Ranks that train together; None: this process alone."""

    faces: dict[str, SideFaces] | None = None
    """Faces of the session before, where its settings of them still hold."""

    window: PreviewWindow | None = None
    """Window of the run, which is opened where the settings want one; None: none can be."""

    opened: dict[str, SideFaces] = field(default_factory=dict)
    """Faces of this session, once they are there."""

    @property
    def faces_gpu_bytes(self) -> int:
        """Memory of the GPU that the faces of this session take."""
        return sum(side.store.gpu_bytes for side in self.opened.values())

    @property
    def group(self) -> Group | None:
        """The connection with the other ranks."""
        return self.crew.group if self.crew else None

    @property
    def ranks(self) -> Ranks:
        """Place of this process."""
        return self.crew.group.ranks if self.crew else ALONE


@contextmanager
def open_setup(
    overrides: Overrides,
    reporter: Reporter,
    recipe: Recipe | None = None,
    *,
    rate_factor: float | None = None,
    crew: Crew | None = None,
    faces: dict[str, SideFaces] | None = None,
    window: PreviewWindow | None = None,
) -> Iterator[TrainingSetup]:
    """Open everything for a session of training, and close it afterwards.

    Where several ranks train, this is for the first one, and `open_follower` for the others.

    Args:
        overrides: What the user set.
        reporter: Reports what was chosen, and warns.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        rate_factor: What the learning rate is multiplied with after rollbacks; None: as saved.
        crew: Ranks that train together; None: this process alone.
        faces: Faces of the session before, where its settings of them still hold; None: to be read.
        window: Window of the run, which is opened where the settings want one; None: none can be.

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
        if crew is not None:
            share_start(crew.group, saved, resolved.config)
        faces_dir = folder.path / "faces"
        start = _Start(resolved, saved, faces_dir, rate_factor, None, crew, faces, window)
        with _built(start, folder, reporter, stack) as setup:
            # At the end: paths of a start that was refused are not to be trusted later.
            _remember_paths(resolved, setup, reporter)
            yield setup


@contextmanager
def open_follower(
    overrides: Overrides,
    reporter: Reporter,
    recipe: Recipe | None = None,
    *,
    rate_factor: float | None = None,
    crew: Crew,
) -> Iterator[StepSetup]:
    """Open what a rank trains with that another one leads; the model folder is left alone.

    Args:
        overrides: What the user set; the settings are those of the first rank.
        reporter: Warns of what is particular to this rank.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        rate_factor: What the learning rate is multiplied with after rollbacks; None: as saved.
        crew: Ranks that train together.

    Raises:
        ValueError: A setting or a folder is not usable on this rank; one line says why.
    """
    saved, config = follow_start(crew.group)
    # Which of the saved paths count, the first rank has decided.
    resolved = resolve(overrides, saved, recipe, lambda setting, path: True)
    resolved = replace(resolved, config=config)
    assert overrides.model_dir is not None  # the first rank refuses to start without
    faces_dir = overrides.model_dir / "faces"
    start = _Start(resolved, saved, faces_dir, rate_factor, crew=crew)
    with ExitStack() as stack:
        device = _device(start, reporter, stack)
        with _explaining_memory(start, device), refusals_told():
            setup, _ = _build_step(start, device, reporter, stack)
        # Outside of `refusals_told`: what the disk refuses later is no mistake in the input.
        with _explaining_memory(start, device):
            yield setup


@contextmanager
def open_dry_run(
    overrides: Overrides,
    reporter: Reporter,
    recipe: Recipe | None,
    scratch: Path,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[TrainingSetup, int]]:
    """Open what `open_setup` would, of the same model, which is only read; with it comes the batch
    size that is set, 0 for auto.

    Args:
        overrides: What the user set.
        reporter: Reports what was chosen, and warns.
        recipe: Stages to train in.
        scratch: Empty folder, to which all goes that is written.
        ranks: Ranks that are planned; of a batch size that is set, the steps have the share of
            one.

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
        check_ranks(config, ranks)
        batch_size = config.train.batch_size
        share = ranks.share(batch_size).count if batch_size else 0
        changes = merge(without_outputs, {"train": {"batch_size": share}})
        resolved = replace(resolved, config=from_dict(merge(to_dict(config), changes)))
        start = _Start(resolved, saved, folder.path / "faces", decoded_faces=decoded)
        with _built(start, folder, reporter, stack) as setup:
            yield setup, batch_size


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
        for place, value in paths_in(to_dict(config), config.model.trainer).items()
        for path in each_path(value)
    ]
    problem = KnownPaths(setup.folder.path, setup.state.run_id).remember(pairs)
    if problem:
        reporter.notice(
            f"paths that lie outside the model folder cannot be remembered ({problem}); the next "
            "start will ask for them again"
        )


@contextmanager
def _built(
    start: _Start, folder: ModelFolder, reporter: Reporter, stack: ExitStack
) -> Iterator[TrainingSetup]:
    """The parts of the session; what goes wrong with them, now or later, is put into words."""
    config = start.resolved.config
    device = _device(start, reporter, stack)
    expected = (RankLost,)  # of which the other rank tells what there is to tell
    with (
        _explaining_memory(start, device),
        reporting_crashes(folder.path, config, reporter, expected),
    ):
        with refusals_told():
            setup = _build(start, folder, device, reporter, stack)
        # Outside of `refusals_told`, as for a follower.
        yield setup


def _device(start: _Start, reporter: Reporter, stack: ExitStack) -> torch.device:
    """The device of this process, which is its current one from now on."""
    config = start.resolved.config
    check_folders(config, is_new=start.saved is None)
    device = choose_device(config.train.device, reporter.warning, start.ranks)
    if device.type == "cuda":
        # For the session alone: a program that trains from Python may go on with another one.
        stack.enter_context(torch.cuda.device(device))
        if start.crew is not None:
            start.crew.group.use_gpu(device)
    elif config.optimizer.placement == "host":
        reporter.notice(
            "optimizer.placement is host, which changes nothing without a GPU: all memory is the "
            "host's"
        )
    return device


@contextmanager
def _explaining_memory(start: _Start, device: torch.device) -> Iterator[None]:
    """Say what to do where the memory of the device does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        config = start.resolved.config
        precision = precisions.resolve(config.precision.mode, device)
        # With all that this process has reserved: so much was free before it took any.
        free, taken = free_bytes(device), start.faces_gpu_bytes
        advice = memory.advice(
            config, precision, free, store_bytes=taken, num_ranks=start.ranks.size
        )
        raise ValueError(advice) from error


def _build(
    start: _Start, folder: ModelFolder, device: torch.device, reporter: Reporter, stack: ExitStack
) -> TrainingSetup:
    """The parts of the session, built and opened, with what is written and shown of it."""
    preview = start.resolved.config.preview
    window = start.window if preview.window else None
    # Before the faces are decoded, which may take minutes: without a screen it is refused.
    if window is not None:
        window.open(preview.preview_scale)
    if slow := precisions.resolve(start.resolved.config.precision.mode, device).warning:
        reporter.warning(slow)
    step_setup, chosen = _build_step(start, device, reporter, stack)
    config, model, faces = step_setup.config, step_setup.model, chosen.faces
    run_id = step_setup.state.run_id
    images, evaluation = open_images(
        config, model, faces, step_setup.precision, folder, run_id, window, reporter
    )
    for notice in notices_of_parts(config, model, start.ranks):
        reporter.notice(notice)
    # Late: a start that was refused has changed nothing in the model folder.
    folder.write_config(start.resolved.kept)
    setup = TrainingSetup(
        **vars(step_setup),
        folder=folder,
        # Entered after the folder, so that it is left, with the last save made, before the lock is.
        saver=stack.enter_context(Saver(folder)),
        log=open_logs(config, folder.path, step_setup.state, reporter, stack),
        images=images,
        faces=faces,
        evaluation=evaluation,
    )
    threads = thread_count(config.data.num_threads)
    reporter.start(*start_report(setup, chosen, start.resolved.changes, threads))
    return setup


def _build_step(
    start: _Start, device: torch.device, reporter: Reporter, stack: ExitStack
) -> tuple[StepSetup, Chosen]:
    """What trains, the same on every rank.

    What can be refused at a glance is refused first: to decode the faces may take minutes.
    """
    progress, crew = start.resolved.progress, start.crew
    # The faces are the same for all ranks, and so is what there is to say of them.
    of_faces = reporter if start.ranks.is_first else Reporter(io.StringIO())
    config = with_own_threads(start.resolved.config, start.ranks)
    precision = precisions.resolve(config.precision.mode, device)
    engine_name, engine_why = check_step(config, device, start.ranks)
    loss = Loss(config.loss, sizes_of(config)[1], device)
    if start.saved:
        # Before the model is made: settings of a far larger one would take the memory first.
        check_fit(config, start.saved)
    model, loaded = _model(start, config, device)
    faces = _faces(start, config, device, of_faces, reporter.warning)
    start.opened.update(faces)
    num_faces = {side: opened.store.num_faces for side, opened in faces.items()}
    # Only now: auto takes what memory the faces have left. Theirs is reserved, too.
    # The ranks of a machine have GPUs of their own, and share its memory.
    num_sharing = 1 if device.type == "cuda" else start.ranks.local_size
    batch = batch_sizes.choose(
        config,
        num_faces,
        precision,
        lambda: (free_bytes(device) - start.faces_gpu_bytes) // num_sharing,
        start.group,
    )
    config = batch_sizes.with_batch_size(config, batch.size)
    if progress:
        _check_later_stages(progress, config, num_faces, device, start.ranks)
    deterministic = config.train.deterministic
    stack.enter_context(library_settings(device, start.ranks, deterministic=deterministic))
    step = build_step(config, model, device, loss=loss, group=start.group)
    state, schedule = _begin_session(start, config, step.update, batch.size)
    feed = open_feed(config, faces, device, precision, of_faces, start.ranks)
    # Closed before the model folder, whose decoded faces its threads may be reading.
    stack.callback(feed.close)
    noise = engines.Noise(config.train.seed, feed.offset) if model.is_noisy else None
    agree = start.group.agree if start.group else bool
    engine = engines.make(engine_name, step, feed, reporter.warning, noise=noise, agree=agree)
    setup = StepSetup(
        config=config,
        state=state,
        model=model,
        step=step,
        engine=engine,
        precision=precision,
        schedule=schedule,
        feed=feed,
        progress=progress,
        device=device,
        council=crew.council(state.iterations) if crew else None,
    )
    # It may have fallen back when it was made.
    engine_why = engine_why if engine.name == engine_name else f"{engine_name} cannot run here"
    if start.group is not None:
        start.group.barrier()  # a rank that is refused ends all before anything is written
    return setup, Chosen(faces, batch, engine_why, loaded)


def _model(start: _Start, config: Config, device: torch.device) -> tuple[Autoencoder, str]:
    """The model, and the weights that it has from another model; of several ranks the first one
    fills a new model."""
    is_new, group = start.saved is None, start.group
    # Without a seed on other ranks: all their numbers come from the first one.
    model, loaded = build_model(config, device, is_new=is_new and start.ranks.is_first)
    if is_new and group is not None:
        group.broadcast([*model.parameters(), *model.buffers()])
    return model, loaded


def _faces(
    start: _Start,
    config: Config,
    device: torch.device,
    reporter: Reporter,
    warn: Callable[[str], None],
) -> dict[str, SideFaces]:
    """The faces of both sides; of the ranks of a machine one decodes them, for all.

    Args:
        start: What the session starts from.
        config: Settings of this rank.
        device: Device on which they are trained on.
        reporter: Shows the progress, and warns of faces that cannot be used; of other ranks than
            the first, to nobody.
        warn: Called with what is particular to this machine.
    """

    # The first one has taken its part of the memory when the others look how much is left.
    num_readers = start.ranks.local_size - (not start.ranks.is_first_here)

    def opened() -> dict[str, SideFaces]:
        return open_faces(
            config,
            device,
            reporter,
            faces_dir=start.faces_dir,
            earlier_dir=start.decoded_faces,
            num_readers=num_readers,
        )

    if start.faces is not None:
        return start.faces
    return opened() if start.group is None else in_turn(start.group, opened, warn)


def _begin_session(
    start: _Start, config: Config, update: Update, batch_size: int
) -> tuple[TrainingState, Schedule]:
    """The state of the session that begins, new or as saved, and its learning rates.

    ``config`` has the batch size that was chosen; the record of the session keeps the one that was
    set, so that auto chooses again at the next start.
    """
    resolved, progress = start.resolved, start.resolved.progress
    state = restore(config, start.saved, update)
    settle_state(state, resolved.before or config, progress, start.rate_factor, config)
    # Only now: what was settled may have it begin anew.
    schedule = begin_schedule(state, config, progress.rate_factor if progress else 1.0)
    state.begin_session(resolved.config, batch_size=batch_size)
    return state, schedule


def _check_later_stages(
    progress: RecipeProgress,
    config: Config,
    num_faces: dict[str, int],
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Refuse today what would end the training when its stage begins, days later."""
    for number in range(progress.stage_state.stage + 1, len(progress.recipe.stages)):
        try:
            later = from_dict(merge(to_dict(config), progress.recipe.settings_of(number)))
            batch_sizes.check(later, num_faces)
            check_step(later, device, ranks)
            if later.loss != config.loss:
                # On the CPU, and thrown away: it is made for its refusals.
                Loss(later.loss, sizes_of(config)[1], "cpu")
        except ValueError as error:
            raise ValueError(f"stage {progress.recipe.stages[number].name}: {error}") from error
