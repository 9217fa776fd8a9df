"""A drawn film: frames of one person who moves and speaks, and the faces extracted from them."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...system.durable_files import folder_beside, writing
from ..geometry import Crop, crop_matrix
from ..png import write_face
from ..png_pixels import encode_rgb
from . import DRAWING_VERSION, FRAME_EDGE, check_arguments, drawn, header_of, lit, read_names
from .head import NOISE_SHIFTS, Scene, draw_scene

FRAMES_BETWEEN_POSES = 20
"""Frames from one pose to the next, 0.8 s at 25 a second. Chosen by eye."""

_CONSTANT = ("light_warmth", "light_strength", "ambient", "scale", "shift", "background")
"""What stays as it is throughout a film: one place, one camera, one lamp."""


def draw_film(
    frames: Path, faces: Path, *, identity: str, count: int, size_px: int = 160, seed: int = 0
) -> None:
    """Draw ``count`` frames of a person into one folder, and the faces of them into another.

    A frame is 2.6 times as large as a face. Each folder appears whole or not at all; those that
    hold exactly this film are left as they are.

    Raises:
        ValueError: A folder holds anything else, or an argument is out of range; one line.
    """
    check_arguments(identity, count, size_px, seed)
    film = f"film_{identity}_v{DRAWING_VERSION}_seed{seed}_{size_px}px"
    names = [f"{film}_{number:06d}" for number in range(count)]
    there = [
        read_names(frames) == [f"{name}.png" for name in names],
        read_names(faces) == [f"{name}_0.png" for name in names],
    ]
    if all(there):
        return
    for folder, is_whole in zip((frames, faces), there, strict=True):
        if read_names(folder) and not is_whole:
            raise ValueError(f"{folder} is not empty: give a new folder, or empty this one first")
    frames.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until all is there, as a folder of drawn faces.
    with writing(frames), folder_beside(frames) as part:
        for kind in ("frames", "faces"):
            (part / kind).mkdir()
        for name, scene in zip(names, _scenes(seed), strict=False):
            _draw_frame(part, name, identity, scene, size_px)
        for made, folder in ((part / "frames", frames), (part / "faces", faces)):
            if not read_names(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                made.replace(folder)


def _draw_frame(part: Path, name: str, identity: str, scene: Scene, size_px: int) -> None:
    """Write one frame, and the face cut out of it as extraction does."""
    drawing, sheet, alignment = drawn(identity, scene, size_px)
    frame_px = round(FRAME_EDGE * size_px)
    whole_23 = np.eye(2, 3)
    frame = lit(drawing, sheet, whole_23, frame_px)
    (part / "frames" / f"{name}.png").write_bytes(encode_rgb(frame))
    head_23 = crop_matrix(alignment, Crop("head", 1.0, 0.0, size_px))
    # Out of the lit frame, not lit anew: a swap is to find in it what the face shows.
    face = cv2.warpAffine(frame, head_23, (size_px, size_px), flags=cv2.INTER_LINEAR)
    header = header_of(drawing, alignment, f"{name}.png", f"{name}_0.png", size_px)
    write_face(part / "faces" / f"{name}_0.png", face, header)


def _scenes(seed: int) -> Iterator[Scene]:
    """Scenes of a film without end: from pose to pose, softly."""
    # No key of a single face, whose upper half is 0 or 1.
    random = np.random.Generator(np.random.Philox(key=[seed, 3 << 32]))
    poses = (draw_scene(random) for _ in itertools.count())
    first = next(poses)
    fixed = {name: getattr(first, name) for name in _CONSTANT}
    for before, after in itertools.pairwise(itertools.chain([first], poses)):
        for step in range(FRAMES_BETWEEN_POSES):
            # A cosine: a head speeds up and slows down.
            share = 0.5 - 0.5 * np.cos(np.pi * step / FRAMES_BETWEEN_POSES)
            down, across = map(int, random.integers(NOISE_SHIFTS, size=2))
            scene = _between(before, after, share)
            yield dataclasses.replace(scene, noise_shift=(down, across), **fixed)


def _between(before: Scene, after: Scene, share: float) -> Scene:
    """The scene a share of the way from one to another."""
    mixed: dict[str, Any] = {}
    for field in dataclasses.fields(Scene):
        ends = (np.asarray(getattr(scene, field.name), float) for scene in (before, after))
        start, end = ends
        value = start + share * (end - start)
        mixed[field.name] = tuple(value.tolist()) if value.ndim else float(value)
    return Scene(**mixed)
