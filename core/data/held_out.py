"""Faces that a model is never trained on: which they are, and their pictures to measure it with.

With `evaluate.held_out` = n a face is held out where the BLAKE2b hash of its file's name is a
multiple of n, which is so for about one in n. The name alone decides: faces that are added or
removed later never move another one in or out of the set. A file that is renamed may move.

Letters: n faces of one side, s edge of the network's input, f edge of its largest output, px;
l = landmark (68), 2 = (x, y), c = B, G, R.
"""

import dataclasses
import hashlib
import os
from dataclasses import dataclass

import numpy as np

from ..config import DataConfig, EvaluateConfig
from ..config.path_settings import each_path
from ..faces import geometry
from ..faces.folder import MINIMUM_FACES, Face, FaceFolder, Rejected, read_folder
from ..faces.listing import overlap_of_sides
from ..faces.png import FaceFileError
from ..system.printable import plural
from .decode import decode_crops
from .pipeline import configured_masks


@dataclass(frozen=True)
class HeldOutFaces:
    """Faces of one side as the network meets them in training, but not varied."""

    inputs_nssc: np.ndarray
    """(n, s, s, 3) uint8: what the network is shown."""

    targets_nffc: np.ndarray
    """(n, f, f, 3) uint8: what it should make of that."""

    masks_nff: np.ndarray
    """(n, f, f) uint8: the face mask, nowhere empty."""

    landmarks_nl2: np.ndarray
    """(n, 68, 2) float32, in px of the targets."""

    rejected: list[Rejected]
    """Faces that were chosen and cannot be used, and why."""


def is_held_out(name: str, one_in: int) -> bool:
    """Whether the face file of this name is among the one in ``one_in`` that are held out."""
    # Not Python's hash, which differs from one start to the next.
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0


def is_trained_on(name: str, evaluate: EvaluateConfig) -> bool:
    """Whether the face file of this name, in the folder of a side, is one to train on."""
    return not (evaluate.held_out and is_held_out(name, evaluate.held_out))


def hold_out(
    folder: FaceFolder, evaluate: EvaluateConfig, *, side: str, data: DataConfig
) -> tuple[FaceFolder, FaceFolder]:
    """The faces of a side to train on, and those to measure on: none where none are asked for.

    Raises:
        ValueError: None would be left to measure on, or too few to train on; or those to measure on
            do not show the crop of that centering.
    """
    own = getattr(evaluate, f"held_out_{side}")
    if own:
        try:
            return folder, read_folder(
                own,
                strict=data.strict,
                minimum=1,
                centering=data.centering,
                sub_folders=data.sub_folders,
            )
        except ValueError as error:
            raise ValueError(f"evaluate.held_out_{side}: {error}") from None
    if not evaluate.held_out:
        return folder, FaceFolder(folder.path, [])
    # By each name, not by shares of the list: faces that come or go move no other one.
    chosen = [is_trained_on(face.path.name, evaluate) for face in folder.faces]
    pairs = list(zip(folder.faces, chosen, strict=True))
    measured = [face for face, is_trained in pairs if not is_trained]
    trained = [face for face, is_trained in pairs if is_trained]
    setting = f"side {side.upper()}: evaluate.held_out = {evaluate.held_out}"
    if not measured:
        raise ValueError(
            f"{setting} holds out none of {len(pairs)} {plural(len(pairs), 'face')}; make it "
            "smaller, or add faces"
        )
    if len(trained) < MINIMUM_FACES:
        raise ValueError(
            f"{setting} leaves {len(trained)} of {len(pairs)} {plural(len(pairs), 'face')} to "
            f"train on, at least {MINIMUM_FACES} are needed; make it larger, or add faces"
        )
    # Files that cannot be used are told once, with the faces that are trained on.
    held_out = dataclasses.replace(folder, faces=measured, rejected=[])
    return dataclasses.replace(folder, faces=trained), held_out


def check_held_out(data: DataConfig, evaluate: EvaluateConfig) -> None:
    """Refuse, by ValueError, what does not say which faces are held out, or says it wrongly.

    Folders must share no faces with one another or with those that are trained on. Files are
    compared, not pictures: a copy of a trained face is not found.
    """
    with_folder = [side for side in "ab" if getattr(evaluate, f"held_out_{side}")]
    if len(with_folder) == 1:
        missing = "b" if with_folder == ["a"] else "a"
        raise ValueError(
            f"evaluate.held_out_{with_folder[0]} is given, but evaluate.held_out_{missing} is not; "
            "give both, or neither"
        )
    if with_folder and evaluate.held_out:
        raise ValueError(
            f"evaluate.held_out is {evaluate.held_out} and evaluate.held_out_a and held_out_b are "
            "folders; choose one of the two ways to hold faces out"
        )
    # A model that nothing is measured with would be read, and its user think that it counts.
    for name in ("landmark_model", "embedding_model"):
        if getattr(evaluate, name) and not with_folder and not evaluate.held_out:
            raise ValueError(
                f"evaluate.{name} needs faces to measure on; set evaluate.held_out, or "
                "evaluate.held_out_a and held_out_b"
            )
    _check_folders(data, evaluate)


def load_held_out(
    folder: FaceFolder,
    data: DataConfig,
    *,
    count: int,
    input_px: int,
    output_px: tuple[int, ...],
    num_threads: int,
) -> HeldOutFaces:
    """Load up to ``count`` faces, evenly spread over the folder's, cut out as those trained on are.

    Raises:
        ValueError: None of them can be used; or one cannot, and data.strict is set.
    """
    # The store's size: a metric must see the faces through the same two filters as training.
    process_px, target_px = max(input_px, *output_px), output_px[-1]
    crop = geometry.Crop(
        data.centering, data.coverage / 100, data.vertical_offset / 100, process_px
    )
    # Spread, and not drawn: every measurement is of the same faces, so that figures can be
    # compared.
    spread = np.linspace(0, len(folder.faces) - 1, min(count, len(folder.faces)))
    chosen = [folder.faces[i] for i in spread.round().astype(int)]
    inputs, targets, masks, landmarks = [], [], [], []
    rejected: list[Rejected] = []
    for i, decoded_ssc in decode_crops(chosen, crop, backend="opencv", num_threads=num_threads):
        face = chosen[i]
        try:
            if isinstance(decoded_ssc, FaceFileError):
                raise decoded_ssc
            mask_ff = _mask(face, crop, data, target_px)
        except FaceFileError as error:
            if data.strict:
                raise ValueError(f"{face.path}: {error}") from None
            rejected.append(Rejected(face.path, str(error)))
            continue
        # Each from the crop at the processing size, as training makes them.
        inputs.append(geometry.resize(decoded_ssc, input_px))
        targets.append(geometry.resize(decoded_ssc, target_px))
        masks.append(mask_ff)
        in_crop_l2 = geometry.crop_landmarks(face.landmarks_l2, face.alignment, crop)
        # Scaled about the corner, as OpenCV's resize of the pixels is within half a pixel.
        landmarks.append(in_crop_l2 * np.float32(target_px / process_px))
    if not inputs:
        raise ValueError(
            f"none of the {len(chosen)} held-out {plural(len(chosen), 'face')} of {folder.title} "
            f"can be used ({rejected[0].path.name}: {rejected[0].reason})"
        )
    return HeldOutFaces(
        np.stack(inputs), np.stack(targets), np.stack(masks), np.stack(landmarks), rejected
    )


def _check_folders(data: DataConfig, evaluate: EvaluateConfig) -> None:
    folders = {
        f"data.input_{side}": each_path(list(getattr(data, f"input_{side}"))) for side in "ab"
    }
    for side in "ab":
        setting, own = f"evaluate.held_out_{side}", getattr(evaluate, f"held_out_{side}")
        if not own:
            continue
        for other, paths in folders.items():
            try:
                shared = overlap_of_sides([own], paths, sub_folders=data.sub_folders)
            except ValueError as error:
                raise ValueError(f"{setting}: {error}") from None
            if shared:
                raise ValueError(
                    f"{setting} must share no faces with {other}, but {shared}; give it a folder "
                    "of its own"
                )
        # Added as it goes, so that the two held-out folders are compared with one another too.
        folders[setting] = [own]


def _mask(face: Face, crop: geometry.Crop, data: DataConfig, size_px: int) -> np.ndarray:
    """The face mask, (f, f) uint8. Raises FaceFileError where there is none, or nothing in it."""
    mask_ss = np.ascontiguousarray(configured_masks(face, crop, data)[..., 0])
    mask_ff = geometry.resize(mask_ss, size_px)
    # A metric inside of it would divide by nothing.
    if not mask_ff.any():
        raise FaceFileError("its face mask is empty")
    return mask_ff
