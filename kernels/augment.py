"""Turn faces of the store into network inputs, targets and loss weights, in one call.

    augment((faces_a, faces_b), params, input_px=, output_px=, ...) -> Augmented

where `draw` gives the params.

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

Shape letters: F faces of the store, S its size in px, B faces of the batch, C channels, H rows, W
columns, N rows of parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, native
from .checks import FLOAT_DTYPES, WIDEST_ACCESS, check_memory, check_tensor
from .draw import FACE_PARAMS, MAX_SIDES, RECORD_ALIGNMENT

NUM_LANDMARKS, NUM_NEAREST = 68, 10
MAX_OUTPUTS = 8
INPUT_CHANNELS = (3, 8)
_PIXEL_BYTES = 8  # B, G, R, three masks and two zeros, which a GPU reads at once


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
    device, count = params_nx.device, params_nx.shape[0]
    size_px = _check_faces(faces, device)
    _check_params(params_nx, faces, num_faces)
    in_store = list(num_faces or map(len, faces))
    if landmarks is not None:
        _check_landmarks(landmarks, in_store, device)
    _check_sizes(input_px, output_px, size_px)
    _check_formats(input_channels, (input_dtype, target_dtype))
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

    ffi, _ = native.library()
    job = _job(ffi, count, size_px, input_px, output_px)
    job.gathered = num_faces is not None
    # The job holds addresses alone; the tensors live on in the arguments until the call is made.
    job.params = ffi.cast("mien_face *", params_nx.data_ptr())
    _point_at_faces(ffi, job, faces, in_store, landmarks or ())
    _point_at_results(ffi, job, out)
    job.rgb = rgb
    job.penalize = penalize_mask
    job.single_interpolation = single_interpolation
    job.eye_extra = eye_multiplier if eye_multiplier > 1 else 0
    job.mouth_extra = mouth_multiplier if mouth_multiplier > 1 else 0
    if dispatch.uses_cuda(device):
        _launch(job, device, workspace)
    else:
        native.call("augment_cpu", job, num_threads)
    return out


def _launch(job: Any, device: torch.device, workspace: Tensor | None) -> None:
    """Run the job on a GPU, in the workspace where there is one."""
    ffi, lib = native.library()
    num_bytes = lib.mien_augment_workspace_bytes(job)
    if workspace is None:
        # It may be freed before the kernels have run: PyTorch then hands it to later work of the
        # same stream alone.
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if workspace.device != device or workspace.nbytes < num_bytes:
        raise ValueError(
            f"workspace must have {num_bytes} bytes on {device}, got {workspace.nbytes} on "
            f"{workspace.device}"
        )
    check_memory(workspace, "workspace", alignment=WIDEST_ACCESS)
    native.launch(
        "augment", device, job, ffi.cast("void *", workspace.data_ptr()), workspace.nbytes
    )


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


def _point_at_faces(
    ffi: Any,
    job: Any,
    faces: Sequence[Tensor],
    in_store: Sequence[int],
    landmarks: Sequence[Landmarks],
) -> None:
    """Give the job the stores and landmarks of its sides."""
    job.num_sides = len(faces)
    for side, faces_fssc in enumerate(faces):
        job.faces[side] = ffi.cast("uint8_t *", faces_fssc.data_ptr())
        job.num_faces[side] = in_store[side]
    for side, of_side in enumerate(landmarks):
        job.to_landmarks = 1
        job.landmarks[side] = ffi.cast("float *", of_side.points_fl2.data_ptr())
        job.nearest[side] = ffi.cast("int32_t *", of_side.nearest_fk.data_ptr())


def _point_at_results(ffi: Any, job: Any, out: Augmented) -> None:
    """Give the job the tensors that it writes, and their types."""
    job.input_channels = out.input_bchw.shape[1]
    job.input_type = FLOAT_DTYPES.index(out.input_bchw.dtype)
    job.target_type = FLOAT_DTYPES.index(out.targets_bchw[0].dtype)
    job.input = ffi.cast("void *", out.input_bchw.data_ptr())
    for i, (target, weight) in enumerate(zip(out.targets_bchw, out.weights_b1hw, strict=True)):
        job.targets[i] = ffi.cast("void *", target.data_ptr())
        job.weights[i] = ffi.cast("float *", weight.data_ptr())
    if out.mask_b1hw is not None:
        job.mask = ffi.cast("float *", out.mask_b1hw.data_ptr())


def _check_params(
    params_nx: Tensor, faces: Sequence[Tensor], num_faces: Sequence[int] | None
) -> None:
    count, sides = params_nx.shape[0], len(faces)
    shape = (count, FACE_PARAMS.itemsize)
    check_tensor(params_nx, "params", shape, (torch.uint8,), params_nx.device)
    check_memory(params_nx, "params", alignment=RECORD_ALIGNMENT)
    if count % sides:
        raise ValueError(f"params must have as many rows for each side, got {count} rows")
    in_batch = [len(faces_fssc) for faces_fssc in faces]
    if num_faces is not None and (len(num_faces) != sides or in_batch != [count // sides] * sides):
        raise ValueError(
            f"with num_faces, faces must be those of the {count} rows, got {in_batch} of "
            f"{list(num_faces)} faces"
        )


def _check_sizes(input_px: int, output_px: Sequence[int], size_px: int) -> None:
    if not output_px or len(output_px) > MAX_OUTPUTS:
        raise ValueError(f"output_px must name 1 to {MAX_OUTPUTS} sizes, got {list(output_px)}")
    for edge in (input_px, *output_px):
        if not 1 <= edge <= size_px:
            raise ValueError(f"sizes must be 1 to {size_px} px (the store's), got {edge}")


def _check_formats(input_channels: int, dtypes: Sequence[torch.dtype]) -> None:
    if input_channels not in INPUT_CHANNELS:
        raise ValueError(f"input_channels must be 3 or 8, got {input_channels}")
    for dtype in dtypes:
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")


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
    for of_side, count in zip(landmarks, num_faces, strict=True):
        points = (count, NUM_LANDMARKS, 2)
        check_tensor(of_side.points_fl2, "landmarks", points, (torch.float32,), device)
        check_memory(of_side.points_fl2, "landmarks")
        check_tensor(of_side.nearest_fk, "nearest", (count, NUM_NEAREST), (torch.int32,), device)
        check_memory(of_side.nearest_fk, "nearest")


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
    count = input_shape[0]
    check_tensor(out.input_bchw, "input", input_shape, FLOAT_DTYPES, device)
    widest = WIDEST_ACCESS if input_shape[1] == 8 else None  # those are stored 16 bytes at once
    check_memory(out.input_bchw, "input", alignment=widest, channels_last=True)
    first_dtype = out.targets_bchw[0].dtype
    same = (first_dtype,) if first_dtype in FLOAT_DTYPES else FLOAT_DTYPES
    for edge, target, weight in zip(output_px, out.targets_bchw, out.weights_b1hw, strict=True):
        check_tensor(target, "target", (count, 3, edge, edge), same, device)
        check_memory(target, "target", channels_last=True)
        check_tensor(weight, "weight", (count, 1, edge, edge), (torch.float32,), device)
        check_memory(weight, "weight")
    if out.mask_b1hw is not None:
        edge = output_px[-1]
        check_tensor(out.mask_b1hw, "mask", (count, 1, edge, edge), (torch.float32,), device)
        check_memory(out.mask_b1hw, "mask")
