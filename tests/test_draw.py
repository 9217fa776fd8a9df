"""draw: pure functions of (seed, side, serial number), with the distributions of the settings."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from mien.kernels.draw import WARP_LANDMARKS, Ranges, draw, records_of
from mien.kernels.native import NativeError

NUM = 20_000

each_processor = pytest.mark.usefixtures("processor")
each_processor_on_request = pytest.mark.usefixtures("processor_on_request")


def drawn(first=0, count=NUM, *, seed=11, side=0, num_faces=997, size_px=64, **ranges):
    """Records of one side; the other side's numbers are others."""
    firsts, nums = [first + 77, first], [num_faces + 1, num_faces]
    params = draw(
        Ranges(**ranges),
        seed=seed,
        first=firsts if side else firsts[::-1],
        count=count,
        num_faces=nums if side else nums[::-1],
        size_px=size_px,
    )
    return records_of(params)[side * count : (side + 1) * count]


def philox(counter, key):
    """Philox4x32-10 as its authors state it, in Python's whole numbers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high & 0xFFFFFFFF, low >> 32 ^ c[3] ^ k[1], low & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@each_processor
def test_numbers_are_philox():
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    seed, side = 0x0123456789ABCDEF, 1
    for serial in (0, 5, 2**40 + 3):
        record = drawn(serial, 1, seed=seed, side=side, num_faces=1)[0]
        where = [serial & ones, serial >> 32, 1 << 8 | side, 0]
        words = philox(where, [seed & ones, seed >> 32])
        parts = (2 * (np.array(words[:3]) >> 8) / 2**24 - 1) * [0.3, 0.08, 0.08]
        np.testing.assert_allclose(record["lab"], parts, rtol=1e-6)
        bend = philox([*where[:2], 3 << 8 | side, 0], [seed & ones, seed >> 32])
        radius = math.sqrt(-2 * math.log((bend[0] + 0.5) / 2**32))
        angle = 2 * math.pi * (bend[1] >> 8) / 2**24
        noise = 5 / 256 * 64 * radius * np.array([math.cos(angle), math.sin(angle)])
        np.testing.assert_allclose(record["warp_noise"][0, 0, :2], noise, rtol=2e-6, atol=1e-6)


@each_processor
def test_a_face_does_not_depend_on_its_batch():
    whole = drawn(0, 50)
    assert np.array_equal(drawn(20, 30), whole[20:])
    assert np.array_equal(drawn(49, 1), whole[49:])


@each_processor
def test_a_side_alone_is_a():
    options = {"seed": 3, "count": 9, "size_px": 64}
    alone = draw(Ranges(), first=[4], num_faces=[7], **options)
    both = draw(Ranges(), first=[4, 0], num_faces=[7, 5], **options)
    assert torch.equal(alone, both[:9])


@each_processor
def test_numbers_can_come_from_a_tensor():
    options = {"seed": 3, "count": 4, "num_faces": [7, 5], "size_px": 64}
    seen = torch.tensor([2**40, 3])
    assert torch.equal(
        draw(Ranges(), first=seen, **options), draw(Ranges(), first=[2**40, 3], **options)
    )


@each_processor
def test_sides_seeds_and_faces_differ():
    one = drawn(0, 100)
    for other in (drawn(0, 100, side=1), drawn(0, 100, seed=12), drawn(100, 100)):
        assert not np.array_equal(one["index"], other["index"])
        for name in ("lab", "matrix", "warp_noise"):
            assert not np.any(one[name] == other[name])


@each_processor
@pytest.mark.parametrize("num_faces", [1, 2, 3, 5, 16, 17, 25, 64, 257, 1000])
def test_every_face_is_seen_before_one_repeats(num_faces):
    epochs = 6
    index = drawn(0, epochs * num_faces, num_faces=num_faces)["index"].reshape(epochs, num_faces)
    assert np.array_equal(np.sort(index, axis=1), np.tile(np.arange(num_faces), (epochs, 1)))
    if num_faces >= 16:
        assert len({row.tobytes() for row in index}) == epochs, "an order came twice"
        assert not any(np.array_equal(row, np.arange(num_faces)) for row in index)


def _chi_squared(counts):
    """Sum of squared, normalised deviations from equal counts, in its own standard deviations."""
    counts = np.asarray(counts, np.float64)
    mean, free = counts.mean(), counts.size - 1
    return (((counts - mean) ** 2 / mean).sum() - free) / math.sqrt(2 * free)


@each_processor_on_request
@pytest.mark.parametrize("num_faces", [5, 25, 100])
def test_every_face_is_as_likely_at_every_place(num_faces):
    epochs = 2000
    index = drawn(0, epochs * num_faces, num_faces=num_faces)["index"].reshape(epochs, num_faces)
    table = np.zeros((num_faces, num_faces))
    for place in range(num_faces):
        np.add.at(table[place], index[:, place], 1)
    assert abs(_chi_squared(table)) < 5
    follows = np.zeros((num_faces, num_faces))
    np.add.at(follows, (index[:, :-1], index[:, 1:]), 1)
    assert abs(_chi_squared(follows[~np.eye(num_faces, dtype=bool)])) < 5


def _is_uniform(values, low, high):
    """Kolmogorov-Smirnov distance to the uniform distribution, below its 1e-4 quantile."""
    ranks = np.sort((np.asarray(values, np.float64) - low) / (high - low))
    assert ranks[0] >= -1e-6
    assert ranks[-1] <= 1 + 1e-6
    distance = np.abs(ranks - (np.arange(ranks.size) + 0.5) / ranks.size).max()
    return distance < 2.23 / math.sqrt(ranks.size)


def _is_chance(hits, chance):
    return abs(np.mean(hits) - chance) < 4.5 * math.sqrt(chance * (1 - chance) / len(hits))


@each_processor_on_request
def test_color_distributions():
    records = drawn(color_lightness=40, color_ab=20, color_clahe_chance=30)
    assert np.all(records["color"] == 1)
    for channel, part in enumerate((0.4, 0.2, 0.2)):
        assert _is_uniform(records["lab"][:, channel], -part, part)
    assert abs(np.corrcoef(records["lab"].T)[np.triu_indices(3, 1)]).max() < 0.035
    assert _is_chance(records["clahe_tiles"] > 0, 0.3)
    assert not drawn(color=False)["color"].any()


@each_processor_on_request
@pytest.mark.parametrize(
    ("size_px", "max_size", "tiles"),
    [
        (64, 4, [2, 3, 4, 5, 6]),
        (256, 1, [2, 3]),
        (384, 4, [3, 4, 5, 6, 7]),
        (512, 4, [4, 6, 8, 10, 12]),
        (512, 0, [4]),
    ],
)
def test_clahe_grids(size_px, max_size, tiles):
    records = drawn(size_px=size_px, color_clahe_chance=100, color_clahe_max_size=max_size)
    counts = Counter(records["clahe_tiles"].tolist())
    assert sorted(counts) == tiles
    if len(tiles) > 1:
        assert abs(_chi_squared(list(counts.values()))) < 5


@each_processor_on_request
@pytest.mark.parametrize("size_px", [64, 256])
def test_affine_distributions(size_px):
    records = drawn(size_px=size_px, zoom_amount=20, rotation_range=25, shift_range=15)
    (alpha, beta, x), (minus_beta, same_alpha, y) = (
        records["matrix"].astype(np.float64).transpose(1, 2, 0)
    )
    assert np.array_equal(alpha, same_alpha)
    assert np.array_equal(beta, -minus_beta)
    assert _is_uniform(np.hypot(alpha, beta), 0.8, 1.2)
    assert _is_uniform(np.rad2deg(np.arctan2(beta, alpha)), -25, 25)
    centre = (size_px - 1) / 2
    shift_x = x - (centre * (1 - alpha) - centre * beta)
    shift_y = y - (centre * beta + centre * (1 - alpha))
    for shift in (shift_x, shift_y):
        assert _is_uniform(shift / size_px, -0.15, 0.15)
    drawn_numbers = np.stack([np.hypot(alpha, beta), np.arctan2(beta, alpha), shift_x, shift_y])
    correlation = np.corrcoef(drawn_numbers) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(NUM)


@each_processor_on_request
def test_flip_chances():
    assert _is_chance(drawn(flip_chance=20)["flip"], 0.2)
    assert not drawn(flip_chance=0)["flip"].any()
    assert drawn(flip_chance=100)["flip"].all()
    assert not drawn(flip=False, flip_chance=100)["flip"].any()


@each_processor_on_request
@pytest.mark.parametrize("size_px", [64, 256])
def test_warp_noise_is_normal(size_px):
    records = drawn(count=4000, size_px=size_px)
    assert np.all(records["warp"] == 1)
    noise = records["warp_noise"].astype(np.float64).reshape(len(records), 50) / (5 / 256 * size_px)
    ranks = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in noise.ravel()])
    assert _is_uniform(ranks, 0, 1)
    assert abs((noise**2).mean() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1
    correlation = np.corrcoef(noise.T) - np.eye(50)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(noise))
    assert not drawn(count=4, warp=False)["warp"].any()


@each_processor_on_request
@pytest.mark.parametrize("size_px", [64, 256])
def test_noise_of_landmarks_is_normal(size_px):
    records = drawn(count=4000, size_px=size_px, warp_to_landmarks=True)
    assert np.all(records["warp"] == WARP_LANDMARKS)
    noise = records["landmark_noise"].astype(np.float64).reshape(4000, 136) / (2 / 256 * size_px)
    ranks = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in noise[:, ::5].ravel()])
    assert _is_uniform(ranks, 0, 1)
    assert abs((noise**2).mean() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1
    both = np.concatenate([noise, records["warp_noise"].reshape(4000, 50)], axis=1)
    correlation = np.corrcoef(both.T) - np.eye(186)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(4000)


@each_processor_on_request
def test_each_of_the_nearest_is_as_likely():
    records = drawn(warp_to_landmarks=True)
    counts = np.bincount(records["near"], minlength=10)
    assert len(counts) == 10
    assert abs(_chi_squared(counts)) < 5
    assert abs(np.corrcoef(records["near"], records["landmark_noise"][:, 0, 0])[0, 1]) < 0.035


@each_processor
def test_without_landmarks_nothing_else_changes():
    grid, landmarks = drawn(count=50), drawn(count=50, warp_to_landmarks=True)
    assert not grid["landmark_noise"].any()
    assert not grid["near"].any()
    for name in ("index", "lab", "matrix", "flip", "clahe_tiles", "warp_noise"):
        assert np.array_equal(grid[name], landmarks[name])
    off = drawn(count=50, warp=False, warp_to_landmarks=True)
    assert not off["warp"].any()
    assert not off["landmark_noise"].any()


@each_processor
def test_no_variation_is_the_identity():
    records = drawn(count=100, zoom_amount=0, rotation_range=0, shift_range=0)
    assert np.array_equal(records["matrix"], np.tile(np.eye(2, 3, dtype=np.float32), (100, 1, 1)))


@each_processor
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "count must be >= 0"),
        ({"num_faces": [0, 5]}, "num_faces >= 1"),
        ({"num_faces": []}, r"num_faces must name 1 or 2 sides, got \[\]"),
        ({"num_faces": [1, 2, 3]}, r"num_faces must name 1 or 2 sides, got \[1, 2, 3\]"),
        ({"size_px": 4}, "size_px >= 8"),
        ({"first": [0, -1]}, r"first must be 2 numbers, none negative, got \[0, -1\]"),
        ({"first": [0]}, r"first must be 2 numbers, none negative, got \[0\]"),
        ({"first": torch.zeros(2)}, r"first must be \(2,\) int64, got \(2,\) float32"),
        ({"first": torch.zeros(1, dtype=torch.int64)}, r"first must be \(2,\) int64, got \(1,\)"),
        ({"color_clahe_max_size": 9}, "color_clahe_max_size must be 0 to 8, got 9"),
    ],
)
def test_refuses(change, message):
    given = {"first": [0, 0], "count": 1, "num_faces": [3, 5], "size_px": 64} | change
    ranges = Ranges(color_clahe_max_size=given.pop("color_clahe_max_size", 4))
    with pytest.raises(ValueError, match=message):
        draw(ranges, seed=0, **given)


@each_processor
def test_counters_are_read_and_moved_on():
    options = {"seed": 3, "count": 4, "num_faces": [7, 9], "size_px": 64}
    counters = torch.tensor([10, 20])
    for first in ([10, 20], [14, 24]):
        drawn_so = draw(Ranges(), first=counters, **options)
        assert torch.equal(drawn_so, draw(Ranges(), first=first, **options))
    assert counters.tolist() == [18, 28]


@each_processor
@pytest.mark.parametrize("shares", [[8], [4, 4], [3, 3, 2], [2, 2, 2, 2], [1, 7]])
def test_shares_of_a_batch_are_the_batch(shares):
    options = {"seed": 3, "num_faces": [7, 9], "size_px": 64}
    whole = draw(Ranges(), first=[10, 20], count=8, **options)
    offset = 0
    for count in shares:
        counters = torch.tensor([10, 20])
        share = {"count": count, "offset": offset, "advance": 8}
        rows = [*range(offset, offset + count), *range(8 + offset, 8 + offset + count)]
        assert torch.equal(draw(Ranges(), first=counters, **share, **options), whole[rows])
        assert torch.equal(draw(Ranges(), first=[10, 20], **share, **options), whole[rows])
        assert counters.tolist() == [18, 28]
        offset += count


@pytest.mark.parametrize("share", [{"offset": -1}, {"advance": 3}, {"offset": 2, "advance": 5}])
def test_shares_beyond_their_batch_are_refused(share):
    with pytest.raises(ValueError, match=r"advance >= offset \+ count"):
        draw(Ranges(), first=[0], count=4, num_faces=[7], size_px=64, seed=0, **share)


@each_processor
def test_counters_begin_anew_behind_the_last_number():
    options = {"seed": 3, "count": 4, "num_faces": [7], "size_px": 64}
    counters = torch.tensor([2**63 - 2])
    params = draw(Ranges(), first=counters, **options)
    assert counters.tolist() == [2]
    assert torch.equal(params[2:], draw(Ranges(), first=[0], **options)[:2])


def test_negative_counters_are_refused():
    counters = torch.tensor([3, -5])
    with pytest.raises(NativeError, match="draw_cpu: counters must not be negative, got -5"):
        draw(Ranges(), first=counters, seed=3, count=4, num_faces=[7, 9], size_px=64)
    assert counters.tolist() == [3, -5]


@pytest.mark.parametrize(
    "name", ["zoom_amount", "rotation_range", "shift_range", "flip_chance", "color_lightness"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1001.0])
def test_ranges_that_are_no_numbers_are_refused(name, value):
    options = {"seed": 3, "count": 4, "num_faces": [7], "size_px": 64}
    with pytest.raises(NativeError, match="draw_cpu: ranges must be within 1000, got "):
        draw(Ranges(**{name: value}), first=[0], **options)


@pytest.mark.gpu
def test_gpu_draws_the_same_bits():
    options = {"seed": 2**63 + 5, "count": 3000, "num_faces": [77, 1001], "size_px": 128}
    for ranges in (Ranges(), Ranges(warp_to_landmarks=True)):
        want = draw(ranges, first=[1000, 2**40], **options)
        counters = torch.tensor([1000, 2**40], device="cuda")
        assert torch.equal(draw(ranges, first=counters, **options).cpu(), want)
        assert counters.tolist() == [4000, 2**40 + 3000]
        ours = draw(ranges, first=[1000, 2**40], device="cuda", **options)
        assert torch.equal(ours.cpu(), want)
