"""Pictures of how a swap has changed: two saves beside each other, or a strip of many."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..faces.geometry import resize
from .sheet import arranged, enlarged, labels_of
from .tiles import ORIGINAL, SWAPPED, Tiles

STRIP_SAVES = 10
"""Saves in a strip at the most."""

STRIP_FACES = 3
"""Faces of each side in a strip, where nothing else is said."""


def comparison(one: Tiles, other: Tiles, enlarge: str) -> np.ndarray:
    """Each face as it is and as both saves swap it, (H, W, 3) BGR uint8.

    Args:
        one: Tiles of a save.
        other: Tiles of another save, of the same sides.
        enlarge: How small tiles are enlarged: lanczos or nearest.
    """
    # One may be read from its kept preview, whose tiles are shrunk.
    other = _of_size(other, one.images.shape[-2])
    # `preview.preview_images` may have changed between them.
    count = min(one.images.shape[1], other.images.shape[1])
    blocks, labels = [], []
    for number, side in enumerate(one.sides):
        kinds = [one.images[number, :count, kind] for kind in (ORIGINAL, SWAPPED)]
        # The original once: a second one would be the same picture, or the caller has warned of it.
        kinds.append(other.images[number, :count, SWAPPED])
        blocks.append(enlarged(np.stack(kinds, axis=1), enlarge))
        own, _, swapped, _ = labels_of(side)
        labels.append([own, f"{swapped}, {one.iteration:,}", f"{swapped}, {other.iteration:,}"])
    # No names of saves: a kept preview knows its iteration only, and outlives the save's folder.
    title = f"iterations {one.iteration:,} and {other.iteration:,}"
    return arranged(blocks, labels, title)


def strip(history: Sequence[Tiles], enlarge: str, num_faces: int = STRIP_FACES) -> np.ndarray:
    """Some faces of both sides in rows, swapped by one save after the other, (H, W, 3) BGR uint8.

    Args:
        history: Tiles of up to 10 saves, in order.
        enlarge: How small tiles are enlarged: lanczos or nearest.
        num_faces: Faces of each side at the most.
    """
    newest = history[-1]
    alike = [_of_size(tiles, newest.images.shape[-2]) for tiles in history]
    count = min(num_faces, *(tiles.images.shape[1] for tiles in alike))
    # Of one save alone: the originals of all are the same.
    columns = [newest.images[:, :count, ORIGINAL]]
    columns += [tiles.images[:, :count, SWAPPED] for tiles in alike]
    faces = np.concatenate(list(np.stack(columns, axis=2)))
    # Numbers alone: ten columns leave no room for a word over a tile.
    labels = ["original", *(f"{tiles.iteration:,}" for tiles in alike)]
    title = f"swaps, iterations {history[0].iteration:,} to {newest.iteration:,}"
    return arranged([enlarged(faces, enlarge)], [labels], title)


def chosen_for_strip(iterations: Sequence[int]) -> list[int]:
    """Choose the first, the last, and some in even steps of those between."""
    count = min(STRIP_SAVES, len(iterations))
    places = np.linspace(0, len(iterations) - 1, count).round().astype(int)
    return [iterations[place] for place in places]


def _of_size(tiles: Tiles, tile_px: int) -> Tiles:
    """The same tiles in another size."""
    if tiles.images.shape[-2] == tile_px:
        return tiles
    flat = tiles.images.reshape(-1, *tiles.images.shape[-3:])
    resized = np.stack([resize(tile, tile_px) for tile in flat])
    return dataclasses.replace(
        tiles, images=resized.reshape(*tiles.images.shape[:-3], *resized.shape[1:])
    )
