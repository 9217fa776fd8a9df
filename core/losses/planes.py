"""Linear maps of pictures as products with matrices: filters with their borders, resizing.

A filter or a resize that treats rows and columns apart is ``rows @ picture @ columns.T``. One small
matrix an axis holds the taps, the border and the size at once; two products of matrices replace
padding, filtering and their scattered gradients. Every sum has a fixed order, so the bits are the
same on every run, and nothing is copied from the host: the matrices are made when the loss is.

All matrices are (outputs, inputs) and float64: the loss that holds them is moved to its own dtype.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Separable(nn.Module):
    """Filters or resizes pictures: ``rows`` (H, H') acts on the rows, ``columns`` on the columns.

    Args:
        rows: Matrix for the axis of height.
        columns: Matrix for the axis of width; None: as ``rows``.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor | None = None):
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("columns", rows if columns is None else columns)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.rows @ x_bchw @ self.columns.T


def gaussian(radius: int, sigma: float) -> Tensor:
    """The 2 radius + 1 taps of a Gaussian; their sum is 1."""
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-places.square() / (2 * sigma**2))
    return taps / taps.sum()


def filtered(size: int, taps: Sequence[float] | Tensor, *, border: str) -> Tensor:
    """(size, size): a filter with an odd number of taps, first tap at the smallest place.

    Args:
        size: Pixels along the axis; more than half the taps where they are reflected.
        taps: Weights of a pixel's neighbours.
        border: Beyond the ends, "replicate" repeats the last pixel and "reflect" mirrors about it.
    """
    taps = torch.as_tensor(taps, dtype=torch.float64)
    radius = len(taps) // 2
    places = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)
    if border == "reflect":
        # About the pixel at the end, which is not repeated.
        places = (size - 1) - ((size - 1) - places.abs()).abs()
    else:
        places = places.clamp(0, size - 1)
    # Added up, not set: taps beyond an end meet others in one pixel.
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, places, taps.expand(size, -1).contiguous())


def resized(size: int, from_size: int) -> Tensor:
    """(size, from_size): linear interpolation between the centres of pixels."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * (from_size / size) - 0.5
    # Beyond the centre of the last pixel there is nothing to go to: it is repeated.
    places = places.clamp(0, from_size - 1)
    low = places.floor().long()
    high = (low + 1).clamp(max=from_size - 1)
    share = (places - low)[:, None]
    matrix = torch.zeros(size, from_size, dtype=torch.float64)
    matrix.scatter_add_(1, low[:, None], 1 - share)
    return matrix.scatter_add_(1, high[:, None], share)


def halving(size: int, *, odd: str) -> Tensor:
    """(halved, size): means of two pixels; an odd last one stands alone ("up") or is left out."""
    (rows,) = halved_sizes(size, 1, odd=odd)[1:]
    matrix = (torch.arange(size) // 2 == torch.arange(rows)[:, None]).double()
    return matrix / matrix.sum(dim=1, keepdim=True)


def halved_sizes(size: int, count: int, *, odd: str) -> list[int]:
    """``size`` and what ``count`` halvings leave of it, an odd one rounded "up" or "down"."""
    sizes = [size]
    for _ in range(count):
        sizes.append(math.ceil(sizes[-1] / 2) if odd == "up" else sizes[-1] // 2)
    return sizes
