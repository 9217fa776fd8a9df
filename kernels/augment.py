"""Turn faces of the store into network inputs, targets and loss weights, in one call.

    draw(ranges, seed=, first=, count=, num_faces=, size_px=)    -> params
    augment((faces_a, faces_b), params, input_px=, output_px=, ...) -> Augmented

    Augmented.input_bchw     (B, 3, input_px, input_px)    0..1, BGR, channels_last; or (B, 8, ...)
             .targets_bchw   one (B, 3, P, P) per output   0..1, BGR, channels_last
             .weights_b1hw   one (B, 1, P, P) per output   float32
             .mask_b1hw      (B, 1, P, P) of the last output, float32; None unless asked for

A batch holds as many faces of A as of B, A's before B's; both are made at once, so that a step on
a GPU is one launch to draw and one series of launches to augment. Each side has a store of its own.
A store alone makes batches of side A alone.

Each face is gathered, varied in colour (a shift of L, a and b, then CLAHE on L), zoomed, turned,
shifted (with its masks, the edge pixels repeated) and mirrored. That picture, resized, is the
target; with the masks it gives one weight per pixel,

    weight = face * (1 + E * eye) * (1 + M * mouth)    E, M: the multipliers above 1, else 0

and, bent and resized, the input: bent by a random 5 x 5 grid, or so that its landmarks come to lie
where those of a similar face of the other side are. Between the stages levels are rounded to uint8,
in the order and with the rounding of OpenCV 5, whose results it equals. One pass writes
everything in the training's dtype and layout: a dozen OpenCV calls and as many temporaries per face
become one call per batch.

Every random number is a pure function of (seed, side, serial number of the face), with the same
bits on the CPU and on a GPU. The faces of a side have the serial numbers 0, 1, 2, ...; each
``num_faces`` of them in a row are all faces of the side, in a new order.

Shape letters: F faces of the store, S its size in px, B faces of the batch, C channels, H rows, W
columns, N rows of parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dispatch, native
from .checks import check_memory, check_tensor

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
NUM_LANDMARKS, NUM_NEAREST = 68, 10
MAX_SIDES = 2
MAX_OUTPUTS = 8
INPUT_CHANNELS = (3, 8)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WIDEST, _PIXEL_BYTES, _RECORD_ALIGNMENT = 16, 8, 8  # bytes that a GPU reads or writes at once


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


@dataclass(frozen=True, kw_only=True)
class Landmarks:
    """What `augment` needs of one side to warp to landmarks."""

    points_fl2: Tensor
    """Landmarks of every face of the store (F, 68, 2) float32, x and y in px of the store."""

    nearest_fk: Tensor
    """Faces of the other side (F, 10) int32, one of which each face is warped to."""


@dataclass
class Augmented:
    """One augmented batch. See the module's first lines for shapes, ranges and dtypes."""

    input_bchw: Tensor
    targets_bchw: list[Tensor]
    weights_b1hw: list[Tensor]
    mask_b1hw: Tensor | None


def empty(
    batch: int,
    *,
    input_px: int,
    output_px: Sequence[int],
    input_channels: int = 3,
    learn_mask: bool = False,
    input_dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Augmented:
    """Room for ``batch`` augmented faces, not yet written."""

    def picture(channels: int, edge: int, dtype: torch.dtype) -> Tensor:
        shape = (batch, channels, edge, edge)
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)

    def plane(edge: int) -> Tensor:
        return torch.empty(batch, 1, edge, edge, device=device)

    return Augmented(
        picture(input_channels, input_px, input_dtype),
        [picture(3, edge, target_dtype) for edge in output_px],
        [plane(edge) for edge in output_px],
        plane(output_px[-1]) if learn_mask else None,
    )


def params_from_records(records: np.ndarray) -> Tensor:
    """`FACE_PARAMS` records (N,) as parameters for `augment`: uint8 (N, bytes of a record)."""
    if records.dtype != FACE_PARAMS or records.ndim != 1:
        raise ValueError(f"records must be a vector of FACE_PARAMS, got {records.dtype}")
    packed = np.ascontiguousarray(records).view(np.uint8)
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
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Parameters of ``count`` faces of each side, uint8 (N, bytes of FACE_PARAMS).

    Row i belongs to A's serial number ``first[0] + i``, row ``count + i`` to B's ``first[1] + i``.

    Args:
        ranges: How far to vary.
        seed: Any 64-bit number.
        first: Serial number of each side's first face; or an int64 tensor of them on the device,
            which is read and then moved on by ``count`` when the drawing runs, so that each replay
            of a captured graph draws the next faces.
        count: How many of each side.
        num_faces: Faces in each side's store: one number for A alone, or two.
        size_px: The stores' edge S.
        device: Device to draw on; default: that of ``first``, the CPU for numbers.
        out: Tensor to put them in.

    Raises:
        ValueError: On a number out of range.
    """
    if device is None:
        device = first.device if isinstance(first, Tensor) else "cpu"
    device, sides = torch.device(device), len(num_faces)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name theirs
    if not 1 <= sides <= MAX_SIDES:
        raise ValueError(f"num_faces must name 1 or 2 sides, got {list(num_faces)}")
    if count < 0 or min(num_faces) < 1 or size_px < 8:
        raise ValueError(
            f"count must be >= 0, num_faces >= 1 and size_px >= 8, got {count}, {list(num_faces)}, "
            f"{size_px}"
        )
    if not 0 <= ranges.color_clahe_max_size <= 8:
        raise ValueError(f"color_clahe_max_size must be 0 to 8, got {ranges.color_clahe_max_size}")
    if isinstance(first, Tensor):
        check_tensor(first, "first", (sides,), (torch.int64,), device)
        check_memory(first, "first")
    elif len(first) != sides or min(first) < 0:
        raise ValueError(f"first must be {sides} numbers, none negative, got {list(first)}")
    shape = (sides * count, FACE_PARAMS.itemsize)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=device)
    check_tensor(out, "out", shape, (torch.uint8,), device)
    check_memory(out, "out", alignment=_RECORD_ALIGNMENT)

    ffi, _ = native.library()
    given = ffi.new(
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
    job = ffi.new("mien_draw_job *")
    job.seed = seed % 2**64
    job.num_sides = sides
    job.size_px = size_px
    job.count = count
    job.num_faces = list(num_faces)
    if isinstance(first, Tensor):
        job.counters = ffi.cast("int64_t *", first.data_ptr())
    else:
        job.first = list(first)
    job.params = ffi.cast("mien_face *", out.data_ptr())
    if dispatch.uses_cuda(device):
        native.launch("draw", device, given, job)
    else:
        native.call("draw_cpu", given, job)
    return out


def augment(
    faces: Sequence[Tensor],
    params_nx: Tensor,
    *,
    input_px: int,
    output_px: Sequence[int],
    num_faces: Sequence[int] | None = None,
    landmarks: Sequence[Landmarks] | None = None,
    input_channels: int = 3,
    penalize_mask: bool = True,
    eye_multiplier: float = 1,
    mouth_multiplier: float = 1,
    learn_mask: bool = False,
    single_interpolation: bool = False,
    rgb: bool = False,
    input_dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype = torch.float32,
    out: Augmented | None = None,
    num_threads: int = 0,
    workspace: Tensor | None = None,
) -> Augmented:
    """The augmented faces that ``params_nx`` names.

    Runs where the parameters lie; faces in pinned host memory can be read from a GPU.

    Args:
        faces: Each side's store, uint8 (F, S, S, 8): B, G, R, face, eye, mouth, 0, 0. The first
            half of the rows are faces of the first, the others of the second; S is the same.
        params_nx: Records from `draw` or `params_from_records`.
        input_px: Edge of the input, at most S.
        output_px: Edge of each output, at most S.
        num_faces: Faces of each side's whole store, where ``faces`` holds only those of this batch,
            in the order of the rows.
        landmarks: Landmarks of both sides, where faces may be warped to them; on the device.
        input_channels: 3, or 8 for an input whose channels 3 to 7 are zeros, as tensor cores
            want multiples of 8.
        penalize_mask: Weigh by the masks; else every weight is 1.
        eye_multiplier: E of the formula where above 1.
        mouth_multiplier: M of the formula where above 1.
        learn_mask: Give the face mask of the last output as well.
        single_interpolation: Sample a bent input once, from the coloured face, by affine and warp
            together. It differs in three things: it is slightly sharper, as nothing is blended and
            rounded twice; positions are single floats throughout, not 32nds of a pixel; and what
            lies outside the picture repeats its edge instead of being black. Targets, weights and
            faces that are not bent stay the same.
        rgb: Write R, G, B instead of B, G, R.
        input_dtype: float32, bfloat16 or float16; of the input.
        target_dtype: The same, of the targets.
        out: Tensors to put everything in, from `empty`; the dtypes are then its own.
        num_threads: CPU threads; 0: as many as the process has cores. The result is the same.
        workspace: GPU only: tensor of at least `workspace_bytes`, aligned to 16 of them.

    Raises:
        ValueError: On shapes, dtypes or devices that do not fit.
    """
    device = params_nx.device
    count = params_nx.shape[0]
    size_px = _check_faces(faces, device)
    check_tensor(params_nx, "params", (count, FACE_PARAMS.itemsize), (torch.uint8,), device)
    check_memory(params_nx, "params", alignment=_RECORD_ALIGNMENT)
    if count % len(faces):
        raise ValueError(f"params must have as many rows for each side, got {count} rows")
    gathered = num_faces is not None
    in_batch = [len(faces_fssc) for faces_fssc in faces]
    in_store = in_batch if num_faces is None else list(num_faces)
    if len(in_store) != len(faces) or (gathered and in_batch != [count // len(faces)] * len(faces)):
        raise ValueError(
            f"with num_faces, faces must be those of the {count} rows, got {in_batch} of "
            f"{in_store} faces"
        )
    if landmarks is not None:
        _check_landmarks(landmarks, in_store, device)
    if not output_px or len(output_px) > MAX_OUTPUTS:
        raise ValueError(f"output_px must name 1 to {MAX_OUTPUTS} sizes, got {list(output_px)}")
    for edge in (input_px, *output_px):
        if not 1 <= edge <= size_px:
            raise ValueError(f"sizes must be 1 to {size_px} px (the store's), got {edge}")
    if input_channels not in INPUT_CHANNELS:
        raise ValueError(f"input_channels must be 3 or 8, got {input_channels}")
    for dtype in (input_dtype, target_dtype):
        if dtype not in _TYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if out is None:
        out = empty(
            count,
            input_px=input_px,
            output_px=output_px,
            input_channels=input_channels,
            learn_mask=learn_mask,
            input_dtype=input_dtype,
            target_dtype=target_dtype,
            device=device,
        )
    _check_out(out, (count, input_channels, input_px, input_px), output_px, learn_mask, device)

    ffi, lib = native.library()
    job = _job(ffi, count, size_px, input_px, output_px)
    job.num_sides = len(faces)
    job.gathered = gathered
    job.input_channels = input_channels
    for side, faces_fssc in enumerate(faces):
        job.faces[side] = ffi.cast("uint8_t *", faces_fssc.data_ptr())
        job.num_faces[side] = in_store[side]
    for side, given in enumerate(landmarks or ()):
        job.to_landmarks = 1
        job.landmarks[side] = ffi.cast("float *", given.points_fl2.data_ptr())
        job.nearest[side] = ffi.cast("int32_t *", given.nearest_fk.data_ptr())
    job.params = ffi.cast("mien_face *", params_nx.data_ptr())
    job.rgb = rgb
    job.input_type = _TYPES[out.input_bchw.dtype]
    job.target_type = _TYPES[out.targets_bchw[0].dtype]
    job.input = ffi.cast("void *", out.input_bchw.data_ptr())
    for i, (target, weight) in enumerate(zip(out.targets_bchw, out.weights_b1hw, strict=True)):
        job.targets[i] = ffi.cast("void *", target.data_ptr())
        job.weights[i] = ffi.cast("float *", weight.data_ptr())
    if learn_mask:
        assert out.mask_b1hw is not None
        job.mask = ffi.cast("float *", out.mask_b1hw.data_ptr())
    job.penalize = penalize_mask
    job.single_interpolation = single_interpolation
    job.eye_extra = eye_multiplier if eye_multiplier > 1 else 0
    job.mouth_extra = mouth_multiplier if mouth_multiplier > 1 else 0

    if not dispatch.uses_cuda(device):
        native.call("augment_cpu", job, num_threads)
        return out
    needed = lib.mien_augment_workspace_bytes(job)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
    if workspace.device != device or workspace.nbytes < needed:
        raise ValueError(
            f"workspace must have {needed} bytes on {device}, got {workspace.nbytes} on "
            f"{workspace.device}"
        )
    check_memory(workspace, "workspace", alignment=_WIDEST)
    room = ffi.cast("void *", workspace.data_ptr())
    native.launch("augment", device, job, room, workspace.nbytes)
    return out


def workspace_bytes(
    batch: int,
    *,
    size_px: int,
    input_px: int,
    output_px: Sequence[int],
    to_landmarks: bool = False,
) -> int:
    """GPU memory that `augment` needs besides its results, for ``batch`` faces."""
    ffi, lib = native.library()
    job = _job(ffi, batch, size_px, input_px, output_px, to_landmarks)
    return lib.mien_augment_workspace_bytes(job)


def launches(
    batch: int,
    *,
    size_px: int,
    input_px: int,
    output_px: Sequence[int],
    to_landmarks: bool = False,
) -> dict[str, int]:
    """Kernels that `draw` and `augment` launch on a GPU for ``batch`` faces of both sides."""
    ffi, lib = native.library()
    job = _job(ffi, batch, size_px, input_px, output_px, to_landmarks)
    return {"draw": int(batch > 0), "augment": lib.mien_augment_launches(job)}


def _warp_of(ranges: Ranges) -> int:
    if not ranges.warp:
        return NO_WARP
    return WARP_LANDMARKS if ranges.warp_to_landmarks else WARP_GRID


def _job(
    ffi: Any,
    count: int,
    size_px: int,
    input_px: int,
    output_px: Sequence[int],
    to_landmarks: bool = False,
) -> Any:
    """A job of the stores' first sides, as many as it needs, its pointers unset."""
    job = ffi.new("mien_augment_job *")
    job.num_sides = MAX_SIDES if to_landmarks else 1
    job.num_faces = [1] * MAX_SIDES
    job.to_landmarks = to_landmarks
    job.count = count
    job.input_channels = 3
    job.size_px = size_px
    job.input_px = input_px
    job.num_outputs = len(output_px)
    for i, edge in enumerate(output_px):
        job.output_px[i] = edge
    return job


def _check_faces(faces: Sequence[Tensor], device: torch.device) -> int:
    """The edge S of the stores; refuse those that cannot be read from the device."""
    if not 1 <= len(faces) <= MAX_SIDES:
        raise ValueError(f"faces must be 1 or 2 stores, got {len(faces)}")
    size_px = faces[0].shape[1] if faces[0].ndim == 4 else 0
    for faces_fssc in faces:
        if faces_fssc.dtype != torch.uint8 or faces_fssc.ndim != 4 or faces_fssc.shape[3] != 8:
            raise ValueError(
                "faces must be uint8 (F, S, S, 8), got "
                f"{faces_fssc.dtype} {tuple(faces_fssc.shape)}"
            )
        shape = (len(faces_fssc), size_px, size_px, 8)
        check_tensor(faces_fssc, "faces", shape, (torch.uint8,))
        check_memory(faces_fssc, "faces", alignment=_PIXEL_BYTES)
        if faces_fssc.device != device and not (device.type == "cuda" and faces_fssc.is_pinned()):
            raise ValueError(
                f"params on {device} but faces on {faces_fssc.device}: put them on one device, or "
                "the faces in pinned memory"
            )
    return size_px


def _check_landmarks(
    landmarks: Sequence[Landmarks], num_faces: Sequence[int], device: torch.device
) -> None:
    if len(landmarks) != MAX_SIDES or len(num_faces) != MAX_SIDES:
        raise ValueError(
            f"landmarks must be of both sides, got {len(landmarks)} of them and {len(num_faces)} "
            "stores"
        )
    for given, count in zip(landmarks, num_faces, strict=True):
        points = (count, NUM_LANDMARKS, 2)
        check_tensor(given.points_fl2, "landmarks", points, (torch.float32,), device)
        check_memory(given.points_fl2, "landmarks")
        check_tensor(given.nearest_fk, "nearest", (count, NUM_NEAREST), (torch.int32,), device)
        check_memory(given.nearest_fk, "nearest")


def _check_out(
    out: Augmented,
    input_shape: tuple[int, int, int, int],
    output_px: Sequence[int],
    learn_mask: bool,
    device: torch.device,
) -> None:
    outputs = len(output_px)
    if len(out.targets_bchw) != outputs or len(out.weights_b1hw) != outputs:
        raise ValueError(
            f"out must have {outputs} targets and weights, got {len(out.targets_bchw)} and "
            f"{len(out.weights_b1hw)}"
        )
    if (out.mask_b1hw is not None) != learn_mask:
        raise ValueError("out must have a mask if, and only if, learn_mask is set")
    types, count = tuple(_TYPES), input_shape[0]
    check_tensor(out.input_bchw, "input", input_shape, types, device)
    widest = _WIDEST if input_shape[1] == 8 else None  # those are stored 16 bytes at once
    check_memory(out.input_bchw, "input", alignment=widest, channels_last=True)
    same = (out.targets_bchw[0].dtype,) if out.targets_bchw[0].dtype in types else types
    for edge, target, weight in zip(output_px, out.targets_bchw, out.weights_b1hw, strict=True):
        check_tensor(target, "target", (count, 3, edge, edge), same, device)
        check_memory(target, "target", channels_last=True)
        check_tensor(weight, "weight", (count, 1, edge, edge), (torch.float32,), device)
        check_memory(weight, "weight")
    if out.mask_b1hw is not None:
        edge = output_px[-1]
        check_tensor(out.mask_b1hw, "mask", (count, 1, edge, edge), (torch.float32,), device)
        check_memory(out.mask_b1hw, "mask")
