"""Draw what is done to each face of a batch: the parameters that `augment` takes.

    draw(ranges, seed=, first=, count=, num_faces=, size_px=)    -> params, a record a face

Every random number is a pure function of (seed, side, serial number of the face), with the same
bits on the CPU and on a GPU. The faces of a side have the serial numbers 0, 1, 2, ...; each
``num_faces`` of them in a row are all faces of the side, in a new order. So a batch can be drawn
anew from a number of faces seen, and a resumed run draws what a whole one would have.

Shape letters: F faces of a store, S its size in px, N rows of parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dispatch, native
from .checks import check_memory, check_range, check_tensor

FACE_PARAMS = np.dtype(
    [
        ("index", np.int64),
        ("lab", np.float32, (3,)),
        ("clahe_tiles", np.int32),
        ("matrix", np.float32, (2, 3)),
        ("flip", np.int32),
        ("color", np.int32),
        ("warp", np.int32),
        ("near", np.int32),
        ("warp_noise", np.float32, (2, 5, 5)),
        ("landmark_noise", np.float32, (68, 2)),
    ]
)
"""What is done to one face; the struct `mien_face` of mien.h, where the fields are explained."""

NO_WARP, WARP_GRID, WARP_LANDMARKS = 0, 1, 2

MAX_SIDES = 2
RECORD_ALIGNMENT = 8
"""Divisor in bytes of the address of a record: its widest field."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """How far faces are varied; the defaults of every setting of `core.config.AugmentConfig`."""

    zoom_amount: float = 5
    """Percent of zoom, in and out."""
    rotation_range: float = 10
    """Degrees of rotation, either way."""
    shift_range: float = 5
    """Percent of the edge, either way, on each axis."""
    flip_chance: float = 50
    """Percent of faces."""
    color_lightness: float = 30
    """Percent up or down."""
    color_ab: float = 8
    """Percent up or down."""
    color_clahe_chance: float = 50
    """Percent of faces."""
    color_clahe_max_size: int = 4
    """Steps by which the CLAHE grid is refined at most, 0 to 8."""
    color: bool = True
    flip: bool = True
    warp: bool = True
    warp_to_landmarks: bool = False
    """Whether faces, where they are bent, are bent to landmarks of the other side, not at
    random."""


def params_from_records(records: np.ndarray) -> Tensor:
    """`FACE_PARAMS` records (N,) as parameters for `augment`: uint8 (N, bytes of a record)."""
    if records.dtype != FACE_PARAMS or records.ndim != 1:
        raise ValueError(f"records must be a vector of FACE_PARAMS, got {records.dtype}")
    packed = np.ascontiguousarray(records).view(np.uint8)
    # A tensor of its own: from_numpy shares the memory of the records, which are the caller's.
    return torch.from_numpy(packed.reshape(len(records), FACE_PARAMS.itemsize).copy())


def records_of(params_nx: Tensor) -> np.ndarray:
    """The parameters as `FACE_PARAMS` records (N,); a view of a CPU tensor, else a copy."""
    return params_nx.cpu().numpy().reshape(-1).view(FACE_PARAMS)


def draw(
    ranges: Ranges,
    *,
    seed: int,
    first: Sequence[int] | Tensor,
    count: int,
    num_faces: Sequence[int],
    size_px: int,
    offset: int = 0,
    advance: int | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Parameters of ``count`` faces of each side, uint8 (N, bytes of FACE_PARAMS).

    Row i belongs to A's serial number ``first[0] + offset + i``, row ``count + i`` to B's
    ``first[1] + offset + i``.

    Args:
        ranges: How far to vary.
        seed: Any 64-bit number.
        first: Serial number of each side's first face; or an int64 tensor of them on the device,
            which is read and then moved on by ``advance`` when the drawing runs, so that each
            replay of a captured graph draws the next faces.
        count: How many of each side.
        num_faces: Faces in each side's store: one number for A alone, or two.
        size_px: The stores' edge S.
        offset: Faces of each side that are left to others before those drawn here.
        advance: Faces of each side that are drawn here and by others; None: ``count``.
        device: Device to draw on; default: that of ``first``, the CPU for numbers.
        out: Tensor to put them in.

    Raises:
        ValueError: On a number out of range.
    """
    if device is None:
        device = first.device if isinstance(first, Tensor) else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name theirs
    _check(ranges, first, count, num_faces, size_px, device)
    advance = count if advance is None else advance
    _check_share(offset, count, advance)
    shape = (len(num_faces) * count, FACE_PARAMS.itemsize)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=device)
    check_tensor(out, "out", shape, (torch.uint8,), device)
    check_memory(out, "out", alignment=RECORD_ALIGNMENT)

    ffi, _ = native.library()
    ranges_struct = _struct_of(ffi, ranges)
    job = _job(ffi, seed, first, offset, num_faces, size_px, out)
    job.count, job.advance = count, advance
    if dispatch.uses_cuda(device):
        native.launch("draw", device, ranges_struct, job)
    else:
        native.call("draw_cpu", ranges_struct, job)
    return out


def _check(
    ranges: Ranges,
    first: Sequence[int] | Tensor,
    count: int,
    num_faces: Sequence[int],
    size_px: int,
    device: torch.device,
) -> None:
    sides = len(num_faces)
    if not 1 <= sides <= MAX_SIDES:
        raise ValueError(f"num_faces must name 1 or 2 sides, got {list(num_faces)}")
    if count < 0 or min(num_faces) < 1 or size_px < 8:
        raise ValueError(
            f"count must be >= 0, num_faces >= 1 and size_px >= 8, got {count}, {list(num_faces)}, "
            f"{size_px}"
        )
    check_range(ranges.color_clahe_max_size, "color_clahe_max_size", 0, 8)
    if isinstance(first, Tensor):
        check_tensor(first, "first", (sides,), (torch.int64,), device)
        check_memory(first, "first")
    elif len(first) != sides or min(first) < 0:
        raise ValueError(f"first must be {sides} numbers, none negative, got {list(first)}")


def _check_share(offset: int, count: int, advance: int) -> None:
    if offset < 0 or advance < offset + count:
        raise ValueError(
            f"offset must be >= 0 and advance >= offset + count, got {offset} and {advance} with "
            f"count {count}"
        )


def _struct_of(ffi: Any, ranges: Ranges) -> Any:
    """The ranges as the struct `mien_ranges` of mien.h."""
    return ffi.new(
        "mien_ranges *",
        {
            "zoom_percent": ranges.zoom_amount,
            "rotation_degrees": ranges.rotation_range,
            "shift_percent": ranges.shift_range,
            "flip_percent": ranges.flip_chance,
            "lightness_percent": ranges.color_lightness,
            "ab_percent": ranges.color_ab,
            "clahe_chance_percent": ranges.color_clahe_chance,
            "clahe_max_size": ranges.color_clahe_max_size,
            "color": ranges.color,
            "flip": ranges.flip,
            "warp": _warp_of(ranges),
        },
    )


def _warp_of(ranges: Ranges) -> int:
    if not ranges.warp:
        return NO_WARP
    return WARP_LANDMARKS if ranges.warp_to_landmarks else WARP_GRID


def _job(
    ffi: Any,
    seed: int,
    first: Sequence[int] | Tensor,
    offset: int,
    num_faces: Sequence[int],
    size_px: int,
    out: Tensor,
) -> Any:
    job = ffi.new("mien_draw_job *")
    # cffi refuses a negative number for an unsigned field.
    job.seed = seed % 2**64
    job.num_sides = len(num_faces)
    job.size_px = size_px
    job.num_faces = list(num_faces)
    if isinstance(first, Tensor):
        # The counters are known on the device alone, where the library adds them to `first`.
        job.counters = ffi.cast("int64_t *", first.data_ptr())
        job.first = [offset] * len(num_faces)
    else:
        job.first = [number + offset for number in first]
    job.params = ffi.cast("mien_face *", out.data_ptr())
    return job
