"""Drawn face sets: two people who do not exist, as extracted face PNGs.

They stand in wherever a face folder is needed and no real person's face may be used: the
demonstration, the tests, the benchmarks. Every picture is drawn in a frame about twice as large,
then cut out as extraction does it (`geometry.align`, the head crop), with exact landmarks.

Face n of a person depends on (identity, seed, n, size) only, not on how many there are.
"""

import functools
import os
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...system.durable_files import folder_beside, writing
from ...system.paths import expanded
from ..geometry import Alignment, Crop, align, crop_matrix, transform
from ..png import FaceFileError, FaceHeader, StoredMask, read_header, write_face
from .head import (
    IDENTITIES,
    NOISE_SHIFTS,
    Scene,
    draw_scene,
    head_landmarks,
    make_camera,
    project_landmarks,
)
from .painting import Drawing, paint
from .relief import shade_face
from .sheet import SUBPIXEL_BITS, Sheet, fixed_point
from .tint import tint_face

MIN_SIZE_PX = 64
MAX_SIZE_PX = 1024
MAX_FACES = 100_000

DRAWING_VERSION = 1
"""Version of the drawing, in the name of every frame, of a film too: what an older one has drawn is
not taken for this one's."""

_ALIGNMENTS_VERSION = 2.4
_FRAME_SCALE = 1.65
FRAME_EDGE = 2.6
"""Edge of a frame by that of the crop: a turned crop meets no edge of it."""

_INNER_BOX = 0.375
_MASK_PX = 128
# Levels, of a usual camera. Chosen by eye.
_NOISE_SIGMA = 1.4


def draw_folder(
    path: str | os.PathLike[str], *, identity: str, count: int, size_px: int = 256, seed: int = 0
) -> None:
    """Fill a folder with ``count`` face PNGs of one drawn person, ``a`` or ``b``.

    The folder appears whole or not at all. One that holds exactly this set already is left as it
    is. Raises ValueError, one line, where it holds anything else, or an argument is out of range.
    """
    check_arguments(identity, count, size_px, seed)
    folder = expanded(path).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the drawn faces")
    names = [_face_name(identity, number) for number in range(count)]
    if folder.is_dir() and any(folder.iterdir()):
        if _holds_this_set(folder, names, identity, size_px, seed):
            return
        raise ValueError(f"{folder} is not empty: give a new folder, or empty this one first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until all faces are there: a part would pass for a small set.
    with writing(folder), folder_beside(folder) as part:
        for number, name in enumerate(names):
            image, header = draw_face(identity, number, size_px=size_px, seed=seed)
            write_face(part / name, image, header)
        part.replace(folder)


def draw_face(
    identity: str, number: int, *, size_px: int = 256, seed: int = 0
) -> tuple[np.ndarray, FaceHeader]:
    """Face ``number`` of a person: its picture, (N, N, 3) uint8 BGR head-centred, and header."""
    side = sorted(IDENTITIES).index(identity)
    # A generator for each face: it is the same one in a set of any size.
    random = np.random.Generator(np.random.Philox(key=[seed, (side << 32) | number]))
    drawing, sheet, alignment = drawn(identity, draw_scene(random), size_px)
    image = lit(drawing, sheet, crop_matrix(alignment, Crop("head", 1.0, 0.0, size_px)), size_px)
    frame, name = _frame_name(identity, number, size_px, seed), _face_name(identity, number)
    return image, header_of(drawing, alignment, frame, name, size_px)


def drawn(identity: str, scene: Scene, size_px: int) -> tuple[Drawing, Sheet, Alignment]:
    """A person in a scene: what is drawn, the painted frame, not lit yet, and the alignment of the
    face in it; size_px: edge of the face's crop."""
    frame_px = round(FRAME_EDGE * size_px)
    unit_px = _FRAME_SCALE * _INNER_BOX * size_px * scene.scale
    camera = make_camera(scene, frame_px, unit_px)
    person = IDENTITIES[identity]
    head_l3 = head_landmarks(person, scene)
    # In the format of a face's header, so that what is drawn and what is told are the same.
    landmarks_l2 = project_landmarks(head_l3, camera).astype(np.float32)
    drawing = Drawing(person, scene, camera, head_l3, landmarks_l2.astype(np.float64))
    return drawing, paint(drawing, frame_px), align(landmarks_l2)


def header_of(
    drawing: Drawing, alignment: Alignment, frame: str, name: str, size_px: int
) -> FaceHeader:
    """The header of a face that was cut out of a frame of this name."""
    landmarks_l2 = drawing.landmarks_l2.astype(np.float32)
    mask_23 = crop_matrix(alignment, Crop("face", 1.0, 0.0, _MASK_PX))
    left, top, width, height = cv2.boundingRect(landmarks_l2)
    return FaceHeader(
        landmarks_l2=landmarks_l2,
        masks=_masks(drawing, mask_23),
        box=(left, top, width, height),
        source=_source(frame, name, size_px),
    )


def check_arguments(identity: str, count: int, size_px: int, seed: int) -> None:
    if identity not in IDENTITIES:
        raise ValueError(f"identity must be one of {sorted(IDENTITIES)}, got {identity!r}")
    if not 1 <= count <= MAX_FACES:
        raise ValueError(f"count must be 1 to {MAX_FACES}, got {count}")
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise ValueError(f"size_px must be {MIN_SIZE_PX} to {MAX_SIZE_PX}, got {size_px}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be 0 to 2**63 - 1, got {seed}")


def _holds_this_set(folder: Path, names: list[str], identity: str, size_px: int, seed: int) -> bool:
    """Whether the folder holds these files and no other, each with the header it would get."""
    if read_names(folder) != names:
        return False
    for number, name in enumerate(names):
        try:
            edge_px, header = read_header(folder / name)
        except FaceFileError:
            return False
        # Their pictures are not compared: the name says all that a drawing hangs on.
        if edge_px != size_px or header.source.get("source_filename") != _frame_name(
            identity, number, size_px, seed
        ):
            return False
    return True


def _source(frame: str, name: str, size_px: int) -> dict[str, Any]:
    """Origin of a face, made up, with the keys that extraction writes."""
    frame_px = round(FRAME_EDGE * size_px)
    return {
        "alignments_version": _ALIGNMENTS_VERSION,
        "original_filename": name,
        "face_index": 0,
        "source_filename": frame,
        "source_is_video": False,
        "source_frame_dims": (frame_px, frame_px),
    }


def _frame_name(identity: str, number: int, size_px: int, seed: int) -> str:
    """Names everything that the drawing depends on."""
    return f"drawn_{identity}_v{DRAWING_VERSION}_seed{seed}_{size_px}px_{number:06d}.png"


def _face_name(identity: str, number: int) -> str:
    return f"drawn_{identity}_{number:06d}_0.png"


def read_names(folder: Path) -> list[str]:
    """Names of what a folder holds, sorted; none where there is no such folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def lit(drawing: Drawing, sheet: Sheet, patch_23: np.ndarray, size_px: int) -> np.ndarray:
    """The picture of a crop: the drawing cut out, lit, and as a camera would see it."""
    scene = drawing.scene
    size = (size_px, size_px)
    smooth_yxc = cv2.GaussianBlur(sheet.image_yxc, (3, 3), 0.8)
    flat_yxc = cv2.warpAffine(smooth_yxc, patch_23, size, flags=cv2.INTER_LINEAR)
    share_yx = cv2.warpAffine(sheet.lit_yx, patch_23, size, flags=cv2.INTER_LINEAR)
    # Light is smooth: half the size shows no difference and has a quarter of the pixels.
    map_px = size_px // 2
    map_23 = patch_23 * 0.5
    placed_l2 = transform(drawing.landmarks_l2, map_23)
    unit_px = drawing.camera.unit_px * float(np.hypot(map_23[0, 0], map_23[1, 0]))
    shade, highlight = shade_face(drawing.identity, scene, placed_l2, unit_px, map_px)
    tint = tint_face(drawing, map_23, map_px)
    around_c = np.float32(0.92 * scene.light_strength) * np.array(
        [1.0 - 0.07 * scene.light_warmth, 1.0, 1.0 + 0.05 * scene.light_warmth], np.float32
    )
    on_head = cv2.merge([shade * tint - around_c, highlight * tint[..., 1]])
    on_head = cv2.resize(on_head, size, interpolation=cv2.INTER_LINEAR)
    on_head *= (share_yx * np.float32(1.0 / 255.0))[..., None]
    lit = on_head[..., :3] + around_c
    lit *= flat_yxc
    lit += on_head[..., 3:]
    down, across = scene.noise_shift
    noise = _noise_tile(size_px)[down : down + size_px, across : across + size_px]
    return cv2.add(lit, noise, dtype=cv2.CV_8U)


@functools.lru_cache(maxsize=2)
def _noise_tile(size_px: int) -> np.ndarray:
    """The camera's noise, float32; each face takes another part of it."""
    edge = size_px + NOISE_SHIFTS
    random = np.random.Generator(np.random.Philox(key=[2, size_px]))
    return random.standard_normal((edge, edge, 3), np.float32) * np.float32(_NOISE_SIGMA)


def _masks(drawing: Drawing, mask_23: np.ndarray) -> dict[str, StoredMask]:
    """Masks such as networks give: the true outline of the face, softly and more tightly."""
    outline_p2 = transform(drawing.face_outline(), mask_23)
    affine_33 = np.vstack([mask_23, (0.0, 0.0, 1.0)])
    points = fixed_point(outline_p2)
    inside = np.zeros((_MASK_PX, _MASK_PX), np.uint8)
    cv2.fillPoly(inside, [points], (255,), cv2.LINE_AA, SUBPIXEL_BITS)
    soft = {
        "vgg-clear": cv2.GaussianBlur(inside, (0, 0), 1.6),
        "bisenet-fp_face": cv2.GaussianBlur(cv2.erode(inside, np.ones((2, 2))), (0, 0), 0.8),
    }
    return {
        name: StoredMask(zlib.compress(mask.tobytes()), _MASK_PX, "face", affine_33)
        for name, mask in soft.items()
    }
