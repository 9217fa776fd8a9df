"""Augmentation: faces a second and core, with every variation on, drawing included.

The faces change from batch to batch, as in training, so that no face is still in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..kernels.augment import NUM_NEAREST, Landmarks, augment, empty, workspace_bytes
from ..kernels.draw import Ranges, draw

SIZES = ((64, (64,)), (128, (128,)), (128, (256,)), (64, (32, 64, 128)))
"""Input and outputs in px; the store has the largest."""

_STORE_BYTES = 64 * 2**20
"""Bytes of each side, so that no face is still in the cache of a GPU when it comes again."""


def step(
    input_px: int,
    output_px: Sequence[int],
    batch: int,
    num_threads: int,
    device: str = "cpu",
    *,
    input_channels: int = 3,
    dtype: torch.dtype = torch.float32,
    to_landmarks: bool = False,
) -> Callable[[], None]:
    """A function that draws and augments the next ``batch`` faces: half of each of two stores."""
    size_px = max(input_px, *output_px)
    faces = [draw_store(size_px).to(device) for _ in range(2)]
    out = empty(
        batch,
        input_px=input_px,
        output_px=output_px,
        input_channels=input_channels,
        input_dtype=dtype,
        target_dtype=dtype,
        device=device,
    )
    num_faces, first = [len(faces_fssc) for faces_fssc in faces], 0
    landmarks = [_landmarks(count, size_px, device) for count in num_faces]
    workspace = None
    # Made once, as a feed keeps it from batch to batch.
    if device != "cpu":
        sizes: dict[str, Any] = {"input_px": input_px, "output_px": output_px}
        needed = workspace_bytes(batch, size_px=size_px, to_landmarks=to_landmarks, **sizes)
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)

    def run() -> None:
        nonlocal first
        params_nx = draw(
            Ranges(warp_to_landmarks=to_landmarks),
            seed=1,
            first=[first, first],
            count=batch // 2,
            num_faces=num_faces,
            size_px=size_px,
            device=device,
        )
        augment(
            faces,
            params_nx,
            input_px=input_px,
            output_px=output_px,
            landmarks=landmarks if to_landmarks else None,
            input_channels=input_channels,
            # As training weighs by default, so that these masks are turned and weighed as well.
            eye_multiplier=3,
            mouth_multiplier=2,
            out=out,
            num_threads=num_threads,
            workspace=workspace,
        )
        first += batch // 2

    return run


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time)."""
    on_gpu = torch.cuda.is_available()
    # As training has it on a GPU, whose tensor cores want multiples of 8.
    device, channels = ("cuda", 8) if on_gpu else ("cpu", 3)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for input_px, output_px in SIZES:
        for batch in (32, 128):
            for to_landmarks in (False, True):
                what = {
                    "kernel": "augment",
                    "variant": "mien",
                    "batch": batch,
                    "input_px": input_px,
                    "output_px": list(output_px),
                    "input_channels": channels,
                    "dtype": str(dtype).removeprefix("torch."),
                    "warp": "landmarks" if to_landmarks else "grid",
                    "num_threads": 1,
                    "bytes": batch * _face_bytes(input_px, output_px, channels, dtype.itemsize),
                }
                yield (
                    what,
                    step(
                        input_px,
                        output_px,
                        batch,
                        1,
                        device,
                        input_channels=channels,
                        dtype=dtype,
                        to_landmarks=to_landmarks,
                    ),
                )


def _face_bytes(input_px: int, output_px: Sequence[int], channels: int, itemsize: int) -> int:
    """What must at least be moved for a face: the store read once, every result written once."""
    outputs = sum((3 * itemsize + 4) * edge**2 for edge in output_px)
    return 8 * max(input_px, *output_px) ** 2 + channels * itemsize * input_px**2 + outputs


def _landmarks(num_faces: int, size_px: int, device: str) -> Landmarks:
    """A spiral of points in the middle of each face, a little shaken."""
    generator = np.random.default_rng(0)
    turns = np.linspace(0, 6 * np.pi, 68)
    spiral = 0.5 + 0.018 * turns[:, None] * np.stack([np.cos(turns), np.sin(turns)], 1)
    points = spiral + generator.normal(0, 0.02, (num_faces, 68, 2))
    nearest = generator.integers(0, num_faces, (num_faces, NUM_NEAREST))
    return Landmarks(
        points_fl2=torch.tensor(points * size_px, dtype=torch.float32, device=device),
        nearest_fk=torch.tensor(nearest, dtype=torch.int32, device=device),
    )


def draw_store(size_px: int) -> torch.Tensor:
    """Smooth pictures with a fine grain, as faces have, and soft discs for masks."""
    generator = np.random.default_rng(0)
    num_faces = max(2, _STORE_BYTES // (8 * size_px * size_px))
    places = np.linspace(-1, 1, size_px, dtype=np.float32)
    faces = np.zeros((num_faces, size_px, size_px, 8), np.uint8)
    radius = np.hypot(places, places[:, None])
    for channel, edge in ((3, 0.9), (4, 0.3), (5, 0.2)):
        faces[..., channel] = np.clip(255 * 8 * (edge - radius), 0, 255)
    for face in faces:
        for channel in range(3):
            tilt, bend, level = generator.uniform((-60, -60, 60), (60, 60, 190))
            face[..., channel] = np.clip(
                level
                + tilt * places
                + bend * np.cos(4 * radius)
                + generator.integers(-6, 7, (size_px, size_px)),
                0,
                255,
            )
    return torch.from_numpy(faces)
