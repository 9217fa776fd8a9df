"""Fresh weights: their spread, their bounds, that no two are alike, and who draws what."""

import math

import pytest
import torch
from torch import nn

from mien import models
from mien.models import initializers as init
from mien.models.blocks import Upscale


def _drawn(draw, *shape, seed=0):
    weight = torch.empty(*shape)
    draw(weight, torch.Generator().manual_seed(seed))
    return weight


@pytest.mark.parametrize(
    ("draw", "shape", "bound"),
    [
        (init.he_uniform, (64, 32, 3, 3), math.sqrt(6 / (32 * 9))),
        (init.depthwise_he_uniform, (512, 1, 5, 5), math.sqrt(6 / (512 * 25))),
        (init.small_uniform, (64, 32, 3, 3), math.sqrt(3 * 0.2 / (32 * 9))),
        (init.glorot_uniform, (64, 32), math.sqrt(6 / (64 + 32))),
        (init.glorot_uniform, (64, 32, 3, 3), math.sqrt(6 / (9 * (64 + 32)))),
    ],
)
def test_uniform_rules_fill_their_range(draw, shape, bound):
    weight = _drawn(draw, *shape)
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(weight.mean()) < 0.03 * bound


def test_normal_rules_have_their_deviation():
    assert _drawn(init.normal_002, 512, 512).std() == pytest.approx(0.02, rel=0.01)
    weight = _drawn(init.he_normal, 512, 256)
    assert weight.std() == pytest.approx(math.sqrt(2 / 256), rel=0.01)
    assert weight.abs().max() <= 2 * math.sqrt(2 / 256) / 0.8796 * 1.001


def test_icnr_begins_all_pixels_of_a_shuffle_alike():
    """Checked on what it is for: an upscale of a flat picture stays without a checkerboard."""
    block = Upscale(8, 6, factor=3)
    generator = torch.Generator().manual_seed(0)
    init.initialize(block, generator, icnr_init=True, conv_aware_init=False)
    out = block(torch.rand(1, 8, 1, 1).expand(1, 8, 6, 6).contiguous())
    blocks = out[..., 3:15, 3:15].unfold(2, 3, 3).unfold(3, 3, 3)
    assert torch.equal(blocks, blocks[..., :1, :1].expand_as(blocks))
    init.initialize(block, generator, icnr_init=False, conv_aware_init=False)
    out = block(torch.rand(1, 8, 1, 1).expand(1, 8, 6, 6).contiguous())
    assert not torch.equal(out[..., 3, 3], out[..., 3, 4])


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (8, 40, 5, 5), (16, 1, 5, 5), (16, 24, 1, 1)])
def test_convolution_aware_filters(shape):
    weight = _drawn(init.convolution_aware, *shape)
    fan_in = math.prod(shape) if shape[1] == 1 else math.prod(shape[1:])
    is_point = shape[2:] == (1, 1)
    assert weight.var(correction=0) == pytest.approx(2 / fan_in, rel=0.2 if is_point else 1e-4)
    assert abs(weight.mean()) < 0.25 * weight.std()
    assert torch.equal(weight, _drawn(init.convolution_aware, *shape))
    assert not torch.equal(weight, _drawn(init.convolution_aware, *shape, seed=1))
    outputs = weight.flatten(1)
    assert torch.cdist(outputs, outputs).fill_diagonal_(1).min() > 1e-3, "two filters are alike"


def test_convolution_aware_filters_are_orthogonal_in_fourier_space(monkeypatch):
    """Of one output, up to as many inputs as a spectrum has numbers; nearly, for real filters."""
    monkeypatch.setattr(init, "_NOISE", 0.0)
    rows = columns = 5
    inputs = 10
    weight = _drawn(init.convolution_aware, 4, inputs, rows, columns)
    for filters in weight:
        spectra = torch.fft.rfft2(filters).real.flatten(1)
        products = nn.functional.normalize(spectra, dim=1)
        off = (products @ products.T).fill_diagonal_(0)
        assert off.abs().mean() < 0.5 * _mean_product(inputs, spectra.shape[1])


def _mean_product(count, length):
    drawn = nn.functional.normalize(torch.randn(count, length), dim=1)
    return (drawn @ drawn.T).fill_diagonal_(0).abs().mean()


def test_a_module_may_draw_its_own_weights():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def draw_weights(self, generator):
            nn.init.constant_(self.inner.weight, 7)

    model = nn.Sequential(Own(), nn.Linear(2, 2))
    init.initialize(model, torch.Generator(), icnr_init=False, conv_aware_init=False)
    assert model[0].inner.weight.eq(7).all()
    assert not model[1].weight.eq(7).any()


@pytest.mark.parametrize("name", ["villain", "unbalanced", "dfaker"])
def test_families_that_begin_small(name):
    """N(0, 0.02) where the family says so; the second convolution of a residual never."""
    model = models.build(name)
    deviations = {
        path: module.weight.std().item()
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000
    }
    small = [path for path, value in deviations.items() if value == pytest.approx(0.02, rel=0.02)]
    assert any(path.endswith("first.conv") for path in small)
    assert not any(path.endswith("second.conv") for path in small)


def test_icnr_is_for_upscales_alone():
    """Villain's encoder shuffles as well, but makes nothing larger by it."""
    model = models.build("villain", lowmem=True, width=16, icnr_init=True)
    groups = model.encoder[1].conv.conv.weight.unflatten(0, (4, -1))
    assert not torch.equal(groups[0], groups[3])


def test_both_options_reach_the_model():
    plain, icnr, aware, both = (
        models.build("original", width=8, icnr_init=one, conv_aware_init=two).state_dict()
        for one, two in ((False, False), (True, False), (False, True), (True, True))
    )
    key = "decoder_a.face.0.conv.conv.weight"
    for state in (icnr, both):
        groups = state[key].unflatten(0, (4, -1))
        assert torch.equal(groups[0], groups[3])
    first = "encoder.0.0.conv.conv.weight"
    assert torch.equal(plain[first], icnr[first])
    assert not torch.equal(plain[first], aware[first])
    dense = "encoder.1.linear.weight"
    assert aware[dense].std() == pytest.approx(plain[dense].std().item(), rel=0.05)
