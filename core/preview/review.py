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
from .sheet import arranged

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
            tiles = [_tile(Path(report.path) / name) for name in names[:_MOST_TILES]]
            shown = [tile for tile in tiles if tile is not None]
            if shown:
                title = f"{os.path.basename(report.path)}: {kind}, {len(names)}"
                blank = np.zeros((_TILE_PX, _TILE_PX, 3), np.uint8)
                row = np.stack([*shown, *[blank] * (_MOST_TILES - len(shown))])[None]
                rows.append(arranged([row], [[""] * _MOST_TILES], title))
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
    for axis, report, counts in zip(axes, reports, counted, strict=True):
        total = max(sum(counts.values()), 1)
        shares = np.array([[100 * counts.get((x, y), 0) / total for x in columns] for y in rows])
        drawn = axis.imshow(shares, origin="lower", extent=extent, aspect="auto", vmin=0)
        axis.set_title(f"{os.path.basename(report.path)}: {report.num_faces} faces")
        axis.set_xlabel("yaw, degrees")
        axis.set_ylabel("pitch, degrees")
        figure.colorbar(drawn, ax=axis, label="% of the faces")
    stream = io.BytesIO()
    figure.savefig(stream, format=path.suffix[1:].lower())
    try:
        write_output(path, stream.getvalue(), force=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def _counts(report: Report) -> dict[tuple[int, int], int]:
    """Faces by the lower ends of their field of yaw and pitch."""
    counts = {}
    for pose, count in report.poses.items():
        _, yaw, _, pitch = pose.split()
        counts[int(yaw.partition("..")[0]), int(pitch.partition("..")[0])] = count
    return counts
