"""The fused picture losses against float64 and the oracle, on every kind of processor."""

import contextlib

import numpy as np
import pytest
import torch

from mien.kernels import native, reference
from mien.kernels.face_loss import LAUNCHES, LOSSES, MAX_LOSSES, _op, face_loss

ALL = [("ssim", 1.0), ("mae", 0.5), ("mse", 2.0), ("logcosh", 0.25), ("smooth_loss", 1.5)]
SIZES = [(6, 6), (7, 7), (33, 33), (64, 64), (97, 41), (16, 32), (6, 131)]


@pytest.fixture(params=["cpu", "baseline", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch, emulated):
    """Where the losses run. The CPU's baseline build goes through a GPU's threads, one by one."""
    if request.param == "baseline":
        monkeypatch.setenv("MIEN_CPU", "baseline")
    with emulated() if request.param == "emulated" else contextlib.nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


def _pictures(height, width, *, batch=2, channels=3, weight="random", device="cpu"):
    """Predictions of both sides, targets and weights, fp32; the sides differ."""
    target = torch.rand(2 * batch, channels, height, width)
    pred = (target + 0.2 * torch.randn_like(target)).clamp(0, 1)
    pred[batch:] = (0.9 * pred[batch:] + 0.05 * torch.rand_like(target[batch:])).clamp(0, 1)
    weights = {
        "random": lambda: 3 * torch.rand(2 * batch, 1, height, width),
        "zero": lambda: torch.zeros(2 * batch, 1, height, width),
        "none": lambda: None,
    }[weight]()
    pred, target = (
        each.to(device).contiguous(memory_format=torch.channels_last) for each in (pred, target)
    )
    weights = None if weights is None else weights.to(device)
    return pred[:batch], pred[batch:], target, weights


def _exact(pred_a, pred_b, target, weight, **options):
    """The reference in float64, on the CPU."""
    tensors = [None if each is None else each.cpu().double() for each in (target, weight)]
    return reference.face_loss(pred_a.cpu().double(), pred_b.cpu().double(), *tensors, **options)


# Largest errors measured over all cases of this file, fp32 against float64: 3e-7 of a mean and
# 4e-7 of the largest gradient.
def _assert_close(result, exact, *, means=1e-6, gradients=1e-6):
    torch.testing.assert_close(result.means_2k.cpu().double(), exact[0], rtol=means, atol=1e-9)
    for ours, wanted in zip(result[1:], exact[1:], strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        bound = gradients * float(wanted.abs().max()) + 1e-12
        torch.testing.assert_close(ours.cpu().double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_float64(height, width, channels, device):
    pictures = _pictures(height, width, channels=channels, device=device)
    _assert_close(face_loss(*pictures, losses=ALL), _exact(*pictures, losses=ALL))


@pytest.mark.parametrize("losses", [[loss] for loss in ALL], ids=lambda losses: losses[0][0])
@pytest.mark.parametrize("weight", ["random", "none", "zero"])
def test_each_loss_alone(losses, weight, device):
    pictures = _pictures(34, 40, weight=weight, device=device)
    _assert_close(face_loss(*pictures, losses=losses), _exact(*pictures, losses=losses))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 3)])
def test_losses_of_pixels_take_any_size(height, width, device):
    pictures = _pictures(height, width, device=device)
    _assert_close(face_loss(*pictures, losses=ALL[1:]), _exact(*pictures, losses=ALL[1:]))


def test_one_face_a_side(device):
    pictures = _pictures(12, 20, batch=1, device=device)
    _assert_close(face_loss(*pictures, losses=ALL), _exact(*pictures, losses=ALL))


def test_the_same_loss_twice_adds_up(device):
    pictures = _pictures(10, 9, device=device)
    losses = [("mse", 1.0), ("ssim", 0.5), ("mse", 0.25), ("ssim", 2.0)]
    _assert_close(face_loss(*pictures, losses=losses), _exact(*pictures, losses=losses))


def test_scale_multiplies_the_gradients_alone(device):
    pictures = _pictures(33, 20, device=device)
    plain = face_loss(*pictures, losses=ALL)
    scaled = face_loss(*pictures, losses=ALL, scale=torch.tensor([1024.0], device=device))
    assert torch.equal(scaled.means_2k, plain.means_2k)
    for ours, wanted in zip(scaled[1:], plain[1:], strict=True):
        assert torch.equal(ours, 1024 * wanted)


@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "channels"), [(36, 3), (41, 1)])
def test_16_bit_pictures(pred_dtype, target_dtype, width, channels, device):
    """Whole words and single numbers; the gradient is rounded once."""
    *preds, target, weight = _pictures(19, width, channels=channels, device=device)
    preds = [pred.to(pred_dtype) for pred in preds]
    pictures = *preds, target.to(target_dtype), weight
    scale = torch.tensor(4096.0, device=device)  # keeps fp16's gradients out of its subnormals
    result = face_loss(*pictures, losses=ALL, scale=scale)
    exact = _exact(*pictures, losses=ALL, scale=4096)
    assert result.gradient_a.dtype == result.gradient_b.dtype == pred_dtype
    _assert_close(result, exact, gradients=1e-6 + torch.finfo(pred_dtype).eps / 2)


def test_float16_gradients_round_like_torch(device):
    """Subnormals, zero and overflow: shares of a mae gradient, which is +1 or -1."""
    pred = torch.ones(1, 1, 1, 1, dtype=torch.float16, device=device)
    target = torch.zeros(2, 1, 1, 1, device=device)
    for share in (1.0, 3e-5, 6.1e-5, 1.7e-7, 2.9e-8, 1e-9, 65504.0, 65519.0, 65520.0, 1 / 3):
        result = face_loss(pred, pred, target, None, losses=[("mae", share)])
        assert torch.equal(result.gradient_a.cpu(), torch.full((1, 1, 1, 1), share).half()), share


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read(dtype, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = bits[torch.isfinite(bits) & (bits.float().abs() < 2**12)].to(device)
    pred = values.reshape(1, 1, 1, -1)
    # Half of d^2's slope is d itself; the scale cancels the mean.
    scale = torch.tensor(pred.numel() / 2.0, device=device)
    target = torch.zeros(2, 1, 1, pred.numel(), device=device)
    result = face_loss(pred, pred, target, None, losses=[("mse", 1.0)], scale=scale)
    # x, scaled and back, within a rounding of fp32: the nearest 16-bit number is x again.
    assert torch.equal(result.gradient_a, pred)


def test_flat_and_equal_pictures(device):
    """Windows without any variance: the clamp holds, nothing is divided by 0."""
    flat = torch.full((2, 3, 20, 20), 0.7, device=device)
    result = face_loss(flat, flat + 0.1, torch.cat((flat, flat)), None, losses=[("ssim", 1.0)])
    x, y = 0.8, 0.7
    wanted = 1 - (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    # A rounding of 0.04 (the squares' mean) over C2 = 9e-4; measured 2e-5.
    assert float(result.means_2k[0, 0]) == pytest.approx(0, abs=5e-5)
    assert float(result.means_2k[1, 0]) == pytest.approx(wanted, abs=5e-5)
    # Of terms of 2 * 0.2 / C2 that cancel; measured 1e-3 of the other side's gradient.
    gradient_a, gradient_b = (float(each.abs().max()) for each in result[1:])
    assert gradient_a < 5e-3 * gradient_b
    assert torch.isfinite(result.gradient_b).all()


def test_far_apart_pixels_do_not_overflow(device):
    """log cosh grows like |d|, far beyond where cosh itself is infinite."""
    pred = torch.full((1, 3, 6, 6), 1e4, device=device)
    target = torch.zeros(2, 3, 6, 6, device=device)
    result = face_loss(pred, -pred, target, None, losses=[("logcosh", 1.0), ("smooth_loss", 1.0)])
    wanted = torch.tensor([[1e4, 1e4], [1e4, 1e4]])
    torch.testing.assert_close(result.means_2k.cpu(), wanted, rtol=1e-4, atol=0)
    assert torch.equal(result.gradient_a, -result.gradient_b)


def test_small_differences_keep_their_digits(device):
    """log cosh d = d^2 / 2 and smooth_loss = d^2 / 2c near 0, without a cancellation."""
    *_, target, _ = _pictures(9, 12, device=device)
    pred = target.double() * 0 + 1e-5
    zeros = torch.zeros_like(target)
    losses = [("logcosh", 1.0), ("smooth_loss", 1.0)]
    result = face_loss(pred[:2].float(), pred[2:].float(), zeros, None, losses=losses)
    wanted = torch.tensor([[0.5e-10, 127.5e-10]] * 2)
    torch.testing.assert_close(result.means_2k.cpu(), wanted, rtol=1e-5, atol=0)


def test_the_same_bits_twice(device):
    pictures = _pictures(97, 41, device=device)
    first, second = (face_loss(*pictures, losses=ALL) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_the_same_bits_for_any_number_of_threads(monkeypatch):
    pictures = _pictures(40, 50, batch=3)
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(face_loss(*pictures, losses=ALL))
    for other in results[1:]:
        for ours, wanted in zip(other, results[0], strict=True):
            assert torch.equal(ours, wanted)


def test_other_memory_formats_give_the_same(device):
    pred_a, pred_b, target, weight = _pictures(20, 24, device=device)
    wanted = face_loss(pred_a, pred_b, target, weight, losses=ALL)
    turned = weight.transpose(2, 3).contiguous().transpose(2, 3)
    result = face_loss(pred_a.contiguous(), pred_b.clone(), target.contiguous(), turned, losses=ALL)
    for ours, theirs in zip(result, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_pictures_that_start_anywhere(device):
    """A view whose first number is no whole word of 16 bytes."""
    pred_a, pred_b, target, weight = _pictures(18, 24, device=device)
    wanted = face_loss(pred_a, pred_b, target, weight, losses=ALL)

    def shifted(tensor):
        room = torch.empty(tensor.numel() + 1, device=device)[1:]
        return torch.as_strided(room, tensor.shape, tensor.stride(), 1).copy_(tensor)

    result = face_loss(shifted(pred_a), pred_b, shifted(target), shifted(weight), losses=ALL)
    for ours, theirs in zip(result, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_requires_grad_is_all_the_same(device):
    pred_a, pred_b, target, weight = _pictures(12, 12, device=device)
    wanted = face_loss(pred_a, pred_b, target, weight, losses=ALL)
    pred_a.requires_grad_(), pred_b.requires_grad_()
    result = face_loss(pred_a, pred_b, target, weight, losses=ALL)
    assert not any(each.requires_grad for each in result)
    torch.autograd.backward([pred_a, pred_b], [result.gradient_a, result.gradient_b])
    assert torch.equal(pred_a.grad, wanted.gradient_a)
    assert torch.equal(pred_b.grad, wanted.gradient_b)


# As in test_losses.py: where a window is almost flat the oracle's own fp32 gradient is off by
# 8e-5; ours by 1e-6.
GRADIENT_BOUND = {"mae": 1e-6, "mse": 1e-6, "logcosh": 1e-6, "smooth_loss": 1e-6, "ssim": 2e-4}


@pytest.mark.oracle
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_oracle(name, oracle, device):
    inputs, wanted = oracle("losses/inputs.npz"), oracle(f"losses/{name}.npz")
    for size in sorted({int(key.split(":")[1]) for key in inputs.files}):
        pred = torch.from_numpy(inputs[f"pred:{size}"]).to(device)
        target = torch.from_numpy(inputs[f"true:{size}"]).to(device)
        faces = [0, len(pred) - 1]
        a, b = (pred[face : face + 1] for face in faces)
        result = face_loss(a, b, target[faces], None, losses=[(name, 1.0)])
        items = wanted[f"bgr:{size}:item"][faces]
        np.testing.assert_allclose(result.means_2k[:, 0].cpu(), items, rtol=2e-5, err_msg=f"{size}")
        stride = 1 if size <= 80 else 2
        for face, gradient in zip(faces, result[1:], strict=True):
            theirs = wanted[f"bgr:{size}:grad"][face]
            ours = gradient[0, :, ::stride, ::stride].cpu().numpy()
            bound = GRADIENT_BOUND[name] * np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=f"{size}")


def test_the_reference_is_the_derivative():
    pred, target = torch.rand(2, 1, 3, 7, 8, dtype=torch.float64)
    pred.requires_grad_()
    for name in LOSSES:
        assert torch.autograd.gradcheck(reference.LOSS_MAPS[name], (pred, target), atol=1e-5), name


@pytest.mark.parametrize("weight", ["random", "none"])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_opcheck(weight, scale, device):
    pictures = _pictures(8, 9, weight=weight, device=device)
    scale = None if scale is None else torch.tensor(scale, device=device)
    torch.library.opcheck(_op, (*pictures, scale, [4, 1], [1.0, 0.5]))


def test_one_operation_is_seen(device):
    pictures = _pictures(8, 12, device=device)
    with torch.profiler.profile() as profile:
        face_loss(*pictures, losses=ALL)
    ours = [event.name for event in profile.events() if event.name.startswith("mien::")]
    assert ours == ["mien::face_loss"]
    assert set(LAUNCHES) == set(ours)


@pytest.mark.gpu
def test_two_launches_and_a_graph():
    pictures = _pictures(64, 64, device="cuda")
    wanted = face_loss(*pictures, losses=ALL)
    with torch.profiler.profile() as profile:
        face_loss(*pictures, losses=ALL)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "loss_" in e.name and "_kernel" in e.name]
    assert len(kernels) == LAUNCHES["mien::face_loss"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = face_loss(*pictures, losses=ALL)
    graph.replay()
    for ours, theirs in zip(captured, wanted, strict=True):
        assert torch.equal(ours, theirs)


@contextlib.contextmanager
def _refused(text):
    with pytest.raises(ValueError, match=text):
        yield


def test_refusals():
    pred_a, pred_b, target, weight = _pictures(8, 9)
    good = {"losses": ALL}
    with _refused(r"SSIM needs pictures of at least 6 px, got 5"):
        face_loss(*_pictures(5, 9), **good)
    with _refused(r"SSIM needs pictures of at least 6 px, got 3"):
        face_loss(*_pictures(9, 3), **good)
    with _refused(r"pred_a must be \(B, 1 or 3, H, W\) and not empty, got \(2, 2, 8, 9\)"):
        face_loss(pred_a[:, :2], pred_b[:, :2], target[:, :2], weight, **good)
    with _refused(r"pred_a must be .* not empty, got \(0, 3, 8, 9\)"):
        face_loss(pred_a[:0], pred_b[:0], target[:0], weight[:0], **good)
    with _refused(r"pred_b must be \(2, 3, 8, 9\) float32, got \(1, 3, 8, 9\) float32"):
        face_loss(pred_a, pred_b[:1], target, weight, **good)
    with _refused(r"pred_b must be \(2, 3, 8, 9\) float32, got \(2, 3, 8, 9\) float16"):
        face_loss(pred_a, pred_b.half(), target, weight, **good)
    with _refused(r"pred_a must be .* float32 or bfloat16 or float16, got .* float64"):
        face_loss(pred_a.double(), pred_b.double(), target, weight, **good)
    with _refused(r"target must be \(4, 3, 8, 9\) .*, got \(2, 3, 8, 9\) float32"):
        face_loss(pred_a, pred_b, target[:2], weight, **good)
    with _refused(r"weight must be \(4, 1, 8, 9\) float32, got \(4, 3, 8, 9\) float32"):
        face_loss(pred_a, pred_b, target, target, **good)
    with _refused(r"weight must be .* float32, got .* bfloat16"):
        face_loss(pred_a, pred_b, target, weight.bfloat16(), **good)
    with _refused(r"target must be on cpu, got meta"):
        face_loss(pred_a, pred_b, target.to("meta"), weight, **good)
    with _refused(r"scale must be \(\) float32, got \(2,\) float32"):
        face_loss(pred_a, pred_b, target, weight, **good, scale=torch.ones(2))
    with _refused(r"loss must be one of mae, mse, logcosh, smooth_loss, ssim, got 'flip'"):
        face_loss(pred_a, pred_b, target, weight, losses=[("flip", 1.0)])
    with _refused(rf"losses must be 1 to {MAX_LOSSES}, got 0"):
        face_loss(pred_a, pred_b, target, weight, losses=[])


@pytest.mark.parametrize("place", [0, 2, 3, 4])
def test_refuses_memory_that_starts_within_a_word(place):
    """Pictures, the weight and the scale; a view of bytes can begin anywhere."""
    given = [*_pictures(8, 9), torch.ones(1)]
    count = given[place].numel()
    room = torch.zeros(count + 1).numpy().view(np.uint8)
    moved = torch.frombuffer(room, dtype=torch.float32, offset=2, count=count)
    given[place] = torch.as_strided(moved, given[place].shape, given[place].stride())
    name = ["pred_a", "pred_b", "target", "weight", "scale"][place]
    with _refused(rf"^{name} must start at a multiple of 4 bytes, got one that starts 2 after"):
        face_loss(*given[:4], losses=ALL, scale=given[4])


def test_numbers_agree_with_c():
    ffi, lib = native.library()
    assert lib.MIEN_MAX_LOSSES == MAX_LOSSES
    assert lib.MIEN_NUM_LOSS_KINDS == len(LOSSES)
    names = {name: getattr(lib, f"MIEN_{name.upper()}") for name in LOSSES}
    assert list(names.values()) == list(range(len(LOSSES)))


def _job(**changes):
    ffi, _ = native.library()
    job = {"batch": 1, "height": 8, "width": 8, "channels": 3, "num_losses": 1, "kinds": [4]}
    return ffi.new("mien_face_loss_job *", job | changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"batch": 0}, "batch must be at least 1, height and width 1..65536, got 0, 8, 8"),
        ({"width": 65537}, "height and width 1..65536, got 1, 8, 65537"),
        ({"batch": 2**60}, "batch must be at most 1466015503701 of this size, got 11529215046"),
        ({"pred_type": 3}, "unknown type 3"),
        ({"num_losses": 0}, "num_losses must be 1..8, got 0"),
        ({"kinds": [5]}, "unknown loss 5"),
        ({"height": 5}, "SSIM needs pictures of at least 6 px, got 8 x 5"),
        ({}, "null pointer"),
    ],
)
def test_the_library_refuses(changes, text):
    ffi, _ = native.library()
    with pytest.raises(native.NativeError, match=f"face_loss_cpu: .*{text}"):
        native.call("face_loss_cpu", _job(**changes), ffi.NULL, 0, 1)


def test_the_library_refuses_a_small_workspace():
    ffi, lib = native.library()
    picture, means = ffi.new("float[192]"), ffi.new("float[2]")
    pictures = {"preds": [picture] * 2, "target": picture, "gradients": [picture] * 2}
    job = _job(**pictures, means=means)
    needed = lib.mien_face_loss_workspace_bytes(job)
    assert needed >= 3 * 2 * 192 * 4
    room = ffi.new("char[]", needed)
    with pytest.raises(native.NativeError, match=rf"workspace must have {needed} bytes .*, got 64"):
        native.call("face_loss_cpu", job, room, 64, 1)
