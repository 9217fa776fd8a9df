"""A film swapped from its frames and faces: checks first, then the conversion, then the sheet."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from ...models.autoencoder import Side
from .. import precision
from ..blend import FEATHER_SHARE, LEARNED, STORED, BlendOptions
from ..checkpoint.inference import Weights, write_export
from ..faces.inspect import tiled
from ..faces.masks import LANDMARK_MASKS
from ..swapping import BatchDecoder, SwapModel, load_model, require_side
from ..system.memory import kept_memory
from ..system.threads import thread_count
from ..training.devices import choose_device
from .convert import TILE_PX, Converter
from .frames import Frame, PictureFolder
from .output import PictureOutput, encoded_png, manifest_of, origin
from .placement import Faces, first_number, read_faces, require_frames, stored_mask_name
from .video import Video
from .video_output import VideoOutput
from .video_parts import CONTAINERS

Emit = Callable[..., None]
# Else a folder of this name would be made of a video that somebody wanted.
_OTHER_VIDEOS = (".avi", ".webm", ".m4v", ".wmv", ".mpg", ".mpeg", ".flv", ".gif")
# Chosen, unmeasured.
_SHEET_FRAMES = 8
_SECONDS_BETWEEN_STEPS = 0.5


@dataclass(frozen=True, kw_only=True)
class SwapSettings:
    """What is to be swapped, and how."""

    model: Path
    """Model folder, or a file of `mien model inference`."""

    faces: Path
    """Folder of the faces that were extracted from the frames, or a faceset.pak."""

    frames: Path
    """Folder of pictures, or a video."""

    output: Path
    """Folder to write, or a video where it ends in one of `CONTAINERS`."""

    generation: str | None = None
    """Name of a save of the model; None: the newest."""

    weights: Weights = "auto"
    """Same as for `load_model`."""

    side: Side = "b"
    """Side as whom the faces are decoded."""

    mask: str | None = None
    """Mask of the faces; `stored`: the one that they have; None: the learned one, or else
    `extended`."""

    feather_px: float | None = None
    """Width over which a face fades out, px of the decoded face; None: 1/16 of its edge."""

    erode_px: float = 0.0
    """Width that is taken off the mask before, px of the decoded face."""

    color: Literal["off", "mean", "full"] = "mean"
    """Colours that are taken over from the frame."""

    batch_size: int = 16
    """Faces that are decoded at a time."""

    device: str = "auto"
    """Device that decodes: auto, cpu, cuda, cuda:N."""

    precision: str = "auto"
    """Number format of the decoding, as for training."""

    num_threads: int = 0
    """Threads that read, blend and encode; 0: one a core."""

    fps: float = 25.0
    """Frames a second of a video that is made of pictures."""

    preview: int | None = None
    """Number of frames with faces, evenly spaced, that are swapped; None: all frames."""

    sheet: Path | None = None
    """PNG that shows some faces before and after."""

    partial: bool = False
    """Leave out faces whose frame is missing."""

    force: bool = False
    """Replace a video or a sheet that is there."""


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    frames: those done, of num_frames; kept: of them, those that were there before. faces: swapped
    now. is_stopped: it was asked to stop before all were done.
    """

    output: Path
    sheet: Path | None
    frames: int
    num_frames: int
    faces: int
    kept: int
    seconds: float
    is_stopped: bool


@dataclass(frozen=True)
class _Film:
    """All that a conversion needs, checked."""

    converter: Converter
    frames: Callable[[], Iterator[Frame]]
    num_frames: int
    num_faces: int
    output: PictureOutput | VideoOutput
    text: str
    """What each output says about itself."""


@precision.restoring_products()
def swap_film(
    settings: SwapSettings, *, emit: Emit, should_stop: Callable[[], bool] = lambda: False
) -> Report:
    """Swap the faces of a film.

    Args:
        settings: What is to be swapped, and how.
        emit: Called with the name of an event and its fields: `start`, `warning`, and `step` at
            most twice a second.
        should_stop: Asked after each frame; the same call then goes on with what is missing.

    Raises:
        ValueError: Something of the input does not fit; one line says what, and what to do.
    """
    # Monotonic: the clock may be set while a film of hours is made.
    began_at = time.monotonic()
    film = _prepare(settings, emit)
    if film.output.notice:
        emit("warning", message=film.output.notice)
    frames = faces = kept = 0
    is_stopped = False
    tiles: list[tuple[str, np.ndarray]] = []
    steps = _Steps(emit, film.num_frames)
    threads = thread_count(settings.num_threads)
    # Frames are large blocks, and each takes the memory of one before it.
    with closing(film.output), kept_memory:
        # Closed before the output, into which its threads may still be writing.
        with closing(film.converter.convert(film.frames(), film.output, threads)) as written:
            for done in written:
                # A kept frame counts, its faces do not: those are what this call has swapped.
                frames, kept = frames + 1, kept + done.was_there
                faces += 0 if done.was_there else done.num_faces
                tiles.extend(done.captioned_tiles)
                steps.add(frames, faces)
                # Asked behind the last frame, a stop comes too late: nothing is missing.
                if should_stop() and frames < film.num_frames:
                    is_stopped = True
                    break
        if not is_stopped:
            film.output.finish()
            # A container may promise more frames than can be decoded.
            if frames < film.num_frames:
                line = f"{settings.frames} ends after {frames} of its {film.num_frames} frames"
                emit("warning", message=line)
    # Of a stopped film, too: what was swapped can be judged.
    sheet = _write_sheet(settings, tiles, film.text) if settings.sheet and tiles else None
    seconds = time.monotonic() - began_at
    return Report(settings.output, sheet, frames, film.num_frames, faces, kept, seconds, is_stopped)


def _prepare(settings: SwapSettings, emit: Emit) -> _Film:
    """Check everything, and open the output last."""

    def warn(line: str) -> None:
        emit("warning", message=line)

    _check_settings(settings)
    source = Video(settings.frames) if settings.frames.is_file() else PictureFolder(settings.frames)
    device = choose_device(settings.device, warn)
    compute = precision.resolve(settings.precision, device)
    save, weights = settings.generation, settings.weights
    model = load_model(settings.model, generation=save, device=device, weights=weights)
    require_side(model, settings.side)
    options = _blend_options(settings, model)
    faces = read_faces(settings.faces, options.mask, warn)
    if isinstance(source, Video):
        # Only the faces' names tell whether their extraction counted from 0 or from 1.
        source.first_number = first_number(faces)
    stems = source.stems
    faces = require_frames(
        faces, frozenset(stems), settings.frames, partial=settings.partial, warn=warn
    )
    with_faces = [stem for stem in stems if stem in faces]
    chosen = None if settings.preview is None else _spread(with_faces, settings.preview)

    # A function: the frames are gone through twice, for a first look and for all.
    def frames() -> Iterator[Frame]:
        if chosen is None:
            return source.frames()
        # Not behind the last one: the rest of the film need not be decoded.
        return islice((each for each in source.frames() if each.stem in chosen), len(chosen))

    # Before the output is opened: one frame is enough to see that the film is another one.
    _check_first(frames(), faces)
    compute.apply()
    num_faces = sum(len(faces[stem]) for stem in chosen or with_faces)
    shown = _spread([stem for stem in with_faces if stem in (chosen or faces)], _SHEET_FRAMES)
    decode = BatchDecoder(model, settings.side, settings.batch_size, compute.compute)
    converter = Converter(
        model, decode, settings.batch_size, options, faces, shown if settings.sheet else frozenset()
    )
    text = origin(model, settings.side)
    written = stems if chosen is None else [stem for stem in stems if stem in chosen]
    output = _open_output(settings, model, options, source, written, faces, text)
    emit(
        "start",
        output=str(settings.output),
        frames=len(written),
        kept=output.num_there(written),
        faces=num_faces,
        run_id=model.run_id,
        iterations=model.iterations,
        weights=model.weights,
        side=settings.side,
        **asdict(options),
        device=str(device),
        precision=compute.name,
        batch_size=settings.batch_size,
    )
    return _Film(converter, frames, len(written), num_faces, output, text)


class _Steps:
    """Events that tell how far it is, at most twice a second, and of the last frame."""

    def __init__(self, emit: Emit, num_frames: int) -> None:
        self._emit, self._num_frames = emit, num_frames
        self._began_at = time.monotonic()
        # So the first frame is told at once: a user sees that it has begun.
        self._told_at = -math.inf

    def add(self, frames: int, faces: int) -> None:
        """Tell of one more frame, if it is time."""
        now = time.monotonic()
        if now - self._told_at < _SECONDS_BETWEEN_STEPS and frames < self._num_frames:
            return
        self._told_at = now
        rate = frames / max(now - self._began_at, 1e-9)
        self._emit(
            "step",
            frame=frames,
            frames=self._num_frames,
            faces=faces,
            frames_per_s=round(rate, 2),
            eta_s=round(max(self._num_frames - frames, 0) / rate, 1),
        )


def _check_settings(settings: SwapSettings) -> None:
    """Refuse, by a ValueError, what does not fit, before anything is read."""
    if not settings.frames.exists():
        raise ValueError(f"{settings.frames} does not exist: give the film's frames, or a video")
    suffix = settings.output.suffix.lower()
    if suffix in _OTHER_VIDEOS:
        raise ValueError(f"a video must end in {', '.join(CONTAINERS)}, got {settings.output}")
    for name, path in (("the output", settings.output), ("the sheet", settings.sheet)):
        if path is None:
            continue
        # Resolved, for a link or `..` would hide that it is the same place.
        for other in (settings.frames, settings.faces, settings.model):
            # Frames that are written among those that are read would be read at the next call.
            if path.resolve().is_relative_to(other.resolve()):
                raise ValueError(f"{name} {path} lies in {other}: choose another place")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}; make it first")
    files = [settings.sheet] if settings.sheet else []
    if settings.sheet and settings.sheet.suffix.lower() != ".png":
        raise ValueError(f"the sheet must end in .png, got {settings.sheet}")
    for file in [*files, settings.output] if suffix in CONTAINERS else files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder: choose another name")
        if os.path.lexists(file) and not settings.force:
            raise ValueError(f"{file} exists; add --force to replace it")
        # A video has its name only once it is whole, which may be after hours.
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise ValueError(f"{file.parent} cannot be written to: choose another place")
    if suffix not in CONTAINERS and settings.output.is_file():
        raise ValueError(f"{settings.output} is a file: give a folder, or a name in .mp4")


def _blend_options(settings: SwapSettings, model: SwapModel) -> BlendOptions:
    """How faces are blended, with what is left to the model settled."""
    if settings.mask == LEARNED and not model.has_mask:
        raise ValueError(
            f"the model has learned no mask: give --mask {' or '.join(LANDMARK_MASKS)}, none, or "
            "the name of a stored one"
        )
    mask = settings.mask or (LEARNED if model.has_mask else "extended")
    feather_px = settings.feather_px
    return BlendOptions(
        mask=stored_mask_name(settings.faces) if mask == STORED else mask,
        feather_px=model.output_px * FEATHER_SHARE if feather_px is None else feather_px,
        erode_px=settings.erode_px,
        color=settings.color,
    )


def _spread(stems: Sequence[str], count: int) -> frozenset[str]:
    """Names, evenly spaced, as many as counted; all where there are fewer."""
    # A float: whole steps would leave the end of a film without any.
    step = max(len(stems) / count, 1)
    return frozenset(stems[int(number * step)] for number in range(min(count, len(stems))))


def _check_first(frames: Iterator[Frame], faces: Faces) -> None:
    """Refuse, by a ValueError, frames of other sizes than the faces', by the first one with any."""
    for frame in frames:
        if frame.stem in faces:
            image_hwc = frame.read()
            for placed in faces[frame.stem]:
                placed.check_size(image_hwc.shape[:2])
            return


def _open_output(
    settings: SwapSettings,
    model: SwapModel,
    options: BlendOptions,
    source: Video | PictureFolder,
    stems: Sequence[str],
    faces: Faces,
    text: str,
) -> PictureOutput | VideoOutput:
    manifest = manifest_of(model, settings.side, options, settings.frames, settings.faces, faces)
    if settings.output.suffix.lower() in CONTAINERS:
        return VideoOutput(
            settings.output,
            stems,
            source if isinstance(source, Video) else None,
            # 1001 is the denominator of the rates of broadcasts, as in 30000/1001.
            Fraction(settings.fps).limit_denominator(1001),
            text,
            # A video of some frames numbers its parts anew, which must not go on with those of all.
            manifest | {"preview": settings.preview},
            # Frames out of all over the film have no sound that would fit.
            has_sound=settings.preview is None,
            force=settings.force,
        )
    return PictureOutput(settings.output, manifest, text)


def _write_sheet(
    settings: SwapSettings, tiles: list[tuple[str, np.ndarray]], text: str
) -> Path | None:
    """Write the picture of some faces before and after."""
    assert settings.sheet is not None
    write_export(settings.sheet, encoded_png(tiled(tiles, TILE_PX), text), force=settings.force)
    return settings.sheet
