"""Pictures of measured face folders: the files to look at, and where the faces look."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..faces.check import POSE_BIN_DEGREES, Report
from ..faces.face import usual_crop
from ..faces.folder import read_face
from ..faces.png import FaceFileError
from ..faces.review import named_files
from ..system.durable_files import write_output
from ..system.printable import plural, printable
from .sheet import BACKGROUND, arranged

_TILE_PX = 128
_MOST_TILES = 12
"""Files of each kind in the picture: more are too small to be judged at a glance. Chosen."""


def review_sheet(reports: Sequence[Report]) -> np.ndarray | None:
    """Some files of each kind as one picture, (H, W, 3) uint8 BGR; None where there are none.

    Files that cannot be read at all have no picture.
    """
    rows = []
    for report in reports:
        for kind, names in named_files(report).items():
            pairs = ((name, _tile(Path(report.path) / name)) for name in names[:_MOST_TILES])
            shown = {name: tile for name, tile in pairs if tile is not None}
            if shown:
                title = f"{os.path.basename(report.path)}: {kind}, {len(names)}"
                num_blank = _MOST_TILES - len(shown)
                blank = np.full((_TILE_PX, _TILE_PX, 3), BACKGROUND, np.uint8)
                row = np.stack([*shown.values(), *[blank] * num_blank])[None]
                rows.append(arranged([row], [[*shown, *[""] * num_blank]], title))
    return np.concatenate(rows) if rows else None


def _tile(path: Path) -> np.ndarray | None:
    """The face as it would be trained on; None where it cannot be read."""
    try:
        face, _ = read_face(path)
        with face.open_picture() as image_bgr:
            return face.cut_out(image_bgr, usual_crop(face.centering, _TILE_PX))
    except FaceFileError:
        return None


def pose_picture(reports: Sequence[Report], path: Path) -> None:
    """Draw how many faces of each side look where, as a picture of its own for each side.

    Raises:
        ValueError: The file's ending is none of a picture, or the disk refuses.
    """
    # Without pyplot, which would look for a screen.
    from matplotlib.figure import Figure

    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--poses must end in .png, .svg or .pdf, got {path}")
    counted = [_counts(report) for report in reports]
    corners = [corner for counts in counted for corner in counts] or [(0, 0)]
    yaws, pitches = ({corner[axis] for corner in corners} for axis in (0, 1))
    columns, rows = (
        range(min(lows), max(lows) + POSE_BIN_DEGREES, POSE_BIN_DEGREES) for lows in (yaws, pitches)
    )
    figure = Figure(figsize=(5 * len(reports), 4), layout="constrained")
    axes = figure.subplots(1, len(reports), squeeze=False)[0]
    extent = (columns.start, columns.stop, rows.start, rows.stop)
    shares = [_shares(counts, rows, columns) for counts in counted]
    # One scale, so that a field has the same colour in both pictures where it has the same share.
    highest = max(float(share.max(initial=0.0)) for share in shares)
    for axis, report, share in zip(axes, reports, shares, strict=True):
        filled = np.ma.masked_equal(share, 0.0)
        drawn = axis.imshow(
            filled, origin="lower", extent=extent, aspect="auto", vmin=0, vmax=highest or 1
        )
        faces = plural(report.num_faces, "face")
        title = f"{os.path.basename(report.path)}: {report.num_faces} {faces}"
        # Names of folders may hold dollar signs, between which a formula would be read.
        axis.set_title(printable(title), parse_math=False)
        axis.set_xlabel("yaw, degrees")
        axis.set_ylabel("pitch, degrees")
    figure.colorbar(drawn, ax=list(axes), label="% of the faces; white: none")
    stream = io.BytesIO()
    # Into memory first: a picture is there whole or not at all.
    figure.savefig(stream, format=path.suffix[1:].lower())
    try:
        write_output(path, stream.getvalue(), force=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def _shares(counts: dict[tuple[int, int], int], rows: range, columns: range) -> np.ndarray:
    """Percent of a side's faces in each field of pitch (rows) and yaw (columns)."""
    total = max(sum(counts.values()), 1)
    return np.array([[100 * counts.get((x, y), 0) / total for x in columns] for y in rows])


def _counts(report: Report) -> dict[tuple[int, int], int]:
    """Faces by the lower ends of their field of yaw and pitch."""
    counts = {}
    for pose, count in report.poses.items():
        _, yaw, _, pitch = pose.split()
        counts[int(yaw.partition("..")[0]), int(pitch.partition("..")[0])] = count
    return counts
