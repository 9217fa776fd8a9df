"""Import of a model of faceswap: a model folder that training resumes and that exports take."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...models.autoencoder import Autoencoder
from ...models.fields import plain
from ..checkpoint.model_folder import ModelFolder, SaveError
from ..checkpoint.weights import read_weights
from ..config import Config, from_dict
from ..optim.lr_schedule import found_rate
from .keras_reader import Found, find, is_of_faceswap, read_model
from .keras_state import settings_of, training_state_of


@dataclass(frozen=True, kw_only=True)
class KerasImport:
    """Facts about a model that was imported."""

    source: Path
    path: Path
    trainer: str
    iterations: int
    num_sessions: int
    learning_rate: float
    """Rate that training goes on with."""

    left_out: tuple[str, ...]
    """Lines about what could not be taken over."""


def import_keras(source: Path, target: Path) -> KerasImport:
    """Read a model of faceswap and write it as the first save of a model folder.

    Args:
        source: Folder of faceswap, or its *.keras or *.h5 file, which is only read.
        target: Model folder, which is new or empty.

    Raises:
        ValueError: h5py is missing; there is no such model, or it does not fit its own options; the
            model folder holds something, or the disk refuses.
    """
    found = find(source)
    state = training_state_of(found.state)
    # Locked before the file is read, which takes a while.
    with ModelFolder(target, trainer=state.trainer) as folder:
        if not folder.is_new:
            raise ValueError(f"model folder {target} holds a model already; choose a new folder")
        model = read_model(found)
        config, left_out = _config_of(found, model)
        folder.write_config(config)
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        try:
            # Without the optimizer: faceswap's is a pickle, which is never read.
            folder.save(tensors, None, state.to_dict())
        except SaveError as error:
            raise ValueError(str(error)) from error
    rate = found_rate(state)
    return KerasImport(
        source=found.model,
        path=target,
        trainer=state.trainer,
        iterations=state.iterations,
        num_sessions=len(state.sessions),
        learning_rate=config.optimizer.learning_rate if rate is None else rate,
        left_out=tuple(left_out),
    )


def _config_of(found: Found, model: Autoencoder) -> tuple[Config, list[str]]:
    """Settings of the model folder; a line for each of faceswap's that is left out."""
    settings, left_out = settings_of(found.state)
    build = model.build
    shape = {
        "reflect_padding": build.reflect_padding,
        "icnr_init": build.icnr_init,
        "conv_aware_init": build.conv_aware_init,
    }
    settings["model"] = {"trainer": model.Config.family, "options": plain(model.config)} | shape
    # By what was built of the graph: the state may have been edited, the outputs cannot lie.
    settings.setdefault("loss", {})["learn_mask"] = build.learn_mask
    if found_rate(training_state_of(found.state)) is not None:
        # Else a resume would begin at the configured rate, which was never trained with.
        settings.setdefault("optimizer", {})["use_lr_finder"] = True
    return from_dict(settings), left_out


def read_any_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of a model of mien or of faceswap, and its family where that is told.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    if (path / "generations").is_dir() or not path.exists() or not is_of_faceswap(path):
        return read_weights(path)
    model = read_model(find(path))
    return dict(model.state_dict()), model.Config.family
