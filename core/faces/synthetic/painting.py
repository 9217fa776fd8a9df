"""The drawing itself: flat colours with anti-aliased edges, in px of the frame.

Light and soft tints are laid over it later, at the resolution of the face PNG (`relief.py`,
`tint.py`), because they are smooth and cost less there.

Letters: l = landmark (68), p = points of a curve, 2 = (x, y), 3 = (x, y, z) in units of the head.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from .head import (
    BROWS,
    EYES,
    Camera,
    Color,
    Identity,
    Scene,
    on_skull,
    skull_outline,
)
from .sheet import DARK, WHITE, Sheet, curve, mix

_PUPIL = (12, 10, 12)
_TEETH = (226, 234, 240)
_TONGUE = (108, 96, 200)
_MOUTH_INSIDE = (32, 18, 62)
_FULL_LIGHT = 255
_AROUND = np.linspace(0.0, 2.0 * np.pi, 48, endpoint=False)


def eye_outline(eye_62: np.ndarray) -> np.ndarray:
    """Almond through the six landmarks of an eye, pointed at its corners."""
    return np.vstack([curve(eye_62[:4]), curve(eye_62[[3, 4, 5, 0]])])


def lips_outline(mouth_20_2: np.ndarray) -> np.ndarray:
    """Outer edge of the lips, through landmarks 48 to 59."""
    return np.vstack([curve(mouth_20_2[:7]), curve(mouth_20_2[[6, 7, 8, 9, 10, 11, 0]])])


def mouth_opening(mouth_20_2: np.ndarray) -> np.ndarray:
    """Inner edge of the lips, through landmarks 60 to 67."""
    return np.vstack([curve(mouth_20_2[12:17]), curve(mouth_20_2[[16, 17, 18, 19, 12]])])


@dataclass
class Drawing:
    """One person in one scene: what is drawn hangs on these. head_l3 before the turn."""

    identity: Identity
    scene: Scene
    camera: Camera
    head_l3: np.ndarray
    landmarks_l2: np.ndarray

    def on_head(self, points_p3: np.ndarray) -> np.ndarray:
        """(p, 2) px of the frame of points in head units."""
        return self.camera.project(np.asarray(points_p3, np.float64))

    def hairline(self) -> np.ndarray:
        """Edge of the face below the hair, from the left temple over the forehead to the right."""
        return curve(self.on_head(on_skull(_HAIRLINES[self.identity.long_hair], grow=1.005)))

    def face_outline(self) -> np.ndarray:
        """True outline of the face: jaw and hairline, (p, 2) px of the frame."""
        return np.vstack([curve(self.landmarks_l2[:17]), self.hairline()[::-1]])


# x and y in units of the skull's radii, from the left of the picture to the right
_HAIRLINES = {
    False: np.array(
        [
            [-0.97, 0.10],
            [-0.93, -0.14],
            [-0.82, -0.30],
            [-0.74, -0.52],
            [-0.42, -0.56],
            [0.00, -0.53],
            [0.42, -0.57],
            [0.74, -0.52],
            [0.82, -0.30],
            [0.93, -0.14],
            [0.97, 0.10],
        ]
    ),
    True: np.array(
        [
            [-0.93, 0.30],
            [-0.90, 0.00],
            [-0.80, -0.24],
            [-0.58, -0.34],
            [-0.20, -0.50],
            [0.22, -0.66],
            [0.45, -0.58],
            [0.66, -0.42],
            [0.82, -0.20],
            [0.90, 0.00],
            [0.93, 0.30],
        ]
    ),
}


def paint(drawing: Drawing, frame_px: int) -> Sheet:
    """The whole picture in flat colours."""
    image_yxc = _background(drawing.identity, drawing.scene, frame_px)
    sheet = Sheet(image_yxc, np.zeros((frame_px, frame_px), np.uint8), drawing.camera.unit_px)
    # From behind to the front: each part covers what lies under it.
    if drawing.identity.long_hair:
        _long_hair_behind(sheet, drawing)
    _neck_and_clothes(sheet, drawing)
    if not drawing.identity.long_hair:
        _ears(sheet, drawing)
    _skin(sheet, drawing)
    _nose(sheet, drawing)
    for side in (0, 1):
        _eye(sheet, drawing, side)
        _brow(sheet, drawing, side)
    _mouth(sheet, drawing)
    if drawing.identity.long_hair:
        _long_hair(sheet, drawing)
    else:
        _short_hair(sheet, drawing)
    return sheet


def _background(identity: Identity, scene: Scene, frame_px: int) -> np.ndarray:
    """A wall out of focus: a few soft discs in the person's background colours."""
    # Small, then enlarged: a blur of that width on the whole frame takes far longer.
    small = np.empty((40, 40, 3), np.uint8)
    small[:] = identity.background[0]
    places = np.array(scene.background).reshape(4, 3)
    for number, (x, y, radius) in enumerate(places.tolist()):
        color = identity.background[1 + number % 2]
        cv2.circle(small, (int(40 * x), int(40 * y)), int(4 + 8 * radius), color, -1)
    soft = cv2.GaussianBlur(small, (0, 0), 3.5)
    return cv2.resize(soft, (frame_px, frame_px), interpolation=cv2.INTER_CUBIC)


def _neck_and_clothes(sheet: Sheet, drawing: Drawing) -> None:
    identity = drawing.identity
    follow = drawing.camera.softened(0.45, drawing.scene)
    neck = identity.neck_width
    half = np.array(
        [
            [0.34 * neck, 0.60, -0.20],
            [0.33 * neck, 1.10, -0.22],
            [0.36 * neck, 1.38, -0.22],
            [0.70 * neck, 1.56, -0.22],
            [1.00 * neck, 2.20, -0.22],
        ]
    )
    neck_p2 = follow.project(np.vstack([half, half[::-1] * (-1, 1, 1)]))
    sheet.fill(curve(neck_p2, closed=True), mix(identity.skin, identity.skin_shadow, 0.35), 120)
    jaw = drawing.landmarks_l2[2:15]
    down = np.array([0.0, 0.13 * sheet.unit_px])
    with sheet.window(curve(neck_p2, closed=True)) as (shadow, corner_2):
        shadow.fill(curve(jaw + down - corner_2), mix(identity.skin_shadow, DARK, 0.25))
    wide = 0.46 * neck
    half = np.array(
        [[0.0, 1.66, 0.10], [wide, 1.36, -0.15], [1.0, 1.52, -0.2], [1.75, 1.9, -0.2], [1.8, 3, 0]]
    )
    clothes_p2 = follow.project(np.vstack([half, half[:0:-1] * (-1, 1, 1)]))
    sheet.fill(curve(clothes_p2, closed=True), identity.clothes, 110)
    collar = half[:2] * (-1, 1, 1)
    collar_p2 = follow.project(np.vstack([collar[::-1], half[1:2]]))
    sheet.stroke(curve(collar_p2), identity.collar, 0.08)


def _ears(sheet: Sheet, drawing: Drawing) -> None:
    identity = drawing.identity
    angle = np.linspace(0.0, 2.0 * np.pi, 20, endpoint=False)
    for sign in (-1.0, 1.0):
        ring = np.column_stack(
            [
                0.055 * np.cos(angle) + 0.02 * np.sin(angle) * -1.0,
                0.155 * np.sin(angle),
                -0.06 * np.cos(angle),
            ]
        )
        centre = np.array([identity.face_width * 0.585, 0.34, -0.24])
        ear_p3 = (centre + ring) * (sign, 1.0, 1.0)
        inner_p3 = (centre + 0.6 * ring + (0.008, 0.0, 0.02)) * (sign, 1.0, 1.0)
        sheet.fill(drawing.on_head(ear_p3), identity.skin, _FULL_LIGHT)
        sheet.fill(drawing.on_head(inner_p3), mix(identity.skin, identity.skin_shadow, 0.6))


_FRECKLES = np.array(
    [[side * x, y, 0.52 - 0.55 * x] for side in (-1.0, 1.0) for x, y in (
        (0.17, 0.40), (0.22, 0.455), (0.27, 0.395), (0.31, 0.46), (0.25, 0.52), (0.36, 0.41),
        (0.19, 0.51), (0.34, 0.53), (0.40, 0.47))]
)  # fmt: skip


def _skin(sheet: Sheet, drawing: Drawing) -> None:
    skin = drawing.identity.skin
    sheet.fill(skull_outline(drawing.camera, _AROUND), skin, _FULL_LIGHT)
    sheet.fill(curve(drawing.landmarks_l2[:17]), skin, _FULL_LIGHT)
    if drawing.identity.freckles:
        color = mix(skin, drawing.identity.hair, 0.42)
        for number, place_2 in enumerate(drawing.on_head(_FRECKLES)):
            sheet.disc(place_2, 0.007 + 0.003 * (number % 3), color)


def _nose(sheet: Sheet, drawing: Drawing) -> None:
    identity, points = drawing.identity, drawing.landmarks_l2
    shadow = mix(identity.skin, identity.skin_shadow, 0.9)
    dark = mix(identity.skin_shadow, DARK, 0.55)
    up = (points[27] - points[33]) / np.linalg.norm(points[27] - points[33])
    unit = sheet.unit_px
    for wing, between in ((31, 32), (35, 34)):
        across = points[33] - points[wing]
        top = points[wing] + up * 0.075 * unit + across * 0.16
        out = points[wing] - across * 0.10 + up * 0.03 * unit
        sheet.stroke(curve(np.array([top, out, points[wing] + across * 0.1])), shadow, 0.016)
        hole = 0.5 * (points[wing] * 0.8 + points[between] * 1.2) + up * 0.012 * unit
        long, high = 0.24 * across, up * 0.017 * unit
        tilt = high * 0.8
        ring = np.array([hole - long - tilt * 0.4, hole + high, hole + long + tilt, hole - high])
        sheet.fill(curve(ring, closed=True), dark)
    base = np.array([points[32] - up * 0.012 * unit, points[33], points[34] - up * 0.012 * unit])
    sheet.stroke(curve(base), shadow, 0.014)


def _eye(sheet: Sheet, drawing: Drawing, side: int) -> None:
    """One eye; side 0 is left in the picture, 1 right."""
    identity, scene = drawing.identity, drawing.scene
    eye_62, eye_63 = drawing.landmarks_l2[EYES[side]], drawing.head_l3[EYES[side]]
    middle_3 = 0.4 * eye_63[[0, 3]].mean(axis=0) + 0.6 * eye_63[[1, 2, 4, 5]].mean(axis=0)
    look = (0.045 * scene.gaze[0], 0.016 * scene.gaze[1], 0.03)
    iris_2 = drawing.on_head((middle_3 + look)[None])[0]
    radius = identity.iris_radius
    radius_px = radius * sheet.unit_px
    with sheet.window(eye_outline(eye_62)) as (inside, corner_2):
        centre = iris_2 - corner_2
        inside.image_yxc[:] = WHITE
        inside.disc(centre, radius, mix(identity.iris, DARK, 0.55))
        inside.disc(centre, 0.84 * radius, identity.iris)
        below = centre + (0.0, 0.22 * radius_px)
        inside.disc(below, 0.55 * radius, mix(identity.iris, WHITE, 0.25))
        inside.disc(centre, 0.46 * radius, _PUPIL)
        inside.disc(centre + (-0.34 * radius_px, -0.38 * radius_px), 0.24 * radius, (255, 255, 255))
        lid_shadow = mix(WHITE, identity.skin_shadow, 0.75)
        inside.stroke(curve(eye_62[:4]) - corner_2, lid_shadow, 0.022)
    lower_lid = mix(identity.skin_shadow, DARK, 0.35)
    sheet.stroke(curve(eye_62[[3, 4, 5, 0]]), lower_lid, 0.010)
    lid = eye_62[:4] if side else eye_62[3::-1]  # from the nose outwards
    lift = identity.lash * sheet.unit_px
    if identity.long_hair:
        outward = (lid[3] - lid[0]) / np.linalg.norm(lid[3] - lid[0])
        lid = np.vstack([lid, lid[3] + 2.0 * lift * outward - (0.0, 0.8 * lift)])
    sheet.stroke(curve(lid), DARK, identity.lash)
    crease = curve(drawing.on_head(eye_63[:4] - (0.0, 0.036, 0.0)))
    sheet.stroke(crease[3:-3], mix(identity.skin_shadow, DARK, 0.18), 0.010)


def _brow(sheet: Sheet, drawing: Drawing, side: int) -> None:
    """A band about the five landmarks, strongest near the nose and pointed at the temple."""
    identity = drawing.identity
    brow_52 = drawing.landmarks_l2[BROWS[side]]
    middle = curve(brow_52 if side else brow_52[::-1])
    along = np.linspace(0.0, 1.0, len(middle))
    taper = 0.3 + 0.8 * np.sin(np.pi * (0.9 * along + 0.12))
    thick = identity.brow_thickness * sheet.unit_px * taper
    direction = np.gradient(middle, axis=0)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    half = 0.5 * thick[:, None] * direction[:, ::-1] * (1.0, -1.0)
    sheet.fill(np.vstack([middle + half, (middle - half)[::-1]]), identity.brow)


def _mouth(sheet: Sheet, drawing: Drawing) -> None:
    identity, mouth = drawing.identity, drawing.landmarks_l2[48:68]
    unit = sheet.unit_px
    sheet.fill(lips_outline(mouth), identity.lip)
    upper = np.vstack([curve(mouth[:7]), curve(mouth[16:11:-1])])
    sheet.fill(upper, mix(identity.lip, DARK, 0.22))
    lower_p2 = 0.5 * (mouth[[10, 9, 8]] + mouth[[19, 18, 17]])
    sheet.stroke(curve(lower_p2), mix(identity.lip, WHITE, 0.28), 0.022)
    down = mouth[18] - mouth[14]
    gap = float(np.linalg.norm(down)) / unit
    if gap > 0.02:
        opening = mouth_opening(mouth)
        with sheet.window(opening) as (inside, corner_2):
            inside.image_yxc[:] = _MOUTH_INSIDE
            tongue = mouth[[19, 18, 17]].mean(axis=0) + 0.05 * down - corner_2
            inside.disc(tongue, 0.085, _TONGUE)
            drop = down * min(0.42, 0.055 / gap)
            edge = mouth[[16, 15, 14, 13, 12]] + np.outer((0.0, 1.0, 1.2, 1.0, 0.0), drop)
            teeth = np.vstack([curve(mouth[12:17]), curve(edge)])
            inside.fill(teeth - corner_2, _TEETH)
    else:
        sheet.stroke(curve(mouth[12:17]), mix(identity.lip, DARK, 0.65), 0.012)
    for corner, sign in ((0, -1.0), (6, 1.0)):
        dimple = mouth[corner] + (0.006 * sign * unit, 0.0)
        sheet.disc(dimple, 0.010, mix(identity.skin_shadow, DARK, 0.35))


def _crown(drawing: Drawing, thickness_p: np.ndarray, lift: float) -> np.ndarray:
    """Outer edge of the hair, over the top from the left of the picture to the right."""
    angle_p = np.linspace(-1.02 * np.pi, 0.02 * np.pi, len(thickness_p))
    angle_p += np.radians(drawing.scene.roll)
    return skull_outline(drawing.camera, angle_p, grow_p=1.0 + thickness_p, lift=lift)


def _strands(
    sheet: Sheet, from_p2: np.ndarray, to_p2: np.ndarray, shades: tuple[Color, ...]
) -> None:
    """Lines that lead over from one curve to another of as many points."""
    count = 2 * len(shades)
    for number in range(count):
        share = (number + 0.7) / count
        line = from_p2 + share * (to_p2 - from_p2)
        sheet.stroke(line, shades[number * 5 % len(shades)], 0.012 + 0.005 * (number * 7 % 4))


def _hair_shades(identity: Identity) -> tuple[Color, ...]:
    light, dark = identity.hair_light, mix(identity.hair, DARK, 0.35)
    tones = (-0.6, 0.25, 0.0, 0.7, -0.3, 0.4, -1.0, 0.15)
    return tuple(mix(identity.hair, light if tone > 0 else dark, abs(tone)) for tone in tones)


def _short_hair(sheet: Sheet, drawing: Drawing) -> None:
    """Short sides and a quiff that is combed to one side."""
    identity = drawing.identity
    hairline = drawing.hairline()
    along = np.linspace(0.0, 1.0, len(hairline))
    waves = 0.012 * np.sin(44.0 * along)
    thickness = 0.03 + 0.09 * np.sin(np.pi * along) + 0.09 * np.exp(-(((along - 0.62) / 0.26) ** 2))
    crown = _crown(drawing, thickness + waves, 0.05)
    sheet.fill(np.vstack([crown, hairline[::-1]]), identity.hair, _FULL_LIGHT)
    shades = _hair_shades(identity)
    for number in range(4, len(hairline) - 4):
        root, tip = hairline[number], crown[number]
        lean = np.array([0.17 * (0.70 - along[number]), -0.02]) * sheet.unit_px
        middle = root + 0.45 * (tip - root) + lean
        line = np.array([root, middle, root + 0.88 * (tip - root) + 0.8 * lean])
        width = 0.014 + 0.005 * (number * 7 % 4)
        sheet.stroke(curve(line), shades[number * 5 % 7 % len(shades)], width)


_LOCK_INNER = np.array(
    [[0.10, -0.52, 0.34], [0.44, -0.22, 0.30], [0.535, 0.10, 0.10], [0.545, 0.45, 0.00],
     [0.52, 0.80, -0.02], [0.50, 1.12, 0.02], [0.58, 1.42, 0.02]]
)  # fmt: skip
_LOCK_OUTER = np.array(
    [[0.04, -0.70, -0.05], [0.46, -0.58, -0.05], [0.69, -0.18, -0.12], [0.76, 0.30, -0.18],
     [0.84, 0.74, -0.20], [0.82, 1.14, -0.16], [0.92, 1.50, -0.12]]
)  # fmt: skip


def _long_hair_behind(sheet: Sheet, drawing: Drawing) -> None:
    identity = drawing.identity
    half = _LOCK_OUTER - (0.0, 0.0, 0.1)
    points = drawing.on_head(np.vstack([half, half[::-1] * (-1.0, 1.0, 1.0)]))
    sheet.fill(curve(points, closed=True), mix(identity.hair, DARK, 0.45), 130)


def _long_hair(sheet: Sheet, drawing: Drawing) -> None:
    """A side parting, a fringe over the forehead, and locks beside the face."""
    identity = drawing.identity
    hairline = drawing.hairline()
    crown = _crown(drawing, np.full(len(hairline), 0.13), 0.05)
    sheet.fill(np.vstack([crown, hairline[::-1]]), identity.hair, _FULL_LIGHT)
    shades = _hair_shades(identity)
    for sign in (-1.0, 1.0):
        mirror = np.array([sign, 1.0, 1.0])
        inner = curve(drawing.on_head(_LOCK_INNER * mirror))
        outer = curve(drawing.on_head(_LOCK_OUTER * mirror))
        sheet.fill(np.vstack([inner, outer[::-1]]), identity.hair, 225)
        _strands(sheet, inner, outer, shades)
    parting = drawing.on_head(on_skull(np.array([[0.26, -0.70], [0.24, -0.86]]), grow=1.06))
    for number in range(4, len(hairline) - 4, 2):
        end = hairline[number]
        bend = 0.3 * (parting[1] + end) + 0.4 * crown[number]
        shade = shades[number * 5 // 2 % len(shades)]
        sheet.stroke(curve(np.array([parting[1], bend, end])), shade, 0.016)
