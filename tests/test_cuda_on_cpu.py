"""The CUDA kernels themselves, without a GPU: the bits of the CPU's threads, and no fault.

The kernels run as emulated blocks (`tests/cuda_on_cpu`), which also see what a right result can
hide: memory that is read before it is written or outside of what the call was given, and threads
that touch the same memory with no barrier between. Planted faults prove that they see it.
"""

import mmap
import re

import cffi
import numpy as np
import pytest
import torch
from emulator import DECLARATIONS, ORDERS, Emulator, build, build_sample
from planted_faults import ANOTHER_RESULT, AUGMENT, FACE_LOSS, FILTERED_LOSS

from mien.core.losses import MADE_FOR_A_SIZE
from mien.kernels import filtered_loss
from mien.kernels.augment import Augmented, Landmarks, augment, launches, workspace_bytes
from mien.kernels.draw import Ranges, draw, params_from_records, records_of
from mien.kernels.face_loss import LAUNCHES, LOSSES, face_loss
from mien.kernels.filtered_loss import LAUNCHES as FILTERED_LAUNCHES
from mien.kernels.native import NativeError

SIZE_PX, NUM_FACES, COUNT = 40, (3, 4), 4  # 40^2 pixels are no whole number of blocks
VARIED = Ranges(
    zoom_amount=25, rotation_range=25, color_clahe_chance=75, color_clahe_max_size=3,
    warp_to_landmarks=True,
)  # fmt: skip


def _store(num_faces, size_px=SIZE_PX):
    return torch.randint(0, 256, (num_faces, size_px, size_px, 8), dtype=torch.uint8)


def _landmarks():
    sides = []
    for count, others in (NUM_FACES, NUM_FACES[::-1]):
        points = torch.rand(count, 68, 2) * 0.8 * SIZE_PX + 4
        nearest = torch.randint(0, others, (count, 10), dtype=torch.int32)
        sides.append(Landmarks(points_fl2=points, nearest_fk=nearest))
    return sides


def _augmented(params_nx):
    """Every kernel of the augmentation at least once, and each of its branches."""
    torch.manual_seed(1)
    faces, landmarks = [_store(count) for count in NUM_FACES], _landmarks()
    once = {"single_interpolation": True, "landmarks": landmarks, "eye_multiplier": 3}
    half, bfloat = torch.float16, torch.bfloat16
    batches = [
        augment(
            faces, params_nx, input_px=40, output_px=[40], learn_mask=True, input_channels=8,
            landmarks=landmarks, mouth_multiplier=2,
        ),
        augment(
            faces, params_nx, input_px=20, output_px=[13, 40, 20], landmarks=landmarks, rgb=True,
            input_dtype=half, target_dtype=bfloat,
        ),
        augment(
            faces, params_nx, input_px=30, output_px=[10], input_channels=8, input_dtype=bfloat,
            target_dtype=half, **once,
        ),
        augment(faces, params_nx, input_px=40, output_px=[40], penalize_mask=False, **once),
    ]  # fmt: skip
    return [
        tensor
        for out in batches
        for tensor in (out.input_bchw, *out.targets_bchw, *out.weights_b1hw, out.mask_b1hw)
        if tensor is not None
    ]


@pytest.fixture(scope="module")
def params_nx():
    """Batch of faces that are bent by the grid and to landmarks, in turn, and one that is not."""
    params_nx = draw(
        VARIED, seed=5, first=[3, 40], count=COUNT, num_faces=NUM_FACES, size_px=SIZE_PX
    )
    records = records_of(params_nx)
    records["warp"][::2], records["warp"][1], records["color"][2] = 1, 0, 0
    return params_nx


def _beyond(params_nx):
    """Parameters that a CPU refuses, and what a GPU takes them for.

    Both faces lie far beyond all memory: nearer ones could fall into another tensor of the call.
    """
    wild, tame = (records_of(params_nx).copy() for _ in range(2))
    wild["index"][[0, 5]], tame["index"][[0, 5]] = [2**48, -(2**48)], [NUM_FACES[0] - 1, 0]
    wild["warp"][[2, 6]], tame["warp"][[2, 6]] = [7, -1], 0
    wild["near"][3], tame["near"][3] = 12, 9
    wild["clahe_tiles"][7], tame["clahe_tiles"][7] = 99, 10
    return params_from_records(wild), params_from_records(tame)


def _drawn():
    first = torch.tensor([3, 2**40])
    options = {"seed": 2**63 + 5, "num_faces": [77, 1001], "size_px": 64}
    params_nx = draw(VARIED, first=first, count=20, offset=3, advance=31, **options)
    more_nx = draw(Ranges(), first=[5, 0], count=3, **options)
    return [params_nx, first, more_nx]


def _losses():
    torch.manual_seed(2)
    results = []
    shares = [(name, 0.5 + i) for i, name in enumerate(LOSSES)]
    for batch, channels, height, width, dtype, losses in (
        (1, 3, 20, 36, torch.float32, shares),
        (2, 1, 19, 41, torch.bfloat16, shares[::-1]),
        (1, 3, 17, 35, torch.float16, [*shares[:2], shares[0]]),
    ):
        target = torch.rand(2 * batch, channels, height, width)
        preds = (target + 0.2 * torch.randn_like(target)).to(dtype).chunk(2)
        weight = None if channels == 1 else torch.rand(2 * batch, 1, height, width)
        results += face_loss(*preds, target, weight, losses=losses, scale=torch.tensor(3.0))
    return results


def _filtered_losses():
    """Value and gradient of each, of pictures whose pixels are no whole number of threads."""
    torch.manual_seed(3)
    results = []
    sizes = {"pixel_gradient_diff": 35, "gmsd": 35, "laploss": 35, "ms_ssim": 49}
    for name, size in sizes.items():
        loss = MADE_FOR_A_SIZE[name](size).float()
        target = torch.rand(1, 3, size, size)
        pred = (target + 0.2 * torch.randn_like(target)).requires_grad_()
        values = loss(pred, target, torch.rand(1, 1, size, size))
        results += [values.detach(), *torch.autograd.grad(values.sum(), pred)]
    return results


def _assert_same(results, wanted):
    for ours, theirs in zip(results, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), ANOTHER_RESULT


@pytest.fixture
def in_order(emulator, monkeypatch):
    """Run the emulated kernels in an order of threads."""
    monkeypatch.setenv("MIEN_CPU", "baseline")  # sums the losses as a GPU's threads do

    def run(order):
        emulator.set_order(order, seed=1)
        return emulator.running()

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_augment_has_the_bits_of_the_threads(in_order, params_nx, order):
    wanted = _augmented(params_nx)
    with in_order(order):
        _assert_same(_augmented(params_nx), wanted)


def test_augment_keeps_to_what_there_is(in_order, params_nx):
    wild_nx, tame_nx = _beyond(params_nx)
    wanted = _augmented(tame_nx)
    with in_order("random"):
        _assert_same(_augmented(wild_nx), wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_draw_has_the_bits_of_the_threads(in_order, order):
    wanted = _drawn()
    with in_order(order):
        _assert_same(_drawn(), wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_face_loss_has_the_bits_of_the_threads(in_order, order):
    wanted = _losses()
    with in_order(order):
        _assert_same(_losses(), wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_filtered_loss_has_the_bits_of_the_threads(in_order, order):
    wanted = _filtered_losses()
    with in_order(order):
        _assert_same(_filtered_losses(), wanted)


def test_a_negative_counter_comes_to_an_end(in_order):
    counters = torch.tensor([-5, -(2**63)])
    with in_order("forward"):
        params_nx = draw(
            VARIED, seed=0, first=counters, count=2, num_faces=NUM_FACES, size_px=SIZE_PX
        )
    index = records_of(params_nx)["index"]
    assert all(index >= 0)
    assert all(index[:2] < NUM_FACES[0])
    assert all(index[2:] < NUM_FACES[1])
    assert counters.tolist() == [2**63 - 3, 2]


def test_as_many_kernels_are_launched_as_are_announced(emulator, params_nx):
    sizes = {"size_px": SIZE_PX, "to_landmarks": True}
    with emulator.running():
        for input_px, output_px in ((40, [40]), (20, [13, 40]), (30, [10])):
            torch.manual_seed(1)
            faces = [_store(count) for count in NUM_FACES]
            options = {"input_px": input_px, "output_px": output_px}
            augment(faces, params_nx, landmarks=_landmarks(), **options)
            assert emulator.num_launches == launches(2 * COUNT, **sizes, **options)["augment"]
        _drawn()
        assert emulator.num_launches == 1
        _losses()
        assert emulator.num_launches == LAUNCHES["mien::face_loss"]
        _filtered_losses()
        assert emulator.num_launches == FILTERED_LAUNCHES["mien::filtered_loss"]


class Sample:
    """The kernels of sample.cu, on tensors of int32."""

    def __init__(self, library):
        self.ffi = cffi.FFI()
        self.ffi.cdef(
            DECLARATIONS
            + "void sample_turn(const int *from, int *to, int blocks, int threads, int bytes);"
            "void sample_shuffle(int *to); void sample_neighbour(int distance, int *to);"
            "void sample_count(int *count); const char *sample_error(void);"
        )
        self.lib = self.ffi.dlopen(str(library))

    def run(self, name, *args, **tensors):
        """The tensors, by name; those called ``to`` hold nothing before, and may be written."""
        names = {name: self.ffi.new("char[]", name.encode()) for name in tensors}
        pointers = {name: self.ffi.cast("int *", t.data_ptr()) for name, t in tensors.items()}
        for each, tensor in tensors.items():
            is_written, holds = each != "source", each != "to"
            where = names[each], pointers[each], tensor.nbytes
            self.lib.emulated_memory(*where, is_written, holds)
        given = [pointers[arg] if arg in pointers else arg for arg in args]
        getattr(self.lib, f"sample_{name}")(*given)
        error = self.ffi.string(self.lib.sample_error()).decode()
        self.lib.emulated_end()
        return error


@pytest.fixture(scope="module")
def sample(pytestconfig):
    return Sample(build_sample(pytestconfig.cache.mkdir("cuda_on_cpu")))


@pytest.mark.parametrize("order", range(len(ORDERS)), ids=ORDERS)
def test_an_emulated_block_has_shuffles_barriers_atomics_and_dynamic_memory(sample, order):
    sample.lib.emulated_order(order, 7)
    source = torch.arange(96, dtype=torch.int32)
    to = torch.full_like(source, -1)
    assert not sample.run("turn", "source", "to", 2, 48, 48 * 4, source=source, to=to)
    assert torch.equal(to, source.view(2, 48).flip(1).flatten())
    to = torch.empty(4, 64, dtype=torch.int32)
    assert not sample.run("shuffle", "to", to=to)
    lane = torch.arange(32, dtype=torch.int32)
    first = torch.stack([lane * 0 + 3, (lane - 2).where(lane > 1, lane), lane, lane ^ 5])
    first[2] = (lane + 2).where(lane < 30, lane)
    assert torch.equal(to, torch.cat([first, first + 32], dim=1))
    count = torch.zeros(1, dtype=torch.int32)
    assert not sample.run("count", "count", count=count)
    assert count.item() == 3 * 2 * 2 * 4 * 3 * 2


def test_a_barrier_of_a_warp_orders_the_warp_alone(sample):
    to = torch.empty(64, dtype=torch.int32)
    assert not sample.run("neighbour", 1, "to", to=to)
    assert torch.equal(to, torch.arange(64, dtype=torch.int32) ^ 1)
    assert "numbers, as another thread does with no barrier" in sample.run(
        "neighbour", 32, "to", to=to
    )


@pytest.mark.parametrize(
    ("blocks", "threads", "num_bytes", "message"),
    [
        (2, 48, 47 * 4, r"block \(0, 0, 0\) thread 47 writes 4 bytes outside of all"),
        (3, 48, 48 * 4, r"block \(2, 0, 0\) thread 0 reads 4 bytes outside .* 384 .* of source$"),
        (1, 48, 49 * 1024, "takes more than 49152 bytes of shared memory"),
        (1, 1025, 0, r"has 1025 threads in a grid of \(1, 1, 1\)"),
        (0, 48, 0, r"has 48 threads in a grid of \(0, 1, 1\)"),
    ],
)
def test_what_a_gpu_would_not_do_is_a_fault(sample, blocks, threads, num_bytes, message):
    source = torch.arange(96, dtype=torch.int32)
    to = torch.empty_like(source)
    sample.lib.emulated_order(0, 0)
    error = sample.run("turn", "source", "to", blocks, threads, num_bytes, source=source, to=to)
    assert re.search(message, error)


def _caught(results, wanted):
    """What is seen of a fault."""
    try:
        _assert_same(results(), wanted)
    except NativeError as error:
        return str(error)
    except AssertionError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("fault", AUGMENT, ids=lambda fault: fault.name)
def test_a_fault_in_augment_or_draw_is_seen(pytestconfig, params_nx, fault):
    wild_nx, tame_nx = _beyond(params_nx)
    wanted = [*_drawn(), *_augmented(tame_nx)]
    faulty = Emulator(build(pytestconfig.cache.mkdir("cuda_on_cpu"), fault))
    with faulty.running():
        assert fault.shows in _caught(lambda: [*_drawn(), *_augmented(wild_nx)], wanted)


@pytest.mark.parametrize("fault", FACE_LOSS, ids=lambda fault: fault.name)
def test_a_fault_in_face_loss_is_seen(pytestconfig, monkeypatch, fault):
    monkeypatch.setenv("MIEN_CPU", "baseline")
    wanted = _losses()
    faulty = Emulator(build(pytestconfig.cache.mkdir("cuda_on_cpu"), fault))
    with faulty.running():
        assert fault.shows in _caught(_losses, wanted)


@pytest.mark.parametrize("fault", FILTERED_LOSS, ids=lambda fault: fault.name)
def test_a_fault_in_filtered_loss_is_seen(pytestconfig, monkeypatch, fault):
    monkeypatch.setenv("MIEN_CPU", "baseline")
    wanted = _filtered_losses()
    faulty = Emulator(build(pytestconfig.cache.mkdir("cuda_on_cpu"), fault))
    with faulty.running():
        assert fault.shows in _caught(_filtered_losses, wanted)


def _sparse(*shape, dtype=np.uint8):
    """A tensor of zeros that takes memory only where it is touched."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    no_reserve = 0x4000  # MAP_NORESERVE, which this Python does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    room = np.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=dtype)
    return torch.from_numpy(room.reshape(shape))


def test_offsets_of_augment_have_64_bits(emulator):
    """10,000 faces of 1,024 px: a store of 84 GB, 300 GB of results, 250 GB of workspace.

    The kernels run for the last row of the batch alone, whose face is the last one of the store.
    """
    count, edge = 10_000, 1024
    faces = _sparse(count, edge, edge, 8)
    faces[-1] = torch.randint(0, 256, (edge, edge, 8), dtype=torch.uint8)
    drawn = {"seed": 1, "first": [0], "count": 1, "num_faces": [1], "size_px": edge}
    one_1x = draw(Ranges(color_clahe_max_size=0), **drawn)
    sizes = {"input_px": edge, "output_px": [edge, 32]}
    wanted = augment([faces[-1:]], one_1x, **sizes)
    params_nx = one_1x.repeat(count, 1)
    records_of(params_nx)["index"] = count - 1
    of_threads = augment([faces], params_nx[-1:], **sizes)
    assert torch.equal(of_threads.input_bchw, wanted.input_bchw)

    out = Augmented(
        _sparse(count, edge, edge, 3, dtype=np.float32).permute(0, 3, 1, 2),
        [_sparse(count, px, px, 3, dtype=np.float32).permute(0, 3, 1, 2) for px in (edge, 32)],
        [_sparse(count, 1, px, px, dtype=np.float32) for px in (edge, 32)],
        None,
    )
    room = _sparse(workspace_bytes(count, size_px=edge, **sizes))
    with emulator.running(), emulator.last_blocks(1):
        augment([faces], params_nx, out=out, workspace=room, **sizes)
    _assert_same(_last_of(out), _last_of(wanted))


def _last_of(out):
    return [each[-1] for each in (out.input_bchw, *out.targets_bchw, *out.weights_b1hw)]


def test_offsets_of_face_loss_have_64_bits(emulator, monkeypatch):
    """1,400,000 faces of a tile: more than 2^31 numbers. The last one's block alone is run."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    batch, face = 700_000, (16, 32, 3)
    a, b, target = (_sparse(n, *face, dtype=np.float32) for n in (batch, batch, 2 * batch))
    b[-1], target[-1] = torch.rand(2, *face)
    one = torch.zeros(1, *face)
    small, large = (
        [each.permute(0, 3, 1, 2) for each in pictures]
        for pictures in ((one, b[-1:], torch.cat((one, target[-1:]))), (a, b, target))
    )
    losses = [("mse", 1.0)]
    with emulator.running(), emulator.last_blocks(1):
        result = face_loss(*large, None, losses=losses, scale=torch.tensor(float(batch)))
    wanted = face_loss(*small, None, losses=losses).gradient_b[0]
    torch.testing.assert_close(result.gradient_b[-1], wanted, rtol=1e-6, atol=0)  # two roundings


def test_offsets_of_filtered_loss_have_64_bits(emulator, monkeypatch):
    """720,896 faces of 3 x 32 x 32: more than 2^31 numbers. The last team alone is run."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(filtered_loss, "_BLOCKS", 2**16)
    faces, face = 11 * 2**16, (3, 32, 32)
    pred, target = (_sparse(faces, *face, dtype=np.float32) for _ in range(2))
    weight = _sparse(faces, 1, 32, 32, dtype=np.float32)
    pred[-1], target[-1], weight[-1] = torch.rand(face), torch.rand(face), torch.rand(1, 32, 32)
    loss = MADE_FOR_A_SIZE["gmsd"](32).float()
    shapes = [number for shape in loss.shapes for number in shape]
    filters = loss.firsts, loss.taps, filtered_loss.LOSSES.index("gmsd"), shapes
    with emulator.running(), emulator.last_blocks(1):
        values, gradient = filtered_loss._op(pred, target, weight, *filters)
    wanted = filtered_loss._op(*(each[-1:].clone() for each in (pred, target, weight)), *filters)
    _assert_same([values[-1, -1], gradient[-1, -1]], [each[-1, -1] for each in wanted])
