"""What to do about a measured face folder: whether it is fit, which files to look at, moving them.

The kinds of files to look at:

    unusable    cannot be read as a face
    blank       a picture of one colour
    blurred     much less sharp than the rest
    odd         landmarks unlike a face, as of a wrong or bad alignment
    repeated    nearly the picture of another file, which is not named

Nothing is ever deleted, and nothing is written over. A set may be put together of links: those that
are moved lead to their files as before.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..system.durable_files import move_file, write_output
from ..system.printable import plural
from .check import Comparison, Report
from .folder import MINIMUM_FACES

_MOST_LINKS = 40
"""Links that lead to one another, as many as Linux follows."""


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
                f"{name} has {report.num_faces} usable {plural(report.num_faces, 'face')} of at "
                f"least {MINIMUM_FACES}"
            )
        elif report.is_mixed:
            reasons.append(f"{name} mixes faces from before alignments version 2.0 with later ones")
    if comparison and comparison.shared:
        reasons.append(comparison.shared)
    return Verdict(not reasons, reasons)


def named_files(report: Report) -> dict[str, list[str]]:
    """Names of the files to look at, by kind, each in one kind only; kinds without any left out."""
    repeated = [name for group in report.repeats for name in _repeated(report.path, group)]
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


def _repeated(folder: str, group: Sequence[str]) -> list[str]:
    """All of a group but the one to stay: the first that is no link to another one of them."""
    place = os.path.realpath(folder)
    paths = {name: os.path.join(place, name) for name in group}
    files = set(paths.values())
    links = {name for name in group if not files.isdisjoint(_behind(paths[name]))}
    stays = min(group, key=lambda name: name in links)
    return [name for name in group if name != stays]


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

    By names alone, so that no file is ever half there: the target must be on the same disk. A
    symbolic link is made anew there, to lead to the same file, on any disk.

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
    places = {str(path): str(place) for _, path, place in moves}
    for kind, path, place in moves:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            # Either fails where the name was taken meanwhile.
            if path.is_symlink():
                os.symlink(_led_from(str(path), str(place.parent), places), place)
                os.unlink(path)
            else:
                move_file(path, place)
        except OSError as error:
            remedy = "; give a folder on the same disk" if error.errno == errno.EXDEV else ""
            raise ValueError(
                f"cannot move {path} to {place}: {error.strerror or error}{remedy}"
            ) from error
        moved[kind] = moved.get(kind, 0) + 1
    return moved


def _led_from(link: str, folder: str, places: Mapping[str, str]) -> str:
    """Text of a link in another folder that leads to where this one does, relative as it is.

    places: where files that are moved with it go, by their paths.
    """
    text, behind = os.readlink(link), list(_behind(link))
    # Past links that stay where they are: they lead to a place that is left.
    moved = next((places[path] for path in behind if path in places), None)
    if os.path.isabs(text):
        return moved or text
    return os.path.relpath(moved or behind[0], os.path.realpath(folder))


def _behind(link: str) -> Iterator[str]:
    """Paths that a link leads to one after another, the last one of them no link."""
    # As many as the system itself follows: links may lead in a circle.
    for _ in range(_MOST_LINKS):
        following = _next_of(link)
        if following is None:
            return
        yield following
        link = following


def _next_of(link: str) -> str | None:
    """Path that a link names, itself perhaps a link; None for what is no link."""
    if not os.path.islink(link):
        return None
    folder, name = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))
    # Of the folder alone: ".." behind a link to a folder leads out of that one.
    return os.path.join(os.path.realpath(folder), name)
