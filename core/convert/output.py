"""A folder of frames that is written, and what each file says about itself.

A frame with a face becomes a PNG, written whole or not at all; one without is copied byte for byte.
A file beside them, `mien_swap.json`, holds what they were made with: the same call goes on with
what is missing, another is refused.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ... import __version__
from ...models.autoencoder import Side
from ...models.fields import shown
from ..blend import BlendOptions
from ..faces.png_pixels import encode_rgb
from ..swapping import SwapModel
from ..system.durable_files import (
    DamagedError,
    discard_leftovers,
    read_regular,
    sync_folder,
    write_file,
)
from ..system.image_text import labelled
from .frames import Frame, read_bytes
from .output_lock import OutputLock
from .placement import Faces, landmarks_digest

MANIFEST = "mien_swap.json"
SCHEMA = "mien.swap/1"
# A manifest has a KiB or two; the folder may be a stranger's.
_MOST_MANIFEST_BYTES = 1 << 16
_FAST_PNG = [
    cv2.IMWRITE_PNG_COMPRESSION,
    1,
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_FILTER_SUB,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY,
]
"""Settings for frames of 16 bits or with alpha, of a camera, whose noise leaves nothing to be found
twice: three quarters of the time of OpenCV's default, for the same size."""


def origin(model: SwapModel, side: Side) -> str:
    """What a picture or a film says about itself."""
    averaged = ", average of the weights" if model.weights == "ema" else ""
    return (
        f"synthetic face: swapped by mien {__version__}, run {model.run_id}, iteration "
        f"{model.iterations}{averaged}, decoded as {side}"
    )


def manifest_of(
    model: SwapModel, side: Side, options: BlendOptions, frames: Path, folder: Path, faces: Faces
) -> dict[str, Any]:
    """What decides how the frames look, ready for JSON.

    The folders alone do not: another film may have been put into them since.
    """
    return {
        "schema": SCHEMA,
        "kind": "synthetic face",
        "run_id": model.run_id,
        "iterations": model.iterations,
        "weights": model.weights,
        "side": side,
        **asdict(options),
        "frames": str(frames.resolve()),
        "faces": str(folder.resolve()),
        # For the text of a refusal: a count says more to a user than a digest.
        "num_faces": sum(map(len, faces.values())),
        "landmarks_sha256": landmarks_digest(faces),
    }


def encoded_png(image_hwc: np.ndarray, text: str) -> bytes:
    """A picture as a labelled PNG, without loss."""
    return labelled(_plain_png(image_hwc), text)


def _plain_png(image_hwc: np.ndarray) -> bytes:
    """A picture as a PNG, without loss."""
    if image_hwc.dtype == np.uint8 and image_hwc.shape[2] == 3:
        # What most films are; OpenCV's encoder only where ours does not reach.
        return encode_rgb(image_hwc)
    is_encoded, content = cv2.imencode(".png", image_hwc, _FAST_PNG)
    if not is_encoded:
        raise RuntimeError(f"OpenCV could not encode a picture of {image_hwc.shape} as PNG")
    return content.tobytes()


class PictureOutput:
    """A folder of frames to be written, or to be completed.

    Args:
        folder: The folder, which is made where there is none.
        manifest: What the frames are made with, from `manifest_of`.
        text: What each swapped frame says about itself.

    Raises:
        ValueError: The folder holds other files, or frames that were made with something else;
            another swap is writing to it; or the disk refuses a file.
        OSError: It cannot be made.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], text: str) -> None:
        self.folder, self._text = folder, text
        remedy = "give a new folder, or empty this one first"
        self._names, self._lock = open_folder(folder, manifest, remedy)

    @property
    def notice(self) -> str:
        """What the user should know of how the folder is held; empty where nothing is unusual."""
        return self._lock.notice

    def num_there(self, stems: Iterable[str]) -> int:
        """Number of these frames that were there when the folder was opened."""
        return len({Path(name).stem for name in self._names}.intersection(stems))

    def is_done(self, frame: Frame, has_faces: bool) -> bool:
        """Whether the frame is there already."""
        return self._name(frame, has_faces) in self._names

    def encode(self, frame: Frame, image_hwc: np.ndarray | None) -> None:
        """Write a frame; may be called from any thread. None: the frame as it was."""
        if image_hwc is not None:
            content = encoded_png(image_hwc, self._text)
        elif frame.path is not None:
            # Byte for byte: a frame without a face loses nothing, its metadata included.
            content = read_bytes(frame.path)
        else:
            content = _plain_png(frame.read())
        _write(self.folder / self._name(frame, image_hwc is not None), content)

    def put(self, _encoded: None) -> None:
        """Do nothing: the frame is written."""

    def finish(self) -> None:
        """Make sure that the names of the frames survive a power cut."""
        # Once, at the end: a power cut before costs frames that the same call makes again.
        sync_folder(self.folder)

    def close(self) -> None:
        """Let another swap have the folder; what is written stays."""
        self._lock.release()

    @staticmethod
    def _name(frame: Frame, is_swapped: bool) -> str:
        return f"{frame.stem}.png" if is_swapped or frame.path is None else frame.path.name


def _write(path: Path, content: bytes) -> None:
    """Write a file, unless another process has been quicker; ValueError where the disk refuses."""
    try:
        with contextlib.suppress(FileExistsError):
            write_file(path, content)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror or error}; mend that and call it again, "
            "what is written stays"
        ) from None


def open_folder(folder: Path, manifest: dict[str, Any], remedy: str) -> tuple[set[str], OutputLock]:
    """Names in a folder of frames to be written or completed, and its lock; it is made where there
    is none.

    Args:
        folder: The folder.
        manifest: What the frames are made with; a new folder says so in a file.
        remedy: What to do where it holds anything else.

    Raises:
        ValueError: It holds other files, or frames that were made with something else; another swap
            is writing to it; or the disk refuses a file.
        OSError: It cannot be made.
    """
    if not folder.parent.is_dir():
        raise ValueError(f"there is no folder {folder.parent}; make it first")
    with contextlib.suppress(FileExistsError):
        # Not its parents: a name with a slip of the pen would grow a tree.
        folder.mkdir()
    lock = OutputLock(folder)
    try:
        return _own_names(folder, manifest, remedy), lock
    except BaseException:
        lock.release()
        raise


def _own_names(folder: Path, manifest: dict[str, Any], remedy: str) -> set[str]:
    """Names in a folder that is locked, once what is there is known to be of the same call."""
    # On a disk that has no files without a name, a kill leaves a part of one.
    discard_leftovers(folder)
    names = set(os.listdir(folder))
    if not names:
        # Before any frame: a folder of frames without it is refused at the next call.
        _write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    elif MANIFEST not in names:
        raise ValueError(f"{folder} is not empty: {remedy}")
    else:
        _refuse_other(folder / MANIFEST, manifest, remedy)
    return names


def _refuse_other(path: Path, manifest: dict[str, Any], remedy: str) -> None:
    """Refuse, by a ValueError, to complete frames that were made with something else."""
    try:
        found = json.loads(read_regular(path, _MOST_MANIFEST_BYTES))
    except (DamagedError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is damaged: {remedy}")
    for key, value in manifest.items():
        if found.get(key) != value:
            raise ValueError(
                f"{path.parent} holds frames made with {key} {shown(found.get(key))}, now it is "
                f"{value!r}: {remedy}"
            )
