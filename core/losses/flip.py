"""The difference that is seen when two pictures alternate (Andersson et al. 2020: LDR-FLIP)."""

import math

import torch
from torch import Tensor, nn

from .picture import PictureLoss
from .planes import Separable, filtered

# FLIP's own default, so that values compare with those of others.
PIXELS_PER_DEGREE = 3840 * math.pi / 180
"""Pixels per degree of a screen 3840 px wide, seen from as far away as it is wide."""

_TO_XYZ = (
    (10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794),
    (2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897),
    (1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382),
)
"""Matrix from linear RGB to XYZ; the sums of the rows are the white of CIE's illuminant D65."""

_CONTRAST = (((1, 0.0047),), ((1, 0.0053),), ((34.1, 0.04), (13.5, 0.025)))
"""Amplitudes and spreads of the eye's filters for luminance, red-green and blue-yellow."""

_COLOR_EXPONENT, _FEATURE_EXPONENT = 0.7, 0.5
_KNEE_ERROR, _KNEE = 0.4, 0.95
"""Share of the largest colour error, and the share of the range to which it is mapped."""

_EDGE_DEGREES = 0.082
# Below these a root's slope grows without bound.
_LEAST_SQUARE = 1e-15
_LEAST_FEATURE = 1e-15


class Flip(PictureLoss):
    """flip: 0..1 of every pixel, colour^(1 - feature); map of 1 channel.

    The colour error is HyAB between what the eye's contrast filters leave, in Hunt-adjusted Lab;
    the feature error is the larger difference of edges and points of the luminance.
    """

    to_opponent: Tensor
    to_linear: Tensor
    to_white: Tensor

    def __init__(self, size_px: int):
        super().__init__()
        to_white = torch.tensor(_TO_XYZ, dtype=torch.float64)
        # Relative to white already, which Lab divides by.
        to_white = to_white / to_white.sum(dim=1, keepdim=True)
        # Y, X - Y and Y - Z. Lab's factors and offsets drop out: filters are linear and sum to 1.
        opponents = torch.tensor([[0, 1, 0], [1, -1, 0], [0, 1, -1]], dtype=torch.float64)
        to_opponent = opponents @ to_white
        self.register_buffer("to_opponent", to_opponent)
        self.register_buffer("to_linear", torch.linalg.inv(to_opponent))
        self.register_buffer("to_white", to_white)
        self.contrasts = nn.ModuleList(_contrast_filter(size_px, terms) for terms in _CONTRAST)
        slope, bend, smooth = (
            filtered(size_px, taps, border="replicate") for taps in _feature_taps()
        )
        self.edges = nn.ModuleList([Separable(smooth, slope), Separable(slope, smooth)])
        self.points = nn.ModuleList([Separable(smooth, bend), Separable(bend, smooth)])
        # Of the loss's own functions, so that the knee fits them to the last bit.
        self.largest = self._largest_color_error()

    def map(self, pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
        lab_x, edge_x, point_x = self._seen(pred_bchw)
        lab_y, edge_y, point_y = self._seen(target_bchw)
        feature = torch.maximum((edge_x - edge_y).abs(), (point_x - point_y).abs())
        feature = (feature.clamp_min(_LEAST_FEATURE) / math.sqrt(2)).pow(_FEATURE_EXPONENT)
        return self._stretched(_hyab(lab_x, lab_y)).pow(1 - feature)

    def _seen(self, bgr_bchw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lab (B, 3, H, W) after the eye's filters; strengths (B, 1, H, W) of edges and points."""
        # RGB from here on, as the matrices are stated; a network may leave 0..1.
        opponent = _mixed(self.to_opponent, _linear(bgr_bchw.flip(1).clamp(0, 1)))
        luminance = opponent[:, :1]
        planes = zip(self.contrasts, opponent.split(1, dim=1), strict=True)
        seen = torch.cat([contrast(plane) for contrast, plane in planes], dim=1)
        linear = _mixed(self.to_linear, seen).clamp(0, 1)
        edge, point = (
            _length(torch.cat([each(luminance) for each in filters], dim=1))
            for filters in (self.edges, self.points)
        )
        return _hunt_lab(_mixed(self.to_white, linear)), edge, point

    def _stretched(self, error: Tensor) -> Tensor:
        """0..1: what is below the knee takes most of the range."""
        knee = _KNEE_ERROR * self.largest
        above = _KNEE + (error - knee) * ((1 - _KNEE) / (self.largest - knee))
        return torch.where(error < knee, error * (_KNEE / knee), above)

    def _largest_color_error(self) -> float:
        """Distance between pure green and pure blue."""
        green, blue = torch.eye(3, dtype=torch.float64)[1:, None, :, None, None]
        lab = [_hunt_lab(_mixed(self.to_white, color)) for color in (green, blue)]
        return float(_hyab(*lab))


class _Sum(nn.Module):
    """A filter that is a sum of separable ones."""

    def __init__(self, filters: list[Separable]):
        super().__init__()
        self.filters = nn.ModuleList(filters)

    def forward(self, x_b1hw: Tensor) -> Tensor:
        return sum((each(x_b1hw) for each in self.filters[1:]), self.filters[0](x_b1hw))


def _contrast_filter(size_px: int, terms: tuple[tuple[float, float], ...]) -> _Sum:
    """The sum of Gaussians a sqrt(pi / b) exp(-pi^2 r^2 / b), r in degrees; its taps sum to 1."""
    widest = max(b for terms in _CONTRAST for _, b in terms)
    radius = math.ceil(3 * math.sqrt(widest / (2 * math.pi**2)) * PIXELS_PER_DEGREE)
    degrees = torch.arange(-radius, radius + 1, dtype=torch.float64) / PIXELS_PER_DEGREE
    lines = [
        math.sqrt(a * math.sqrt(math.pi / b)) * torch.exp(-((math.pi * degrees) ** 2) / b)
        for a, b in terms
    ]
    total = sum(float(line.sum()) ** 2 for line in lines)
    return _Sum(
        [
            Separable(filtered(size_px, line / math.sqrt(total), border="replicate"))
            for line in lines
        ]
    )


def _feature_taps() -> tuple[Tensor, Tensor, Tensor]:
    """First and second derivative of a Gaussian, and the Gaussian.

    Positive and negative parts of the derivatives each sum to 1 where the Gaussian does.
    """
    deviation = 0.5 * _EDGE_DEGREES * PIXELS_PER_DEGREE
    radius = math.ceil(3 * deviation)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    smooth = torch.exp(-places.square() / (2 * deviation**2))
    slope = -places * smooth
    bend = (places.square() / deviation**2 - 1) * smooth
    slope, bend = (
        torch.where(taps > 0, taps / taps.clamp_min(0).sum(), taps / -taps.clamp_max(0).sum())
        for taps in (slope, bend)
    )
    return slope, bend, smooth / smooth.sum()


def _mixed(matrix_33: Tensor, x_bchw: Tensor) -> Tensor:
    return torch.einsum("kc,bchw->bkhw", matrix_33, x_bchw)


def _linear(rgb: Tensor) -> Tensor:
    """Linear RGB of sRGB, in 0..1: its gamma undone."""
    return torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92)


def _hunt_lab(xyz_b3hw: Tensor) -> Tensor:
    """CIE L*a*b* of XYZ relative to white; a and b fade with the lightness (Hunt)."""
    delta = 6 / 29
    # The root's slope is infinite at 0, where the line is taken.
    root = xyz_b3hw.clamp_min(delta**3).pow(1 / 3)
    f = torch.where(xyz_b3hw > delta**3, root, xyz_b3hw / (3 * delta**2) + 4 / 29)
    x, y, z = f.split(1, dim=1)
    lightness = 116 * y - 16
    fade = 0.01 * lightness
    return torch.cat((lightness, fade * 500 * (x - y), fade * 200 * (y - z)), dim=1)


def _hyab(lab_x: Tensor, lab_y: Tensor) -> Tensor:
    """Sum of the distances in lightness and in colour, to a power; (B, 1, H, W)."""
    difference = lab_x - lab_y
    lightness = difference[:, :1].square().clamp_min(_LEAST_SQUARE).sqrt()
    return (lightness + _length(difference[:, 1:])).pow(_COLOR_EXPONENT)


def _length(x_bchw: Tensor) -> Tensor:
    """Length of the vector of channels, (B, 1, H, W); where it is 0, so is its gradient."""
    square = x_bchw.square().sum(dim=1, keepdim=True)
    # Filled before the root and after it: a `where` behind the root would let its infinite slope
    # through as NaN.
    is_zero = square == 0
    return square.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)
