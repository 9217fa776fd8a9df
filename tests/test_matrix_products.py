"""Products of matrices in fp32 by oneDNN: values, strides, sums, gradients of layers, choice."""

import pytest
import torch
import torch.nn.functional as F

from mien.kernels import conv3x3, wide_products
from mien.kernels import matrix_products as module
from mien.kernels.matrix_products import by_pytorch, is_chosen, multiply, multiply_all

SIZES = [(1, 1, 1), (3, 33, 17), (16, 256, 300), (70, 5, 129)]

has_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


@pytest.fixture
def onednn(monkeypatch):
    """Products of every size are oneDNN's; counts them."""
    monkeypatch.setattr(module, "_is_wider", True)
    monkeypatch.setattr(module, "_LEAST_MULTIPLICATIONS", 1)
    calls, multiply_there = [], module._by_onednn

    def count(*operands):
        calls.append(operands)
        return multiply_there(*operands)

    monkeypatch.setattr(module, "_by_onednn", count)
    return calls


def _drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _assert_exact(found, exact):
    """As near as sums of some hundred products in fp32 come to those in float64."""
    assert found.dtype == torch.float32
    largest = float(exact.detach().abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-6 * max(1.0, largest))


@has_onednn
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_products_equal_float64(onednn, size, biased, turned):
    rows, inner, columns = size
    first, second = _drawn(rows, inner), _drawn(inner, columns)
    bias = _drawn(columns) if biased else None
    exact = first.double() @ second.double() + (bias.double() if biased else 0)
    first, second = (
        each.t().contiguous().t() if is_turned else each
        for each, is_turned in zip((first, second), turned, strict=True)
    )
    _assert_exact(multiply(first, second, bias), exact)
    assert len(onednn) == 1
    with by_pytorch():
        _assert_exact(multiply(first, second, bias), exact)
    assert len(onednn) == 1


@has_onednn
@pytest.mark.parametrize("strides", [(0,), (2,)])
def test_a_bias_is_read_as_its_strides_say(onednn, strides):
    first, second = _drawn(16, 20), _drawn(20, 30)
    bias = _drawn(60).as_strided((30,), strides)
    exact = first.double() @ second.double() + bias.double()
    _assert_exact(multiply(first, second, bias), exact)
    assert len(onednn) == 1


@has_onednn
@pytest.mark.parametrize("adds", [False, True])
def test_many_products_are_written_or_added(onednn, adds):
    first, second, out = _drawn(16, 12, 20), _drawn(16, 24, 20).transpose(1, 2), _drawn(16, 12, 24)
    exact = first.double() @ second.double() + (out.double() if adds else 0)
    other = out.clone()
    multiply_all(first, second, out, adds=adds)
    _assert_exact(out, exact)
    assert len(onednn) == 16
    with by_pytorch():
        multiply_all(first, second, other, adds=adds)
    _assert_exact(other, exact)
    assert len(onednn) == 16


@has_onednn
@pytest.mark.parametrize("biased", [False, True])
def test_a_dense_layer_and_its_gradients_equal_float64(onednn, biased):
    operands = [_drawn(8, 70), _drawn(40, 70), *[_drawn(40)] * biased]
    grad = _drawn(8, 40)

    def results(layer, operands):
        operands = [each.requires_grad_() for each in operands]
        y = layer(*operands, *[None] * (not biased))
        return y, *torch.autograd.grad(y, operands, grad.to(y.dtype))

    exact = results(F.linear, [each.double() for each in operands])
    for ours, theirs in zip(results(wide_products.linear, operands), exact, strict=True):
        _assert_exact(ours, theirs)
    assert len(onednn) == 3


@has_onednn
def test_a_compiled_dense_layer_and_its_gradients_are_the_eager_ones(onednn):
    operands = [_drawn(8, 70), _drawn(40, 70), _drawn(40)]

    def results(layer):
        y = layer(*[each.requires_grad_() for each in operands])
        return y, *torch.autograd.grad(y, operands, _drawn(8, 40))

    compiled = torch.compile(wide_products.linear, fullgraph=True, dynamic=False)
    for ours, theirs in zip(results(compiled), results(wide_products.linear), strict=True):
        torch.testing.assert_close(ours, theirs)
    # The compiler itself is told of results alone.
    assert sum(type(first) is torch.Tensor for first, *_ in onednn) == 6


@has_onednn
def test_a_dense_layer_of_another_library_takes_it_too(onednn):
    layer, x = torch.nn.Linear(33, 6), _drawn(3, 5, 33)
    wanted = layer(x)
    wide_products.widen(layer)
    torch.testing.assert_close(layer(x), wanted)
    assert len(onednn) == 1
    with by_pytorch():
        assert torch.equal(layer(x), wanted)


@has_onednn
def test_winograds_products_are_those(onednn):
    x, weight = _drawn(2, 96, 8, 8), _drawn(96, 96, 3, 3) / 30
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    _assert_exact(conv3x3.conv3x3(x, weight), exact)
    assert len(onednn) == 16


@has_onednn
def test_a_compiler_is_told_the_result(onednn):
    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(4, 70), torch.empty(40, 70)
        assert wide_products.linear(x, weight, None).shape == (4, 40)


def test_only_large_products_in_fp32_on_a_cpu_are_chosen(monkeypatch):
    monkeypatch.setattr(module, "_is_wider", True)
    monkeypatch.setattr(module, "_LEAST_MULTIPLICATIONS", 4 * 5 * 6)
    x, weight = torch.ones(4, 5), torch.ones(6, 5)
    assert is_chosen(x, weight)
    assert is_chosen(x, weight.t())
    assert not is_chosen(x[1:], weight)
    assert not is_chosen(x, weight[1:])
    for kind in (torch.float64, torch.bfloat16, "meta"):
        assert not is_chosen(x, weight.to(kind))
        assert not is_chosen(x.to(kind), weight)
    with torch.autocast("cpu"):
        assert not is_chosen(x, weight)
    with by_pytorch():
        assert not is_chosen(x, weight)
    assert is_chosen(x, weight)
    monkeypatch.setattr(module, "_is_wider", False)
    assert not is_chosen(x, weight)


@pytest.mark.parametrize(
    ("vendor", "vectors", "library", "is_wider"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", True, True),
        ("vendor_id\t: AuthenticAMD", "AVX2", True, False),
        ("vendor_id\t: AuthenticAMD", "AVX512", False, False),
        ("vendor_id\t: GenuineIntel", "AVX512", True, False),
        ("CPU implementer\t: 0x41", "SVE256", True, False),
        ("model name\t: unknown", "AVX512", True, False),
    ],
)
def test_the_cpu_and_the_libraries_decide(
    monkeypatch, tmp_path, vendor, vectors, library, is_wider
):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{vendor}\n")
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    assert module.has_wider_library() == is_wider


def test_a_cpu_that_does_not_name_itself_is_no_reason_to_fail(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "missing")
    assert module._maker() == ""
