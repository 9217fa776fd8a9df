"""Plain statements of every operation in `mien.kernels`, to test the fast ones against.

Written to be read, not to be fast; nothing but tests uses them.
"""

from collections.abc import Sequence

import cv2
import numpy as np

_IDENTITY = np.array([[1, 0, 0], [0, 1, 0]], np.float32)


def augment(
    faces_fssc: np.ndarray,
    records: np.ndarray,
    *,
    input_px: int,
    output_px: Sequence[int],
    penalize_mask: bool = True,
    eye_multiplier: float = 1,
    mouth_multiplier: float = 1,
    single_interpolation: bool = False,
    rgb: bool = False,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], np.ndarray]:
    """`mien.kernels.augment` as a chain of OpenCV calls.

    Returns:
        Input (B, H, W, 3) uint8; of each output its target (B, H, W, 3) uint8 and its weight
        (B, H, W) float64; the face mask (B, H, W) uint8 of the last output.
    """
    inputs: list[np.ndarray] = []
    targets: list[list[np.ndarray]] = [[] for _ in output_px]
    weights: list[list[np.ndarray]] = [[] for _ in output_px]
    masks: list[np.ndarray] = []
    size_px = faces_fssc.shape[1]
    for record in records:
        face_ssc = faces_fssc[record["index"]].copy()
        if record["color"]:
            face_ssc[..., :3] = vary_color(
                face_ssc[..., :3], record["lab"], int(record["clahe_tiles"])
            )
        colored = face_ssc = np.ascontiguousarray(face_ssc[..., :6])
        if not np.array_equal(record["matrix"], _IDENTITY):
            face_ssc = cv2.warpAffine(
                face_ssc,
                record["matrix"],
                (size_px, size_px),
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
        if record["flip"]:
            face_ssc = face_ssc[:, ::-1]
        order = [2, 1, 0] if rgb else [0, 1, 2]
        before = np.ascontiguousarray(colored[..., order])
        picture = np.ascontiguousarray(face_ssc[..., order])
        # OpenCV's rounding depends on the number of channels: those masks that are used.
        used = [3]
        if penalize_mask:
            used += [4] * (eye_multiplier > 1) + [5] * (mouth_multiplier > 1)
        stack = np.ascontiguousarray(face_ssc[..., order + used])
        for i, edge in enumerate(output_px):
            small = _shrunk(stack, edge)
            targets[i].append(small[..., :3])
            face, areas = small[..., 3], iter(np.moveaxis(small[..., 4:], -1, 0))
            weight = np.ones((edge, edge))
            if penalize_mask:
                weight = face / 255
                for multiplier in (eye_multiplier, mouth_multiplier):
                    if multiplier > 1:
                        weight = weight + weight * (next(areas) / 255) * multiplier
            weights[i].append(weight)
        masks.append(face)
        if record["warp"]:
            maps = warp_maps(record["warp_noise"], size_px)
            if single_interpolation:
                maps = maps_before(*maps, record["matrix"], bool(record["flip"]))
                edge_mode = cv2.BORDER_REPLICATE
                picture = cv2.remap(before, *maps, cv2.INTER_LINEAR, borderMode=edge_mode)
            else:
                picture = cv2.remap(picture, *maps, cv2.INTER_LINEAR)
        inputs.append(_shrunk(picture, input_px))
    return np.stack(inputs), [*map(np.stack, targets)], [*map(np.stack, weights)], np.stack(masks)


def vary_color(picture_ssc: np.ndarray, lab: np.ndarray, clahe_tiles: int) -> np.ndarray:
    """A BGR picture with L, a, b moved by a part of the way to 255 or 0, then CLAHE on L."""
    levels = cv2.cvtColor(np.ascontiguousarray(picture_ssc), cv2.COLOR_BGR2LAB).astype(np.float32)
    part = lab.astype(np.float32)
    moved = np.where(part >= 0, levels + (255 - levels) * part, levels * (1 + part))
    lab_ssc = moved.astype(np.uint8)
    if clahe_tiles:
        clahe = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(clahe_tiles, clahe_tiles))
        lab_ssc[..., 0] = clahe.apply(np.ascontiguousarray(lab_ssc[..., 0]))
    return cv2.cvtColor(lab_ssc, cv2.COLOR_LAB2BGR)


def warp_maps(noise: np.ndarray, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of the random warp comes from: x (S, S) and y (S, S), float32."""
    points = np.linspace(0, size_px, 5, dtype=np.float32)
    stretched = int(1.25 * size_px)
    begin = stretched // 10
    maps = []
    for grid in (np.tile(points, (5, 1)) + noise[0], np.tile(points[:, None], 5) + noise[1]):
        large = cv2.resize(grid, (stretched, stretched), interpolation=cv2.INTER_LINEAR)
        maps.append(np.ascontiguousarray(large[begin : begin + size_px, begin : begin + size_px]))
    return maps[0], maps[1]


def maps_before(
    x_ss: np.ndarray, y_ss: np.ndarray, matrix: np.ndarray, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Where positions of the turned and mirrored picture lie in the picture before, float32."""
    x = x_ss.shape[0] - 1 - x_ss.astype(np.float64) if flip else x_ss.astype(np.float64)
    whole = np.vstack([matrix.astype(np.float64), [0, 0, 1]])
    inverse = np.linalg.inv(whole)[:2]
    source = np.einsum("ij,jyx->iyx", inverse, np.stack([x, y_ss, np.ones_like(x)]))
    return source[0].astype(np.float32), source[1].astype(np.float32)


def _shrunk(picture: np.ndarray, edge: int) -> np.ndarray:
    """Resized by area; a picture of more than four channels one by one where OpenCV refuses it."""
    if picture.shape[0] == edge:
        return picture
    if picture.shape[2] > 4 and picture.shape[0] % edge:
        planes = [np.ascontiguousarray(plane) for plane in np.moveaxis(picture, -1, 0)]
        return np.stack(
            [cv2.resize(p, (edge, edge), interpolation=cv2.INTER_AREA) for p in planes], -1
        )
    return cv2.resize(picture, (edge, edge), interpolation=cv2.INTER_AREA)
