"""Batches: pure functions of seed and count, one ahead, in the network's format."""

import pytest
import torch

from mien.core.config import from_dict
from mien.core.data.feed import Feed
from mien.core.data.store import FaceStore
from mien.kernels.augment import Landmarks
from mien.kernels.draw import draw, records_of


def _store(num_faces, seed):
    generator = torch.Generator().manual_seed(seed)
    faces = torch.randint(0, 256, (num_faces, 32, 32, 8), dtype=torch.uint8, generator=generator)
    names = [f"{i}.png" for i in range(num_faces)]
    return FaceStore(faces, "host", names, [], "", "", reused=False, seconds=0.0)


def _feed(
    dtype=torch.float32, threads=2, channels=3, device="cpu", landmarks=None, share=None, **sections
):
    values = {"train": {"batch_size": 4}} | sections
    stores = {"a": _store(7, 1), "b": _store(5, 2)}
    if device == "cuda":
        stores["a"].faces_fssc = stores["a"].faces_fssc.cuda()
        stores["b"].faces_fssc = stores["b"].faces_fssc.pin_memory()
    return Feed(
        stores,
        from_dict(values),
        input_px=16,
        output_px=(16, 32),
        device=torch.device(device),
        dtype=dtype,
        num_threads=threads,
        input_channels=channels,
        landmarks=landmarks,
        **(share or {}),
    )


def _assert_equal(one, two):
    assert torch.equal(one.input_nchw, two.input_nchw)
    for ours, theirs in zip(one.targets + one.weights, two.targets + two.weights, strict=True):
        assert torch.equal(ours, theirs)


def test_batches_depend_on_the_count_alone():
    """Not on what was asked before, on working ahead, or on the number of threads."""
    steady, jumping = _feed(), _feed(threads=1)
    for step in range(4):
        seen = {"a": 4 * step, "b": 4 * step}
        jumping.seek(seen)
        _assert_equal(steady.next(seen), jumping.batch())
    _assert_equal(steady.next({"a": 40, "b": 8}), jumping.next({"a": 40, "b": 8}))
    steady.close()
    jumping.close()


def test_seek_and_batch_go_on_by_themselves():
    """As a captured step does: `batch` again and again, `seek` where another count is wanted."""
    plain, moving = _feed(), _feed()
    seen = {"a": 0, "b": 0}
    for _ in range(3):
        moving.seek(seen)
        _assert_equal(moving.batch(), plain.next(seen))
        seen = {side: number + 4 for side, number in seen.items()}
        assert moving.seen.tolist() == list(seen.values())
    resumed = {"a": 400, "b": 8}
    moving.seek(resumed)
    _assert_equal(moving.batch(), plain.next(resumed))
    moving.seek(resumed)  # the same batch once more
    _assert_equal(moving.batch(), plain.next(resumed))
    plain.close()
    moving.close()


@pytest.mark.parametrize("gathers", [False, True])
def test_shares_of_several_processes_are_the_batch(gathers):
    plain, seen = _feed(), {"a": 40, "b": 8}
    feeds = [_feed(share={"offset": 0, "count": 3}), _feed(share={"offset": 3, "count": 1})]
    for _ in range(2):
        for feed in feeds:
            feed._gathers = gathers
            feed.seek(seen)
        shares = [feed.batch() for feed in feeds]
        assert all(feed.seen.tolist() == [seen["a"] + 4, seen["b"] + 4] for feed in feeds)
        whole = plain.next(seen)
        for name in ("input_nchw", "targets", "weights"):
            tensors, parts = getattr(whole, name), [getattr(share, name) for share in shares]
            if name == "input_nchw":
                tensors, parts = [tensors], [[part] for part in parts]
            for tensor, *pieces in zip(tensors, *parts, strict=True):
                sides = zip(*(piece.chunk(2) for piece in pieces), strict=True)
                assert torch.equal(tensor, torch.cat([torch.cat(side) for side in sides]))
        seen = plain.following(seen)
        assert feeds[1].following(seen) == plain.following(seen)
    for feed in (plain, *feeds):
        feed.close()


def _landmarks(device):
    generator = torch.Generator().manual_seed(3)
    return tuple(
        Landmarks(
            points_fl2=(4 + 24 * torch.rand(count, 68, 2, generator=generator)).to(device),
            nearest_fk=torch.zeros(count, 10, dtype=torch.int32, device=device),
        )
        for count in (7, 5)
    )


def test_landmarks_bend_the_inputs_alone():
    plain = _feed()
    bent = _feed(landmarks=_landmarks("cpu"), augment={"warp_to_landmarks": True})
    one, other = plain.batch(), bent.batch()
    assert not torch.equal(one.input_nchw, other.input_nchw)
    for ours, theirs in zip(one.targets + one.weights, other.targets + other.weights, strict=True):
        assert torch.equal(ours, theirs)
    bent.seek({"a": 0, "b": 0})
    _assert_equal(bent.batch(), other)
    plain.close()
    bent.close()


def test_gathered_faces_make_the_same_batches():
    """As for a GPU where faces are in a file, here forced."""
    options = {"landmarks": _landmarks("cpu"), "augment": {"warp_to_landmarks": True}}
    plain, gathering = _feed(**options), _feed(**options)
    gathering._gathers = True
    for seen in ({"a": 0, "b": 0}, {"a": 40, "b": 8}):
        gathering.seek(seen)
        _assert_equal(gathering.batch(), plain.next(seen))
    plain.close()
    gathering.close()


@pytest.mark.gpu
def test_faces_that_a_gpu_cannot_read_are_gathered():
    plain, gathering = _feed(), _feed(device="cuda")
    assert gathering.is_capturable
    stores = {"a": _store(7, 1), "b": gathering.stores["b"]}  # A's in plain host memory
    mixed = Feed(
        stores,
        gathering.config,
        input_px=16,
        output_px=(16, 32),
        device=torch.device("cuda"),
        dtype=torch.float32,
        num_threads=1,
    )
    assert not mixed.is_capturable
    for seen in ({"a": 0, "b": 0}, {"a": 4, "b": 4}):
        ours, wanted = mixed.next(seen), plain.next(seen)
        assert torch.equal(ours.input_nchw.cpu(), wanted.input_nchw)
    plain.close()


@pytest.mark.gpu
@pytest.mark.parametrize("to_landmarks", [False, True], ids=["grid", "landmarks"])
def test_a_graph_makes_the_batches_of_the_cpu(to_landmarks):
    options = {"channels": 8, "augment": {"warp_to_landmarks": to_landmarks}}
    plain, captured = (
        _feed(device=device, landmarks=_landmarks(device) if to_landmarks else None, **options)
        for device in ("cpu", "cuda")
    )
    seen = {"a": 40, "b": 8}
    captured.seek(seen)
    captured.batch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = captured.batch()
    for _ in range(3):
        captured.seek(seen)
        graph.replay()
        wanted = plain.next(seen)
        assert torch.equal(batch.input_nchw.cpu(), wanted.input_nchw)
        pairs = zip(batch.targets + batch.weights, wanted.targets + wanted.weights, strict=True)
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs)
        seen = {side: number + 4 for side, number in seen.items()}
    plain.close()


def test_shapes_formats_and_sides():
    feed = _feed(torch.bfloat16, loss={"learn_mask": True})
    batch = feed.batch()
    assert batch.input_nchw.shape == (8, 3, 16, 16)
    assert batch.input_nchw.dtype == torch.bfloat16
    assert batch.input_nchw.is_contiguous(memory_format=torch.channels_last)
    assert [t.shape for t in batch.targets] == [(8, 3, 16, 16), (8, 3, 32, 32)]
    assert [w.shape for w in batch.weights] == [(8, 1, 16, 16), (8, 1, 32, 32)]
    assert batch.weights[0].dtype == torch.float32
    assert batch.mask_n1hw.shape == (8, 1, 32, 32)
    for tensor in (batch.input_nchw, *batch.targets, *batch.weights, batch.mask_n1hw):
        assert tensor.isfinite().all()
        assert tensor.min() >= 0
    assert batch.targets[1].max() <= 1
    feed.close()


def test_without_a_penalty_every_weight_is_one():
    feed = _feed(loss={"penalized_mask_loss": False})
    assert all(weight.eq(1).all() for weight in feed.batch().weights)
    feed.close()


@pytest.mark.parametrize(("side", "num_faces"), [(0, 7), (1, 5)])
def test_every_face_is_seen_before_one_repeats(side, num_faces):
    feed = _feed()
    orders = set()
    for epoch in range(6):
        params = draw(
            feed.ranges,
            seed=3,
            first=[epoch * num_faces] * 2,
            count=num_faces,
            num_faces=[num_faces, num_faces],
            size_px=32,
        )
        order = tuple(records_of(params)["index"][side * num_faces :][:num_faces])
        assert sorted(order) == list(range(num_faces))
        orders.add(order)
    assert len(orders) > 1, "every epoch has the same order"
    feed.close()


def test_waiting_is_counted():
    feed = _feed()
    feed.next({"a": 0, "b": 0})
    assert feed.waited_s > 0
    feed.close()
