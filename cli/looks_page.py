"""The page that shows what settings do to a picture: a row of drawn faces for each.

Run: ``make docs``.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.config import setting_at
from ..core.faces.folder import Face, read_folder
from ..core.faces.geometry import Crop
from ..core.faces.masks import training_masks
from ..core.faces.synthetic import draw_folder
from ..core.preview.files import save_jpeg
from ..core.preview.sheet import arranged
from ..kernels.augment import augment
from ..kernels.draw import Ranges, draw

DOCS = Path(__file__).parents[1] / "docs"

_TILE_PX, _NUM_TILES = 128, 6
_SEED = 5  # of the drawings; one whose row shows the whole range was chosen
_STILL: dict[str, Any] = {
    **dict.fromkeys(("zoom_amount", "rotation_range", "shift_range", "flip_chance"), 0),
    **{"color": False, "flip": False, "warp": False},
}
_NO_COLOR = {"color": True, "color_lightness": 0, "color_ab": 0, "color_clahe_chance": 0}


@dataclass(frozen=True)
class _Row:
    """Settings that one row shows, and the row."""

    settings: tuple[str, ...]
    tiles: list[np.ndarray]
    labels: list[str]

    @property
    def name(self) -> str:
        """Name of the picture's file."""
        return self.settings[0].rpartition(".")[2]


def update() -> None:
    """Draw all pictures anew, and write the page."""
    pictures = DOCS / "looks"
    pictures.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mien-looks-") as scratch:
        draw_folder(Path(scratch) / "a", identity="a", count=25, size_px=256)
        rows = _rows(read_folder(Path(scratch) / "a", strict=True).faces[1])
    for row in rows:
        tiles = np.stack(row.tiles)[None]
        save_jpeg(pictures / f"{row.name}.jpg", arranged([tiles], [row.labels], ""), "drawn face")
    (DOCS / "looks.md").write_text(_page(rows), encoding="utf-8")


def _page(rows: Sequence[_Row]) -> str:
    lines = [
        "# What a setting does to the picture",
        "",
        "Each row shows one drawn face, with nothing varied but what the row is about.",
        "`make docs` draws them with the code that training uses.",
    ]
    for row in rows:
        lines += ["", f"## {row.name}", ""]
        lines += [f"- `{name}`: {_doc(name)}" for name in row.settings]
        lines += ["", f"![{row.name}](looks/{row.name}.jpg)"]
    return "\n".join(lines) + "\n"


def _doc(full_name: str) -> str:
    section, name = full_name.split(".")
    return setting_at((section, name)).doc


def _rows(face: Face) -> list[_Row]:
    return [*_rows_of_crops(face), *_rows_of_masks(face), *_rows_of_augmentation(face)]


def _rows_of_crops(face: Face) -> list[_Row]:
    centerings = ("legacy", "face", "head")
    coverages = (100.0, 87.5, 75.0, 62.5)
    offsets = (-20, 0, 20)
    return [
        _Row(
            ("data.centering",),
            [_crop(face, Crop(name, 1.0, 0.0, _TILE_PX)) for name in centerings],
            list(centerings),
        ),
        _Row(
            ("data.coverage",),
            [_crop(face, Crop("face", share / 100, 0.0, _TILE_PX)) for share in coverages],
            [f"{share:g}" for share in coverages],
        ),
        _Row(
            ("data.vertical_offset",),
            [_crop(face, Crop("face", 0.8, offset / 100, _TILE_PX)) for offset in offsets],
            [f"{offset:+d}" for offset in offsets],
        ),
    ]


def _rows_of_masks(face: Face) -> list[_Row]:
    types = ("components", "extended", "vgg-clear", "bisenet-fp_face")
    dilations = (-5.0, -2.5, 0.0, 2.5, 5.0)
    blurs = (0, 3, 9)
    return [
        _Row(("data.mask_type",), [_masked(face, mask_type=name) for name in types], list(types)),
        _Row(
            ("data.mask_dilation",),
            [_masked(face, dilation=percent) for percent in dilations],
            [f"{percent:+g}" for percent in dilations],
        ),
        _Row(
            ("data.mask_blur_kernel",),
            [_masked(face, mask_type="vgg-clear", blur_kernel=size) for size in blurs],
            [str(size) for size in blurs],
        ),
    ]


def _rows_of_augmentation(face: Face) -> list[_Row]:
    """Six draws of each kind of variation, at twice the usual amount where that is hard to see."""
    ranges: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("augment.warp",), {"warp": True}),
        (("augment.flip", "augment.flip_chance"), {"flip": True, "flip_chance": 50}),
        (("augment.zoom_amount",), {"zoom_amount": 10}),
        (("augment.rotation_range",), {"rotation_range": 10}),
        (("augment.shift_range",), {"shift_range": 5}),
        (("augment.color_lightness",), _NO_COLOR | {"color_lightness": 30}),
        (("augment.color_ab",), _NO_COLOR | {"color_ab": 16}),
        (
            ("augment.color_clahe_chance", "augment.color_clahe_max_size"),
            _NO_COLOR | {"color_clahe_chance": 100, "color_clahe_max_size": 4},
        ),
    ]
    return [
        _Row(settings, _varied(face, _STILL | given), _labels(settings, given))
        for settings, given in ranges
    ]


def _labels(settings: tuple[str, ...], given: dict[str, Any]) -> list[str]:
    name = settings[-1].rpartition(".")[2]
    return [f"{name} {given[name]}" if not isinstance(given[name], bool) else name] + [
        "" for _ in range(_NUM_TILES - 1)
    ]


def _crop(face: Face, crop: Crop) -> np.ndarray:
    """The part of the picture that is trained on, (S, S, 3) uint8 BGR."""
    with face.open_picture() as picture_hwc:
        return face.cut_out(picture_hwc, crop)


def _masked(
    face: Face, *, mask_type: str = "extended", dilation: float = 0.0, blur_kernel: int = 3
) -> np.ndarray:
    """The picture, tinted where the mask leaves it out."""
    crop = Crop("face", 1.0, 0.0, _TILE_PX)
    mask = training_masks(
        face,
        crop,
        mask_type=mask_type,
        dilation=dilation,
        blur_kernel=blur_kernel,
        threshold=4,
    )[..., :1]
    share = 1 - 0.6 * (1 - mask / 255.0)
    red = np.array([0, 0, 255.0])
    return np.rint(share * _crop(face, crop) + (1 - share) * red).astype(np.uint8)


def _varied(face: Face, ranges: dict[str, Any]) -> list[np.ndarray]:
    """What training makes of the face: the input where it is bent, else the target."""
    store = np.zeros((1, _TILE_PX, _TILE_PX, 8), np.uint8)
    store[0, ..., :3] = _crop(face, Crop("face", 1.0, 0.0, _TILE_PX))
    params = draw(
        Ranges(**ranges),
        seed=_SEED,
        first=[0],
        count=_NUM_TILES,
        num_faces=[1],
        size_px=_TILE_PX,
    )
    made = augment(
        [torch.from_numpy(store)], params, input_px=_TILE_PX, output_px=[_TILE_PX], num_threads=1
    )
    tiles = made.input_bchw if ranges["warp"] else made.targets_bchw[0]
    levels = (255 * tiles.permute(0, 2, 3, 1)).round().to(torch.uint8)
    return list(levels.contiguous().numpy())


if __name__ == "__main__":
    update()
