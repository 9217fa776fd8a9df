"""Exports of a model folder as ONNX files, compared with the model before they are written."""

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.inference import refuse_target, write_export
from .dfm import OnnxFile, dfm_file, dfm_plan, plain_file
from .onnx_check import (
    Expected,
    Verdict,
    expected_of_dfm,
    expected_of_plain,
    sample_pictures,
    verify,
)
from .onnx_graph import import_onnx
from .trained_model import TrainedModel, read_trained_model


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """Facts about a file that was written."""

    path: Path
    size_bytes: int
    input_px: int
    """Edge of the pictures that go in."""

    verdict: Verdict
    target: str | None = None
    """Program that it is for."""

    mask: str | None = None
    """Kind of its masks."""

    square: tuple[int, int, int] | None = None
    """Left, top and edge of the model's own square in the program's picture, px; None where they
    are one."""

    warnings: tuple[str, ...] = ()


def export_onnx(
    path: Path, target: Path, *, generation: str | None = None, force: bool = False
) -> OnnxExport:
    """Write a model as it is.

    Args:
        path: The model folder; it is only read.
        target: A file *.onnx outside the saves.
        generation: Name of a save, or `backup`; None: the newest.
        force: Replace the file where there is one.

    Raises:
        ValueError: The package onnx is missing; the save or the target cannot be used; the model
            cannot be said in ONNX, or the file differs from it.
    """
    import_onnx()
    refuse_target(path, target, ".onnx", force=force)
    model = read_trained_model(path, generation)
    file, expected = plain_file(model.network), expected_of_plain(model.network)
    size_bytes, verdict = _write(model, file, expected, model.metadata, target, force=force)
    return OnnxExport(
        path=target, size_bytes=size_bytes, input_px=model.network.input_px, verdict=verdict
    )


def export_dfm(
    path: Path,
    target: Path,
    *,
    program: str = "facefusion",
    mask: str | None = None,
    generation: str | None = None,
    force: bool = False,
) -> OnnxExport:
    """Write a model as a .dfm.

    Args:
        path: The model folder; it is only read.
        target: A file *.dfm outside the saves.
        program: Program that is to load it, a key of `PROGRAMS`.
        mask: One of `MASKS`; None: the learned mask where there is one, else the mean face.
        generation: Name of a save, or `backup`; None: the newest.
        force: Replace the file where there is one.

    Raises:
        ValueError: As `export_onnx`; or the model has no such mask.
    """
    import_onnx()
    refuse_target(path, target, ".dfm", force=force)
    model = read_trained_model(path, generation)
    plan = dfm_plan(model.network, model.crop, program, mask)
    choices = {"target": plan.target, "mask": plan.mask}
    file, expected = dfm_file(model.network, plan), expected_of_dfm(model.network, plan)
    metadata = model.metadata | choices
    size_bytes, verdict = _write(model, file, expected, metadata, target, force=force)
    place = plan.placement
    warnings = []
    if model.crop.centering == "head":
        warnings.append(
            "a head-centred crop follows the turning head, the square of a program does not: "
            "beyond 15 degrees of yaw the face is shifted; train with data.centering = face"
        )
    return OnnxExport(
        path=target,
        size_bytes=size_bytes,
        input_px=plan.size_px,
        verdict=verdict,
        target=plan.target,
        mask=plan.mask,
        square=None if place.is_whole else (place.left, place.top, place.side_px),
        warnings=tuple(warnings),
    )


def _write(
    model: TrainedModel,
    file: OnnxFile,
    expected: Expected,
    metadata: dict[str, str],
    target: Path,
    *,
    force: bool,
) -> tuple[int, Verdict]:
    """Compare the file with the model and write it; its bytes, and how it compares."""
    content = file.content(metadata)
    edge_px, _, _ = file.input.shape
    verdict = verify(content, sample_pictures(edge_px, model.faces()), expected)
    write_export(target, content, force=force)
    return len(content), verdict
