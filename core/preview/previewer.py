"""The pictures of a run: the preview, and one more of the time-lapse at every save.

To draw them changes nothing of the training. An image that cannot be written is reported once.

Letters: n faces of a side, S edge of a prediction in px, C its channels, 3 or with the mask 4.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...models.autoencoder import Autoencoder
from ..checkpoint.model_folder import PREVIEW
from ..config import Config
from ..data.sides import SIDES
from ..faces.folder import Face, read_folder, skipped
from ..precision import Precision
from .faces import PreviewFaces, PreviewLoader, drawn, spread
from .grid import preview_image, save_jpeg, save_png
from .window import PreviewWindow


@dataclass(frozen=True)
class Look:
    """What the model makes of some faces at one moment."""

    iteration: int
    faces: PreviewFaces
    predictions: np.ndarray
    """(2 sides, 2 decoders, its own first, n, S, S, C) uint8."""


class Pictures:
    """Draws and writes them.

    Args:
        config: All settings, the paths absolute.
        model: The model in training.
        precision: What it computes in.
        loader: Reads faces as the model needs them.
        faces: Faces that are trained on, by side.
        folder: The model folder.
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
        window: PreviewWindow | None,
        warn: Callable[[str], None],
    ) -> None:
        self._settings, self._config = config.preview, config
        self._model, self._precision = model, precision
        self._loader, self._trained_on, self._window, self._warn = loader, faces, window, warn
        count = self._settings.preview_images
        # Now, also where they are to be fresh: faces that cannot be shown are refused at the start.
        self._faces = loader.load({side: spread(all_, count) for side, all_ in faces.items()})
        self._preview_paths = [folder / PREVIEW]
        if self._settings.write_image:
            self._preview_paths.append(Path(self._settings.write_image))
        self._timelapse_folder = Path(self._settings.timelapse_output or folder / "timelapse")
        self._timelapse_faces = self._open_timelapse()
        self._timelapse_at: int | None = None
        """The iteration of the last picture of it."""

        self._is_told: set[Path] = set()

    def look(self, iteration: int) -> Look:
        """What the model makes of the preview's faces as of now."""
        if self._settings.faces == "fresh":
            self._faces = self._fresh_faces(iteration)
        return Look(iteration, self._faces, self._predictions(self._faces))

    def write_preview(self, look: Look, *, mask_is_toggled: bool) -> Path:
        """Write the preview, and show it in the window; the path of the one in the model folder."""
        image = self._image(look, shows_mask=self._settings.show_mask ^ mask_is_toggled)
        for path in self._preview_paths:
            self._write(save_png, path, image, at=path)
        if self._window is not None:
            self._window.show(image)
        return self._preview_paths[0]

    def add_to_timelapse(self, iteration: int) -> Path | None:
        """The new picture of the time-lapse; None where there is no time-lapse, or it failed, or
        the iteration has its picture.

        A key that toggles the mask does not count here: a film should not flicker.
        """
        # An iteration that is saved again has its picture already.
        if self._timelapse_faces is None or self._timelapse_at == iteration:
            return None
        self._timelapse_at = iteration
        faces = self._timelapse_faces
        look = Look(iteration, faces, self._predictions(faces))
        image = self._image(look, shows_mask=self._settings.show_mask)
        # Two saves may fall into one second, and no picture is written over another.
        path = _free_path(self._timelapse_folder, int(time.time()))
        return path if self._write(save_jpeg, path, image, at=self._timelapse_folder) else None

    def keys(self) -> str:
        """Keys pressed in the window."""
        return self._window.keys() if self._window is not None else ""

    def _fresh_faces(self, iteration: int) -> PreviewFaces:
        """Load other faces than before; the same where files have gone since the run began."""
        seed, count = self._config.train.seed, self._settings.preview_images
        chosen = {
            side: drawn(faces, count, seed, iteration, number)
            for number, (side, faces) in enumerate(self._trained_on.items())
        }
        try:
            return self._loader.load(chosen)
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

    @torch.no_grad()
    def _predictions(self, faces: PreviewFaces) -> np.ndarray:
        """(2 sides, 2 decoders, its own first, n, S, S, C) uint8."""
        model = self._model
        device = next(model.parameters()).device
        model.eval()
        predictions = []
        for side, inputs in zip(SIDES, faces.inputs, strict=True):
            pixels = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(device)
            other = SIDES[1 - SIDES.index(side)]
            codes = model.encode(pixels.to(self._precision.compute) / 255)
            decoded = [model.decode(model.side_code(codes, to), to) for to in (side, other)]
            predictions.append([_to_pixels(each, model.build.learn_mask) for each in decoded])
        model.train()
        return np.array(predictions)

    def _image(self, look: Look, *, shows_mask: bool) -> np.ndarray:
        settings = self._settings
        return preview_image(
            look.predictions,
            look.faces.targets,
            coverage=self._config.data.coverage / 100,
            mask_opacity=settings.mask_opacity,
            mask_color=settings.mask_color,
            has_mask=self._loader.has_mask,
            mask_toggled_off=not shows_mask,
        )

    def _write(
        self, save: Callable[[Path, np.ndarray], None], path: Path, image: np.ndarray, *, at: Path
    ) -> bool:
        """Whether it could be written; where not, ``at`` is reported once."""
        try:
            save(path, image)
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


def _to_pixels(outputs: tuple[torch.Tensor, ...], learn_mask: bool) -> np.ndarray:
    """(n, S, S, 3 or 4) uint8 of the largest face and, where learned, its mask."""
    picture = torch.cat(outputs[-2:], dim=1) if learn_mask else outputs[-1]
    pixels = (picture.float() * 255).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
