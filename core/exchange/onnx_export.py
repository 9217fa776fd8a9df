"""Exports of a model folder as ONNX files, compared with the model before they are written."""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..checkpoint.inference import Weights, refuse_target, write_export
from .dfm import dfm_file, dfm_plan, plain_file
from .onnx_check import expected_of_dfm, expected_of_plain, verify
from .onnx_graph import import_onnx
from .trained_model import Report, read_trained_model, sample_pictures, silent

_TURNING_HEAD = (
    "a head-centred crop follows the turning head, the square of a program does not: beyond 15 "
    "degrees of yaw the face is shifted; train with data.centering = face"
)


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """Facts about a file that was written."""

    path: Path
    size_bytes: int
    input_px: int
    """Edge of the pictures that go in."""

    difference: float
    """Largest difference of an output from the model, of 0..1."""

    num_pictures: int
    """Pictures that were compared."""

    num_faces: int
    """Faces of the model's own folders among them."""

    runtime: str
    """Name of what ran the file."""

    target: str | None = None
    """Program that it is for."""

    mask: str | None = None
    """Kind of its masks."""

    square: tuple[int, int, int] | None = None
    """Left, top and edge of the model's own square in the program's picture, px; None where they
    are one."""

    warnings: tuple[str, ...] = ()


def export_onnx(
    path: Path,
    target: Path,
    *,
    generation: str | None = None,
    weights: Weights = "auto",
    force: bool = False,
    report: Report = silent,
) -> OnnxExport:
    """Write a model as it is.

    Args:
        path: The model folder; it is only read.
        target: A file *.onnx outside the saves.
        generation: Name of a save, or `backup`; None: the newest.
        weights: Same as for `read_model`.
        force: Replace the file where there is one.
        report: Called with each stage.

    Raises:
        ValueError: The package onnx is missing; the save or the target cannot be used; the model
            cannot be said in ONNX, or the file differs from it.
    """
    import_onnx()
    # Before the model is read and computed with, which takes long.
    refuse_target(path, target, ".onnx", force=force)
    model = read_trained_model(path, generation, report, weights)
    report("writing the graph and the weights")
    content = plain_file(model.network).content(model.metadata)
    faces, input_px = model.faces(), model.network.input_px
    report("running it, to compare it with the model")
    # After the file was written of it: from here on the model is only compared with.
    expected = expected_of_plain(model.network.double())
    # Of the bytes that will be written, so that nothing comes between the test and the file.
    verdict = verify(content, sample_pictures(input_px, faces), expected)
    write_export(target, content, force=force)
    return OnnxExport(
        path=target,
        size_bytes=len(content),
        input_px=input_px,
        num_faces=len(faces),
        **asdict(verdict),
    )


def export_dfm(
    path: Path,
    target: Path,
    *,
    program: str = "facefusion",
    mask: str | None = None,
    generation: str | None = None,
    weights: Weights = "auto",
    force: bool = False,
    report: Report = silent,
) -> OnnxExport:
    """Write a model as a .dfm.

    Args:
        path: The model folder; it is only read.
        target: A file *.dfm outside the saves.
        program: Program that is to load it, a key of `PROGRAMS`.
        mask: One of `MASKS`; None: the learned mask where there is one, else the mean face.
        generation: Name of a save, or `backup`; None: the newest.
        weights: Same as for `read_model`.
        force: Replace the file where there is one.
        report: Called with each stage.

    Raises:
        ValueError: As `export_onnx`; or the model has no such mask.
    """
    import_onnx()
    refuse_target(path, target, ".dfm", force=force)
    model = read_trained_model(path, generation, report, weights)
    plan = dfm_plan(model.network, model.crop, program, mask)
    # Nothing but the file says later what it was made for.
    metadata = model.metadata | {"target": plan.target, "mask": plan.mask}
    report("writing the graph and the weights")
    content, faces = dfm_file(model.network, plan).content(metadata), model.faces()
    report("running it, to compare it with the model")
    expected = expected_of_dfm(model.network.double(), plan)
    verdict = verify(content, sample_pictures(plan.size_px, faces), expected)
    write_export(target, content, force=force)
    place = plan.placement
    return OnnxExport(
        path=target,
        size_bytes=len(content),
        input_px=plan.size_px,
        num_faces=len(faces),
        **asdict(verdict),
        target=plan.target,
        mask=plan.mask,
        square=None if place.is_whole else (place.left, place.top, place.side_px),
        warnings=(_TURNING_HEAD,) if model.crop.centering == "head" else (),
    )
