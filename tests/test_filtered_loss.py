"""The losses of filtered pictures against float64, on every kind of processor."""

import contextlib

import pytest
import torch

from mien.benchmarks import launches
from mien.core.losses import MADE_FOR_A_SIZE, planes
from mien.kernels import filtered_loss as module
from mien.kernels import native, reference
from mien.kernels.filtered_loss import (
    LAUNCHES,
    LOSSES,
    MAX_PX,
    Filters,
    _op,
    filtered_loss,
    pack,
)

SIZES = {
    "pixel_gradient_diff": (3, 4, 17, 40),
    "gmsd": (3, 4, 17, 40),
    "laploss": (32, 35, 40),
    "ms_ssim": (48, 49, 71),
}
CASES = [(name, size) for name in LOSSES for size in SIZES[name]]
SMALLEST = {name: sizes[0] for name, sizes in SIZES.items()}


@pytest.fixture(params=["cpu", "baseline", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch, emulated):
    """Where the losses run. The CPU's baseline build has one plane at a time, as a GPU's block."""
    if request.param == "baseline":
        monkeypatch.setenv("MIEN_CPU", "baseline")
    with emulated() if request.param == "emulated" else contextlib.nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


def _pictures(size, *, faces=2, channels=3, weight="random", device="cpu"):
    """Predictions, targets and weights, fp32."""
    target = torch.rand(faces, channels, size, size)
    pred = (target + 0.2 * torch.randn_like(target)).clamp(0, 1)
    weights = {"random": 3 * torch.rand(faces, 1, size, size)}
    weights["zero"] = torch.zeros_like(weights["random"])
    return [each.to(device) for each in (pred, target, weights[weight])]


def _made(name, size, device="cpu"):
    """The loss as training has it, and what it was packed of."""
    return MADE_FOR_A_SIZE[name](size).to(device, torch.float32)


def _filters(loss):
    return Filters(loss.firsts, loss.taps, loss.shapes)


def _found(loss, pred, target, weight, factors=None):
    """Values and gradient of a loss, times one factor a face."""
    pred = pred.clone().requires_grad_()
    values = loss(pred, target, weight)
    factors = torch.ones_like(values) if factors is None else factors
    return values.detach(), torch.autograd.grad(values, pred, factors)[0]


def _exact(name, pred, target, weight):
    """The reference in float64, on the CPU."""
    differences = MADE_FOR_A_SIZE[name](pred.shape[-1]).map
    return reference.filtered_loss(differences, *(t.cpu().double() for t in (pred, target, weight)))


# Of a value, and of the whole vector of gradients by its length. In random pictures windows of
# ms_ssim have similarities near 0, which are raised to 0.04.
VALUE_BOUND = {"ms_ssim": 2e-5}
GRADIENT_BOUND = {"ms_ssim": 1e-3}


def _assert_close(name, found, exact):
    values, gradient = (each.cpu().double() for each in found)
    torch.testing.assert_close(values, exact[0], rtol=VALUE_BOUND.get(name, 2e-6), atol=1e-12)
    assert gradient.is_contiguous()
    error = float((gradient - exact[1]).norm()) / max(float(exact[1].norm()), 1e-12)
    assert error < GRADIENT_BOUND.get(name, 2e-6)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_equals_float64(name, size, device):
    pictures = _pictures(size, device=device)
    found = _found(_made(name, size, device), *pictures)
    _assert_close(name, found, _exact(name, *pictures))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("faces", "channels"), [(1, 1), (3, 3), (4, 4)])
def test_any_number_of_planes(name, faces, channels, device):
    """One, nine and sixteen: a lane; a full group of lanes and one more; two full ones."""
    size = SMALLEST[name]
    pictures = _pictures(size, faces=faces, channels=channels, device=device)
    found = _found(_made(name, size, device), *pictures)
    _assert_close(name, found, _exact(name, *pictures))


@pytest.mark.parametrize("name", LOSSES)
def test_a_team_has_one_plane_after_the_other(name, monkeypatch, device):
    size = SMALLEST[name]
    pictures = _pictures(size, faces=7, device=device)
    wanted = _found(_made(name, size, device), *pictures)
    monkeypatch.setattr(module, "_BLOCKS", 2)
    for ours, theirs in zip(_found(_made(name, size, device), *pictures), wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", LOSSES)
def test_what_weighs_nothing_is_nothing(name, device):
    size = SMALLEST[name]
    for found in _found(_made(name, size, device), *_pictures(size, weight="zero", device=device)):
        assert found.eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_factor_of_each_face_multiplies_its_gradient(name, device):
    size = SMALLEST[name]
    pictures, loss = _pictures(size, device=device), _made(name, size, device)
    _, plain = _found(loss, *pictures)
    _, twice = _found(loss, *pictures, torch.tensor([2.0, -0.5], device=device))
    assert torch.equal(twice, plain * torch.tensor([2.0, -0.5], device=device).view(2, 1, 1, 1))


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_twice(name, device):
    size = SMALLEST[name]
    pictures, loss = _pictures(size, device=device), _made(name, size, device)
    for one, other in zip(*(_found(loss, *pictures) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_on_every_cpu(name, monkeypatch):
    """Whatever the threads, and whether a plane is a lane or alone."""
    size = SIZES[name][-1]
    pictures, loss = _pictures(size, faces=6), _made(name, size)
    wanted = _found(loss, *pictures)
    for build, count in (("", 2), ("", 5), ("baseline", 1)):
        monkeypatch.setenv("MIEN_CPU", build)
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        for ours, theirs in zip(_found(loss, *pictures), wanted, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "matrix",
    [
        planes.filtered(7, (1, 0, 0, 0, -1), border="reflect"),
        planes.filtered(3, (1, -2, 3, 4, 5), border="replicate"),
        planes.resized(9, 4),
        planes.resized(4, 1),
        planes.halving(7, odd="up"),
        planes.halving(7, odd="down"),
        torch.zeros(2, 3, dtype=torch.float64),
    ],
)
def test_packed_matrices_are_whole(matrix):
    packed = pack([matrix])
    rows, columns, length, turned = packed.shapes[0]
    firsts = packed.firsts.split([rows, columns])
    taps = packed.taps.split([rows * length, columns * turned])
    for first, runs, wanted in zip(firsts, taps, (matrix, matrix.T), strict=True):
        runs = runs.view(len(first), -1)
        places = first[:, None].long() + torch.arange(runs.shape[1])
        assert torch.equal(torch.zeros_like(wanted).scatter_(1, places, runs), wanted)


@pytest.mark.parametrize(("odd", "rows"), [("up", 4), ("down", 3)])
def test_halving_takes_means_of_two(odd, rows):
    x = torch.rand(7, dtype=torch.float64)
    pairs = x[:6].view(3, 2).mean(dim=1)
    wanted = torch.cat((pairs, x[6:])) if odd == "up" else pairs
    assert planes.halving(7, odd=odd).shape == (rows, 7)
    torch.testing.assert_close(planes.halving(7, odd=odd) @ x, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_opcheck(name, device):
    size = SMALLEST[name]
    loss = _made(name, size, device)
    shapes = [number for shape in loss.shapes for number in shape]
    given = (*_pictures(size, device=device), loss.firsts, loss.taps, LOSSES.index(name), shapes)
    torch.library.opcheck(_op, given)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_six_launches_at_most(name):
    size = SMALLEST[name]
    pictures, loss = _pictures(size), _made(name, size)
    pred = pictures[0].requires_grad_()
    assert set(LAUNCHES) == {"mien::filtered_loss"}
    count = launches.count(lambda: torch.autograd.grad(loss(*pictures).sum(), pred))
    # The kernel; the means over channels; their sum and its gradient, 1; its product with ours.
    assert count == 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_as_many_launches_as_announced_and_a_graph(name):
    pictures, loss = _pictures(64, device="cuda"), _made(name, 64, "cuda")
    wanted = loss(*pictures)
    with torch.profiler.profile() as profile:
        loss(*pictures)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "filtered_loss_kernel" in e.name]
    assert len(kernels) == LAUNCHES["mien::filtered_loss"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss(*pictures)
    graph.replay()
    assert torch.equal(captured, wanted)


@contextlib.contextmanager
def _refused(text):
    with pytest.raises(ValueError, match=text):
        yield


def test_refusals():
    pred, target, weight = _pictures(8)
    filters = _filters(_made("gmsd", 8))

    def run(pred=pred, target=target, weight=weight, filters=filters, name="gmsd"):
        filtered_loss(name, pred, target, weight, filters)

    with _refused("loss must be one of pixel_gradient_diff, gmsd, .*, got 'ssim'"):
        run(name="ssim")
    with _refused(rf"pred must be \(B, 1 to 4, S, S\), not empty and of at most {MAX_PX} px, got"):
        run(pred[:, :, :5])
    with _refused(r"pred must be .* got \(0, 3, 8, 8\)"):
        run(pred[:0])
    with _refused(r"pred must be \(2, 3, 8, 8\) float32, got \(2, 3, 8, 8\) float64"):
        run(pred.double())
    with _refused(r"target must be \(2, 3, 8, 8\) float32, got \(1, 3, 8, 8\)"):
        run(target=target[:1])
    with _refused(r"weight must be \(2, 1, 8, 8\) float32, got \(2, 3, 8, 8\)"):
        run(weight=target)
    with _refused("target must be on cpu, got meta"):
        run(target=target.to("meta"))
    with _refused("pred must be contiguous, got strides"):
        run(pred.contiguous(memory_format=torch.channels_last))
    with _refused("weight must not require a gradient: there is none by it; detach it"):
        run(weight=weight.clone().requires_grad_())
    with _refused(r"taps must be .* float32, got .* float64"):
        run(filters=filters._replace(taps=filters.taps.double()))


def test_filters_of_another_loss_or_size_are_refused():
    pictures = _pictures(48)
    with pytest.raises(native.NativeError, match="num_filters must be 4, got 2"):
        filtered_loss("gmsd", *pictures, _filters(_made("pixel_gradient_diff", 48)))
    text = "filter 0 must map 48 to 48 px in as many taps at most, got 49 to 49, 5, 5"
    with pytest.raises(native.NativeError, match=text):
        filtered_loss("gmsd", *pictures, _filters(_made("gmsd", 49)))


def test_a_second_derivative_is_refused():
    pictures = _pictures(8)
    pred = pictures[0].requires_grad_()
    total = _made("gmsd", 8)(*pictures).square().sum()
    (gradient,) = torch.autograd.grad(total, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_numbers_agree_with_c():
    _, lib = native.library()
    assert lib.MIEN_MAX_PICTURE_PX == MAX_PX
    assert [getattr(lib, f"MIEN_{name.upper()}") for name in LOSSES] == [*range(len(LOSSES))]


def _job(**changes):
    ffi, _ = native.library()
    job = {"faces": 1, "channels": 3, "size": 8, "kind": 0, "num_filters": 2, "num_teams": 8}
    return ffi.new("mien_filtered_loss_job *", job | {"filters": [[8, 8, 3, 3]] * 2} | changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": 4}, "unknown loss 4"),
        ({"faces": 0}, "faces must be at least 1, channels 1..4, size 1..4096, got 0, 3, 8"),
        ({"channels": 5}, "channels 1..4, size 1..4096, got 1, 5, 8"),
        ({"size": 4097}, "size 1..4096, got 1, 3, 4097"),
        ({"faces": 2**60}, "faces must be at most 1466015503701 of this size, got 11529215046"),
        ({"num_teams": 0}, "num_teams must be 1..65536, got 0"),
        ({"num_filters": 1}, "num_filters must be 2, got 1"),
        ({"filters": [[8, 8, 9, 3]] * 2}, "filter 0 must map 8 to 8 px .*, got 8 to 8, 9, 3"),
        ({"filters": [[8, 8, 3, 0]] * 2}, "filter 0 must map 8 to 8 px .*, got 8 to 8, 3, 0"),
        ({"kind": 2, "num_filters": 15}, "filter 5 must reduce 8 px, got 0"),
        ({}, "null pointer"),
    ],
)
def test_the_library_refuses(changes, text):
    ffi, _ = native.library()
    with pytest.raises(native.NativeError, match=f"filtered_loss_cpu: .*{text}"):
        native.call("filtered_loss_cpu", _job(**changes), ffi.NULL, 0)


def test_the_library_refuses_a_small_workspace_and_a_part_of_a_thread():
    ffi, lib = native.library()
    numbers, firsts = ffi.new("float[192]"), ffi.new("int32_t[32]")
    pictures = dict.fromkeys(("pred", "target", "weight", "values", "gradient", "taps"), numbers)
    job = _job(**pictures, firsts=firsts)
    needed = lib.mien_filtered_loss_workspace_bytes(job)
    assert needed >= 8 * (8 * 64 + 8) * 4
    room = ffi.new("char[]", needed + 16)
    start = ffi.cast("char *", (int(ffi.cast("uintptr_t", room)) + 15) // 16 * 16)
    with pytest.raises(native.NativeError, match=rf"workspace must have {needed} bytes .*, got 64"):
        native.call("filtered_loss_cpu", job, start, 64)
    job.num_teams = 7
    with pytest.raises(native.NativeError, match="num_teams must be a multiple of 8, got 7"):
        native.call("filtered_loss_cpu", job, start, needed)
