"""What a face folder is worth for training: variety of angle and light, size, repeats, damage.

Every picture is decoded once. Light is the mean CIE lightness L* (0 to 100) over the face; repeats
are found by the signs of the 255 lowest DCT coefficients of the aligned face: two encodings of one
picture differ in up to 10 of them, neighbouring frames of a film in 12 and more (measured on four
sets). Angles are those of the alignment, in degrees.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from ..config import DataConfig
from ..system.printable import plural
from ..system.threads import thread_count, working_threads
from .face import Face, as_settings, usual_crop, usual_of, usual_share
from .folder import MINIMUM_FACES, FaceFolder, Rejected, read_folder, uneven
from .geometry import Crop, crop_landmarks
from .listing import PassedOver, overlap
from .masks import LANDMARK_MASKS, is_empty, landmark_mask, named_mask, stored_mask, why_empty
from .png import FIRST_HEAD_VERSION, FaceFileError, FaceHeader

WANTED_FACES = 500
MANY_FACES = 10_000
POSE_BIN_DEGREES = 15
REPEAT_BITS = 10
"""Faces of a side that advice is content with, and finds many; degrees of a field of poses; bits by
which the hashes of one picture's copies differ at most. Chosen, unmeasured, but for the last."""

# Light, sharpness and repeats show at this size. Chosen, unmeasured.
_CROP_PX = 128
_DEFAULTS = DataConfig()
_HASH_EDGE = 16
_BLOCK_ROWS = 1024  # bounds the matrix of hashes; chosen, unmeasured

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spread:
    """How a quantity is spread over the faces."""

    minimum: float
    p5: float
    median: float
    p95: float
    maximum: float

    @property
    def range(self) -> float:
        """Width of the middle 90 %."""
        return self.p95 - self.p5


@dataclass(frozen=True)
class Report:
    """What was measured in one folder. `as_dict` makes it ready for JSON.

    sub_folders: whether faces of sub-folders are among them. passed_over: pictures that are not
    looked at. versions: number of faces of each alignments version; num_legacy: those from before
    2.0. shows: what most of the pictures show: the head
    crop, the legacy crop, or a face type of DeepFaceLab. sizes_px: number of files of each edge.
    native_px: width of the picture in px of the source, before extraction scaled it. masks: number
    of faces that have each stored mask. empty_masks: by mask, faces with (almost) nothing inside it
    where all else is left at its default, and why. poses: number of faces in each field of 15
    degrees of yaw and pitch. lightness: L* over the face. light_balance: L* of the right half minus
    the left. repeats: groups of files that show nearly the same picture. blurred, blank,
    odd_landmarks: file names. damaged_masks, unreadable: the reason by file name.
    """

    path: str
    num_files: int
    num_faces: int
    sub_folders: bool
    passed_over: PassedOver
    versions: dict[str, int]
    num_legacy: int
    shows: str
    sizes_px: dict[int, int]
    native_px: Spread | None
    masks: dict[str, int]
    empty_masks: dict[str, dict[str, str]]
    yaw: Spread | None
    pitch: Spread | None
    roll: Spread | None
    poses: dict[str, int]
    lightness: Spread | None
    light_balance: Spread | None
    sharpness: Spread | None
    repeats: list[list[str]]
    blurred: list[str]
    blank: list[str]
    odd_landmarks: list[str]
    damaged_masks: dict[str, str]
    unreadable: dict[str, str]
    advice: list[str]

    @property
    def trainable(self) -> bool:
        """Whether there are enough faces to train at all, and all of them show the same crop."""
        return self.num_faces >= MINIMUM_FACES and not self.is_mixed

    @property
    def is_mixed(self) -> bool:
        """Whether faces from before alignments version 2.0 lie among later ones."""
        return 0 < self.num_legacy < self.num_faces

    @property
    def num_repeats(self) -> int:
        """Files that could go without losing a picture."""
        return sum(len(group) - 1 for group in self.repeats)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "trainable": self.trainable,
            "num_repeats": self.num_repeats,
        }


@dataclass(frozen=True)
class Comparison:
    """What either side shows that the other does not."""

    shared: str | None
    poses_only_a: dict[str, float]
    poses_only_b: dict[str, float]
    advice: list[str]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Measured:
    lightness: float
    light_balance: float
    sharpness: float
    is_blank: bool
    signs: np.ndarray
    masks: list[str]
    damaged: str
    empty: dict[str, str]


def report(
    folder: str | os.PathLike[str],
    *,
    sub_folders: bool = False,
    progress: Progress | None = None,
) -> Report:
    """What is in a face folder and what to do about it.

    sub_folders: whether faces of its sub-folders are in it, too. progress: called with the number
    of pictures done and of all.
    Raises ValueError where there is no such folder or no PNG in it.
    """
    # However few: what is wrong with a folder is what is asked.
    opened = read_folder(folder, minimum=0, sub_folders=sub_folders)
    faces: list[Face] = []
    measured: list[_Measured] = []
    rejected = list(opened.rejected)
    # Threads are enough: decoding and OpenCV's filters let the others run.
    with working_threads(thread_count(0)) as pool:
        for done, (face, result) in enumerate(
            zip(opened.faces, pool.map(_measure, opened.faces), strict=True), 1
        ):
            if isinstance(result, Rejected):
                rejected.append(result)
            else:
                faces.append(face)
                measured.append(result)
            if progress:
                progress(done, len(opened.faces))
    # Headers were refused first and pictures later: a user reads them as one list.
    rejected.sort(key=lambda file: file.path)
    opened = dataclasses.replace(opened, faces=faces, rejected=rejected)
    measurements = _report(opened, measured, sub_folders)
    return dataclasses.replace(measurements, advice=_advice(measurements))


def compare(a: Report, b: Report) -> Comparison:
    """What side A shows that B lacks, and the other way round."""
    # First of all: with shared faces every other difference is without meaning.
    shared = overlap(a.path, b.path, sub_folders=a.sub_folders or b.sub_folders)
    only_a, only_b = _poses_only(a, b), _poses_only(b, a)
    advice = []
    if shared:
        advice.append(f"{shared}: give each person a folder of their own.")
    for name, other, poses in (("A", "B", only_a), ("B", "A", only_b)):
        if poses:
            share = sum(poses.values())
            # The fullest fields first: there new faces help most.
            fields = ", ".join(sorted(poses, key=lambda pose: -poses[pose])[:4])
            advice.append(
                f"{100 * share:.0f} % of side {name}'s faces look where side {other} has none "
                f"({fields}): add such faces to {other}."
            )
    advice.extend(_light_advice(a, b))
    difference = uneven(a.path, a.num_faces, b.path, b.num_faces)
    if difference:
        advice.append(f"{difference}.")
    return Comparison(shared, only_a, only_b, advice)


def _measure(face: Face) -> _Measured | Rejected:
    crop = usual_crop(face.centering, _CROP_PX)
    try:
        header = face.read_header()
        with face.open_picture() as image_bgr:
            crop_bgr = face.cut_out(image_bgr, crop)
    except FaceFileError as error:
        return Rejected(face.path, str(error))
    damaged, empty = _mask_problems(face, header, crop)
    landmarks_l2 = crop_landmarks(face.landmarks_l2, face.alignment, crop)
    # The face alone: hair and background have a light and a sharpness of their own.
    inside = landmark_mask("components", landmarks_l2, crop.size_px) > 127
    lightness = cv2.cvtColor(crop_bgr.astype(np.float32) / 255, cv2.COLOR_BGR2LAB)[..., 0]
    half = crop.size_px // 2
    left, right = (
        float(lightness[:, part][inside[:, part]].mean()) if inside[:, part].any() else 0.0
        for part in (slice(0, half), slice(half, crop.size_px))
    )
    grey = cv2.cvtColor(crop_bgr, cv2.COLOR_BGR2GRAY)
    contrast = float(grey[inside].std()) if inside.any() else 0.0
    edges = cv2.Laplacian(grey, cv2.CV_32F)
    return _Measured(
        lightness=float(lightness[inside].mean()) if inside.any() else 0.0,
        light_balance=right - left,
        # Relative to the contrast: a pale face is not a blurred one.
        sharpness=float(edges[inside].std()) / contrast if contrast else 0.0,
        # Less than one level of 256: nothing that a codec leaves of a real picture.
        is_blank=contrast < 1.0,
        signs=_signs(grey),
        masks=sorted(header.masks),
        damaged=damaged,
        empty=empty,
    )


def _mask_problems(face: Face, header: FaceHeader, crop: Crop) -> tuple[str, dict[str, str]]:
    """Reason that the first damaged mask of a face cannot be used, empty where none is; and, by
    mask, why it leaves (almost) nothing inside the crop."""
    damaged = ""
    empty = {}
    landmarks_l2 = crop_landmarks(face.landmarks_l2, face.alignment, crop)
    for name in LANDMARK_MASKS:
        if is_empty(landmark_mask(name, landmarks_l2, crop.size_px)):
            empty[name] = why_empty(face, name)
    for name in sorted(set(header.masks) - set(LANDMARK_MASKS)):  # those are drawn afresh
        try:
            mask = named_mask(header, name)
            pixels = stored_mask(
                mask,
                face.source_alignment,
                crop,
                dilation=_DEFAULTS.mask_dilation,
                blur_kernel=_DEFAULTS.mask_blur_kernel,
                threshold=_DEFAULTS.mask_threshold,
            )
            if is_empty(pixels):
                empty[name] = why_empty(face, name)
        except FaceFileError as error:
            damaged = damaged or f"{name}: {error}"
    return damaged, empty


def _signs(grey: np.ndarray) -> np.ndarray:
    """Signs of the low DCT coefficients about their median, -1 or 1, float32."""
    # So small that noise and compression are gone, which differ between copies.
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    # Without the first: it is the mean, which a change of light alone moves.
    low = cv2.dct(small)[:_HASH_EDGE, :_HASH_EDGE].ravel()[1:]
    return np.where(low > np.median(low), np.float32(1), np.float32(-1))


def _report(opened: FaceFolder, measured: list[_Measured], sub_folders: bool) -> Report:
    faces = opened.faces
    names = [opened.name_of(face.path) for face in faces]
    pairs = list(zip(names, measured, strict=True))
    sharpness = np.array([one.sharpness for one in measured])
    # Against the set's own median: how sharp faces are depends on the film. Chosen, unmeasured.
    dull = sharpness < 0.5 * np.median(sharpness) if len(measured) else sharpness
    blank = [name for name, one in pairs if one.is_blank]
    versions = Counter("unknown" if face.version is None else str(face.version) for face in faces)
    return Report(
        path=str(opened.path),
        num_files=len(faces) + len(opened.rejected),
        num_faces=len(faces),
        sub_folders=sub_folders,
        passed_over=opened.passed_over[opened.path],
        versions=dict(sorted(versions.items())),
        num_legacy=sum(face.centering == "legacy" for face in faces),
        shows=usual_of(faces, _CROP_PX)[0] if faces else "head",
        sizes_px=dict(sorted(Counter(face.edge_px for face in faces).items())),
        native_px=_spread([face.native_px for face in faces]),
        masks=dict(sorted(Counter(name for one in measured for name in one.masks).items())),
        empty_masks=_empty_masks(pairs),
        yaw=_spread([face.alignment.yaw for face in faces]),
        pitch=_spread([face.alignment.pitch for face in faces]),
        roll=_spread([face.alignment.roll for face in faces]),
        poses=dict(Counter(_pose_field(face) for face in faces)),
        lightness=_spread([one.lightness for one in measured]),
        light_balance=_spread([one.light_balance for one in measured]),
        sharpness=_spread(sharpness.tolist()),
        repeats=_repeats(names, measured),
        blurred=[n for n, is_dull in zip(names, dull, strict=True) if is_dull and n not in blank],
        blank=blank,
        # Chosen, unmeasured.
        odd_landmarks=[
            name
            for name, face in zip(names, faces, strict=True)
            if face.alignment.average_distance > 0.08
        ],
        damaged_masks={name: one.damaged for name, one in pairs if one.damaged},
        unreadable={opened.name_of(file.path): file.reason for file in opened.rejected},
        advice=[],
    )


def _empty_masks(pairs: list[tuple[str, _Measured]]) -> dict[str, dict[str, str]]:
    """Faces whose mask is empty, and why, by mask."""
    by_mask: dict[str, dict[str, str]] = {}
    for file, one in pairs:
        for name, reason in one.empty.items():
            by_mask.setdefault(name, {})[file] = reason
    return dict(sorted(by_mask.items()))


def _spread(values: list[float]) -> Spread | None:
    if not values:
        return None
    # Percentiles, since a single face that was placed badly would set mean and deviation.
    numbers = np.percentile(values, [0, 5, 50, 95, 100])
    return Spread(*(round(float(number), 3) for number in numbers))


def _pose_field(face: Face) -> str:
    """Name of the field of yaw and pitch, such as `yaw -15..0 pitch 0..15`."""
    parts = []
    for name, angle in (("yaw", face.alignment.yaw), ("pitch", face.alignment.pitch)):
        low = int(angle // POSE_BIN_DEGREES) * POSE_BIN_DEGREES
        parts.append(f"{name} {low}..{low + POSE_BIN_DEGREES}")
    return " ".join(parts)


def _repeats(names: list[str], measured: list[_Measured]) -> list[list[str]]:
    """Groups of nearly equal pictures: each file joins the first earlier one that it repeats."""
    if not measured:
        return []
    signs = np.stack([one.signs for one in measured])
    # Each differing bit takes two off: one that agrees is gone, and one counts against.
    least = signs.shape[1] - 2 * REPEAT_BITS
    first_of: dict[int, list[int]] = {}
    repeated = np.zeros(len(names), bool)
    for start in range(0, len(names), _BLOCK_ROWS):
        # A product of signs counts equal bits less differing ones.
        alike = signs[start : start + _BLOCK_ROWS] @ signs[: start + _BLOCK_ROWS].T >= least
        for row, position in enumerate(range(start, min(start + _BLOCK_ROWS, len(names)))):
            # Not of a repeat: else a slow pan would chain all its frames into one group.
            earlier = np.flatnonzero(alike[row, :position] & ~repeated[:position])
            if earlier.size:
                repeated[position] = True
                first_of.setdefault(int(earlier[0]), [int(earlier[0])]).append(position)
    return [[names[index] for index in group] for _, group in sorted(first_of.items())]


def _advice(result: Report) -> list[str]:
    """What the numbers say, as sentences."""
    advice = []
    if num_unreadable := len(result.unreadable):
        advice.append(
            f"{num_unreadable} of {result.num_files} {plural(result.num_files, 'file')} cannot be "
            f"used and {plural(num_unreadable, 'is', 'are')} left out: repair or remove "
            f"{plural(num_unreadable, 'it', 'them')}."
        )
    if notice := result.passed_over.notice(has_flag=True):
        advice.append(f"{notice}.")
    advice.extend(_version_advice(result))
    if result.num_faces < MINIMUM_FACES:
        these = plural(result.num_faces, "face is", "faces are")
        advice.append(
            f"{result.num_faces} usable {these} too few to train: at least {MINIMUM_FACES} are "
            f"needed, {WANTED_FACES} varied ones for a good result."
        )
    elif result.num_faces < WANTED_FACES:
        advice.append(
            f"{result.num_faces} faces are few: use at least {WANTED_FACES} varied ones, 1,000 to "
            "10,000 is sane."
        )
    elif result.num_faces > MANY_FACES:
        advice.append(
            f"{result.num_faces} faces are more than help: keep 1,000 to 10,000 varied ones."
        )
    # Of too few faces the spread says nothing but that they are few.
    if result.trainable:
        advice.extend(_variety_advice(result))
    if result.num_repeats > 0.05 * result.num_faces:
        repeats = plural(result.num_repeats, "repeats", "repeat")
        remedy = plural(
            result.num_repeats, "remove it, it teaches nothing", "remove them, they teach nothing"
        )
        advice.append(
            f"{result.num_repeats} of {result.num_faces} files {repeats} another file's picture "
            f"nearly unchanged (groups: {len(result.repeats)}): {remedy}."
        )
    advice.extend(_picture_advice(result))
    return advice


def _version_advice(result: Report) -> list[str]:
    """What to do about legacy crops."""
    if result.is_mixed:
        return [
            f"{result.num_legacy} {plural(result.num_legacy, 'face was', 'faces were')} extracted "
            f"before alignments version {FIRST_HEAD_VERSION} and "
            f"{result.num_faces - result.num_legacy} later; they show different crops and cannot "
            "be trained together: put them into folders of their own, or extract all of them again."
        ]
    if result.num_faces and result.shows not in ("head", "legacy"):
        return [
            f"{result.shows} pictures: train them with "
            f"{as_settings(usual_crop(result.shows, _CROP_PX))}, which they hold."
        ]
    if result.num_legacy:
        return [
            f"All faces were extracted before alignments version {FIRST_HEAD_VERSION} and show the "
            "legacy crop only: train them with data.centering=legacy, or extract them again."
        ]
    return []


def _variety_advice(result: Report) -> list[str]:
    advice = []
    for name, spread, least_range in (("yaw", result.yaw, 40.0), ("pitch", result.pitch, 20.0)):
        if spread and spread.range < least_range:
            advice.append(
                f"Little variety of {name}: 90 % of the faces lie within {spread.range:.0f} "
                f"degrees ({spread.p5:z.0f} to {spread.p95:z.0f}); add faces that look elsewhere."
            )
    light, balance = result.lightness, result.light_balance
    # Thresholds of advice, here and below: chosen, unmeasured.
    if light and balance and light.range < 10 and balance.range < 10:
        advice.append(
            f"One light: 90 % of the faces lie within {light.range:.0f} of 100 steps of lightness; "
            "add faces under other light, or let colour augmentation help."
        )
    return advice


def _picture_advice(result: Report) -> list[str]:
    advice = []
    if len(result.sizes_px) > 1:
        sizes = ", ".join(f"{count} of {size} px" for size, count in result.sizes_px.items())
        advice.append(
            f"The pictures have {len(result.sizes_px)} sizes ({sizes}): all work, the small ones "
            "train a blurrier face; extract all at one size where you can."
        )
    if result.sizes_px and result.native_px:
        # The most frequent, of equally frequent ones the larger: a few odd files do not decide.
        usual_px = max(result.sizes_px, key=lambda size: (result.sizes_px[size], size))
        # The smaller of both: extraction may have enlarged a face that was small in its film.
        face_px = min(usual_px, result.native_px.median) * usual_share(result.shows)
        advice.append(
            f"At {usual_crop(result.shows, _CROP_PX).centering} centring these files hold about "
            f"{face_px:.0f} real px of a face: fit for models of up to {_model_px(face_px)} px; "
            "larger input is not better output."
        )
    advice.extend(_mask_advice(result))
    for names, text in (
        (list(result.damaged_masks), "with a damaged stored mask"),
        (result.blank, "with a blank picture"),
        (result.blurred, "much blurrier than the rest"),
        (result.odd_landmarks, "with landmarks unlike a face"),
    ):
        if names:
            remedy = plural(
                len(names),
                "look at it, and remove it if it is bad",
                "look at them and remove the bad ones",
            )
            advice.append(f"{_faces(len(names))} {text} ({_some(names)}): {remedy}.")
    return advice


def _mask_advice(result: Report) -> list[str]:
    advice = []
    stored = {name: n for name, n in result.masks.items() if name not in LANDMARK_MASKS}
    for name, count in stored.items():
        # Only stored ones: masks of landmarks can be drawn of every face.
        if count < result.num_faces:
            advice.append(
                f"Only {count} of {result.num_faces} faces {plural(count, 'has', 'have')} the mask "
                f"{name!r}: with it as data.mask_type the others are left out."
            )
    if result.num_faces and not stored:
        advice.append(
            "No network-made mask is stored: train with data.mask_type extended or components, "
            "which are drawn from the landmarks."
        )
    for name, reasons in result.empty_masks.items():
        first, reason = next(iter(reasons.items()))
        advice.append(
            f"{_faces(len(reasons))} with an (almost) empty mask {name!r} "
            f"({_some(list(reasons))}), with which nothing of "
            f"{plural(len(reasons), 'it', 'them')} is trained; {first}: {reason}."
        )
    return advice


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _faces(count: int) -> str:
    return f"{count} {plural(count, 'face')}"


def _model_px(real_px: float) -> int:
    """The largest usual model size that so many px still feed."""
    # A size that lacks 15 % of its px counts as fed. Chosen, unmeasured.
    fed = [size for size in (64, 128, 192, 256, 384, 512) if size <= real_px * 1.15]
    return max(fed, default=64)


def _poses_only(one: Report, other: Report) -> dict[str, float]:
    """Fields of pose with at least 1 % of one side's faces and none of the other's."""
    return {
        pose: count / one.num_faces
        for pose, count in one.poses.items()
        if count >= max(0.01 * one.num_faces, 1) and not other.poses.get(pose)
    }


def _light_advice(a: Report, b: Report) -> list[str]:
    advice = []
    for name, other, one, two in (("A", "B", a, b), ("B", "A", b, a)):
        if not one.lightness or not two.lightness:
            continue
        if one.lightness.p95 > two.lightness.p95 + 8:
            advice.append(
                f"Side {name} has faces as light as {one.lightness.p95:.0f} of 100, side {other} "
                f"only up to {two.lightness.p95:.0f}: add lighter faces to {other}."
            )
        if one.lightness.p5 < two.lightness.p5 - 8:
            advice.append(
                f"Side {name} has faces as dark as {one.lightness.p5:.0f} of 100, side {other} "
                f"only down to {two.lightness.p5:.0f}: add darker faces to {other}."
            )
    if a.light_balance and b.light_balance:
        # Medians, not ends: light that comes from both sides in turn is no difference.
        difference = b.light_balance.median - a.light_balance.median
        if abs(difference) > 10:
            where = "right" if difference > 0 else "left"
            advice.append(
                f"Most faces of side B are lit more from the {where} than those "
                f"of side A (by {abs(difference):.0f} of 100): match the light."
            )
    return advice
