"""What a session writes and shows next to its saves: previews, measurements, events, lines."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from ...models.autoencoder import Autoencoder
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.state import TrainingState
from ..config import Config, from_dict, to_dict, to_toml, without_private
from ..console.notify import Notifier
from ..console.reporter import EVENTS, Reporter
from ..console.tensorboard import Log, Logs, open_log
from ..console.wandb_log import WandbLog
from ..data.sides import SideFaces
from ..evaluate.evaluate import Evaluation, open_evaluation
from ..history.history import BATCH_SIZE_TAG
from ..precision import Precision
from ..preview.image import loader_of
from ..preview.previewer import Pictures
from ..preview.window import PreviewWindow
from ..system.printable import printable_values
from ..system.threads import thread_count
from .build import sizes_of


def open_images(
    config: Config,
    model: Autoencoder,
    faces: dict[str, SideFaces],
    precision: Precision,
    folder: ModelFolder,
    run_id: str,
    window: PreviewWindow | None,
    reporter: Reporter,
) -> tuple[Pictures, Evaluation | None]:
    """The preview, and where faces are held out the measuring of the model by them.

    Args:
        config: All settings.
        model: Network that makes the images.
        faces: Faces of each side.
        precision: Number formats of the model.
        folder: Place of `preview.png`, and of the previews of earlier saves.
        run_id: Name of the run.
        window: Window that shows the preview; None: none.
        reporter: Warns of what cannot be written or measured.
    """
    input_px, output_px = sizes_of(config)
    num_threads = thread_count(config.data.num_threads)
    images = Pictures(
        config,
        model,
        precision,
        loader=loader_of(
            config, input_px=input_px, output_px=output_px[-1], num_threads=num_threads
        ),
        # Not all of the folder: what the store left out could not be shown, either.
        faces={side: opened.trained_on for side, opened in faces.items()},
        folder=folder.path,
        run_id=run_id,
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
    return images, evaluation


def report_warnings(folder: ModelFolder, reporter: Reporter) -> None:
    """Report the warnings of a model folder, each once."""
    while folder.warnings:
        # Taken out: the folder adds to the same list at every save.
        reporter.warning(folder.warnings.pop(0))


def open_logs(
    config: Config,
    model_dir: Path,
    state: TrainingState,
    reporter: Reporter,
    stack: ExitStack,
) -> Log:
    """Open this session's log; its events and lines are kept in their files from now on."""
    logs = Logs(warn=reporter.warning)
    # On the stack before any is open: a start that fails behind one must still close its file.
    stack.callback(logs.close)
    # Each by itself: W&B that is out of reach must not cost the events on the disk.
    for opening in _log_openings(config, model_dir, state):
        logs.open(opening)
    # The history reckons EG/s from it, also of a session that no save knows of.
    logs.scalars({BATCH_SIZE_TAG: state.session.batch_size}, state.iterations)
    events = model_dir / "logs" / f"session_{state.session.number}" / EVENTS
    reporter.keep_in(
        events=events if config.save.logs else None,
        log_file=Path(config.log.file) if config.log.file else None,
        level=config.log.level,
        all_steps=config.train.log_interval > 0,
    )
    if config.notify.command or config.notify.url:
        reporter.notify_by(Notifier(config.notify, model_dir))
    return logs


def _log_openings(
    config: Config, model_dir: Path, state: TrainingState
) -> Iterator[Callable[[], Log]]:
    """Calls that open the logs of scalars that are set."""
    # W&B and TensorBoard show them to others, and take no name that is not UTF-8.
    settings = printable_values(without_private(to_dict(config)))
    yield lambda: open_log(
        model_dir,
        state.session.number,
        enabled=config.save.logs,
        first_step=state.iterations + 1,
        settings=to_toml(from_dict(settings)),
    )
    if config.log.wandb:
        yield lambda: WandbLog(config.log.wandb, model_dir, state.run_id, settings)
