"""The aligned face of DeepFaceLab: a square JPEG with its metadata in an APP15 segment.

The segment holds a pickle of one dictionary. Landmarks are in px of this JPEG; what else it may
tell is the frame that the face is of, a painted or learned mask (XSeg), and a mask of polygons.

Letters: l = landmark (68), n = point of a polygon, 2 = (x, y), 23 = 2 x 3 matrix.
"""

import contextlib
import os
import re
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import cv2
import numpy as np

from ..system.output import silent_libraries
from . import dfl_jpeg, png
from .dfl_pickle import StoredArray, read_values
from .face import FACE_TYPES
from .geometry import transform
from .png import FaceFileError, StoredMask

# DeepFaceLab writes 50,000 at the most: all of it has to fit into one segment.
MAX_MASK_BYTES = 65_536
MAX_MASK_PX = 1024
MAX_POLYGONS = 64
MAX_SPREAD_EDGES = 4.0
"""Distance from the JPEG, in its edges, up to which landmarks and polygons may lie. Chosen,
unmeasured."""

MASK = "custom_head"
"""Name by which its mask is known: as a stored mask of the user's own."""


@dataclass(frozen=True)
class Metadata:
    """What a JPEG says of its face. Entries that training does without are None where they are
    missing or odd.

    face_type: one of `FACE_TYPES`. landmarks_l2: (68, 2) float32, px of the JPEG.
    source_landmarks_l2: (68, 2) float32, px of the frame. source_rect: left, top, right, bottom in
    the frame. mask: bytes of a PNG or JPEG. polygons: (is inside, (n, 2) float64 px of the JPEG).
    """

    face_type: str
    landmarks_l2: np.ndarray
    source_filename: str | None
    source_landmarks_l2: np.ndarray | None
    source_rect: tuple[int, int, int, int] | None
    mask: bytes | None
    polygons: list[tuple[bool, np.ndarray]]


def read_metadata(file: BinaryIO, begin: int, size: int) -> tuple[int, Metadata]:
    """Edge of a JPEG in px and what it says; it lies in the open file at ``begin``.

    Raises FaceFileError with the reason and the remedy where it is no usable face.
    """
    edge_px, data = dfl_jpeg.read_segments(file, begin, size)
    values = read_values(data)
    if not isinstance(values, dict):
        _refuse("is no dictionary")
    return edge_px, _metadata_from(values, edge_px)


def masks_of(metadata: Metadata, edge_px: int) -> dict[str, StoredMask | str]:
    """The mask by its name, or why it cannot be used; its matrix is from px of the JPEG.

    What is painted or learned goes before the polygons.
    """
    if metadata.mask is not None:
        try:
            pixels = _decoded_mask(metadata.mask)
        except FaceFileError as error:
            return {MASK: str(error)}
    elif metadata.polygons:
        pixels = _drawn(metadata.polygons, edge_px)
    else:
        return {}
    size_px = pixels.shape[0]
    scale = size_px / edge_px
    corner = (scale - 1.0) / 2.0  # pixels are squares, and a coordinate is that of their middle
    affine_33 = np.array([[scale, 0.0, corner], [0.0, scale, corner], [0.0, 0.0, 1.0]])
    # Compressed as in a face PNG, so that one reader serves both.
    stored = StoredMask(zlib.compress(pixels.tobytes()), size_px, png.AS_PICTURE, affine_33)
    return {MASK: stored}


def plain_name(name: str) -> str | None:
    """The last part of a path of any system; None where it is no name of a file."""
    # Both slashes: DeepFaceLab runs on Windows, and its files are trained with elsewhere.
    last = re.split(r"[\\/]", name)[-1]
    is_name = last not in ("", ".", "..") and last.isprintable() and len(os.fsencode(last)) <= 255
    return last if is_name else None


def _metadata_from(values: dict[Any, Any], edge_px: int) -> Metadata:
    # DeepFaceLab's own default.
    face_type = values.get("face_type", "full_face")
    if face_type not in FACE_TYPES:
        shown = repr(face_type)[:40] if isinstance(face_type, str) else "no text"
        _refuse(f"has a face_type that is none of {', '.join(FACE_TYPES)} ({shown})")
    landmarks_l2 = png.checked_landmarks(_points(values.get("landmarks"), "landmarks"))
    reach_px = MAX_SPREAD_EDGES * edge_px
    if np.abs(landmarks_l2 - edge_px / 2).max() > reach_px + edge_px / 2:
        _refuse(f"has a landmark more than {MAX_SPREAD_EDGES:g} edges away from the picture")
    name = values.get("source_filename")
    return Metadata(
        face_type=face_type,
        landmarks_l2=landmarks_l2,
        source_filename=plain_name(name) if isinstance(name, str) else None,
        source_landmarks_l2=_source_landmarks(values, landmarks_l2),
        source_rect=_rect(values.get("source_rect")),
        mask=_mask_bytes(values.get("xseg_mask")),
        polygons=_polygons(values.get("seg_ie_polys"), edge_px),
    )


def _points(value: Any, name: str, columns: int = 2) -> np.ndarray:
    """Points, (n, columns) float64, finite: of a stored array or of nested lists."""
    if isinstance(value, StoredArray):
        points = value.values().astype(np.float64)
    else:
        is_list = isinstance(value, list | tuple)
        if not is_list or not all(_is_row(row, columns) for row in value):
            _refuse(f"has no {name}" if value is None else f"has {name} that are no (x, y) pairs")
        points = np.array([[float(each) for each in row] for row in value]).reshape(-1, columns)
    if points.ndim != 2 or points.shape[1] != columns:
        _refuse(f"has {name} of shape {points.shape}, not (n, {columns})")
    if not np.isfinite(points).all():
        _refuse(f"has {name} that are not all finite")
    return points


def _is_row(row: Any, columns: int) -> bool:
    return isinstance(row, list | tuple) and len(row) == columns and all(map(_is_number, row))


def _is_number(value: Any) -> bool:
    """Whether it is one that is a float as well."""
    if type(value) is int:
        # Python's own have no end: a long one would overflow where it is made a float.
        return abs(value) < 2**63
    return type(value) is float


def _source_landmarks(values: dict[Any, Any], landmarks_l2: np.ndarray) -> np.ndarray | None:
    """Landmarks in the frame: as they are told, or by the matrix that the frame was warped with."""
    try:
        if values.get("source_landmarks") is not None:
            points_l2 = _points(values["source_landmarks"], "source landmarks")
        else:
            to_jpeg_23 = _points(values.get("image_to_face_mat"), "a matrix", columns=3)
            if len(to_jpeg_23) != 2:
                return None
            points_l2 = transform(landmarks_l2, cv2.invertAffineTransform(to_jpeg_23))
        is_finite = np.isfinite(points_l2).all()
        return png.checked_landmarks(points_l2.astype(np.float64)) if is_finite else None
    except FaceFileError:
        return None


def _rect(value: Any) -> tuple[int, int, int, int] | None:
    """The detector's box: left, top, right, bottom."""
    if isinstance(value, StoredArray):
        try:
            value = value.values().ravel().tolist()
        except FaceFileError:
            return None
    is_list = isinstance(value, list | tuple) and len(value) == 4
    if not is_list or not all(_is_number(each) for each in value):
        return None
    if not all(abs(each) <= png.MAX_COORDINATE_PX for each in value):  # NaN is not, either
        return None
    left, top, right, bottom = (round(each) for each in value)
    return (left, top, right, bottom) if right > left and bottom > top else None


def _mask_bytes(value: Any) -> bytes | None:
    """The file of a mask; a mask that is there and cannot be read is told where it is asked for."""
    if value is None:
        return None
    if isinstance(value, StoredArray) and isinstance(value.content, bytes):
        # A byte more than is allowed, by which the reader sees that there is more.
        return value.content[: MAX_MASK_BYTES + 1]
    return value if isinstance(value, bytes) else b""


def _polygons(value: Any, edge_px: int) -> list[tuple[bool, np.ndarray]]:
    """Polygons with three points or more; those that cannot be read are left out.

    Their type is 1 for what is inside, 0 for what is not.
    """
    entries = value.get("polys") if isinstance(value, dict) else value
    polygons: list[tuple[bool, np.ndarray]] = []
    for entry in entries[:MAX_POLYGONS] if isinstance(entries, list | tuple) else ():
        if isinstance(entry, dict):
            entry = (entry.get("type"), entry.get("pts"))
        if not isinstance(entry, list | tuple) or len(entry) != 2 or entry[0] not in (0, 1):
            continue
        try:
            points_n2 = _points(entry[1], "a polygon")
        except FaceFileError:
            continue
        # Drawing takes time by the distance of a point, as of landmarks.
        if len(points_n2) >= 3 and np.abs(points_n2).max() <= (1 + MAX_SPREAD_EDGES) * edge_px:
            polygons.append((entry[0] == 1, points_n2))
    return polygons


def _decoded_mask(content: bytes) -> np.ndarray:
    """Pixels of a mask's own file, (s, s) uint8."""
    if len(content) > MAX_MASK_BYTES:
        raise FaceFileError(f"has an xseg_mask of more than {MAX_MASK_BYTES} bytes: remove it")
    # A PNG, or a JPEG where that would not have fitted.
    is_png = content.startswith(png.SIGNATURE)
    size_px = png.edge_of(content) if is_png else dfl_jpeg.edge_of(content)
    if size_px is None or not 0 < size_px <= MAX_MASK_PX:
        raise FaceFileError(
            f"has an xseg_mask that is no square picture of up to {MAX_MASK_PX} px: apply XSeg "
            "again, or set data.mask_type to extended"
        )
    pixels = None
    if png.is_complete(content) if is_png else dfl_jpeg.is_complete(content):
        encoded = np.frombuffer(content, np.uint8)
        with contextlib.suppress(cv2.error), silent_libraries():
            pixels = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None or pixels.shape != (size_px, size_px):
        raise FaceFileError(
            "has a damaged xseg_mask: apply XSeg again, or set data.mask_type to extended"
        )
    return pixels


def _drawn(polygons: list[tuple[bool, np.ndarray]], edge_px: int) -> np.ndarray:
    """The polygons as a mask: first what is inside, then what is not."""
    size_px = min(edge_px, MAX_MASK_PX)
    pixels = np.zeros((size_px, size_px), np.uint8)
    # Exclusions last, whatever their order in the file, as in DeepFaceLab.
    for wanted in (True, False):
        for is_inside, points_n2 in polygons:
            if is_inside == wanted:
                points = np.rint(points_n2 * (size_px / edge_px)).astype(np.int32)
                cv2.fillPoly(pixels, [points], 255 if is_inside else 0)
    return pixels


def _refuse(what: str) -> NoReturn:
    raise FaceFileError(f"its metadata {what}: extract the face again")
