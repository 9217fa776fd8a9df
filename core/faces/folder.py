"""One side's faces: each of a folder, or of several, with its landmarks and alignment, by name.

They are face PNGs; or, where a folder holds none, JPEGs of DeepFaceLab, or the pack of them.

A folder may come from a stranger, and hold links: a set of faces is often put together of links to
files elsewhere. So links to files are followed. They are only read, as pictures, and what is no
face is refused by its first bytes. Links to folders are not followed.

Of a header only what every training needs is held; a stored mask is read again when it is asked
for. So faces take the same memory whatever their files hold.

Letters: l = landmark (68), 2 = (x, y).
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..system.paths import expanded
from ..system.printable import plural
from .dfl_face import header_of, part_of, read_jpeg
from .dfl_pack import Part, read_pack
from .face import Face, checked_alignment, size_and_time
from .listing import JPEG_SUFFIXES, PACK_SUFFIX, PassedOver, list_pictures, name_of, passed_over
from .png import (
    FIRST_HEAD_VERSION,
    FaceFileError,
    FaceHeader,
    NotExtractedError,
    Placement,
    read_header,
    read_placement,
)

# As in faceswap.
MINIMUM_FACES = 25
# The smaller side is then shown five times as often. Chosen, unmeasured.
_UNEVEN = 5
_NUM_NAMED = 3


@dataclass(frozen=True)
class Rejected:
    """A file that cannot be used, and why (one line without the path)."""

    path: Path
    reason: str
    is_extracted: bool = True
    """Extraction wrote it, as far as can be seen."""


@dataclass
class FaceFolder:
    """The faces of a folder, sorted by file name, the files that are none, and what else it has.

    Several folders are as one that holds all their faces; path is then the one that all lie in.
    folders: those that were given. is_nested: whether faces may lie below the path.
    """

    path: Path
    faces: list[Face]
    rejected: list[Rejected] = field(default_factory=list)
    passed_over: dict[Path, PassedOver] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    is_nested: bool = False

    def __post_init__(self) -> None:
        self.folders = self.folders or (self.path,)

    @property
    def title(self) -> str:
        """The folders as texts have them."""
        return ", ".join(map(str, self.folders))

    def name_of(self, file: Path) -> str:
        """Name of a face file, alone among all faces; below the path with its folder."""
        return str(file.relative_to(self.path)) if self.is_nested else file.name

    def folder_of(self, file: Path) -> int:
        """Number of the given folder that holds a file."""
        holding = [number for number, one in enumerate(self.folders) if one in file.parents]
        # Of nested folders the inner one: faces of sub-folders are not the outer one's then.
        return max(holding, key=lambda number: len(self.folders[number].parts))


def read_folder(
    path: str | os.PathLike[str],
    *,
    strict: bool = False,
    minimum: int = MINIMUM_FACES,
    side: str | None = None,
    most: int | None = None,
    centering: str | None = None,
    sub_folders: bool | None = None,
    on_face: Callable[[Face], None] | None = None,
) -> FaceFolder:
    """The faces of a folder or of a pack; other files are passed over.

    strict: refuse the folder at the first file that is no usable face. minimum: faces that a side
    needs; with 0 a folder without any comes back too. side: "a" or "b", for the texts. most: faces
    after which the rest of the folder is not read. centering: of the crop that they are for; None
    for none, then pictures of any kind come back. sub_folders: whether faces of sub-folders are
    read, too; None: the command has no such choice. on_face: called with each face when it is read.
    Raises ValueError, one line, where the folder is missing, holds no faces or too few, or faces
    that show another crop.
    """
    return read_folders(
        [path],
        strict=strict,
        minimum=minimum,
        side=side,
        most=most,
        centering=centering,
        sub_folders=sub_folders,
        on_face=on_face,
    )


def read_folders(
    paths: Sequence[str | os.PathLike[str]],
    *,
    strict: bool = False,
    minimum: int = MINIMUM_FACES,
    side: str | None = None,
    most: int | None = None,
    centering: str | None = None,
    sub_folders: bool | None = None,
    on_face: Callable[[Face], None] | None = None,
) -> FaceFolder:
    """The faces of folders, as of one that holds them all; the rest as of `read_folder`."""
    opened, files = _listed(paths, side, sub_folders)
    name = name_of(opened.title, side)
    faces: list[Face] = []
    rejected: list[Rejected] = []
    # Threads would only wait for each other: this is Python's own work.
    for result in map(_read, face_sources(files, side)):
        if isinstance(result, Face):
            faces.append(result)
            if on_face:
                on_face(result)
            # By usable faces: damaged ones at the start must not leave a preview empty.
            if len(faces) == most:
                break
            continue
        if strict:
            raise ValueError(f"{result.path}: {result.reason}")
        rejected.append(result)
    if len(faces) < minimum:
        # These are so few that it takes no time, and `faces check` counts them too.
        rejected = sorted(rejected + _without_picture(faces), key=lambda file: file.path)
        opened = replace(opened, faces=faces, rejected=rejected)
        raise ValueError(_too_few(opened, name, minimum, has_flag=sub_folders is False))
    if centering is not None:
        # Behind the count: a folder of too few faces is no matter of their version.
        _check_versions(name, faces, centering)
    return replace(opened, faces=faces, rejected=rejected)


def _listed(
    paths: Sequence[str | os.PathLike[str]], side: str | None, sub_folders: bool | None
) -> tuple[FaceFolder, list[Path]]:
    """The folders, of which nothing is read yet, and their files in the order of the faces."""
    folders = tuple(expanded(path) for path in paths)
    if len(folders) > 1:
        # Absolute, as `commonpath` takes no mix of the two kinds.
        folders = tuple(Path(os.path.abspath(folder)) for folder in folders)
    files = [
        file for each in folders for file in list_pictures(each, side=side, sub_folders=sub_folders)
    ]
    opened = FaceFolder(
        folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders)),
        faces=[],
        passed_over={each: passed_over(each, sub_folders=bool(sub_folders)) for each in folders},
        folders=folders,
        is_nested=len(folders) > 1 or bool(sub_folders),
    )
    if opened.is_nested:
        # As if they lay in one folder, whose faces are numbered by name.
        files.sort(key=lambda file: (file.name, file))
    return opened, files


def read_face(path: Path) -> tuple[Face, FaceHeader]:
    """A face, and all that its header says.

    Raises FaceFileError where the file is no usable face.
    """
    part = part_of(path)
    if part is not None:
        return read_source(part)
    # Before it is read: a file that changes meanwhile must not be kept under its new time.
    size_time = size_and_time(path)
    edge_px, header = read_header(path)
    placement = Placement(edge_px, header.landmarks_l2, header.version)
    return _placed(path, placement, size_time), header


def named(rejected: Sequence[Rejected]) -> str:
    """The first of the files with their reasons, and how many more there are, in one line."""
    some = rejected[:_NUM_NAMED]
    parts = [
        f"{', '.join(file.path.name for file in alike)}: {reason}"
        # Alike and next to each other: most folders have one fault many times.
        for reason, alike in itertools.groupby(some, key=lambda file: file.reason)
    ]
    more = len(rejected) - len(some)
    return "; ".join([*parts, f"and {more} more"] if more else parts)


def skipped(rejected: Sequence[Rejected], kind: str = "") -> str:
    """What to say of files of one folder that cannot be used, in one line; kind: what they are."""
    which = f", {kind}" if kind else ""
    if len(rejected) == 1:
        return f"skipped {rejected[0].path}{which}: {rejected[0].reason}"
    folder = rejected[0].path.parent
    return f"skipped {len(rejected)} files of {folder}{which}: {named(rejected)}"


def uneven(name_a: str, count_a: int, name_b: str, count_b: int) -> str | None:
    """What to say of sides of very different numbers of faces; None where they are near enough."""
    (small, smaller), (large, larger) = sorted(((count_a, name_a), (count_b, name_b)))
    # A side without faces is refused elsewhere, by what it lacks.
    if not small or large <= _UNEVEN * small:
        return None
    return (
        f"{larger} has {large} faces and {smaller} {small}: the smaller side is repeated more "
        "often; bring them nearer to each other"
    )


def read_source(source: Path | Part) -> tuple[Face, FaceHeader]:
    """The same of a member of `face_sources`."""
    if not isinstance(source, Part):
        return read_face(source)
    face, metadata = read_jpeg(source)
    return face, header_of(face, metadata)


def face_sources(files: list[Path], side: str | None = None) -> Iterator[Path | Part]:
    """What holds a face each: files as they are, of a pack its parts.

    Raises ValueError, one line, where a pack is damaged.
    """
    for file in files:
        if file.suffix.lower() == PACK_SUFFIX:
            try:
                yield from read_pack(file)
            except FaceFileError as error:
                raise ValueError(f"{name_of(file, side)}: {error}") from None
        else:
            yield file


def _face_of(path: Path) -> Face:
    """The face of `read_face`, without the rest of its header."""
    part = part_of(path)
    if part is not None:
        return read_jpeg(part)[0]
    # Before it is read, as there.
    size_time = size_and_time(path)
    return _placed(path, read_placement(path), size_time)


def _placed(path: Path, placement: Placement, size_time: tuple[int, int]) -> Face:
    edge_px, landmarks_l2, version = placement
    return Face(path, edge_px, landmarks_l2, checked_alignment(landmarks_l2), version, size_time)


def _read(source: Path | Part) -> Face | Rejected:
    try:
        return read_jpeg(source)[0] if isinstance(source, Part) else _face_of(source)
    except FaceFileError as error:
        path = source.path if isinstance(source, Part) else source
        # The text alone: an error holds the frames it was raised in, and these the file's bytes.
        return Rejected(path, str(error), is_extracted=not isinstance(error, NotExtractedError))


def _without_picture(faces: list[Face]) -> list[Rejected]:
    """Take out the faces whose picture is damaged, which no header tells; these files, and why."""
    rejected = []
    for face in list(faces):
        try:
            with face.open_picture():
                pass
        except FaceFileError as error:
            faces.remove(face)
            rejected.append(Rejected(face.path, str(error)))
    return rejected


def _check_versions(name: str, faces: list[Face], centering: str) -> None:
    """Refuse legacy crops for another crop than that, and such among others, by ValueError."""
    legacy = [face for face in faces if face.centering == "legacy"]
    later = [face for face in faces if face.centering != "legacy"]
    if not legacy:
        return
    first = f"{legacy[0].path.name}: version {legacy[0].version}"
    if later:
        raise ValueError(
            f"{name} mixes {len(legacy)} {plural(len(legacy), 'face')} extracted before alignments "
            f"version {FIRST_HEAD_VERSION} ({first}) with {len(later)} of later ones "
            f"({later[0].path.name}: version {later[0].version or 'unknown'}), which show another "
            "crop: put them into folders of their own, or extract all of them again"
        )
    if centering != "legacy":
        raise ValueError(
            f"{name} holds faces extracted before alignments version {FIRST_HEAD_VERSION} "
            f"({first}), which show the legacy crop only, and data.centering is {centering}: "
            "extract the faces again, or begin a model with data.centering=legacy"
        )


def _too_few(opened: FaceFolder, name: str, minimum: int, *, has_flag: bool) -> str:
    """The one line that says why a folder is refused, and what to do."""
    faces, rejected, tail = opened.faces, opened.rejected, named(opened.rejected)
    kind = "JPEG" if rejected and rejected[0].path.suffix.lower() in JPEG_SUFFIXES else "PNG"
    is_one = len(rejected) == 1
    if not faces and any(file.is_extracted for file in rejected):
        of_it = f"its only {kind} cannot" if is_one else f"none of its {len(rejected)} {kind}s can"
        return f"{name}: {of_it} be used ({tail})"
    no_faces = f"its {len(rejected)} {kind}s are not extracted faces"
    if is_one:
        no_faces = f"its only {kind} is not an extracted face"
    nested = next((each for each in opened.passed_over.values() if each.subfolders), None)
    if not faces and rejected and nested:
        return f"{name}: {no_faces}{nested.instead(has_flag=has_flag)}"
    if not faces and rejected:
        return (
            f"{name}: {no_faces}: extract faces from the "
            f"pictures first and give the folder they were written to ({tail})"
        )
    files = plural(len(rejected), "file is", "files are")
    unusable = f", {len(rejected)} {files} unusable ({tail})" if rejected else ""
    return (
        f"{name} contains fewer than {minimum} usable {plural(minimum, 'face')} "
        f"({len(faces)}){unusable}: extract more faces, at least 500 varied ones for a good result"
    )
