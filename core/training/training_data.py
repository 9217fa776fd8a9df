"""Faces and batches of a session: opened as its settings say, with warnings of their faults."""

import dataclasses
from pathlib import Path

import torch

from ...kernels.augment import Landmarks
from ...models.alignment import MULTIPLE
from ..config import Config
from ..console.reporter import Reporter
from ..data.feed import Feed
from ..data.landmarks import landmarks_of_sides
from ..data.sides import SIDES, SideFaces, open_sides, warnings_of
from ..data.store import NUM_SHARED
from ..distribute.ranks import ALONE, Ranks
from ..faces.folder import skipped
from ..precision import Precision
from ..system.threads import thread_count
from .build import has_aligned_channels, sizes_of

_MOST_NAMES = 10
"""Files that a warning lists for programs; it counts them all."""


def check_folders(config: Config, *, is_new: bool) -> None:
    """Refuse training without faces, and half a time-lapse, by ValueError."""
    for side in SIDES:
        if not getattr(config.data, f"input_{side}"):
            where = f"; {config.save.model_dir} holds no model yet" if is_new else ""
            raise ValueError(f"no faces for side {side.upper()}: add --input-{side} FOLDER{where}")
    preview = config.preview
    # At the start, since the first picture is due with the first save.
    if bool(preview.timelapse_input_a) != bool(preview.timelapse_input_b):
        has, lacks = ("a", "b") if preview.timelapse_input_a else ("b", "a")
        raise ValueError(
            f"a time-lapse shows both sides, and preview.timelapse_input_{lacks} is not set; add "
            f"--timelapse-input-{lacks} FOLDER, or leave --timelapse-input-{has} out"
        )


def open_faces(
    config: Config,
    device: torch.device,
    reporter: Reporter,
    *,
    faces_dir: Path,
    earlier_dir: Path | None,
    num_readers: int = 1,
) -> dict[str, SideFaces]:
    """Both sides' faces, decoded to the processing size; what had to be left out is reported.

    Args:
        config: All settings.
        device: Device on which they are trained on.
        reporter: Shows the progress, and warns of faces that cannot be used.
        faces_dir: Folder for decoded faces where the settings name none.
        earlier_dir: Folder of decoded faces that are read too, and left alone; None: there is none.
        num_readers: Processes of this machine that hold the faces, of which each has its part of
            the memory.

    Raises:
        ValueError: As `open_sides`.
    """
    input_px, output_px = sizes_of(config)
    # A mask that nothing uses must not make a face unusable.
    uses_mask = config.loss.penalized_mask_loss or config.loss.learn_mask
    data = config.data if uses_mask else dataclasses.replace(config.data, mask_type="none")
    faces = open_sides(
        data,
        config.evaluate,
        # One size for all: inputs and targets are made of the same stored face.
        max(input_px, *output_px),
        store_dir=Path(data.store_dir or faces_dir),
        earlier_dir=earlier_dir,
        device=device,
        progress=reporter.progress,
        num_readers=num_readers,
        # The model's own folder has one reader, whose settings are the model's.
        num_kept=NUM_SHARED if data.store_dir else 1,
    )
    for opened in faces.values():
        for files in opened.left_out:
            names = [file.path.name for file in files[:_MOST_NAMES]]
            reporter.warning(skipped(files), count=len(files), files=names)
    for warning in warnings_of(faces, config.loss):
        reporter.warning(warning)
    return faces


def open_feed(
    config: Config,
    faces: dict[str, SideFaces],
    device: torch.device,
    precision: Precision,
    reporter: Reporter,
    ranks: Ranks = ALONE,
) -> Feed:
    """The feed of batches of these faces, in the number format of the model's input; of several
    ranks each has its share of every batch."""
    input_px, output_px = sizes_of(config)
    # Of one rank alone it is the whole batch.
    share = ranks.share(config.train.batch_size)
    return Feed(
        {side: opened.store for side, opened in faces.items()},
        config,
        input_px=input_px,
        output_px=output_px,
        device=device,
        dtype=precision.compute,
        num_threads=thread_count(config.data.num_threads),
        input_channels=MULTIPLE if has_aligned_channels(config, device) else 3,
        landmarks=_landmarks(config, faces, device, reporter),
        offset=share.first,
        count=share.count,
        tables={side: opened.draw_table for side, opened in faces.items()},
    )


def _landmarks(
    config: Config, faces: dict[str, SideFaces], device: torch.device, reporter: Reporter
) -> tuple[Landmarks, Landmarks] | None:
    """What faces are warped to, where they are warped to landmarks."""
    if not config.augment.warp_to_landmarks:
        return None
    # Said, since a user who has asked for it would look for its effect.
    if not config.augment.warp:
        reporter.warning("augment.warp is off, so augment.warp_to_landmarks does nothing")
        return None
    a, b = (faces[side].landmarks_fl2 for side in SIDES)
    return landmarks_of_sides((a, b), device)
