"""The tiles of a preview: each face as it is, re-created, and swapped in its own surroundings.

A swap is pasted back as `mien swap` does where nothing else is set: in the colours of the original,
through the mask that the model has learned (else `extended`), which fades out over a part of the
face's edge. So a seam, or a colour that does not fit, is seen here before a film shows it.

Letters: s sides, n faces of a side, k kinds of tiles, f edge of a tile in px, o edge of a
prediction in px, c B,G,R.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from ...models.autoencoder import Side
from ..blend import FEATHER_SHARE, matched, softened
from .look import Look

ORIGINAL, RECREATED, SWAPPED, MASK = range(4)


@dataclass(frozen=True)
class Tiles:
    """What a sheet is put together of."""

    iteration: int
    sides: tuple[Side, ...]
    images: np.ndarray
    """(s, n, k, f, f, 3) uint8 BGR: original, re-created, swapped and, where the model learns
    masks, that of the swap in grey."""

    masks: np.ndarray | None
    """(s, n, 2, f, f) uint8: masks of the original and of the re-created face; None: the model
    trains without, or they were not kept."""

    trained_px: int
    """Edge of the square in the middle of a tile that is trained on."""

    faces_digest: str
    """Name of these faces: equal where the originals are."""

    weights: str = ""
    """Weights that made them, ema or raw; empty: unknown, in files of older versions."""

    def first(self, num_faces: int | None) -> "Tiles":
        """The first faces of each side, so many at the most; None: all of them."""
        masks = None if self.masks is None else self.masks[:, :num_faces]
        return replace(self, images=self.images[:, :num_faces], masks=masks)


def tiles_of(look: Look, *, has_mask: bool) -> Tiles:
    """The tiles of what a model makes of faces; has_mask: it trains with masks."""
    targets_snff3 = look.faces.targets[..., :3]
    out_px, full_px = look.predictions.shape[-2], targets_snff3.shape[-2]
    pad = (full_px - out_px) // 2
    middle = np.s_[..., pad : pad + out_px, pad : pad + out_px, :]
    # By the picture: a model may train with masks, and yet learn none.
    has_learned_mask = look.predictions.shape[-1] == 4
    # Copies: kinds are painted into, and the targets are the look's.
    kinds = [targets_snff3.copy() for _ in range(4 if has_learned_mask else 3)]
    # Pasted hard, without its mask: a re-created face is judged over the whole trained square.
    kinds[RECREATED][middle] = look.predictions[:, 0, ..., :3]
    swapped = kinds[SWAPPED][middle]
    for place in np.ndindex(swapped.shape[:2]):
        side, number = place
        decoded_oo = look.predictions[side, 1, number]
        mask_oo = decoded_oo[..., 3] if has_learned_mask else look.faces.landmark_masks[place]
        swapped[place] = _pasted(swapped[place], decoded_oo[..., :3], mask_oo)
    masks = None
    if has_learned_mask:
        kinds[MASK][:] = 0
        kinds[MASK][middle] = look.predictions[:, 1, ..., 3:]
    if has_mask:
        trained_snff = look.faces.targets[..., 3]
        # Without a mask of its own the model is held to the one that it is trained with.
        recreated_snff = trained_snff
        if has_learned_mask:
            recreated_snff = np.zeros_like(trained_snff)
            recreated_snff[middle[:-1]] = look.predictions[:, 0, ..., 3]
        masks = np.stack([trained_snff, recreated_snff], axis=2)
    # 64 bits: a few sets of faces are to be told apart, and nobody would forge one.
    digest = hashlib.sha256(np.ascontiguousarray(targets_snff3).data).hexdigest()[:16]
    images = np.stack(kinds, axis=2)
    return Tiles(look.iteration, look.faces.sides, images, masks, out_px, digest, look.weights)


def _pasted(original_ooc: np.ndarray, decoded_ooc: np.ndarray, mask_oo: np.ndarray) -> np.ndarray:
    """A decoded face in its place, (o, o, 3) uint8, in the original's colours."""
    original_ooc, decoded_ooc, mask_oo = (
        part.astype(np.float32) / 255 for part in (original_ooc, decoded_ooc, mask_oo)
    )
    # The defaults of `mien swap`, from where it has them: a preview shows what a film would.
    mask_oo = softened(mask_oo, 0.0, len(mask_oo) * FEATHER_SHARE)
    face_ooc = matched(decoded_ooc, original_ooc, mask_oo, "mean")
    blended_ooc = original_ooc + (face_ooc - original_ooc) * mask_oo[..., None]
    return np.rint(blended_ooc * 255).astype(np.uint8)
