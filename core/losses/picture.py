"""What every loss of pictures is: a value for each face, given how much each of its pixels weighs.

Shape letters: B faces, C channels, H rows, W columns.
"""

from torch import Tensor, nn


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
