"""Previews drawn on request: of a save, of two, or of the history; no training is needed.

Where no folders of faces are given, two saves are compared by the previews that were kept of them,
which need no weights and show the same faces; else by their weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ...models.autoencoder import Side
from ..checkpoint.inference import Weights
from ..checkpoint.model_folder import PREVIEWS, ModelFolder
from ..config import Config
from .compare import STRIP_FACES, chosen_for_strip, comparison, strip
from .image import description, image_of, shown_mask, uses_mask, weights_in_words
from .kept import KeptPreviews
from .look import Look
from .saved_model import SavedModel, has_weights, read_saved
from .sheet import SheetStyle, preview_sheet
from .tiles import Tiles, tiles_of


@dataclass(frozen=True, kw_only=True)
class PreviewRequest:
    """What is to be drawn, and how; None: as the settings of the save say."""

    model_dir: Path
    """Model folder, which is only read."""

    folders: dict[str, Path] = field(default_factory=dict)
    """Folder of faces of each side that is shown; none: those that the model was trained on."""

    num_faces: int | None = None
    style: str | None = None
    enlarge: str | None = None
    mask: str | None = None
    weights: Weights = "auto"
    """Weights of a save that are to draw it; auto: the average where there is one."""

    device: torch.device = torch.device("cpu")
    warn: Callable[[str], None] = print
    """Told, in a line, of what should be known of the picture."""


@dataclass(frozen=True)
class Drawn:
    """An image, and what it is."""

    image: np.ndarray
    """(H, W, 3) BGR uint8."""

    text: str
    """What the image says about itself."""

    source: str
    """Place that its faces are from, to be read by a user."""

    iterations: list[int]
    sides: tuple[Side, ...]
    weights: list[str]
    """Weights that each save was drawn by: ema, raw, or nothing where that is not known."""


def draw_save(request: PreviewRequest, at: str | None) -> Drawn:
    """The preview of a save; of its kept preview where its weights are gone.

    Args:
        request: What is to be drawn.
        at: Iteration, `backup` or name of a generation; None: the newest.

    Raises:
        ValueError: There is neither, or no face can be shown.
    """
    kept = KeptPreviews(request.model_dir / PREVIEWS)
    if at is not None and at.isdecimal() and not has_weights(request.model_dir, int(at)):
        # Kept tiles are those of a sheet, and of faces that were trained on.
        if int(at) in kept.iterations() and not request.folders and request.style != "faceswap":
            # Rather a small picture of that moment than a refusal: its weights come back no more.
            tiles = kept.read(int(at)).first(request.num_faces)
            if not _are_by(request.weights, [tiles]):
                raise ValueError(
                    f"the weights of iteration {int(at):,} are gone, and its kept preview is not "
                    f"known to be by {request.weights} weights; leave --weights out"
                )
            # Masks are not kept.
            style = SheetStyle(enlarge=request.enlarge or "lanczos", mask="off")
            image = preview_sheet(tiles, style, f"iteration {tiles.iteration:,}, as it was kept")
            return _drawn(request, image, [tiles], f"the preview kept in {kept.folder}")
    saved = read_saved(request.model_dir, at, request.device, request.weights)
    config, look = _look(request, saved)
    mask = request.mask or shown_mask(config)
    image = image_of(look, config, mask)
    text = description(saved.run_id, saved.iteration, [saved.weights])
    iterations, weights = [saved.iteration], [saved.weights]
    return Drawn(image, text, str(saved.path), iterations, look.faces.sides, weights)


def draw_comparison(request: PreviewRequest, iterations: Sequence[int]) -> Drawn:
    """The swaps of two saves beside each other.

    Raises:
        ValueError: Of one there is nothing left, or no face can be shown.
    """
    kept = KeptPreviews(request.model_dir / PREVIEWS)
    history, source = [], f"the previews kept in {kept.folder}"
    # Both kept or both rendered: a shrunk JPEG differs from a fresh tile without any training.
    if not request.folders and set(iterations) <= set(kept.iterations()):
        history = [kept.read(iteration).first(request.num_faces) for iteration in iterations]
    if not history or not _are_by(request.weights, history):
        history = [_rendered(request, iteration) for iteration in iterations]
        source = f"the saves of {request.model_dir}"
    _warn_of_what_differs(request, history)
    one, other = history
    image = comparison(one, other, request.enlarge or "lanczos")
    return _drawn(request, image, history, source)


def draw_strip(request: PreviewRequest) -> Drawn:
    """Swaps of some of the previews that were kept, one after the other.

    Raises:
        ValueError: None was kept.
    """
    kept = KeptPreviews(request.model_dir / PREVIEWS)
    iterations = kept.iterations()
    if not iterations:
        raise ValueError(
            f"{kept.folder} holds no previews: a training with preview.history above 0 keeps one "
            "at every save"
        )
    history = _readable(request, kept, chosen_for_strip(iterations))
    _warn_of_what_differs(request, history)
    image = strip(history, request.enlarge or "lanczos", request.num_faces or STRIP_FACES)
    return _drawn(request, image, history, f"the previews kept in {kept.folder}")


def _look(request: PreviewRequest, saved: SavedModel) -> tuple[Config, Look]:
    """The settings to draw by, and what a save makes of the faces."""
    preview = saved.config.preview
    preview = dataclasses.replace(
        preview, style=request.style or preview.style, enlarge=request.enlarge or preview.enlarge
    )
    # In the settings themselves, so that drawing has one place to ask.
    config = dataclasses.replace(saved.config, preview=preview)
    count = request.num_faces or preview.preview_images
    faces = saved.open_faces(request.folders, count, request.warn)
    if preview.style == "faceswap" and len(faces.sides) < 2:
        raise ValueError("faceswap's layout shows both sides; add -A and -B, or --style sheet")
    return config, saved.look(faces)


def _rendered(request: PreviewRequest, iteration: int) -> Tiles:
    saved = read_saved(request.model_dir, str(iteration), request.device, request.weights)
    # Whatever the save's style is: faceswap's would ask for both sides, and only tiles are used.
    sheet = dataclasses.replace(request, style="sheet")
    config, look = _look(sheet, saved)
    return tiles_of(look, has_mask=uses_mask(config))


def _readable(
    request: PreviewRequest, kept: KeptPreviews, iterations: Sequence[int]
) -> list[Tiles]:
    """The kept previews of these iterations, less those that are damaged, which is told."""
    history = []
    for iteration in iterations:
        try:
            history.append(kept.read(iteration))
        except ValueError as error:
            request.warn(f"left out: {error}")
    if not history:
        raise ValueError(f"none of the previews in {kept.folder} can be read")
    return history


def _are_by(weights: Weights, history: Sequence[Tiles]) -> bool:
    """Whether kept previews are by the weights that are asked for."""
    # A run draws what it keeps by the average where it has one, as auto does.
    return weights == "auto" or all(tiles.weights == weights for tiles in history)


def _warn_of_what_differs(request: PreviewRequest, history: Sequence[Tiles]) -> None:
    """Warn where more than the training is between these saves."""
    weights = {tiles.weights for tiles in history} - {""}
    if len(weights) > 1:
        request.warn(f"not all of these saves are by the same: {weights_in_words(weights)}")
    if len({tiles.faces_digest for tiles in history}) > 1:
        request.warn("not all of these saves show the same faces: the folders have changed since")


def _drawn(
    request: PreviewRequest, image: np.ndarray, history: Sequence[Tiles], source: str
) -> Drawn:
    """An image of tiles, under the name of the run."""
    with ModelFolder(request.model_dir, read_only=True) as folder:
        # None where the saves are gone, which kept previews outlive.
        state = folder.newest_state()
    iterations = [tiles.iteration for tiles in history]
    weights = [tiles.weights for tiles in history]
    text = description(state["run_id"] if state else "unknown", iterations[-1], weights)
    return Drawn(image, text, source, iterations, history[0].sides, weights)
