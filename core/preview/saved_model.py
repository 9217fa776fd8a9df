"""A save of a model, found by its iteration and shown faces; training goes on, if it does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...models.autoencoder import Autoencoder
from ..checkpoint.format import read_manifest
from ..checkpoint.generations import BACKUP, is_name
from ..checkpoint.inference import Weights, network_of, read_model
from ..checkpoint.known_paths import KnownPaths
from ..checkpoint.model_folder import PREVIEWS, ModelFolder
from ..checkpoint.retention import snapshot_path
from ..config import Config
from ..config.path_settings import each_path
from ..data.sides import SIDES
from ..faces.folder import Face, read_folders, skipped
from ..system.durable_files import DamagedError
from ..system.threads import thread_count
from .faces import PreviewFaces, spread
from .image import loader_of
from .kept import KeptPreviews
from .look import Look, look_at


@dataclass(frozen=True)
class SavedModel:
    """A save, read into memory."""

    path: Path
    """Folder of the save."""

    model_dir: Path
    """Model folder that it was asked for in."""

    network: Autoencoder
    """Network in evaluation mode, on its device."""

    config: Config
    run_id: str
    iteration: int
    weights: str
    """Weights of the network: ema, an average, or raw."""

    def open_faces(
        self, folders: dict[str, Path], count: int, warn: Callable[[str], None]
    ) -> PreviewFaces:
        """Some faces of each folder, evenly spread, as the model needs them.

        Args:
            folders: Folder of each side; none: those that the model was trained on, where they
                are known to this user.
            count: Faces of a side at the most.
            warn: Told, in a line, of files that cannot be used.

        Raises:
            ValueError: There is no folder, or none of its faces can be shown.
        """
        faces: dict[str, list[Face]] = {}
        chosen = {side: [path] for side, path in folders.items()} or self._trained_folders()
        data = self.config.data
        for side, paths in chosen.items():
            opened = read_folders(
                paths,
                minimum=1,
                side=side,
                centering=data.centering,
                sub_folders=data.sub_folders if not folders else None,
            )
            if opened.rejected:
                warn(skipped(opened.rejected))
            faces[side] = spread(opened.faces, count)
        loader = loader_of(
            self.config,
            input_px=self.network.input_px,
            output_px=self.network.output_px[-1],
            num_threads=thread_count(self.config.data.num_threads),
        )
        return loader.load(faces)

    def look(self, faces: PreviewFaces) -> Look:
        """What it makes of the faces."""
        # The format of the masters, whatever was trained in: one picture has no need of speed.
        return look_at(self.network, torch.float32, faces, self.iteration, self.weights)

    def _trained_folders(self) -> dict[str, list[Path]]:
        """The folders of faces that the settings name; a stranger's may name any."""
        # To decode any folder that a model from elsewhere names would betray what lies there.
        known = KnownPaths(self.model_dir, self.run_id)
        folders: dict[str, list[Path]] = {}
        for side in SIDES:
            setting = f"input_{side}"
            paths = each_path(list(getattr(self.config.data, setting)))
            if not paths or not all(known.trust(f"data.{setting}", path) for path in paths):
                raise ValueError(
                    f"the faces that {self.model_dir} was trained on are not known here; add "
                    "-A FOLDER, -B FOLDER or both"
                )
            folders[side] = [Path(path) for path in paths]
        return folders


def read_saved(
    model_dir: Path, at: str | None, device: torch.device, weights: Weights
) -> SavedModel:
    """Read a save.

    Args:
        model_dir: Model folder, which is only read.
        at: Total iteration, of a generation, the backup or a snapshot beside the folder; or
            `backup`, or the name of a generation. None: the newest.
        device: Device on which it is to compute.
        weights: Same as for `read_model`.

    Raises:
        ValueError: There is no such save, or it is damaged, or lacks the average that is asked
            for.
    """
    # None and the backup need no search: reading them tells by itself what is missing.
    folder, name = (model_dir, at) if at is None or at == BACKUP else _find(model_dir, at)
    path, state, config, tensors, chosen = read_model(folder, name, weights=weights)
    network = network_of(path, config, tensors).to(device)
    run_id, iteration = state["run_id"], state["iterations"]
    return SavedModel(path, model_dir, network, config, run_id, iteration, chosen)


def has_weights(model_dir: Path, iteration: int) -> bool:
    """Whether there is a save of a total iteration."""
    return _place_of(model_dir, iteration) is not None


def _find(model_dir: Path, at: str) -> tuple[Path, str | None]:
    """Model folder and generation of a save; ValueError where there is none."""
    if not is_name(at):
        raise ValueError(f"--at must be an iteration, backup or a generation's name, got {at!r}")
    place = _place_of(model_dir, int(at)) if at.isdecimal() else (model_dir, at)
    if place is None:
        raise ValueError(
            f"{model_dir} has no save of iteration {int(at):,}; it has saves of "
            f"{_named(_saved_iterations(model_dir))}, and previews of "
            f"{_named(KeptPreviews(model_dir / PREVIEWS).iterations())}"
        )
    return place


def _place_of(model_dir: Path, iteration: int) -> tuple[Path, str | None] | None:
    """Model folder and generation of a save; None where there is none."""
    with ModelFolder(model_dir, read_only=True) as folder:
        for manifest in folder.generations.manifests():
            if manifest.iterations == iteration:
                return model_dir, manifest.name
    if _backup_iteration(model_dir) == iteration:
        return model_dir, BACKUP
    # Last: a snapshot is a folder of its own, and the same weights may still lie in a generation.
    snapshot = snapshot_path(model_dir, iteration)
    return (snapshot, None) if snapshot.is_dir() else None


def _backup_iteration(model_dir: Path) -> int | None:
    try:
        return read_manifest(model_dir / BACKUP).iterations
    except DamagedError:  # there is none, or none that helps
        return None


def _saved_iterations(model_dir: Path) -> list[int]:
    """Total iterations of all saves, in order: generations, the backup, snapshots beside them."""
    with ModelFolder(model_dir, read_only=True) as folder:
        found = {manifest.iterations for manifest in folder.generations.manifests()}
    backup = _backup_iteration(model_dir)
    if backup is not None:
        found.add(backup)
    # From the name that retention gives, so that the two cannot drift apart.
    before, _, after = snapshot_path(model_dir, 0).name.rpartition("0")
    for path in model_dir.resolve().parent.iterdir():
        number = path.name.removeprefix(before).removesuffix(after)
        # Built anew: removing prefix and suffix leaves names alone that have neither.
        if path.name == f"{before}{number}{after}" and is_name(number) and number.isdecimal():
            found.add(int(number))
    return sorted(found)


def _named(iterations: Sequence[int]) -> str:
    """Iterations as a user reads them."""
    return ", ".join(f"{iteration:,}" for iteration in iterations) or "none"
