"""The light on a drawn face: a height map made of an ellipsoid and bumps, lit from one side.

The height is z(x, y) = skull + sum of Gaussians at the landmarks (nose, lips, cheeks, sockets); as
each Gaussian is a product of one in x and one in y, the sum is one matrix product. The normals of
the height give Lambert's diffuse light and a small highlight (Blinn-Phong).

Letters: y, x = row and column of the map, b = bump, c = B, G, R, l = landmark.
"""

import numpy as np

from .head import Identity, Scene

# weights of landmarks whose mean is the place, shift in y, height, width in x, width in y (units)
_BUMPS: tuple[tuple[tuple[int, ...], float, float, float, float], ...] = (
    ((27,), 0.00, 0.050, 0.050, 0.080),
    ((28,), 0.00, 0.075, 0.050, 0.080),
    ((29,), 0.00, 0.110, 0.055, 0.080),
    ((30,), 0.00, 0.190, 0.085, 0.070),
    ((31,), -0.02, 0.075, 0.045, 0.045),
    ((35,), -0.02, 0.075, 0.045, 0.045),
    ((18, 19, 20), 0.03, 0.050, 0.140, 0.050),
    ((23, 24, 25), 0.03, 0.050, 0.140, 0.050),
    ((36, 39), -0.01, -0.080, 0.120, 0.080),
    ((42, 45), -0.01, -0.080, 0.120, 0.080),
    ((36, 39), 0.01, 0.045, 0.070, 0.045),
    ((42, 45), 0.01, 0.045, 0.070, 0.045),
    ((3, 36, 31), -0.02, 0.080, 0.150, 0.120),
    ((13, 45, 35), -0.02, 0.080, 0.150, 0.120),
    ((51,), 0.02, 0.045, 0.110, 0.035),
    ((57,), -0.03, 0.055, 0.090, 0.035),
    ((57,), 0.055, -0.050, 0.110, 0.035),
    ((48,), 0.00, -0.030, 0.035, 0.040),
    ((54,), 0.00, -0.030, 0.035, 0.040),
    ((8,), -0.07, 0.070, 0.120, 0.080),
    ((19, 24), -0.22, 0.040, 0.260, 0.140),
)
_NOSE_BUMPS = slice(0, 6)
_MAP_RADIUS_X = 0.66
_MAP_RADIUS_Y = 0.94
_MAP_DEPTH = 0.50
# Found by eye, as are the bumps.
_HIGHLIGHT_POWER = 18


def shade_face(
    identity: Identity, scene: Scene, landmarks_l2: np.ndarray, unit_px: float, size_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Light that multiplies the colours, (S, S, 3), and a highlight to add, (S, S); both float32.

    landmarks_l2: px of this map. unit_px: px of one unit of the head.
    """
    height_yx = _height(identity, landmarks_l2, unit_px, size_px)
    slope_y, slope_x = np.gradient(height_yx * unit_px)
    light = _direction(scene.light_azimuth, scene.light_elevation)
    length = np.sqrt(slope_x**2 + slope_y**2 + 1.0)
    facing = (light[2] - slope_x * light[0] - slope_y * light[1]) / length
    half = light + (0.0, 0.0, 1.0)
    half /= np.linalg.norm(half)
    shine = (half[2] - slope_x * half[0] - slope_y * half[1]) / length
    diffuse = np.maximum(facing, 0.0)
    warm = scene.light_warmth
    sun_c = np.array([1.0 - 0.16 * warm, 1.0, 1.0 + 0.10 * warm])
    # Light that went through skin is red: so are the shadows.
    sky_c = np.array([0.93 + 0.06 * warm, 0.98, 1.08 - 0.05 * warm])
    strength = scene.light_strength
    shade = (strength * scene.ambient * sky_c).astype(np.float32) + diffuse[..., None] * (
        strength * (1.12 - scene.ambient) * 1.12 * sun_c
    ).astype(np.float32)
    highlight = 26.0 * strength * np.maximum(shine, 0.0) ** _HIGHLIGHT_POWER
    return shade.astype(np.float32), highlight.astype(np.float32)


def _direction(azimuth: float, elevation: float) -> np.ndarray:
    """Unit vector towards the light; y is down."""
    across, up = np.radians((azimuth, elevation))
    return np.array([np.sin(across) * np.cos(up), -np.sin(up), np.cos(across) * np.cos(up)])


def _height(
    identity: Identity, landmarks_l2: np.ndarray, unit_px: float, size_px: int
) -> np.ndarray:
    """(S, S) float32 in units of the head."""
    places_b2 = np.array([landmarks_l2[list(bump[0])].mean(axis=0) for bump in _BUMPS])
    shift, amount, width_x, width_y = np.array([bump[1:] for bump in _BUMPS]).T
    amount = amount * identity.relief
    amount[_NOSE_BUMPS] *= identity.nose_relief
    place_x = places_b2[:, 0] / unit_px
    place_y = places_b2[:, 1] / unit_px + shift
    axis = (np.arange(size_px, dtype=np.float32) + 0.5) / unit_px
    bell_bx = np.exp(-0.5 * ((axis - place_x[:, None]) / width_x[:, None]) ** 2)
    bell_by = np.exp(-0.5 * ((axis - place_y[:, None]) / width_y[:, None]) ** 2)
    bumps_yx = (amount[:, None] * bell_by).T @ bell_bx
    temples = landmarks_l2[[0, 16]].mean(axis=0)
    centre = 0.5 * (temples + landmarks_l2[27]) / unit_px
    across = ((axis - centre[0]) / _MAP_RADIUS_X) ** 2
    down = ((axis - centre[1] - 0.06) / _MAP_RADIUS_Y) ** 2
    # Above 0: at the edge of an ellipsoid the slope has no end.
    inside = np.maximum(1.0 - across[None, :] - down[:, None], 0.08)
    return (_MAP_DEPTH * np.sqrt(inside) + bumps_yx).astype(np.float32)
