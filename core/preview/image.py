"""The preview as an image, in the style that the settings name."""

from collections.abc import Iterable

import numpy as np

from ... import __version__
from ..config import Config
from .faces import PreviewLoader
from .grid import preview_image
from .look import Look
from .sheet import SheetStyle, preview_sheet
from .tiles import tiles_of

_WEIGHTS = {"ema": "average of the weights", "raw": "weights of the training"}


def uses_mask(config: Config) -> bool:
    """Whether the model trains with a mask."""
    return config.loss.penalized_mask_loss or config.loss.learn_mask


def loader_of(config: Config, *, input_px: int, output_px: int, num_threads: int) -> PreviewLoader:
    """What reads faces as the previews of a model need them."""
    return PreviewLoader(config.data, uses_mask(config), input_px, output_px, num_threads)


def image_of(look: Look, config: Config, mask: str) -> np.ndarray:
    """The preview of a look, (H, W, 3) BGR uint8.

    Args:
        look: Faces of both sides; in a sheet, of one or both.
        config: Settings of the model; `preview` says how it is drawn.
        mask: One of `sheet.MASKS`; faceswap's layout has no outline, and shows the tint.
    """
    settings, has_mask = config.preview, uses_mask(config)
    if settings.style == "faceswap":
        return preview_image(
            look.predictions,
            look.faces.targets,
            coverage=config.data.coverage / 100,
            mask_opacity=settings.mask_opacity,
            mask_color=settings.mask_color,
            has_mask=has_mask,
            mask_toggled_off=mask == "off",
        )
    title = f"{config.model.trainer}, iteration {look.iteration:,}"
    style = SheetStyle.of(settings, mask)
    return preview_sheet(tiles_of(look, has_mask=has_mask), style, title)


def shown_mask(config: Config, *, is_toggled: bool = False) -> str:
    """How the mask is shown, one of `sheet.MASKS`.

    is_toggled: the user has the tint in the place of what is set, or does without it.
    """
    usual = "outline" if config.preview.style == "sheet" else "tint"
    usual = usual if config.preview.show_mask else "off"
    return usual if not is_toggled else "off" if usual == "tint" else "tint"


def weights_in_words(weights: Iterable[str]) -> str:
    """Weights that made a picture (ema, raw, or nothing where unknown), each once; may be empty."""
    return " and ".join(words for each, words in _WEIGHTS.items() if each in set(weights))


def description(run_id: str, iteration: int, weights: Iterable[str]) -> str:
    """What a preview says about itself.

    Args:
        run_id: Name of the run.
        iteration: Total iteration of the weights.
        weights: Weights that made it: ema, raw, or nothing where unknown.
    """
    words = weights_in_words(weights)
    # First what it is: a picture may travel without its folder.
    return f"synthetic face: preview by mien {__version__}, run {run_id}, iteration {iteration}" + (
        f", {words}" if words else ""
    )
