"""The picture losses beside the fused ones of `kernels.face_loss`.

Those of filtered pictures have a kernel, `kernels.filtered_loss`; autograd differentiates the rest.
"""

from collections.abc import Callable, Sequence

from .extremes import LargestDifference
from .flip import Flip
from .frequency import FocalFrequency
from .gradients import GradientSimilarity, PixelGradientDifference
from .lpips import TRUNKS, Lpips
from .picture import PictureLoss
from .pyramids import MIN_LAPLACIAN_PX, MIN_MS_SSIM_PX, LaplacianPyramid, MultiScaleSsim

MADE_FOR_A_SIZE: dict[str, Callable[[int], PictureLoss]] = {
    "ffl": FocalFrequency,
    "flip": Flip,
    "gmsd": GradientSimilarity,
    "l_inf_norm": lambda _: LargestDifference(),
    "laploss": LaplacianPyramid,
    "ms_ssim": MultiScaleSsim,
    "pixel_gradient_diff": PixelGradientDifference,
}
"""Makers of losses by name, for pictures with an edge of so many px."""

MIN_PX = {"laploss": MIN_LAPLACIAN_PX, "ms_ssim": MIN_MS_SSIM_PX} | {
    name: trunk.min_px for name, trunk in TRUNKS.items()
}
"""The smallest edge that a loss can do with, where there is one."""


def picture_losses(
    names: Sequence[str], sizes_px: Sequence[int], *, lpips_weights: str = ""
) -> list[dict[str, PictureLoss]]:
    """Losses by name for each size, on the CPU; their dtypes are to be made one by ``.to``.

    Args:
        names: Names in `MADE_FOR_A_SIZE` or `TRUNKS`.
        sizes_px: Edges of the pictures.
        lpips_weights: Folder with the weights of lpips losses.

    Raises:
        ValueError: A size is too small for a loss, or the folder lacks a file.
    """
    for name in names:
        if min(sizes_px) < MIN_PX.get(name, 1):
            raise ValueError(
                f"{name} needs faces of at least {MIN_PX[name]} px, but the model gives "
                f"{min(sizes_px)} px; use another loss, such as ssim"
            )
    # One for all sizes: its trunk takes any, and has up to 15 M weights.
    networks = {name: Lpips(name, lpips_weights) for name in names if name in TRUNKS}
    return [
        {name: networks.get(name) or MADE_FOR_A_SIZE[name](size_px) for name in names}
        for size_px in sizes_px
    ]
