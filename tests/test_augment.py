"""augment against OpenCV and against the oracle, stage by stage and whole: the same levels.

Levels are compared exactly, as OpenCV 5 computes them. With OpenCV 4 only the random warp differs:
it then uses 5 bits of position, up to 4 levels away on up to 12 % of the values.
"""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import triton

import mien
from mien.kernels import reference
from mien.kernels.augment import Augmented, Landmarks, augment, empty, launches
from mien.kernels.draw import FACE_PARAMS, Ranges, draw, params_from_records, records_of

CSRC = Path(mien.__file__).parent / "kernels/csrc"
each_processor = pytest.mark.usefixtures("processor")
each_processor_on_request = pytest.mark.usefixtures("processor_on_request")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def levels(picture):
    """A result as uint8 (B, H, W, C); fails where it is not level / 255 exactly."""
    values = picture.float().permute(0, 2, 3, 1).numpy()
    rounded = np.rint(values * 255)
    exact = (torch.from_numpy(rounded.astype(np.float32)) / 255).to(picture.dtype).float()
    assert np.array_equal(exact.numpy(), values)
    return rounded.astype(np.uint8)


def store_of(planes):
    """uint8 (F, S, S, up to 6) as a store tensor."""
    faces = np.zeros((*planes.shape[:3], 8), np.uint8)
    faces[..., : planes.shape[3]] = planes
    return torch.from_numpy(faces)


def still(count):
    """Parameters that change nothing."""
    records = np.zeros(count, FACE_PARAMS)
    records["index"] = np.arange(count)
    records["matrix"] = [[1, 0, 0], [0, 1, 0]]
    return records


def drawn_store(num_faces, size_px, seed=0):
    """Faces with structure of every scale, all levels, and soft masks."""
    generator = np.random.default_rng(seed)
    planes = np.zeros((num_faces, size_px, size_px, 6), np.uint8)
    for face in planes:
        for channel in range(6):
            coarse = generator.integers(0, 256, (5, 5)).astype(np.uint8)
            plane = cv2.resize(coarse, (size_px, size_px), interpolation=cv2.INTER_CUBIC)
            grain = generator.integers(-20, 21, plane.shape)
            face[..., channel] = np.clip(plane.astype(int) + grain, 0, 255)
    return store_of(planes)


def drawn_params(count, num_faces, size_px, **ranges):
    strong = {
        "zoom_amount": 25,
        "rotation_range": 25,
        "shift_range": 25,
        "color_lightness": 75,
        "color_ab": 50,
        "color_clahe_chance": 75,
        "color_clahe_max_size": 8,
    }
    return draw(
        Ranges(**(strong | ranges)),
        seed=5,
        first=[3],
        count=count,
        num_faces=[num_faces],
        size_px=size_px,
    )


def both_sides(count, num_faces, size_px, **ranges):
    """Parameters of ``count`` faces of each side."""
    ranges = Ranges(rotation_range=25, zoom_amount=25, color_clahe_max_size=8, **ranges)
    return draw(ranges, seed=5, first=[3, 40], count=count, num_faces=num_faces, size_px=size_px)


def config_of(data):
    return dict(zip(data["conf_names"].tolist(), data["conf_values"].tolist(), strict=True))


def clahe_tiles(chosen, grid_base, size_px):
    """Tiles of each face; the oracle leaves CLAHE out where only the first face was chosen."""
    tiles = np.zeros(len(chosen), np.int32)
    if not np.array_equal(np.flatnonzero(chosen), [0]):
        base = max(2, size_px // 128)
        tiles[chosen] = grid_base.astype(int) * (base // 2) + base
    return tiles


def run_whole(faces, records, size_px):
    """Target and input levels at the store's size, and the face mask."""
    params = params_from_records(records)
    out = augment([faces], params, input_px=size_px, output_px=[size_px], learn_mask=True)
    return levels(out.targets_bchw[0]), levels(out.input_bchw), levels(out.mask_b1hw)


@each_processor_on_request
@pytest.mark.oracle
def test_each_stage_equals_the_oracle(oracle_paths):
    """Colour, affine of picture and masks, flip, warp: each from the oracle's random numbers."""
    for file in oracle_paths("augmentation/*.npz"):
        data = np.load(file, allow_pickle=False)
        size_px, config = int(data["size"]), config_of(data)
        planes = data["in_batch"]
        faces, count = store_of(planes), len(planes)

        color = still(count)
        color["color"] = 1
        color["lab"] = data["color:lab_random"].reshape(count, 3)
        lab_only = run_whole(faces, color, size_px)[0]
        chosen = data["color:clahe_random"] < config["color_clahe_chance"] / 100
        color["clahe_tiles"] = clahe_tiles(chosen, data["color:clahe_grid_base"], size_px)
        assert np.array_equal(run_whole(faces, color, size_px)[0], data["color:out"]), file
        shifted = data["color:lab_after_random_lab"]
        back = np.stack([cv2.cvtColor(lab, cv2.COLOR_LAB2BGR) for lab in shifted])
        assert np.array_equal(lab_only, back), file

        records = still(count)
        records["matrix"] = data["transform:matrices"][:, :2]
        target, _, mask = run_whole(faces, records, size_px)
        assert np.array_equal(target, data["transform:out"][..., :3]), file
        assert np.array_equal(mask, data["transform:out"][..., 3:4]), file

        records["flip"] = data["flip:random"] <= config["flip_chance"] / 100
        target, _, mask = run_whole(faces, records, size_px)
        assert np.array_equal(target, data["flip:out"][..., :3]), file
        assert np.array_equal(mask, data["flip:out"][..., 3:4]), file

        records["warp"], records["warp_noise"] = 1, data["warp:noise"]
        target, warped, _ = run_whole(faces, records, size_px)
        assert np.array_equal(target, data["flip:out"][..., :3]), file
        assert np.array_equal(warped, data["warp:out"]), file


def _draws(data):
    """The oracle's random numbers by purpose, from the order in which they were drawn."""
    warp, to_landmarks, flip, color = data["flags_warp_wtl_flip_color"].tolist()
    series = [data[key] for key in sorted(data.files) if key.startswith("random:")]
    taken = iter(series[2:] if to_landmarks else series)
    draws = {}
    if color:
        draws["lab"], draws["clahe"] = next(taken), next(taken)
        # The grid is drawn only where a face was chosen: 5 numbers or fewer, whole numbers.
        if np.any(draws["clahe"] < 0.5):
            draws["grid"] = next(taken)
    draws["rotation"], draws["scale"], draws["shift"] = next(taken), next(taken), next(taken)
    if flip:
        draws["flip"] = next(taken)
    if warp and not to_landmarks:
        draws["noise"] = next(taken)
    return draws


def _matrices(draws, size_px):
    angle = np.deg2rad(draws["rotation"].astype(np.float32))
    alpha = draws["scale"].astype(np.float32) * np.cos(angle)
    beta = draws["scale"].astype(np.float32) * np.sin(angle)
    centre = (size_px - 1) / 2
    shift = draws["shift"].astype(np.float32)
    x = centre * (1 - alpha) - centre * beta + shift[:, 0]
    y = centre * beta + centre * (1 - alpha) + shift[:, 1]
    rows = np.stack([np.stack([alpha, beta, x], -1), np.stack([-beta, alpha, y], -1)], 1)
    return rows.astype(np.float32)


@each_processor
@pytest.mark.oracle
def test_the_whole_chain_equals_the_oracle(oracle_paths):
    """From the store to input, targets and masks of every size, in the oracle's random numbers."""
    for file in oracle_paths("collate/*.npz"):
        data = np.load(file, allow_pickle=False)
        _, to_landmarks, flips, colors = data["flags_warp_wtl_flip_color"].tolist()
        draws = _draws(data)
        items = data["trainset_items"]  # (batch, side, S, S, C); A first, then B, when augmented
        batch, size_px = items.shape[0], items.shape[2]
        planes = np.concatenate([items[:, side] for side in range(items.shape[1])])
        records = still(len(planes))
        records["index"] %= batch
        if colors:
            records["color"] = 1
            records["lab"] = draws["lab"].reshape(-1, 3)
            chosen = draws["clahe"] < 0.5
            records["clahe_tiles"] = clahe_tiles(chosen, draws.get("grid"), size_px)
        records["matrix"] = _matrices(draws, size_px)
        if flips:
            records["flip"] = draws["flip"] <= 0.5
        if "noise" in draws:
            records["warp"], records["warp_noise"] = 1, draws["noise"]
        output_px = data["output_sizes"].tolist()
        out = augment(
            [store_of(planes[:batch]), store_of(planes[batch:])],
            params_from_records(records),
            input_px=int(data["input_size"]),
            output_px=output_px,
            eye_multiplier=3 if "mask_eye:0" in data.files else 1,
            mouth_multiplier=2 if "mask_mouth:0" in data.files else 1,
            learn_mask=True,
            rgb=str(data["color_order"]) == "rgb",
        )
        for side in range(items.shape[1]):
            half = slice(side * batch, (side + 1) * batch)
            if not to_landmarks:  # random warp or none
                assert np.array_equal(levels(out.input_bchw[half]), data[f"feed:{side}"]), file
            for i in range(len(output_px)):
                target = data[f"target:{i}"][:, side]
                assert np.array_equal(levels(out.targets_bchw[i][half]), target), (file, i)
                face, eye, mouth = (
                    data[f"mask_{name}:{i}"][:, side] / 255
                    if f"mask_{name}:{i}" in data.files
                    else 0
                    for name in ("face", "eye", "mouth")
                )
                weight = face + face * eye * 3
                weight = weight + weight * mouth * 2
                ours = out.weights_b1hw[i][half].numpy()
                np.testing.assert_allclose(ours, weight, rtol=5e-7)
            face = data[f"mask_face:{i}"][:, side, 0]
            assert np.array_equal(levels(out.mask_b1hw[half])[..., 0], face), file


def landmarks_of(points, nearest):
    """What `augment` takes of one side."""
    return Landmarks(
        points_fl2=torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)),
        nearest_fk=torch.from_numpy(np.ascontiguousarray(nearest, dtype=np.int32)),
    )


@each_processor_on_request
@pytest.mark.oracle
def test_warp_to_landmarks_equals_the_oracle(oracle_paths):
    """The oracle bends along the wrong axes: x and y are exchanged in its points.

    Its pixels that lie outside the picture are undefined. Positions are of 2^-14 px here and float
    there, so single levels fall to their neighbour.
    """
    for file in oracle_paths("augmentation/*.npz"):
        data = np.load(file, allow_pickle=False)
        size_px, count = int(data["size"]), len(data["in_batch"])
        faces, points = store_of(data["flip:out"]), data["flip:points_out"][..., ::-1]
        records = still(2 * count)
        records["index"] %= count
        records["warp"] = 2
        records["landmark_noise"][:count] = data["wtl:noise"][..., ::-1]
        nearest = np.tile(np.arange(count)[:, None], 10)
        out = augment(
            [faces, faces],
            params_from_records(records),
            input_px=size_px,
            output_px=[size_px],
            landmarks=[landmarks_of(points[:, side], nearest) for side in range(2)],
        )
        ours, want = levels(out.input_bchw)[:count], data["wtl:out"]
        differ = (ours.astype(int) - want)[data["wtl:defined"]]
        assert np.abs(differ).max() <= 1, file
        # Measured: at most 6.2e-5 of them, 3 of the smallest pictures.
        assert np.count_nonzero(differ) <= 5 + 1e-4 * differ.size, file


CASES = [
    pytest.param(64, 64, [64], id="64"),
    pytest.param(128, 64, [32, 64, 128], id="whole-ratios"),
    pytest.param(96, 40, [33, 64, 96], id="other-ratios"),
    pytest.param(66, 66, [22], id="no-multiple-of-4"),
    pytest.param(37, 36, [1, 37], id="odd"),
    pytest.param(8, 8, [8, 4], id="smallest"),
]
LARGE = 384, 128, [384, 96]


def _assert_equals_opencv(size_px, input_px, output_px, *, rgb):
    faces = drawn_store(5, size_px)
    params = drawn_params(7, 5, size_px)
    records = records_of(params)
    records["color"][1], records["warp"][2], records["clahe_tiles"][3] = 0, 0, 3
    records["warp_noise"][4] *= 40  # far out of the picture
    sizes = {"input_px": input_px, "output_px": output_px}
    masks = {"eye_multiplier": 3, "mouth_multiplier": 2}
    ours = augment([faces], params, **sizes, **masks, learn_mask=True, rgb=rgb)
    want = reference.augment(faces.numpy(), records, **sizes, **masks, rgb=rgb)
    assert np.array_equal(levels(ours.input_bchw), want[0])
    for target, wanted in zip(ours.targets_bchw, want[1], strict=True):
        assert np.array_equal(levels(target), wanted)
    for weight, wanted in zip(ours.weights_b1hw, want[2], strict=True):
        np.testing.assert_allclose(weight[:, 0].numpy(), wanted, rtol=5e-7)  # fp32 roundings
    assert np.array_equal(levels(ours.mask_b1hw)[..., 0], want[3])


@each_processor
@pytest.mark.parametrize(("size_px", "input_px", "output_px"), CASES)
@pytest.mark.parametrize("rgb", [False, True], ids=["bgr", "rgb"])
def test_equals_opencv(size_px, input_px, output_px, rgb):
    _assert_equals_opencv(size_px, input_px, output_px, rgb=rgb)


@each_processor_on_request
def test_large_faces_equal_opencv():
    _assert_equals_opencv(*LARGE, rgb=True)


def test_color_equals_opencv_for_every_color():
    """All 2^24 colours, each with a shift of L, a, b: reaches all tables of both directions."""
    low = np.arange(65536, dtype=np.uint32)
    generator = np.random.default_rng(0)
    for begin in range(0, 256, 32):
        high = np.arange(begin, begin + 32, dtype=np.uint32)
        colors = np.stack(np.broadcast_arrays(low & 255, low >> 8, high[:, None]), -1)
        faces = store_of(colors.astype(np.uint8).reshape(32, 256, 256, 3))
        records = still(32)
        records["color"] = 1
        records["lab"][begin == 0 :] = generator.uniform(-0.5, 0.5, (32 - (begin == 0), 3))
        ours = run_whole(faces, records, 256)[0]
        for face, record, picture in zip(faces.numpy(), records, ours, strict=True):
            assert np.array_equal(picture, reference.vary_color(face[..., :3], record["lab"], 0))


@each_processor_on_request
@pytest.mark.parametrize("size_px", [64, 100, 256])
@pytest.mark.parametrize("tiles", range(1, 11))
def test_clahe_equals_opencv(size_px, tiles):
    faces = drawn_store(2, size_px, seed=tiles)
    faces[1, :, :, :3] = 130  # one level: all of it above the clip limit
    records = still(2)
    records["color"], records["clahe_tiles"] = 1, tiles
    ours = run_whole(faces, records, size_px)[0]
    for face, picture in zip(faces.numpy(), ours, strict=True):
        want = reference.vary_color(face[..., :3], np.zeros(3, np.float32), tiles)
        assert np.array_equal(picture, want)


@each_processor
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
def test_dtypes_are_rounded_once(input_dtype, target_dtype):
    faces, params = drawn_store(4, 32), drawn_params(4, 4, 32)
    sizes = {"input_px": 32, "output_px": [16, 32]}
    whole = augment([faces], params, **sizes)
    ours = augment([faces], params, **sizes, input_dtype=input_dtype, target_dtype=target_dtype)
    assert torch.equal(ours.input_bchw, whole.input_bchw.to(input_dtype))
    for target, wanted in zip(ours.targets_bchw, whole.targets_bchw, strict=True):
        assert torch.equal(target, wanted.to(target_dtype))
        assert target.is_contiguous(memory_format=torch.channels_last)


@each_processor
def test_weights_follow_the_multipliers():
    faces = drawn_store(3, 32)
    params = params_from_records(still(3))
    face, eye, mouth = (faces[..., c].double() / 255 for c in (3, 4, 5))

    def weight(**options):
        out = augment([faces], params, input_px=32, output_px=[32], **options)
        return out.weights_b1hw[0][:, 0].double()

    assert weight(penalize_mask=False, eye_multiplier=3).eq(1).all()
    torch.testing.assert_close(weight(), face, rtol=5e-7, atol=0)
    torch.testing.assert_close(
        weight(eye_multiplier=1, mouth_multiplier=1), face, rtol=5e-7, atol=0
    )
    eyes = face * (1 + 4 * eye)
    torch.testing.assert_close(weight(eye_multiplier=4), eyes, rtol=5e-7, atol=0)
    lips = face * (1 + 2 * mouth)
    torch.testing.assert_close(weight(mouth_multiplier=2), lips, rtol=5e-7, atol=0)


def test_same_bits_on_any_number_of_threads():
    faces, params = drawn_store(9, 64), drawn_params(20, 9, 64)
    runs = [
        augment([faces], params, input_px=32, output_px=[64, 24], num_threads=threads)
        for threads in (1, 1, 2, 5, 0)
    ]
    for other in runs[1:]:
        assert torch.equal(other.input_bchw, runs[0].input_bchw)
        for ours, first in zip(other.targets_bchw, runs[0].targets_bchw, strict=True):
            assert torch.equal(ours, first)


@each_processor
def test_both_sides_go_into_one_batch():
    faces = [drawn_store(3, 32, seed=1), drawn_store(4, 32, seed=2)]
    sizes = {"input_px": 32, "output_px": [16]}
    params = both_sides(4, (3, 4), 32)
    both = augment(faces, params, **sizes)
    for side in range(2):
        half = slice(4 * side, 4 * side + 4)
        alone = augment([faces[side]], params[half], **sizes)
        assert torch.equal(both.input_bchw[half], alone.input_bchw)
        assert torch.equal(both.targets_bchw[0][half], alone.targets_bchw[0])
        assert torch.equal(both.weights_b1hw[0][half], alone.weights_b1hw[0])


@each_processor
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_can_bring_its_own_faces(device):
    """The faces that the rows name, in their order, in place of the stores."""
    faces = [drawn_store(5, 32, seed=1), drawn_store(7, 32, seed=2)]
    landmarks = drawn_landmarks((5, 7), 32)
    params = both_sides(4, (5, 7), 32, warp_to_landmarks=True)
    index = records_of(params)["index"].reshape(2, 4)
    sizes = {"input_px": 32, "output_px": [16]}
    want = augment(faces, params, landmarks=landmarks, **sizes)
    own = [store[rows].to(device) for store, rows in zip(faces, index, strict=True)]
    there = [
        Landmarks(points_fl2=one.points_fl2.to(device), nearest_fk=one.nearest_fk.to(device))
        for one in landmarks
    ]
    params = params.to(device)
    ours = augment(own, params, num_faces=(5, 7), landmarks=there, **sizes)
    assert torch.equal(ours.input_bchw.cpu(), want.input_bchw)
    assert torch.equal(ours.targets_bchw[0].cpu(), want.targets_bchw[0])
    with pytest.raises(ValueError, match=r"those of the 8 rows, got \[5, 7\] of \[5, 7\] faces"):
        augment(faces, params, num_faces=(5, 7), **sizes)


@each_processor
def test_nothing_is_written_beyond_the_batch():
    faces, params = drawn_store(3, 32), drawn_params(2, 3, 32)
    whole = empty(3, input_px=32, output_px=[32], input_channels=8)
    first_two = Augmented(
        whole.input_bchw[:2], [whole.targets_bchw[0][:2]], [whole.weights_b1hw[0][:2]], None
    )
    sizes = {"input_px": 32, "output_px": [32], "input_channels": 8}
    assert augment([faces], params, **sizes, out=first_two).input_bchw.isfinite().all()
    for tensor in (whole.input_bchw, whole.targets_bchw[0], whole.weights_b1hw[0]):
        assert tensor[2].isnan().all()


AREAS = {
    "none": [],
    "a corner": [(0, 0)],
    "the last pixel": [(-1, -1)],
    "both ends of a row": [(20, 0), (20, -1)],
    "far apart": [(3, 30), (35, 9)],
}


@pytest.mark.parametrize("size_px", [37, 40])
@pytest.mark.parametrize("places", AREAS.values(), ids=AREAS)
def test_areas_count_wherever_they_lie(size_px, places):
    """Few and at the ends, turned, mirrored and moved out of the picture, where it is repeated."""
    faces = drawn_store(6, size_px)
    faces[..., 4:6] = 0
    for row, column in places:
        faces[:, row, column, 4:6] = 255
    params = drawn_params(12, 6, size_px)
    records = records_of(params)
    records["flip"] = [0, 1] * 6
    records["matrix"][::3, :, 2] += 0.6 * size_px
    records["matrix"][1::3, :, 2] -= 0.6 * size_px
    sizes = {"input_px": size_px, "output_px": [size_px, size_px // 2]}
    masks = {"eye_multiplier": 3, "mouth_multiplier": 2}
    ours = augment([faces], params, **sizes, **masks)
    want = reference.augment(faces.numpy(), records, **sizes, **masks)[2]
    for got, expected in zip(ours.weights_b1hw, want, strict=True):
        np.testing.assert_allclose(got[:, 0].numpy(), expected, rtol=5e-7)


def _assert_single_interpolation_equals_opencv(size_px, input_px, output_px):
    """Positions are float32 here and float64 there: a level may fall to its other neighbour."""
    faces, params = drawn_store(5, size_px), drawn_params(9, 5, size_px)
    records = records_of(params)
    records["color"][1], records["warp"][2] = 0, 0
    records["warp_noise"][4] *= 40
    sizes = {"input_px": input_px, "output_px": output_px}
    plain = augment([faces], params, **sizes)
    ours = augment([faces], params, **sizes, single_interpolation=True)
    want = reference.augment(faces.numpy(), records, **sizes, single_interpolation=True)[0]
    differ = levels(ours.input_bchw).astype(int) - want
    assert np.abs(differ).max() <= 1
    assert np.mean(differ != 0) < 2e-4  # measured: at most 1.1e-4
    assert torch.equal(ours.input_bchw[2], plain.input_bchw[2]), "a face that is not bent"
    assert not torch.equal(ours.input_bchw[0], plain.input_bchw[0])
    for one, other in zip(ours.targets_bchw, plain.targets_bchw, strict=True):
        assert torch.equal(one, other)


@each_processor
@pytest.mark.parametrize(("size_px", "input_px", "output_px"), CASES)
def test_single_interpolation_equals_opencv(size_px, input_px, output_px):
    _assert_single_interpolation_equals_opencv(size_px, input_px, output_px)


@each_processor_on_request
def test_single_interpolation_of_large_faces_equals_opencv():
    _assert_single_interpolation_equals_opencv(*LARGE)


@each_processor_on_request
def test_single_interpolation_is_sharper():
    faces, params = drawn_store(6, 128), drawn_params(6, 6, 128)
    rows = [
        levels(
            augment(
                [faces], params, input_px=128, output_px=[128], single_interpolation=single
            ).input_bchw
        )[:, 8:-8, 8:-8].astype(float)
        for single in (False, True)
    ]
    twice, once = (np.square(np.diff(row, axis=2)).mean() for row in rows)
    assert once > 1.5 * twice  # measured: 2.0, the faces being full of grain


def drawn_landmarks(num_faces, size_px, seed=0):
    """Landmarks of both sides: a face's outline and features, differing a little from face to face.

    The jaw is no hull of the features, so that some of its points are dropped and some are not.
    """
    generator = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 51, endpoint=False)
    jaw = np.stack([np.cos(np.linspace(0, np.pi, 17)), np.sin(np.linspace(0, np.pi, 17))], 1)
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    features *= 0.7 * (np.arange(51)[:, None] % 7 + 1) / 7
    face = np.concatenate([0.8 * jaw, features]) * 0.45 + 0.5
    sides = []
    for count in num_faces:
        shaken = face + generator.normal(0, 0.02, (count, 68, 2))
        nearest = generator.integers(0, num_faces[1 - len(sides)], (count, 10))
        sides.append(landmarks_of(shaken * size_px, nearest))
    return sides


def landmark_pairs(records, landmarks):
    """For each row, the landmarks of its face and of the one that it is warped to."""
    pairs = []
    for row, record in enumerate(records):
        side = int(2 * row >= len(records))
        index = record["index"]
        other = landmarks[side].nearest_fk[index, record["near"]]
        pairs.append(
            (
                landmarks[side].points_fl2[index].numpy(),
                landmarks[1 - side].points_fl2[other].numpy(),
            )
        )
    return pairs


@each_processor
@pytest.mark.parametrize("single", [False, True], ids=["twice", "once"])
@pytest.mark.parametrize(("size_px", "input_px"), [(64, 64), (96, 48), (66, 22), (37, 30), (8, 8)])
def test_warp_to_landmarks_equals_opencv(size_px, input_px, single):
    faces = [drawn_store(3, size_px), drawn_store(4, size_px, seed=1)]
    landmarks = drawn_landmarks((3, 4), size_px)
    params = both_sides(2, (3, 4), size_px, warp_to_landmarks=True)
    records = records_of(params)
    sizes = {"input_px": input_px, "output_px": [size_px], "single_interpolation": single}
    ours = levels(augment(faces, params, landmarks=landmarks, **sizes).input_bchw)
    pairs = landmark_pairs(records, landmarks)
    for side in range(2):
        half = slice(2 * side, 2 * side + 2)
        want = reference.augment(
            faces[side].numpy(), records[half], landmarks=pairs[half], **sizes
        )[0]
        differ = ours[half].astype(int) - want
        assert np.abs(differ).max() <= 1
        assert np.count_nonzero(differ) <= 2 + 5e-4 * differ.size  # measured: 4.4e-4, full of grain


@each_processor
@pytest.mark.parametrize("on_edge", ["source", "destination", "neither"])
def test_a_point_of_the_jaw_on_the_edge_of_the_features_is_dropped(on_edge):
    generator = np.random.default_rng(0)
    features = generator.uniform(24, 40, (51, 2))
    features[-4:] = [[20, 20], [44, 20], [44, 44], [20, 44]]
    jaw = np.stack([np.linspace(8, 56, 17), np.full(17, 10.0)], 1)
    sides = [np.concatenate([jaw, features]) for _ in range(2)]
    if on_edge != "neither":
        sides[on_edge == "destination"][8] = [32, 20]
    landmarks = [landmarks_of(points[None], np.zeros((1, 10))) for points in sides]
    records = still(2)
    records["index"], records["warp"] = 0, 2
    records["landmark_noise"] = generator.uniform(-2, 2, (2, 68, 2))
    records["landmark_noise"][:, [8, -4, -3, -2, -1]] = 0
    faces = drawn_store(1, 64)
    sizes = {"input_px": 64, "output_px": [64]}
    params = params_from_records(records)
    ours = levels(augment([faces, faces], params, landmarks=landmarks, **sizes).input_bchw)
    pairs = landmark_pairs(records, landmarks)
    want = reference.augment(faces.numpy(), records, landmarks=pairs, **sizes)[0]
    differ = ours.astype(int) - want
    assert np.abs(differ).max() <= 1
    assert np.mean(differ != 0) < 5e-4


def _landmark_case(kind, size_px):
    generator = np.random.default_rng(3)
    along = np.linspace(0, size_px - 1, 68)
    return {
        "one point": np.full((68, 2), size_px / 3),
        "a line": np.stack([along, along], 1),
        "the border": np.stack([along, np.zeros(68)], 1),
        "a lattice": generator.integers(0, 8, (68, 2)) * (size_px // 8),
        "a circle": (np.stack([np.cos(along), np.sin(along)], 1) + 1) * (size_px / 2 - 1),
        "all anywhere": generator.uniform(-0.2, 1.2, (68, 2)) * size_px,
        "far outside": generator.normal(0, 1e6, (68, 2)),
    }[kind]


@each_processor
@pytest.mark.parametrize("size_px", [8, 37, 64])
@pytest.mark.parametrize(
    "kind",
    ["one point", "a line", "the border", "a lattice", "a circle", "all anywhere"],
)
def test_landmarks_that_stay_move_nothing(kind, size_px):
    """Whatever they look like; the points are of 2^-14 px, too little to move a level."""
    faces = drawn_store(2, size_px)
    points = np.tile(_landmark_case(kind, size_px), (2, 1, 1))
    landmarks = [landmarks_of(points, np.zeros((2, 10)))] * 2
    records = still(4)
    records["index"] %= 2
    records["warp"] = 2
    params = params_from_records(records)
    sizes = {"input_px": size_px, "output_px": [size_px]}
    out = augment([faces, faces], params, landmarks=landmarks, **sizes)
    assert torch.equal(out.input_bchw, out.targets_bchw[0])


@each_processor
def test_landmarks_far_outside_are_no_error():
    faces = drawn_store(2, 64)
    points = np.tile(_landmark_case("far outside", 64), (2, 1, 1))
    landmarks = [landmarks_of(scale * points, np.ones((2, 10))) for scale in (1, -0.3)]
    records = still(4)
    records["index"] %= 2
    records["warp"] = 2
    sizes = {"input_px": 64, "output_px": [64]}
    out = augment([faces, faces], params_from_records(records), landmarks=landmarks, **sizes)
    assert 0 <= out.input_bchw.min() <= out.input_bchw.max() <= 1


@each_processor
@pytest.mark.parametrize("axis", [0, 1], ids=["x", "y"])
def test_landmarks_pull_the_picture_along_their_own_axis(axis):
    """A feature goes where its landmark goes."""
    size_px = 64
    faces = np.zeros((1, size_px, size_px, 3), np.uint8)
    faces[0, 28:33, 28:33] = 255  # centre (30, 30)
    points = 30 + 6 * np.stack([np.cos(np.arange(68)), np.sin(np.arange(68))], 1)
    moved = points.copy()
    moved[:, axis] += 8
    landmarks = [landmarks_of(p[None], np.zeros((1, 10))) for p in (points, moved)]
    records = still(2)
    records["index"], records["warp"] = 0, 2
    store = store_of(faces)
    out = augment(
        [store, store],
        params_from_records(records),
        input_px=size_px,
        output_px=[size_px],
        landmarks=landmarks,
    )
    face = levels(out.input_bchw)[0, ..., 0].astype(float)  # A's, warped to B's landmarks
    y, x = np.indices(face.shape)
    centre = [(face * at).sum() / face.sum() for at in (x, y)]
    wanted = [30.0, 30.0]
    wanted[axis] += 8
    np.testing.assert_allclose(centre, wanted, atol=0.1)


@each_processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rgb", [False, True], ids=["bgr", "rgb"])
def test_eight_channels_are_three_and_zeros(dtype, rgb):
    faces, params = drawn_store(4, 37), drawn_params(5, 4, 37)
    options = {"input_px": 23, "output_px": [37], "input_dtype": dtype, "rgb": rgb}
    three = augment([faces], params, **options)
    eight = augment([faces], params, **options, input_channels=8)
    assert eight.input_bchw.shape == (5, 8, 23, 23)
    assert eight.input_bchw.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(eight.input_bchw[:, :3], three.input_bchw)
    assert torch.equal(eight.input_bchw[:, 3:], torch.zeros(5, 5, 23, 23, dtype=dtype))
    assert torch.equal(eight.targets_bchw[0], three.targets_bchw[0])


def test_launches_follow_the_sizes():
    def count(batch, input_px, output_px):
        return launches(batch, size_px=64, input_px=input_px, output_px=output_px)

    assert count(32, 64, [64]) == {"draw": 1, "augment": 5}
    assert count(32, 32, [64, 64]) == {"draw": 1, "augment": 5}
    assert count(32, 32, [16, 32, 64]) == {"draw": 1, "augment": 6}
    assert count(32, 48, [64]) == {"draw": 1, "augment": 6}
    assert count(32, 16, [16]) == {"draw": 1, "augment": 7}
    more = launches(32, size_px=64, input_px=64, output_px=[64], to_landmarks=True)
    assert more == {"draw": 1, "augment": 7}
    assert count(0, 64, [64]) == {"draw": 0, "augment": 0}


@each_processor
def test_no_faces_are_no_error():
    faces, params = drawn_store(2, 32), drawn_params(0, 2, 32)
    assert augment([faces], params, input_px=32, output_px=[32]).input_bchw.shape == (0, 3, 32, 32)


def test_works_in_a_forked_process():
    """The parent's threads are not in the child, which has to start its own."""
    faces, params = drawn_store(4, 32), drawn_params(8, 4, 32)
    want = augment([faces], params, input_px=32, output_px=[32], num_threads=3).input_bchw
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)  # it would wait for ever for threads that it does not have
        ours = augment([faces], params, input_px=32, output_px=[32], num_threads=3).input_bchw
        os._exit(0 if ours.numpy().tobytes() == want.numpy().tobytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("rgb", "eye_multiplier", "penalize"), [(True, 3, True), (False, 1, False)]
)
def test_large_targets_that_go_past_the_cache_are_those_of_small_batches(
    rgb, eye_multiplier, penalize
):
    """A million pixels and more of all faces: 17 faces of 256 px."""
    faces, params = [drawn_store(3, 256)], drawn_params(17, 3, 256)
    how = {"input_px": 64, "output_px": [64, 256], "rgb": rgb, "penalize_mask": penalize}
    how["eye_multiplier"] = eye_multiplier
    whole = augment(faces, params, **how)
    parts = [augment(faces, params[at : at + 6], **how) for at in range(0, 17, 6)]
    for at in range(2):
        for of in ("targets_bchw", "weights_b1hw"):
            joined = torch.cat([getattr(part, of)[at] for part in parts])
            assert torch.equal(getattr(whole, of)[at], joined)


def test_every_build_gives_the_same_bits():
    """The library holds the inner loops for two instruction sets."""
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); import test_augment as t\n"
        "out = t.augment([t.drawn_store(5, 96)], t.drawn_params(9, 5, 96), input_px=48,\n"
        "    output_px=[96, 40], eye_multiplier=3, mouth_multiplier=2)\n"
        "bent = t.augment([t.drawn_store(5, 96)] * 2, t.both_sides(4, (5, 5), 96,\n"
        "    warp_to_landmarks=True), input_px=48, output_px=[96],\n"
        "    landmarks=t.drawn_landmarks((5, 5), 96))\n"
        "tensors = [out.input_bchw, *out.targets_bchw, *out.weights_b1hw, bent.input_bchw]\n"
        "print(hashlib.sha256(b''.join(x.numpy().tobytes() for x in tensors)).hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env=os.environ | {"MIEN_CPU": name},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("baseline", "")
    ]
    assert len(runs[0]) > 60
    assert runs[0] == runs[1]


def _refused(change):
    faces, params = torch.zeros(2, 16, 16, 8, dtype=torch.uint8), drawn_params(3, 2, 16)
    given = {"faces": [faces], "params_nx": params, "input_px": 16, "output_px": [16]}
    return given | change(given)


def _store(change):
    return lambda given: {"faces": [change(given["faces"][0])]}


def _bad_index(given):
    records = records_of(given["params_nx"]).copy()
    records["index"][1] = 2
    return {"params_nx": params_from_records(records)}


def _bad_tiles(given):
    records = records_of(given["params_nx"]).copy()
    records["clahe_tiles"][2] = 11
    return {"params_nx": params_from_records(records)}


def _landmarks(change):
    """Both sides with landmarks, and something wrong."""

    def given(given):
        faces = [given["faces"][0], given["faces"][0]]
        records = still(4)
        records["index"] %= 2
        records["warp"] = 2
        landmarks = drawn_landmarks((2, 2), 16)
        given = {"faces": faces, "landmarks": landmarks, "records": records}
        given |= change(given)
        given["params_nx"] = params_from_records(given.pop("records"))
        return given

    return given


def _changed(name, value):
    def change(given):
        given["records"][name] = value
        return {}

    return _landmarks(change)


def _half(points):
    return [
        points[0],
        Landmarks(points_fl2=points[1].points_fl2, nearest_fk=points[1].nearest_fk[:, :9]),
    ]


def _lost(points):
    return [points[0], landmarks_of(points[1].points_fl2, np.full((2, 10), 2))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_landmarks(lambda g: {"landmarks": None}), r"face 0: warp must be 0\.\.2 .*got 2"),
        (_changed("warp", 3), r"face 0: warp must be 0\.\.2 .*got 3"),
        (_changed("near", 10), r"face 0: near must be 0\.\.9, got 10"),
        (_landmarks(lambda g: {"landmarks": g["landmarks"][:1]}), "landmarks must be of both"),
        (_landmarks(lambda g: {"faces": g["faces"][:1]}), "got 2 of them and 1 stores"),
        (
            _landmarks(lambda g: {"landmarks": _half(g["landmarks"])}),
            r"nearest must be \(2, 10\) int32, got \(2, 9\)",
        ),
        (
            _landmarks(lambda g: {"landmarks": _lost(g["landmarks"])}),
            r"face 2: nearest must be 0\.\.1, got 2",
        ),
        (_store(lambda faces: faces.float()), r"faces must be uint8 \(F, S, S, 8\)"),
        (_store(lambda faces: faces[0]), r"faces must be uint8 \(F, S, S, 8\)"),
        (_store(lambda faces: faces[..., :6]), r"faces must be uint8 \(F, S, S, 8\)"),
        (_store(lambda faces: faces[:, :8]), r"faces must be \(2, 8, 8, 8\)"),
        (_store(lambda faces: faces.transpose(1, 2)), "faces must be contiguous"),
        (lambda g: {"faces": []}, "faces must be 1 or 2 stores, got 0"),
        (lambda g: {"faces": 2 * g["faces"]}, "as many rows for each side, got 3 rows"),
        (
            lambda g: {"faces": [*g["faces"], torch.zeros(1, 8, 8, 8, dtype=torch.uint8)]},
            r"faces must be \(1, 16, 16, 8\) uint8, got \(1, 8, 8, 8\)",
        ),
        (lambda g: {"input_channels": 4}, "input_channels must be 3 or 8, got 4"),
        (lambda g: {"params_nx": g["params_nx"][:, :9]}, r"params must be \(3, 808\) uint8"),
        (lambda g: {"input_px": 17}, "sizes must be 1 to 16 px .*got 17"),
        (lambda g: {"output_px": [0]}, "sizes must be 1 to 16 px .*got 0"),
        (lambda g: {"output_px": []}, "output_px must name 1 to 8 sizes"),
        (lambda g: {"output_px": [4] * 9}, "output_px must name 1 to 8 sizes"),
        (lambda g: {"input_dtype": torch.float64}, "dtype must be float32, bfloat16 or float16"),
        (
            lambda g: {"out": empty(2, input_px=16, output_px=[16])},
            r"input must be \(3, 3, 16, 16\)",
        ),
        (
            lambda g: {"out": empty(3, input_px=16, output_px=[16]), "input_channels": 8},
            r"input must be \(3, 8, 16, 16\)",
        ),
        (
            lambda g: {"out": empty(3, input_px=16, output_px=[8])},
            r"target must be \(3, 3, 16, 16\)",
        ),
        (lambda g: {"out": empty(3, input_px=16, output_px=[8, 16])}, "must have 1 targets"),
        (lambda g: {"learn_mask": True, "out": empty(3, input_px=16, output_px=[16])}, "a mask if"),
        (_bad_index, r"face 1: index must be 0\.\.1, got 2"),
        (_bad_tiles, r"face 2: clahe_tiles must be 0\.\.10, got 11"),
    ],
)
def test_refuses(change, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        augment(**_refused(change))


def _after(tensor, bytes_past=1):
    """The same tensor, so many bytes after where it could start."""
    room = bytearray(tensor.nbytes + 64 + bytes_past)
    start = torch.frombuffer(room, dtype=torch.uint8).data_ptr()
    offset = -start % 64 + bytes_past
    moved = torch.frombuffer(room, dtype=tensor.dtype, offset=offset, count=tensor.numel())
    return torch.as_strided(moved, tensor.shape, tensor.stride()).copy_(tensor)


@each_processor
@pytest.mark.parametrize(
    ("name", "bytes_past", "needed"),
    [("faces", 4, 8), ("params", 4, 8), ("landmarks", 2, 4), ("nearest", 2, 4)]
    + [("input", 8, 16), ("target", 1, 2), ("weight", 2, 4), ("mask", 2, 4)],
)
def test_refuses_memory_that_starts_within_a_word(name, bytes_past, needed):
    given = _landmarks(lambda given: {})({"faces": [drawn_store(2, 16)]})
    options = {"input_px": 16, "output_px": [16], "input_channels": 8, "learn_mask": True}
    out = empty(4, target_dtype=torch.bfloat16, **options)
    (a, b) = given["landmarks"]
    if name == "faces":
        given["faces"][1] = _after(given["faces"][1], bytes_past)
    elif name == "params":
        given["params_nx"] = _after(given["params_nx"], bytes_past)
    elif name == "landmarks":
        b = dataclasses.replace(b, points_fl2=_after(b.points_fl2, bytes_past))
    elif name == "nearest":
        b = dataclasses.replace(b, nearest_fk=_after(b.nearest_fk, bytes_past))
    elif name == "input":
        out.input_bchw = _after(out.input_bchw, bytes_past)
    elif name == "target":
        out.targets_bchw[0] = _after(out.targets_bchw[0], bytes_past)
    elif name == "weight":
        out.weights_b1hw[0] = _after(out.weights_b1hw[0], bytes_past)
    else:
        out.mask_b1hw = _after(out.mask_b1hw, bytes_past)
    message = rf"^{name} must start at a multiple of {needed} bytes, got one that starts "
    with pytest.raises(ValueError, match=rf"{message}{bytes_past} after: clone it$"):
        augment(**given | {"landmarks": [a, b]}, out=out, **options)


@each_processor
def test_memory_may_start_at_any_whole_word():
    faces, params = drawn_store(3, 16), drawn_params(4, 3, 16)
    options = {"input_px": 16, "output_px": [16]}
    want = augment([faces], params, **options)
    ours = augment([_after(faces, 8)], _after(params, 24), **options)
    assert torch.equal(ours.input_bchw, want.input_bchw)


NO_NUMBERS = [np.nan, np.inf, -np.inf, 3e38, -3e38]


@each_processor
@pytest.mark.parametrize("field", ["warp_noise", "matrix", "lab", "landmark_noise", "landmarks"])
@pytest.mark.parametrize("single", [False, True], ids=["twice", "once"])
def test_numbers_that_are_none_leave_other_faces_alone(field, single):
    """A face whose parameters are broken is some picture of the store, and no error."""
    faces = [drawn_store(6, 40), drawn_store(6, 40, seed=1)]
    landmarks = drawn_landmarks((6, 6), 40)
    params = both_sides(6, (6, 6), 40, warp_to_landmarks=True)
    records = records_of(params)
    records["index"] = [*range(6), *range(6)]
    records["color"], records["warp"] = 1, 1 if field == "warp_noise" else 2
    for side in landmarks:  # the last of each side is warped to the other's last
        side.nearest_fk[5] = 5
    options = {"input_px": 40, "output_px": [40], "single_interpolation": single}
    want = augment(faces, params, landmarks=landmarks, **options)
    for row, value in enumerate(NO_NUMBERS):
        if field == "landmarks":
            for side in landmarks:
                side.points_fl2[row] = value
        else:
            records[field][[row, 6 + row]] = value
    ours = augment(faces, params, landmarks=landmarks, **options)
    assert 0 <= ours.input_bchw.min() <= ours.input_bchw.max() <= 1
    for row in (5, 11):
        assert torch.equal(ours.input_bchw[row], want.input_bchw[row])
        assert torch.equal(ours.targets_bchw[0][row], want.targets_bchw[0][row])


@pytest.mark.slow
def test_boxes_of_more_than_2_to_the_31_levels_have_a_mean():
    """A store of 2,912 px whose output is one pixel: 255 * 2,912^2 is above 2^31."""
    faces = torch.full((1, 2912, 2912, 8), 254, dtype=torch.uint8)
    out = augment([faces], params_from_records(still(1)), input_px=1, output_px=[1])
    assert torch.equal(out.targets_bchw[0], torch.full((1, 3, 1, 1), 254) / 255)
    assert torch.equal(out.weights_b1hw[0], torch.full((1, 1, 1, 1), 254) / 255)


def test_refuses_an_output_of_another_layout():
    given = _refused(lambda given: {})
    out = empty(3, input_px=16, output_px=[16])
    out.input_bchw = torch.empty(3, 3, 16, 16)
    with pytest.raises(ValueError, match="input must be channels_last"):
        augment(**given, out=out)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size_px", "input_px", "output_px"), [*CASES, pytest.param(*LARGE, id="384")]
)
@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("single", [False, True], ids=["twice", "once"])
def test_gpu_gives_the_bits_of_the_cpu(size_px, input_px, output_px, channels, dtype, single):
    """A's store lies in GPU memory, B's, which has more faces, in pinned memory."""
    a, b = drawn_store(5, size_px), drawn_store(7, size_px, seed=1)
    params = both_sides(6, (5, 7), size_px)
    records = records_of(params)
    records["color"][1], records["warp"][2] = 0, 0
    options = {"input_px": input_px, "output_px": output_px, "learn_mask": True}
    options |= {"eye_multiplier": 3, "mouth_multiplier": 2, "input_channels": channels}
    options |= {"input_dtype": dtype, "target_dtype": dtype, "single_interpolation": single}
    want = augment([a, b], params, **options)
    ours = augment([a.cuda(), b.pin_memory()], params.cuda(), **options)
    assert torch.equal(ours.input_bchw.cpu(), want.input_bchw)
    assert torch.equal(ours.mask_b1hw.cpu(), want.mask_b1hw)
    pairs = zip(
        ours.targets_bchw + ours.weights_b1hw, want.targets_bchw + want.weights_b1hw, strict=True
    )
    assert all(torch.equal(one.cpu(), other) for one, other in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("single", [False, True], ids=["twice", "once"])
@pytest.mark.parametrize("size_px", [8, 37, 64, 256])
def test_gpu_warps_to_landmarks_as_the_cpu(size_px, single):
    faces = [drawn_store(5, size_px), drawn_store(7, size_px, seed=1)]
    landmarks = drawn_landmarks((5, 7), size_px)
    params = both_sides(8, (5, 7), size_px, warp_to_landmarks=True)
    records_of(params)["warp"][3] = 1
    options = {"input_px": size_px, "output_px": [size_px], "single_interpolation": single}
    want = augment(faces, params, landmarks=landmarks, **options)
    there = [
        Landmarks(points_fl2=one.points_fl2.cuda(), nearest_fk=one.nearest_fk.cuda())
        for one in landmarks
    ]
    on_gpu = [faces_fssc.cuda() for faces_fssc in faces]
    for _ in range(3):  # the order in which the triangles are found differs
        ours = augment(on_gpu, params.cuda(), landmarks=there, **options)
        assert torch.equal(ours.input_bchw.cpu(), want.input_bchw)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["one point", "a line", "the border", "a lattice", "a circle", "far outside"]
)
def test_gpu_takes_any_landmarks(kind):
    faces = drawn_store(2, 64)
    points = np.tile(_landmark_case(kind, 64), (2, 1, 1))
    landmarks = [landmarks_of(scale * points, np.zeros((2, 10))) for scale in (1, 0.9)]
    records = still(4)
    records["index"] %= 2
    records["warp"] = 2
    params = params_from_records(records)
    options = {"input_px": 64, "output_px": [64]}
    want = augment([faces, faces], params, landmarks=landmarks, **options)
    there = [
        Landmarks(points_fl2=one.points_fl2.cuda(), nearest_fk=one.nearest_fk.cuda())
        for one in landmarks
    ]
    ours = augment([faces.cuda()] * 2, params.cuda(), landmarks=there, **options)
    assert torch.equal(ours.input_bchw.cpu(), want.input_bchw)


def _assembled(folder, arch):
    """The kernels' cubin, and what the assembler said of them."""
    file = folder / "augment.cubin"
    command = "nvcc -std=c++17 -O3 --fmad=false -Werror all-warnings -Xptxas -v -cubin".split()
    folders = [f"-arch=sm_{arch}", "-I", str(CSRC / "include"), "-I", str(CSRC)]
    files = [str(CSRC / "augment.cu"), "-o", str(file)]
    done = subprocess.run([*command, *folders, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return file, done.stderr


@pytest.mark.aot
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_cuda_kernels_spill_nothing_and_leave_room(tmp_path, arch):
    said = _assembled(tmp_path, arch)[1]
    usage = [line for line in said.splitlines() if "bytes stack frame" in line]
    assert len(usage) == 12, "kernels came or went: look at the new list"
    for line in usage:
        assert "0 bytes spill stores, 0 bytes spill loads" in line
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == 12
    assert max(registers) <= 64  # four blocks of 256 threads a multiprocessor


@pytest.mark.aot
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_kernels_move_pixels_whole(tmp_path):
    """The store is read by 8 bytes a pixel, inputs of eight channels are written by 16."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(cuobjdump), "-sass", str(_assembled(tmp_path, 90)[0])]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {part.split()[0]: part for part in listing.split("Function : ")[1:]}

    def count(kernel, instruction):
        (code,) = (code for name, code in kernels.items() if kernel in name)
        return len(re.findall(re.escape(instruction), code))

    assert count("gather_kernel", "LDG.E.64.CONSTANT") == 1
    assert count("gather_kernel", "STG.E.64") == 1
    assert count("transform_kernel", "LDG.E.64.CONSTANT") == 4
    for ratio in range(3):
        assert count(f"input_kernelILi{ratio}E", "STG.E.128") == 3  # one of 16 bits, two of fp32
