"""What to do about a measured face folder: whether it is fit, which files to look at, moving them.

The kinds of files to look at:

    unusable    cannot be read as a face
    blank       a picture of one colour
    blurred     much less sharp than the rest
    odd         landmarks unlike a face, as of a wrong or bad alignment
    repeated    nearly the picture of a file before it, which is not named

Nothing is ever deleted, and nothing is written over.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..system.durable_files import write_output
from .check import Comparison, Report
from .folder import MINIMUM_FACES


@dataclass(frozen=True)
class Verdict:
    """Whether faces can be trained on, and why not."""

    is_ready: bool
    reasons: list[str]

    @property
    def text(self) -> str:
        """The verdict as one line."""
        return "ready" if self.is_ready else f"not ready, because {'; '.join(self.reasons)}"


def verdict(reports: Sequence[Report], comparison: Comparison | None) -> Verdict:
    """Whether training can begin with these folders; what only lowers its quality is advice."""
    reasons = []
    for report in reports:
        name = os.path.basename(report.path) or report.path
        if report.num_faces < MINIMUM_FACES:
            reasons.append(
                f"{name} has {report.num_faces} usable faces of at least {MINIMUM_FACES}"
            )
        elif report.is_mixed:
            reasons.append(f"{name} mixes faces from before alignments version 2.0 with later ones")
    if comparison and comparison.shared:
        reasons.append(comparison.shared)
    return Verdict(not reasons, reasons)


def named_files(report: Report) -> dict[str, list[str]]:
    """Names of the files to look at, by kind, each in one kind only; kinds without any left out."""
    repeated = [name for group in report.repeats for name in group[1:]]
    kinds = {
        "unusable": list(report.unreadable),
        "blank": report.blank,
        "blurred": report.blurred,
        "odd": report.odd_landmarks,
        "repeated": repeated,
    }
    seen: set[str] = set()
    named: dict[str, list[str]] = {}
    for kind, names in kinds.items():
        own = [name for name in dict.fromkeys(names) if name not in seen]
        seen.update(own)
        if own:
            named[kind] = own
    return named


def write_lists(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write the absolute paths of each kind into `<kind>.txt`, with a zero byte after each, as
    `xargs -0` reads them.

    Raises:
        ValueError: A file is there already, or the disk refuses.
    """
    by_kind: dict[str, list[str]] = {}
    for report in reports:
        for kind, names in named_files(report).items():
            paths = [os.path.abspath(os.path.join(report.path, name)) for name in names]
            by_kind.setdefault(kind, []).extend(paths)
    written = []
    for kind, paths in by_kind.items():
        path = folder / f"{kind}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_output(path, b"".join(os.fsencode(name) + b"\0" for name in paths), force=False)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
        written.append(path)
    return written


def move_named(report: Report, target: Path) -> dict[str, int]:
    """Move the files to look at into `<target>/<kind>`; how many of each.

    A link and an unlink, so that no file is ever half there: the target must be on the same disk.

    Raises:
        ValueError: The target lies in the folder itself, or a file of that name is there; then
            nothing has been moved. Or the disk refuses; then those before have been moved.
    """
    source, target = Path(report.path).resolve(), target.resolve()
    if target == source or source in target.parents:
        raise ValueError(f"--move-to {target} lies in {source} itself; give a folder beside it")
    moves = [
        (kind, source / name, target / kind / name)
        for kind, names in named_files(report).items()
        for name in names
    ]
    for _, _, place in moves:
        # Before the first one is moved: half a job is harder to undo than none.
        if os.path.lexists(place):
            raise ValueError(f"{place} is there already; give another folder to --move-to")
    moved: dict[str, int] = {}
    for kind, path, place in moves:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            # A link fails where the name was taken meanwhile, and a rename would replace it.
            os.link(path, place, follow_symlinks=False)
            os.unlink(path)
        except OSError as error:
            remedy = "; give a folder on the same disk" if error.errno == errno.EXDEV else ""
            raise ValueError(
                f"cannot move {path} to {place}: {error.strerror or error}{remedy}"
            ) from error
        moved[kind] = moved.get(kind, 0) + 1
    return moved
