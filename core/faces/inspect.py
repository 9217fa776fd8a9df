"""One face file: what its header says, and how training sees its picture."""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..system.printable import printable
from .face import Face
from .folder import read_face
from .geometry import CENTERINGS, Crop, crop_landmarks
from .masks import AREAS, LANDMARK_MASKS, area_mask, landmark_mask, named_mask, stored_mask
from .png import FaceFileError, FaceHeader

_TINT_BGR = np.array([64, 64, 255], np.float32)
# Chosen by eye.
_SHEET_MARGIN_PX = 8
_CAPTION_PX = 20


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts of one face file, ready for JSON.

    Raises FaceFileError where the file is no usable face.
    """
    face, header = read_face(Path(path))
    alignment = face.alignment
    with face.open_picture():
        pass  # refused where it cannot be decoded
    return {
        "file": str(path),
        "edge_px": face.edge_px,
        "shows": f"{face.centering} crop",
        "native_px": round(face.native_px, 1),
        # By name: a box of four numbers would be read as corners by half of its readers.
        "box": dict(zip(("left", "top", "width", "height"), header.box, strict=True)),
        "yaw": round(alignment.yaw, 1),
        "pitch": round(alignment.pitch, 1),
        "roll": round(alignment.roll, 1),
        # What `faces check` calls odd above 0.08: the number lets a user judge the one face.
        "distance_from_mean_face": round(alignment.average_distance, 4),
        "masks": {name: _mask_facts(header, name) for name in sorted(header.masks)},
        "source": header.source,
    }


def summary(face: Face) -> dict[str, Any]:
    """The facts of a face in one line, without its masks, ready for JSON; no picture is decoded."""
    alignment = face.alignment
    return {
        "file": face.path.name,
        "edge_px": face.edge_px,
        "native_px": round(face.native_px),
        "yaw": round(alignment.yaw),
        "pitch": round(alignment.pitch),
        "roll": round(alignment.roll),
        "distance_from_mean_face": round(alignment.average_distance, 3),
    }


def contact_sheet(path: str | os.PathLike[str], *, tile_px: int = 192) -> np.ndarray:
    """One face as training sees it: its crops, and its masks laid over the face; BGR uint8.

    A picture from before alignments version 2.0 has the legacy crop only. A stored mask that cannot
    be used is left out. Raises FaceFileError where the file is no usable face.
    """
    face, header = read_face(Path(path))
    # A legacy picture is too narrow for the other crops, which would have black rims.
    shown = ("legacy",) if face.centering == "legacy" else CENTERINGS
    crops = {name: Crop(name, 1.0, 0.0, tile_px) for name in shown}
    with face.open_picture() as image_bgr:
        pictures = {name: face.cut_out(image_bgr, crop) for name, crop in crops.items()}
    # The crop that training has by default, on which masks are judged.
    main = shown[0]
    landmarks_l2 = crop_landmarks(face.landmarks_l2, face.alignment, crops[main])
    dots = pictures[main].copy()
    for x, y in landmarks_l2.tolist():
        cv2.circle(dots, (round(x), round(y)), 1, (0, 255, 0), -1, cv2.LINE_AA)
    tiles = [(f"{name} crop", picture) for name, picture in pictures.items()]
    tiles.append(("landmarks", dots))
    masks = {name: landmark_mask(name, landmarks_l2, tile_px) for name in LANDMARK_MASKS}
    masks |= {f"{area} area": area_mask(area, landmarks_l2, tile_px) for area in AREAS}
    tiles.extend((name, _tinted(pictures[main], mask)) for name, mask in masks.items())
    tiles.extend(_stored_tiles(face, header, crops, pictures))
    return tiled(tiles, tile_px)


def _stored_tiles(
    face: Face, header: FaceHeader, crops: dict[str, Crop], pictures: dict[str, np.ndarray]
) -> list[tuple[str, np.ndarray]]:
    """The stored masks that can be used, each on the crop that it is centred as, if it is shown."""
    tiles = []
    for name in sorted(set(header.masks) - set(LANDMARK_MASKS)):  # those are drawn afresh
        try:
            mask = named_mask(header, name)
            # A mask that lies over the picture as it is has no centring of its own.
            crop = crops.get(mask.centering, next(iter(crops.values())))
            pixels = stored_mask(
                mask, face.source_alignment, crop, dilation=0, blur_kernel=0, threshold=0
            )
        except FaceFileError:  # `inspect` says why
            continue
        tiles.append((name, _tinted(pictures[crop.centering], pixels)))
    return tiles


def _mask_facts(header: FaceHeader, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    try:
        mask = named_mask(header, name)
        facts |= {"size_px": mask.size_px, "centering": mask.centering}
        facts["inside"] = round(float((mask.pixels() > 127).mean()), 3)
    except FaceFileError as error:
        # In the facts: one damaged mask must not hide all else that the file says.
        facts["problem"] = str(error)
    return facts


def _tinted(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture, red where the mask leaves it out."""
    outside = (255.0 - mask[..., None]) / 255.0 * 0.6
    return np.rint(picture * (1.0 - outside) + _TINT_BGR * outside).astype(np.uint8)


def tiled(tiles: list[tuple[str, np.ndarray]], tile_px: int) -> np.ndarray:
    """Captioned pictures in rows of four."""
    columns = min(4, len(tiles))
    rows = -(-len(tiles) // columns)
    step_x, step_y = tile_px + _SHEET_MARGIN_PX, tile_px + _SHEET_MARGIN_PX + _CAPTION_PX
    sheet = np.full(
        (rows * step_y + _SHEET_MARGIN_PX, columns * step_x + _SHEET_MARGIN_PX, 3), 32, np.uint8
    )
    for index, (caption, picture) in enumerate(tiles):
        top = index // columns * step_y + _SHEET_MARGIN_PX
        left = index % columns * step_x + _SHEET_MARGIN_PX
        cv2.putText(
            sheet,
            printable(caption),  # bytes that are no UTF-8 would end the process inside OpenCV
            (left, top + _CAPTION_PX - 6),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.45,
            (230, 230, 230),
            1,
            cv2.LINE_AA,
        )
        top += _CAPTION_PX
        sheet[top : top + tile_px, left : left + tile_px] = picture
    return sheet
