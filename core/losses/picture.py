"""What every loss of pictures is: a value for each face, given how much each of its pixels weighs.

Shape letters: B faces, C channels, H rows, W columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.filtered_loss import Filters, filtered_loss, pack


class PictureLoss(nn.Module):
    """A difference between pictures of one size; its tensors are made once, and never trained.

    A subclass has `map`, or its own `forward` where the value is not the mean of a map.
    """

    def forward(self, pred_bchw: Tensor, target_bchw: Tensor, weight_b1hw: Tensor) -> Tensor:
        """(B,): of each face the mean of weight * map over all pixels and channels.

        Args:
            pred_bchw: Decoded faces, (B, 3, H, W) BGR 0..1, in the dtype of the loss.
            target_bchw: Faces to match, of that shape.
            weight_b1hw: Weight of each pixel, at least 0.
        """
        return (weight_b1hw * self.map(pred_bchw, target_bchw)).mean(dim=(1, 2, 3))

    def map(self, pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
        """(B, 3 or 1, H, W): the difference at every pixel."""
        raise NotImplementedError


class FilteredLoss(PictureLoss):
    """A loss of filtered pictures: its map for autograd, and in fp32 a kernel for both at once.

    Args:
        name: Name in `kernels.filtered_loss.LOSSES`.
        matrices: The filters, in the order that mien.h states; see `planes`.
    """

    firsts: Tensor
    taps: Tensor

    def __init__(self, name: str, matrices: Sequence[Tensor]):
        super().__init__()
        self.name = name
        filters = pack(matrices)
        self.register_buffer("firsts", filters.firsts)
        self.register_buffer("taps", filters.taps)
        self.shapes = filters.shapes

    def forward(self, pred_bchw: Tensor, target_bchw: Tensor, weight_b1hw: Tensor) -> Tensor:
        # The kernel knows fp32; float64, for tests of gradients, goes through the map.
        if pred_bchw.dtype != torch.float32:
            return super().forward(pred_bchw, target_bchw, weight_b1hw)
        filters = Filters(self.firsts, self.taps, self.shapes)
        # The kernel works on planes, whose pixels lie together in this layout alone.
        pred_bchw, target_bchw = pred_bchw.contiguous(), target_bchw.contiguous()
        return filtered_loss(self.name, pred_bchw, target_bchw, weight_b1hw.contiguous(), filters)
