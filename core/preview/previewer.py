"""The pictures of a run: the preview, and one more of the history and the time-lapse at every save.

To draw them changes nothing of the training. An image that cannot be written is reported once.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ...models.autoencoder import Autoencoder
from ..checkpoint.model_folder import PREVIEW, PREVIEWS, SHEET
from ..config import Config
from ..data.sides import SIDES
from ..faces.folder import Face, read_folder, skipped
from ..precision import Precision
from ..system.durable_files import discard_leftovers
from .faces import PreviewFaces, PreviewLoader, drawn, spread
from .files import encoded_jpeg, save_jpeg, save_png
from .image import description, image_of, shown_mask, uses_mask
from .kept import KeptPreviews
from .look import Look, look_at
from .tiles import tiles_of
from .window import PreviewWindow


class Pictures:
    """Draws and writes them.

    Args:
        config: All settings, the paths absolute.
        model: The model in training.
        precision: What it computes in.
        loader: Reads faces as the model needs them.
        faces: Faces that are trained on, by side.
        folder: The model folder.
        run_id: Name of the run, for what the pictures say about themselves.
        window: Shows the preview too.
        warn: Told, in one line, of what cannot be read or written.

    Raises:
        ValueError: No face can be shown, or a folder of the time-lapse cannot be used.
    """

    def __init__(
        self,
        config: Config,
        model: Autoencoder,
        precision: Precision,
        *,
        loader: PreviewLoader,
        faces: dict[str, list[Face]],
        folder: Path,
        run_id: str,
        window: PreviewWindow | None,
        warn: Callable[[str], None],
    ) -> None:
        self._settings, self._config = config.preview, config
        self._model, self._compute, self._run_id = model, precision.compute, run_id
        self._loader, self._trained_on, self._window, self._warn = loader, faces, window, warn
        count = self._settings.preview_images
        # Now, also where they are to be fresh: faces that cannot be shown are refused at the start.
        self._faces = loader.load({side: spread(all_, count) for side, all_ in faces.items()})
        self._compared_faces = self._faces
        """The faces of the history, which stay the same."""

        self._kept = KeptPreviews(folder / PREVIEWS)
        self._preview_paths = [folder / PREVIEW]
        if self._settings.write_image:
            self._preview_paths.append(Path(self._settings.write_image))
        self._sheet_path = folder / SHEET
        self._timelapse_folder = Path(self._settings.timelapse_output or folder / "timelapse")
        self._timelapse_faces = self._open_timelapse()
        self._timelapse_at: int | None = None
        """The iteration of the last picture of it."""

        # By place, not by file: a full disk would else be reported at every save.
        self._is_told: set[Path] = set()
        self._shown: tuple[np.ndarray, str] | None = None
        """The preview that was written last, and what it says of itself."""

    def look(self, iteration: int, weights: str) -> Look:
        """What the model makes of the preview's faces as of now; weights: its own, ema or raw."""
        if self._settings.faces == "fresh":
            self._faces = self._fresh_faces(iteration)
        return look_at(self._model, self._compute, self._faces, iteration, weights)

    def write_preview(self, look: Look, *, mask_is_toggled: bool) -> Path:
        """Write the preview, and show it in the window; the path of the one in the model folder."""
        image = image_of(look, self._config, shown_mask(self._config, is_toggled=mask_is_toggled))
        # Into every copy alike, since pictures travel without their folder.
        text = description(self._run_id, look.iteration, [look.weights])
        for path in self._preview_paths:
            self._attempt(partial(save_png, path, image, text), path, at=path)
        if self._window is not None:
            self._window.show(image)
        self._shown = image, text
        return self._preview_paths[0]

    def write_sheet(self, look: Look) -> Path | None:
        """Write a sheet to judge by, also where the preview has faceswap's layout; its path, or
        None where it could not be written."""
        preview = dataclasses.replace(self._settings, style="sheet")
        config = dataclasses.replace(self._config, preview=preview)
        image = image_of(look, config, shown_mask(config))
        text, path = description(self._run_id, look.iteration, [look.weights]), self._sheet_path
        return path if self._attempt(partial(save_png, path, image, text), path, at=path) else None

    def shown_jpeg(self) -> tuple[bytes, tuple[int, int]]:
        """The preview that was written last as a JPEG, and its width and height in px."""
        assert self._shown is not None  # a preview is written before anybody asks for it
        image, text = self._shown
        return encoded_jpeg(image, text), (image.shape[1], image.shape[0])

    def keep(self, look: Look) -> None:
        """Keep what a save makes of the faces, to be compared with others."""
        most, iteration = self._settings.history, look.iteration
        if not most:
            return
        # Fresh faces are others at every save, and could not be compared.
        if look.faces is not self._compared_faces:
            look = look_at(
                self._model, self._compute, self._compared_faces, iteration, look.weights
            )
        tiles = tiles_of(look, has_mask=uses_mask(self._config))
        text = description(self._run_id, iteration, [look.weights])
        path = self._kept.path(iteration)
        self._attempt(partial(self._kept.keep, tiles, text, most), path, at=path.parent)

    def add_to_timelapse(self, iteration: int, weights: str) -> Path | None:
        """The new picture of the time-lapse; None where there is no time-lapse, or it failed, or
        the iteration has its picture. weights: the model's own now, ema or raw.

        A key that toggles the mask does not count here: a film should not flicker.
        """
        # An iteration that is saved again has its picture already.
        if self._timelapse_faces is None or self._timelapse_at == iteration:
            return None
        # In a folder of the user's own another run may be writing.
        if not self._settings.timelapse_output:
            discard_leftovers(self._timelapse_folder)
        # Set before it is tried: a disk that refuses is not asked again for the same iteration.
        self._timelapse_at = iteration
        look = look_at(self._model, self._compute, self._timelapse_faces, iteration, weights)
        image = image_of(look, self._config, shown_mask(self._config))
        # Two saves may fall into one second, and no picture is written over another.
        path = _free_path(self._timelapse_folder, int(time.time()))
        text = description(self._run_id, iteration, [weights])
        write = partial(save_jpeg, path, image, text)
        return path if self._attempt(write, path, at=self._timelapse_folder) else None

    def keys(self) -> str:
        """Keys pressed in the window."""
        return self._window.keys() if self._window is not None else ""

    def _fresh_faces(self, iteration: int) -> PreviewFaces:
        """Load other faces than before; the same where files have gone since the run began."""
        seed, count = self._config.train.seed, self._settings.preview_images
        chosen = {
            # Seeded by the iteration, so that a resumed run shows what the unbroken one would have.
            side: drawn(faces, count, seed, iteration, number)
            for number, (side, faces) in enumerate(self._trained_on.items())
        }
        try:
            return self._loader.load(chosen)
        # A preview is never worth the run, not even where the user has moved the faces meanwhile.
        except ValueError:
            return self._faces

    def _open_timelapse(self) -> PreviewFaces | None:
        """The first faces of both its folders, as many as both have; None where there are none."""
        settings = self._settings
        if not settings.timelapse_input_a:
            return None
        faces = {}
        for side in SIDES:
            opened = read_folder(
                getattr(settings, f"timelapse_input_{side}"),
                minimum=1,
                side=side,
                most=settings.preview_images,
                centering=self._config.data.centering,
                sub_folders=self._config.data.sub_folders,
            )
            if opened.rejected:
                self._warn(skipped(opened.rejected, "of the time-lapse"))
            faces[str(side)] = opened.faces
        try:
            self._timelapse_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"preview.timelapse_output {self._timelapse_folder} cannot be made: "
                f"{error.strerror}; choose another --timelapse-output"
            ) from error
        return self._loader.load(faces)

    def _attempt(self, write: Callable[[], None], path: Path, *, at: Path) -> bool:
        """Whether a file could be written; where not, ``at`` is reported once."""
        try:
            write()
        except OSError as error:
            if at not in self._is_told:
                reason = error.strerror or error
                self._warn(f"cannot write {path}: {reason}; training goes on without the picture")
                self._is_told.add(at)
            return False
        return True


def _free_path(folder: Path, seconds: int) -> Path:
    """A file of the time-lapse that is not there yet."""
    path, number = folder / f"{seconds}.jpg", 1
    while path.exists():
        number += 1
        path = folder / f"{seconds}-{number}.jpg"
    return path
