"""The largest difference."""

from torch import Tensor

from .picture import PictureLoss


class LargestDifference(PictureLoss):
    """l_inf_norm: of each channel the largest weight * |pred - target|, mean over channels."""

    def forward(self, pred_bchw: Tensor, target_bchw: Tensor, weight_b1hw: Tensor) -> Tensor:
        # Over rows and columns. faceswap's axes are those of channels and rows, by a slip.
        return (weight_b1hw * (pred_bchw - target_bchw).abs()).amax(dim=(2, 3)).mean(dim=1)
