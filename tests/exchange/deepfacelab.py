"""Faces as DeepFaceLab writes them, of the drawn people: to test what reads them."""

import functools
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mien.core.faces.geometry import Alignment, align, transform
from mien.core.faces.png import FaceHeader
from mien.core.faces.synthetic import draw_face

SIDE_UNITS = {"whole_face": 2.131, "full_face": 1.597, "head": 2.98}
NUM_DRAWN = 6  # to draw one takes a second; the others are turned otherwise
CENTRES = {"whole_face": (0.51, 0.43), "full_face": (0.51, 0.5), "head": (0.5, 0.3)}


def jpeg_with(
    picture_bgr: np.ndarray, *segments: bytes, marker: int = 0xEF, how: Sequence[int] = ()
) -> bytes:
    """A JPEG with segments behind its first one; how: OpenCV's settings for its encoder."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, 95, *how]
    jpeg = cv2.imencode(".jpg", picture_bgr, settings)[1].tobytes()
    start = 4 + int.from_bytes(jpeg[4:6], "big")
    added = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment for segment in segments
    )
    return jpeg[:start] + added + jpeg[start:]


@functools.lru_cache(maxsize=128)
def _person(identity: str, number: int) -> tuple[np.ndarray, FaceHeader]:
    return draw_face(identity, number, size_px=256)


def jpeg_matrix(
    alignment: Alignment, edge_px: int, face_type: str, turn_degrees: float
) -> np.ndarray:
    """Matrix from px of the frame to px of the JPEG, (2, 3) float64."""
    scale, turn = edge_px / SIDE_UNITS[face_type], np.deg2rad(turn_degrees)
    turned_22 = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shift_2 = edge_px / 2 - turned_22 @ CENTRES[face_type]
    normalized_33 = np.vstack([alignment.matrix_23, [0, 0, 1]])
    return np.column_stack([turned_22, shift_2]) @ normalized_33


def drawn(
    identity: str = "a",
    number: int = 0,
    *,
    edge_px: int = 128,
    face_type: str = "whole_face",
    turn_degrees: float | None = None,
) -> tuple[np.ndarray, dict]:
    """A picture cut out as DeepFaceLab does, turned a little, and its metadata."""
    picture_bgr, header = _person(identity, number % NUM_DRAWN)
    alignment = align(header.landmarks_l2)
    turn_degrees = number % 7 / 2 if turn_degrees is None else turn_degrees
    to_jpeg_33 = np.eye(3)
    to_jpeg_33[:2] = jpeg_matrix(alignment, edge_px, face_type, turn_degrees)
    inner_px = 256 - 2 * 80  # of the head crop
    to_png_33 = np.vstack([alignment.matrix_23, [0, 0, 1]])
    to_png_33[:2, 2] -= alignment.offsets["head"]
    to_png_33[:2] *= inner_px
    to_png_33[:2, 2] += 80
    from_png_33 = to_jpeg_33 @ np.linalg.inv(to_png_33)
    jpeg_bgr = cv2.warpAffine(
        picture_bgr, from_png_33[:2], (edge_px, edge_px), flags=cv2.INTER_CUBIC
    )
    frame_l2 = header.landmarks_l2
    landmarks_l2 = transform(frame_l2, to_jpeg_33[:2])
    left, top, width, height = header.box
    return jpeg_bgr, {
        "face_type": face_type,
        "landmarks": landmarks_l2.tolist(),
        "source_filename": f"frame_{number:05d}.png",
        "source_rect": [left, top, left + width, top + height],
        "source_landmarks": frame_l2.tolist(),
        "image_to_face_mat": to_jpeg_33[:2],
        "eyebrows_expand_mod": 1.0,
    }


def dumped(values: object, protocol: int = 4) -> bytes:
    """A pickle as DeepFaceLab's Python writes it, with the names of NumPy 1."""
    data = pickle.dumps(values, protocol)
    if protocol < 4:
        return data.replace(b"cnumpy._core.", b"cnumpy.core.")
    return data


def write_jpeg(path: Path, number: int = 0, protocol: int = 4, **changes) -> Path:
    """Write one face; ``changes`` of its metadata, None takes an entry out."""
    kept = ("identity", "edge_px", "face_type", "turn_degrees")
    drawing = {key: changes.pop(key) for key in kept if key in changes}
    if drawing.get("face_type") not in SIDE_UNITS:  # of no picture that there is
        changes |= {key: drawing.pop(key) for key in ("face_type",) if key in drawing}
    picture_bgr, values = drawn(number=number, **drawing)
    values = {key: value for key, value in (values | changes).items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg_with(picture_bgr, dumped(values, protocol)))
    return path


def write_folder(folder: Path, count: int, identity: str = "a", **changes) -> Path:
    for number in range(count):
        write_jpeg(folder / f"frame_{number:05d}_0.jpg", number, identity=identity, **changes)
    return folder


def pack(jpegs: list[bytes], listed: object = None) -> bytes:
    """A faceset.pak of these files; listed: what its pickle holds."""
    data = dumped(listed)
    start = struct.pack("<QQ", 1, len(data)) + data
    offsets = [0]
    for jpeg in jpegs:
        offsets.append(offsets[-1] + len(jpeg))
    table_end = len(start) + 8 * len(offsets)
    offsets[-1] += table_end  # as it is written: from the start of the file
    return start + struct.pack(f"<{len(offsets)}Q", *offsets) + b"".join(jpegs)
