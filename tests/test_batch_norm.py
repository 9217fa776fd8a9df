"""Batch normalisation that keeps the sides apart, against a float64 statement of it."""

import pytest
import torch

from mien.benchmarks import launches
from mien.models.batch_norm import BatchNorm, norms_of, update_running_stats

# One or two roundings of the output's format, of values up to 4.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def _reference(x_bchw, weight, bias, sides, eps):
    """Normalised input, and each side's mean and biased variance, in float64."""
    outputs, statistics = [], []
    for part in x_bchw.chunk(sides):
        variance, mean = torch.var_mean(part, dim=(0, 2, 3), correction=0)
        scale = weight / torch.sqrt(variance + eps)
        outputs.append((part - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None])
        statistics.append((mean.detach(), variance.detach()))
    return torch.cat(outputs), statistics


def _assert_moved(norm, statistics):
    """From where they begin, by a step towards each side's in turn; `statistics` as above."""
    mean, variance = torch.zeros(norm.channels).double(), torch.ones(norm.channels).double()
    for side_mean, side_variance in statistics:
        mean = mean.lerp(side_mean, norm.momentum)
        variance = variance.lerp(side_variance, norm.momentum)
    for running, want in ((norm.running_mean, mean), (norm.running_var, variance)):
        assert running.dtype is torch.float32
        torch.testing.assert_close(running.double(), want, rtol=1e-6, atol=1e-6)


def _norm(channels, dtype=torch.float32, **options):
    norm = BatchNorm(channels, **options)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    for parameter in norm.parameters():
        parameter.data = parameter.data.to(dtype)  # as the optimizer lowers them
    return norm


def _input(shape, dtype):
    """Sides that differ in mean and spread."""
    x = torch.randn(shape)
    x[: shape[0] // 2] = x[: shape[0] // 2] * 0.5 + 1
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("shape", [(4, 8, 5, 3), (2, 3, 7, 7), (6, 5, 1, 1)])
def test_values_gradients_and_estimates(shape, sides, dtype):
    if shape[0] // sides * shape[2] * shape[3] < 2:
        pytest.skip("one value has no spread")
    norm = _norm(shape[1], dtype, sides=sides)
    x = _input(shape, dtype).requires_grad_()
    pull = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    out = norm(x)
    gradients = torch.autograd.grad(out, [x, norm.weight, norm.bias], pull)
    assert out.dtype is dtype
    assert out.is_contiguous(memory_format=torch.channels_last)

    inputs = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    wanted, statistics = _reference(*inputs, sides, norm.eps)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(wanted, inputs, pull.double())
    for got, want in zip(gradients, expected, strict=True):
        assert got.dtype is dtype
        # Sums over the batch: the rounding of the largest term, and of the sum.
        atol = tolerance * max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)

    _assert_moved(norm, [])
    update_running_stats([norm])
    _assert_moved(norm, statistics)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_estimates_normalise_outside_training(dtype):
    norm = _norm(4, dtype).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    x = _input((3, 4, 5, 5), dtype)
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + 1e-3)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    wanted = x.double() * scale[:, None, None] + shift[:, None, None]
    out = norm(x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    update_running_stats([norm])
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_norms_of_all_kinds_move_together():
    norms = [BatchNorm(3), BatchNorm(5, eps=1e-5), BatchNorm(2, momentum=0.1), BatchNorm(4)]
    norms += [BatchNorm(3, sides=1), BatchNorm(1)]
    idle = BatchNorm(3)
    everything = []
    for norm in norms:
        x = _input((4, norm.channels, 5, 3), torch.float32)
        norm(x)
        everything.append(_reference(x.double(), norm.weight, norm.bias, norm.sides, norm.eps)[1])
    update_running_stats([*norms, idle])
    for norm, statistics in zip(norms, everything, strict=True):
        _assert_moved(norm, statistics)
    _assert_moved(idle, [])


def test_what_was_seen_is_remembered_once():
    """Of several forward passes the last."""
    norm, x = BatchNorm(3), _input((4, 3, 5, 3), torch.float32).requires_grad_()
    norm(torch.randn(4, 3, 5, 3))
    norm(x)
    assert not any(part.requires_grad for side in norm.seen for part in side)
    for _ in range(2):
        update_running_stats([norm])
        _assert_moved(norm, _reference(x.double(), norm.weight, norm.bias, 2, norm.eps)[1])


def test_launches_do_not_grow_with_the_norms():
    counts = []
    for number in (1, 30):
        network = torch.nn.Sequential(*(BatchNorm(4) for _ in range(number)))
        network(torch.randn(4, 4, 3, 3))
        norms = norms_of(network)
        seen = norms[0].seen

        def again(norms=norms, seen=seen):
            for norm in norms:
                norm.seen = seen
            update_running_stats(norms)

        counts.append(launches.count(again))
    assert counts[0] == counts[1] < 20
    assert launches.count(lambda: update_running_stats([])) == 0


def test_each_side_is_as_though_alone():
    norm, alone = BatchNorm(4), BatchNorm(4, sides=1)
    x = _input((6, 4, 5, 5), torch.float32)
    apart = torch.cat([alone(x[:3]), alone(x[3:])])
    assert torch.equal(norm(x), apart)
    for part in (x[:3], x[3:]):
        alone(part)
        update_running_stats([alone])
    update_running_stats([norm])
    for one, two in zip(norm.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(BatchNorm(4, sides=1)(x), apart, atol=0.1)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_a_channel_that_is_not_finite_leaves_no_trace(value):
    """The other side's moves as ever, and so do the other channels. 1e30: too large to square."""
    norm, clean, only_a = BatchNorm(2), BatchNorm(2), BatchNorm(2, sides=1)
    x = torch.randn(4, 2, 4, 4)
    clean(x)
    only_a(x[:2])
    x[3, 1, 0, 0] = value
    norm(x)
    update_running_stats([norm, clean, only_a])
    for moved, of_both, of_a in zip(*(n.buffers() for n in (norm, clean, only_a)), strict=True):
        torch.testing.assert_close(moved, torch.stack((of_both[0], of_a[1])))


def test_a_conversion_to_16_bits_passes_by_the_estimates():
    norm = BatchNorm(3)
    norm.running_mean.fill_(1 / 3)
    norm.to(torch.bfloat16)
    assert norm.weight.dtype is torch.bfloat16
    assert torch.equal(norm.running_mean, torch.full((3,), 1 / 3))
    norm(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16))
    update_running_stats([norm])
    assert norm.running_var.dtype is torch.float32


def test_state_and_refusals():
    assert list(BatchNorm(2).state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    with pytest.raises(ValueError, match=r"the batch must be a multiple of 2 \(sides\), got 3"):
        BatchNorm(2)(torch.rand(3, 2, 4, 4))
    assert BatchNorm(2).eval()(torch.rand(3, 2, 4, 4)).shape == (3, 2, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_pass_notes_what_an_eager_one_does(dtype):
    plain, norm = BatchNorm(4).to(dtype), BatchNorm(4).to(dtype)
    backend = "aot_eager_decomp_partition"  # all of it but to make code
    compiled = torch.compile(norm, backend=backend, fullgraph=True, dynamic=False)
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        x = _input((4, 4, 5, 3), dtype).requires_grad_()
        with torch.compiler.set_stance(stance):
            out = compiled(x)
            assert not any(part.requires_grad for side in norm.seen for part in side)
            out.sum().backward()
        plain(x)
        update_running_stats([norm])
        update_running_stats([plain])
    # In bf16 statistics up to 2 are rounded to 2**-8; three steps of 0.01 towards twice that.
    tolerance = 1e-6 if dtype is torch.float32 else 5e-4
    for moved, wanted in zip(norm.buffers(), plain.buffers(), strict=True):
        assert moved.dtype is torch.float32
        torch.testing.assert_close(moved, wanted, rtol=0, atol=tolerance)


@pytest.mark.gpu
def test_a_step_is_captured_in_a_graph():
    norm = BatchNorm(8).cuda()
    x = _input((4, 8, 6, 6), torch.bfloat16).cuda()
    graph = torch.cuda.CUDAGraph()
    norm(x)
    update_running_stats([norm])
    torch.cuda.synchronize()
    before = norm.running_mean.clone()
    with torch.cuda.graph(graph):
        out = norm(x)
        update_running_stats([norm])
    graph.replay()
    torch.cuda.synchronize()
    assert out.isfinite().all()
    assert not torch.equal(norm.running_mean, before)
