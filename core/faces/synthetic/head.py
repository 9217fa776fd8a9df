"""The drawn people: a 3-D head per identity, how it poses, and how it comes onto the picture.

A head is 68 landmarks in three dimensions and an ellipsoid skull. Units are those of the mean face
(its eyebrows are about 1 wide); x to the right of the picture, y down, z to the viewer. Expression
moves the landmarks, pose turns them, a mild perspective projects them, so whatever is drawn hangs
on exact landmarks.

Letters: l = landmark (68), p = any number of points, 2 = (x, y), 3 = (x, y, z).
"""

from dataclasses import dataclass

import numpy as np

Color = tuple[int, int, int]

# One tile of noise serves all faces, each from another place, and is drawn once.
NOISE_SHIFTS = 128

EYES = (slice(36, 42), slice(42, 48))
BROWS = (slice(17, 22), slice(22, 27))

# Numbers of this file were found by eye.
_CAMERA_DISTANCE = 8.0
_PIVOT_3 = np.array([0.0, 0.35, -0.15])
_PATCH_CENTRE_3 = np.array([0.0, 0.216, -0.17])
_CHEEK_DEPTH = 0.34
_SKULL_CENTRE_3 = np.array([0.0, 0.10, -0.13])
_SKULL_RADII_3 = np.array([0.575, 0.70, 0.62])
MOUTH_LINE_Y = 0.793

# Landmarks on the left of the picture and in the middle; the right ones are their mirror image.
_HALF_HEAD = {
    0: (-0.570, 0.220, -0.20),
    1: (-0.565, 0.370, -0.17),
    2: (-0.550, 0.520, -0.12),
    3: (-0.520, 0.660, -0.06),
    4: (-0.460, 0.800, 0.02),
    5: (-0.370, 0.930, 0.10),
    6: (-0.270, 1.030, 0.17),
    7: (-0.140, 1.110, 0.26),
    8: (0.000, 1.135, 0.30),
    17: (-0.490, 0.106, 0.25),
    18: (-0.415, 0.039, 0.38),
    19: (-0.309, 0.019, 0.47),
    20: (-0.199, 0.034, 0.50),
    21: (-0.097, 0.077, 0.50),
    27: (0.000, 0.203, 0.50),
    28: (0.000, 0.307, 0.56),
    29: (0.000, 0.410, 0.63),
    30: (0.000, 0.516, 0.68),
    31: (-0.123, 0.587, 0.43),
    32: (-0.064, 0.609, 0.46),
    33: (0.000, 0.628, 0.50),
    36: (-0.368, 0.216, 0.29),
    37: (-0.303, 0.179, 0.33),
    38: (-0.224, 0.180, 0.345),
    39: (-0.156, 0.232, 0.32),
    40: (-0.229, 0.245, 0.33),
    41: (-0.307, 0.244, 0.32),
    48: (-0.236, 0.785, 0.36),
    49: (-0.149, 0.750, 0.43),
    50: (-0.061, 0.729, 0.47),
    51: (0.000, 0.743, 0.48),
    57: (0.000, 0.890, 0.45),
    58: (-0.067, 0.883, 0.44),
    59: (-0.152, 0.845, 0.41),
    60: (-0.205, 0.789, 0.37),
    61: (-0.062, 0.790, 0.45),
    62: (0.000, 0.792, 0.46),
    66: (0.000, 0.798, 0.44),
    67: (-0.063, 0.797, 0.44),
}
_MIRROR_OF = {left: 16 - left for left in range(8)}
_MIRROR_OF |= {left: 43 - left for left in range(17, 22)}
_MIRROR_OF |= {31: 35, 32: 34, 36: 45, 37: 44, 38: 43, 39: 42, 40: 47, 41: 46}
_MIRROR_OF |= {48: 54, 49: 53, 50: 52, 58: 56, 59: 55, 60: 64, 61: 63, 67: 65}

_JAW_DROP_9 = np.array([0.0, 0.0, 0.04, 0.12, 0.3, 0.55, 0.8, 0.95, 1.0])
_JAW_DROP_17 = np.concatenate([_JAW_DROP_9, _JAW_DROP_9[-2::-1]])


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A drawn person. Colours are B, G, R; factors are relative to the mean face."""

    name: str
    skin: Color
    skin_shadow: Color
    hair: Color
    hair_light: Color
    brow: Color
    iris: Color
    lip: Color
    clothes: Color
    collar: Color
    background: tuple[Color, Color, Color]
    face_width: float
    jaw_width: float
    chin_drop: float
    eye_opening: float
    eye_width: float
    eye_tilt: float
    iris_radius: float
    brow_arch: float
    brow_drop: float
    brow_tilt: float
    brow_thickness: float
    nose_width: float
    nose_length: float
    nose_relief: float
    relief: float
    mouth_width: float
    lip_fullness: float
    neck_width: float
    lash: float
    blush: float
    beard: bool
    long_hair: bool
    freckles: bool


IDENTITIES = {
    "a": Identity(
        name="a",
        skin=(122, 168, 222),
        skin_shadow=(78, 116, 176),
        hair=(30, 36, 46),
        hair_light=(62, 76, 98),
        brow=(26, 32, 42),
        iris=(54, 84, 122),
        lip=(104, 112, 186),
        clothes=(92, 74, 44),
        collar=(128, 108, 72),
        background=((150, 128, 84), (186, 168, 128), (112, 92, 60)),
        face_width=1.03,
        jaw_width=1.10,
        chin_drop=0.05,
        eye_opening=1.45,
        eye_width=1.0,
        eye_tilt=-0.01,
        iris_radius=0.056,
        brow_arch=0.0,
        brow_drop=0.03,
        brow_tilt=0.0,
        brow_thickness=0.060,
        nose_width=1.22,
        nose_length=1.04,
        nose_relief=1.15,
        relief=0.9,
        mouth_width=1.08,
        lip_fullness=0.85,
        neck_width=1.18,
        lash=0.014,
        blush=0.25,
        beard=True,
        long_hair=False,
        freckles=False,
    ),
    "b": Identity(
        name="b",
        skin=(186, 208, 246),
        skin_shadow=(150, 164, 224),
        hair=(34, 74, 178),
        hair_light=(70, 130, 226),
        brow=(44, 76, 144),
        iris=(96, 158, 70),
        lip=(84, 60, 206),
        clothes=(120, 70, 130),
        collar=(150, 100, 164),
        background=((132, 196, 226), (168, 222, 244), (104, 164, 204)),
        face_width=0.98,
        jaw_width=0.96,
        chin_drop=-0.045,
        eye_opening=1.62,
        eye_width=1.08,
        eye_tilt=0.018,
        iris_radius=0.064,
        brow_arch=0.018,
        brow_drop=-0.03,
        brow_tilt=0.042,
        brow_thickness=0.026,
        nose_width=0.80,
        nose_length=0.93,
        nose_relief=0.85,
        relief=0.72,
        mouth_width=0.82,
        lip_fullness=1.30,
        neck_width=0.86,
        lash=0.026,
        blush=1.0,
        beard=False,
        long_hair=True,
        freckles=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that differs between two drawings of one person. Angles in degrees."""

    yaw: float
    pitch: float
    roll: float
    mouth_open: float
    smile: float
    eye_closed: float
    brow_raised: float
    gaze: tuple[float, float]
    light_azimuth: float
    light_elevation: float
    light_warmth: float
    light_strength: float
    ambient: float
    scale: float
    shift: tuple[float, float]
    background: tuple[float, ...]
    noise_shift: tuple[int, int]


def draw_scene(random: np.random.Generator) -> Scene:
    """A pose, expression, light and place, drawn at random."""
    # The order of what is drawn is part of every picture: another one needs a new version of the
    # drawing.
    uniform = random.uniform
    speaking = uniform() < 0.55
    blinking = uniform() < 0.12
    return Scene(
        yaw=uniform(-25.0, 25.0),
        pitch=uniform(-12.0, 12.0),
        roll=uniform(-15.0, 15.0),
        mouth_open=uniform(0.15, 1.0) if speaking else 0.0,
        smile=uniform(-0.35, 1.0),
        eye_closed=uniform(0.6, 1.0) if blinking else uniform(-0.12, 0.35),
        brow_raised=uniform(-0.5, 1.0),
        gaze=(uniform(-1.0, 1.0), uniform(-0.8, 0.8)),
        light_azimuth=uniform(-65.0, 65.0),
        light_elevation=uniform(5.0, 50.0),
        light_warmth=uniform(-1.0, 1.0),
        light_strength=uniform(0.80, 1.04),
        ambient=uniform(0.42, 0.62),
        scale=uniform(0.93, 1.07),
        shift=(uniform(-0.03, 0.03), uniform(-0.03, 0.03)),
        background=tuple(uniform(size=12).tolist()),
        noise_shift=(int(random.integers(NOISE_SHIFTS)), int(random.integers(NOISE_SHIFTS))),
    )


def head_landmarks(identity: Identity, scene: Scene) -> np.ndarray:
    """The landmarks of a person with an expression, not turned yet, (68, 3)."""
    points_l3 = _person(identity)
    _open_mouth(points_l3, scene.mouth_open)
    _smile(points_l3, scene.smile)
    for eye in EYES:
        _close_eye(points_l3[eye], scene.eye_closed)
    for brow in BROWS:
        points_l3[brow, 1] -= 0.055 * scene.brow_raised
    return points_l3


def _mean_head() -> np.ndarray:
    points_l3 = np.zeros((68, 3))
    for index, point in _HALF_HEAD.items():
        points_l3[index] = point
    for left, right in _MIRROR_OF.items():
        points_l3[right] = points_l3[left] * (-1.0, 1.0, 1.0)
    return points_l3


_MEAN_HEAD_L3 = _mean_head()


def _person(identity: Identity) -> np.ndarray:
    """The landmarks of a person at rest."""
    points_l3 = _MEAN_HEAD_L3.copy()
    jaw, nose, mouth = points_l3[:17], points_l3[27:36], points_l3[48:68]
    low = np.clip((jaw[:, 1] - 0.35) / 0.6, 0.0, 1.0)
    jaw[:, 0] *= identity.face_width * (1.0 + (identity.jaw_width - 1.0) * low)
    jaw[:, 1] += identity.chin_drop * low
    for brow, sign in zip(BROWS, (1.0, -1.0), strict=True):
        along = np.linspace(0.0, 1.0, 5)[:: int(sign)]
        points_l3[brow, 1] += identity.brow_drop - identity.brow_tilt * along
        points_l3[brow, 1] -= identity.brow_arch * np.sin(np.pi * along)
    for eye, sign in zip(EYES, (1.0, -1.0), strict=True):
        centre = points_l3[eye].mean(axis=0)
        away = points_l3[eye] - centre
        away[:, 1] = away[:, 1] * identity.eye_opening + sign * away[:, 0] * 2 * identity.eye_tilt
        away[:, 0] *= identity.eye_width
        points_l3[eye] = centre + away
    nose[:, 0] *= identity.nose_width
    nose[:, 1] = 0.203 + (nose[:, 1] - 0.203) * identity.nose_length
    mouth[:, 0] *= identity.mouth_width
    mouth[:12, 1] = MOUTH_LINE_Y + (mouth[:12, 1] - MOUTH_LINE_Y) * identity.lip_fullness
    return points_l3


def _open_mouth(points_l3: np.ndarray, amount: float) -> None:
    points_l3[:17, 1] += 0.14 * amount * _JAW_DROP_17
    points_l3[[55, 56, 57, 58, 59], 1] += amount * np.array([0.135, 0.170, 0.175, 0.170, 0.135])
    points_l3[[65, 66, 67], 1] += amount * np.array([0.155, 0.165, 0.155])
    points_l3[[56, 58], 0] *= 1.0 + 0.30 * amount
    points_l3[[61, 63, 65, 67], 0] *= 1.0 + 0.55 * amount
    points_l3[[61, 62, 63, 50, 51, 52], 1] -= 0.018 * amount
    corners = [48, 54, 60, 64]
    points_l3[corners, 1] += 0.05 * amount
    points_l3[corners, 0] *= 1.0 - 0.10 * amount


def _smile(points_l3: np.ndarray, amount: float) -> None:
    for near, weight in (([48, 54, 60, 64], 1.0), ([49, 53, 59, 55, 61, 63, 67, 65], 0.4)):
        points_l3[near, 0] *= 1.0 + 0.24 * amount * weight
        points_l3[near, 1] -= 0.062 * amount * weight
        points_l3[near, 2] -= 0.04 * abs(amount) * weight
    points_l3[[56, 57, 58, 66], 1] += 0.015 * amount


def _close_eye(eye_63: np.ndarray, amount: float) -> None:
    """Lower the upper lid; most of the way is the upper lid's, the rest the lower one's."""
    for upper, lower in ((1, 5), (2, 4)):
        gap = eye_63[lower] - eye_63[upper]
        eye_63[upper] += 0.82 * amount * gap
        eye_63[lower] -= 0.10 * amount * gap


@dataclass(frozen=True)
class Camera:
    """Turns the head and projects it to px of the frame. unit_px: px of one unit of the head."""

    turn_33: np.ndarray
    centre_2: np.ndarray
    unit_px: float

    def project(self, points_p3: np.ndarray) -> np.ndarray:
        """(p, 2) float64, px of the frame."""
        turned_p3 = (points_p3 - _PIVOT_3) @ self.turn_33.T + _PIVOT_3
        near_p1 = _CAMERA_DISTANCE / (_CAMERA_DISTANCE - turned_p3[:, 2:])
        return self.centre_2 + self.unit_px * near_p1 * turned_p3[:, :2]

    def softened(self, share: float, scene: Scene) -> "Camera":
        """The camera of what turns less than the head does, such as the neck."""
        turn_33 = rotation(share * scene.yaw, share * scene.pitch, share * scene.roll)
        return Camera(turn_33, self.centre_2, self.unit_px)


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3); positive yaw turns the face to the right of the picture, positive pitch up."""
    y, x, z = np.radians((yaw, -pitch, roll))
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), np.sin(x)], [0, -np.sin(x), np.cos(x)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


def make_camera(scene: Scene, frame_px: int, unit_px: float) -> Camera:
    """The camera that puts the middle of the head near the middle of a square frame."""
    turn_33 = rotation(scene.yaw, scene.pitch, scene.roll)
    middle = Camera(turn_33, np.zeros(2), unit_px).project(_PATCH_CENTRE_3[None])[0]
    wanted = frame_px * (0.5 + np.array(scene.shift))
    return Camera(turn_33, wanted - middle, unit_px)


def project_landmarks(head_l3: np.ndarray, camera: Camera) -> np.ndarray:
    """The landmarks in px of the frame, (68, 2).

    Where the cheek hides the jaw, the jaw's landmarks go to the visible edge, as detectors see it.
    """
    points_l2 = camera.project(head_l3)
    upwards = np.abs(np.linspace(-1.0, 1.0, 17))
    cheek_p3 = head_l3[:17].copy()
    cheek_p3[:, 0] *= 0.90 + 0.03 * upwards
    cheek_p3[:, 2] += _CHEEK_DEPTH * upwards**0.7
    cheek_p2 = camera.project(cheek_p3)
    across_2 = camera.turn_33[:2, 0] / np.linalg.norm(camera.turn_33[:2, 0])
    outward = np.sign(np.arange(17) - 8)
    hidden = ((cheek_p2 - points_l2[:17]) @ across_2) * outward > 0
    # Detectors give the edge that is seen, and training learns from what they give.
    points_l2[:17][hidden] = cheek_p2[hidden]
    return points_l2


def skull_outline(
    camera: Camera, angle_p: np.ndarray, *, grow_p: float | np.ndarray = 1.0, lift: float = 0.0
) -> np.ndarray:
    """Points of the visible edge of the skull's ellipsoid, (p, 2) px of the frame.

    angle_p: radians, 0 is right, clockwise. grow_p: distance from the centre, relative. lift: how
    much higher the centre is, units.
    """
    centre = camera.project((_SKULL_CENTRE_3 - (0.0, lift, 0.0))[None])[0]
    stretched = camera.turn_33 * _SKULL_RADII_3
    # The shadow of an ellipsoid is an ellipse, of that part of its matrix that has no depth.
    edge_22 = np.linalg.cholesky((stretched @ stretched.T)[:2, :2])
    around_p2 = np.column_stack([np.cos(angle_p), np.sin(angle_p)]) @ edge_22.T
    return centre + camera.unit_px * around_p2 * np.reshape(grow_p, (-1, 1))


def on_skull(directions_p2: np.ndarray, *, grow: float = 1.0) -> np.ndarray:
    """Points on the skull's front, (p, 3), from their x and y in units of the skull's radii."""
    depth = np.sqrt(np.clip(1.0 - (directions_p2**2).sum(axis=1), 0.0, 1.0))
    return _SKULL_CENTRE_3 + grow * _SKULL_RADII_3 * np.column_stack([directions_p2, depth])
