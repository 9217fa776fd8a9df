"""The augmentation as a chain of OpenCV calls, one face after the other: a part of `reference`."""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np

WARP_LANDMARKS = 2
_IDENTITY = np.array([[1, 0, 0], [0, 1, 0]], np.float32)


def augment(
    faces_fssc: np.ndarray,
    records: np.ndarray,
    *,
    input_px: int,
    output_px: Sequence[int],
    landmarks: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    penalize_mask: bool = True,
    eye_multiplier: float = 1,
    mouth_multiplier: float = 1,
    single_interpolation: bool = False,
    rgb: bool = False,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], np.ndarray]:
    """`mien.kernels.augment` as a chain of OpenCV calls.

    It takes one store, and for each record the ``landmarks`` (68, 2) of its face and of the one
    that it is warped to.

    Returns:
        Input (B, H, W, 3) uint8; of each output its target (B, H, W, 3) uint8 and its weight
        (B, H, W) float64; the face mask (B, H, W) uint8 of the last output.
    """
    inputs: list[np.ndarray] = []
    targets: list[list[np.ndarray]] = [[] for _ in output_px]
    weights: list[list[np.ndarray]] = [[] for _ in output_px]
    masks: list[np.ndarray] = []
    size_px = faces_fssc.shape[1]
    multipliers = [each for each in (eye_multiplier, mouth_multiplier) if each > 1]
    for number, record in enumerate(records):
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
            face = small[..., 3]
            weight = _weight(small, multipliers) if penalize_mask else np.ones((edge, edge))
            weights[i].append(weight)
        masks.append(face)
        if record["warp"]:
            source = before if single_interpolation else picture
            points = None if landmarks is None else landmarks[number]
            picture = _bent(source, record, points, is_single=single_interpolation)
        inputs.append(_shrunk(picture, input_px))
    return np.stack(inputs), [*map(np.stack, targets)], [*map(np.stack, weights)], np.stack(masks)


def _weight(stack_hwc: np.ndarray, multipliers: Sequence[float]) -> np.ndarray:
    """Weight of each pixel by its face mask, and by one more mask a multiplier."""
    weight = stack_hwc[..., 3] / 255
    for multiplier, area in zip(multipliers, np.moveaxis(stack_hwc[..., 4:], -1, 0), strict=True):
        weight = weight + weight * (area / 255) * multiplier
    return weight


def _bent(
    picture_ssc: np.ndarray,
    record: np.ndarray,
    landmarks: tuple[np.ndarray, np.ndarray] | None,
    *,
    is_single: bool,
) -> np.ndarray:
    """A picture that is warped at random or to landmarks; ``is_single``: and turned on the way."""
    size_px, border = len(picture_ssc), cv2.BORDER_CONSTANT
    if record["warp"] == WARP_LANDMARKS:
        assert landmarks is not None
        maps = landmark_maps(record, *landmarks, size_px)
        border = cv2.BORDER_REPLICATE
    else:
        maps = warp_maps(record["warp_noise"], size_px)
    if is_single:
        maps = maps_before(*maps, record["matrix"], bool(record["flip"]))
        border = cv2.BORDER_REPLICATE
    return cv2.remap(picture_ssc, *maps, cv2.INTER_LINEAR, borderMode=border)


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
    """Positions from which each pixel of the random warp comes: x (S, S) and y (S, S), float32."""
    points = np.linspace(0, size_px, 5, dtype=np.float32)
    stretched = int(1.25 * size_px)
    begin = stretched // 10
    maps = []
    for grid in (np.tile(points, (5, 1)) + noise[0], np.tile(points[:, None], 5) + noise[1]):
        large = cv2.resize(grid, (stretched, stretched), interpolation=cv2.INTER_LINEAR)
        maps.append(np.ascontiguousarray(large[begin : begin + size_px, begin : begin + size_px]))
    return maps[0], maps[1]


def landmark_maps(
    record: np.ndarray, source_l2: np.ndarray, destination_l2: np.ndarray, size_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions from which each pixel of the warp to landmarks comes: x (S, S) and y (S, S),
    float32."""
    source = _turned(source_l2, record, size_px)
    destination = _turned(destination_l2, record, size_px) + record["landmark_noise"]
    inner = np.concatenate([source[17:], destination[17:]]).astype(int).astype(np.float32)
    hull = cv2.convexHull(inner)

    def is_covered(point: np.ndarray) -> bool:
        return cv2.pointPolygonTest(hull, tuple(map(float, point)), False) >= 0

    outside_hull = [
        i
        for i in range(len(source))
        if i > 17 or not (is_covered(source[i]) or is_covered(destination[i]))
    ]
    last, half = size_px - 1, size_px // 2 - 1
    corners = [(0, 0), (0, last), (last, last), (last, 0)]
    anchors = np.array([*corners, (half, 0), (half, last), (last, half), (0, half)], float)
    source = np.concatenate([source[outside_hull], anchors])
    destination = np.concatenate([destination[outside_hull], anchors])
    # NaN would show a pixel that no triangle has.
    maps = np.full((2, size_px, size_px), np.nan)
    y, x = np.indices((size_px, size_px))
    for triangle in delaunay(destination):
        a, b, c = destination[triangle]
        of_b, of_c = np.einsum(
            "ij,jyx->iyx",
            np.linalg.inv(np.stack([b - a, c - a], 1)),
            np.stack([x - a[0], y - a[1]]),
        )
        shares = np.stack([1 - of_b - of_c, of_b, of_c])
        # A pixel on an edge is inside, however it was rounded.
        inside = (shares >= -1e-9).all(0)
        maps[:, inside] = source[triangle].T @ shares[:, inside]
    return maps[0].astype(np.float32), maps[1].astype(np.float32)


def delaunay(points_p2: np.ndarray) -> np.ndarray:
    """The triangles (T, 3) round whose corners runs a circle with no other point within."""
    triples = np.array(list(itertools.combinations(range(len(points_p2)), 3)))
    a, b, c = (points_p2[triples[:, i]] for i in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    squares = [np.square(corner).sum(1) for corner in (a, b, c)]
    with np.errstate(divide="ignore", invalid="ignore"):
        centre_x = sum(
            s * (q[:, 1] - r[:, 1]) for s, q, r in zip(squares, (b, c, a), (c, a, b), strict=True)
        ) / (2 * area)
        centre_y = sum(
            s * (r[:, 0] - q[:, 0]) for s, q, r in zip(squares, (b, c, a), (c, a, b), strict=True)
        ) / (2 * area)
        centre = np.stack([centre_x, centre_y], 1)
        radius = np.linalg.norm(a - centre, axis=1)
        # Three points in a line have no circle.
        empty = np.abs(area) > 1e-9
        for point in points_p2:
            # Less a little, for the corners themselves lie on the circle.
            empty &= np.linalg.norm(point - centre, axis=1) > radius * (1 - 1e-9)
    return triples[empty]


def _turned(landmarks_l2: np.ndarray, record: np.ndarray, size_px: int) -> np.ndarray:
    """Landmarks of the store in the turned and mirrored picture, float64."""
    matrix = record["matrix"].astype(np.float64)
    points = landmarks_l2 @ matrix[:, :2].T + matrix[:, 2]
    if record["flip"]:
        points[:, 0] = size_px - 1 - points[:, 0]
    return points


def maps_before(
    x_ss: np.ndarray, y_ss: np.ndarray, matrix: np.ndarray, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the picture before of those in the turned and mirrored one, float32."""
    x = x_ss.shape[0] - 1 - x_ss.astype(np.float64) if flip else x_ss.astype(np.float64)
    whole = np.vstack([matrix.astype(np.float64), [0, 0, 1]])
    inverse = np.linalg.inv(whole)[:2]
    source = np.einsum("ij,jyx->iyx", inverse, np.stack([x, y_ss, np.ones_like(x)]))
    return source[0].astype(np.float32), source[1].astype(np.float32)


def _shrunk(picture: np.ndarray, edge: int) -> np.ndarray:
    """Picture resized by area; more than four channels one by one where OpenCV refuses them."""
    if picture.shape[0] == edge:
        return picture
    if picture.shape[2] > 4 and picture.shape[0] % edge:
        planes = [np.ascontiguousarray(plane) for plane in np.moveaxis(picture, -1, 0)]
        return np.stack(
            [cv2.resize(p, (edge, edge), interpolation=cv2.INTER_AREA) for p in planes], -1
        )
    return cv2.resize(picture, (edge, edge), interpolation=cv2.INTER_AREA)
