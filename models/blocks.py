"""The layers that the families share.

Tensors are channels_last (NHWC in memory), so flattening, un-flattening and depth-to-space need no
reordering: dense weights are kept in NHWC order, and a shuffled pixel's channels lie together.

Shape letters: B faces, C channels, H rows, W columns, R upscale factor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init


def _same_padding(size_px: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after one axis so that the output is ceil(size / stride)."""
    total = max((-(-size_px // stride) - 1) * stride + kernel - size_px, 0)
    return total // 2, total - total // 2


class SameConv(nn.Module):
    """Convolution whose output is ceil(size / stride), the smaller share of the padding first."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, reflect: bool = False
    ):
        super().__init__()
        self.kernel, self.stride, self.reflect = kernel, stride, reflect
        # Even padding on both ends is the convolution's own affair; anything else is padded first.
        self.built_in = stride == 1 and kernel % 2 == 1 and not reflect
        self.conv = skip_init(
            nn.Conv2d, inputs, outputs, kernel, stride, padding=kernel // 2 if self.built_in else 0
        )

    def forward(self, x_bchw: Tensor) -> Tensor:
        if not self.built_in:
            top, bottom = _same_padding(x_bchw.shape[2], self.kernel, self.stride)
            left, right = _same_padding(x_bchw.shape[3], self.kernel, self.stride)
            mode = "reflect" if self.reflect else "constant"
            x_bchw = F.pad(x_bchw, (left, right, top, bottom), mode=mode)
        return self.conv(x_bchw)


def depth_to_space(x_bchw: Tensor, factor: int) -> Tensor:
    """[B, R*R*C, H, W] -> [B, C, H*R, W*R]; input channel (i*R + j)*C + c is output (i, j, c)."""
    batch, channels, rows, columns = x_bchw.shape
    out_channels = channels // factor**2
    blocks = x_bchw.permute(0, 2, 3, 1).reshape(batch, rows, columns, factor, factor, out_channels)
    spread = blocks.permute(0, 1, 3, 2, 4, 5)
    out_bhwc = spread.reshape(batch, rows * factor, columns * factor, out_channels)
    return out_bhwc.permute(0, 3, 1, 2)


class Downscale(nn.Module):
    """[B, C, H, W] -> [B, outputs, ceil(H / 2), ceil(W / 2)]: 5x5 convolution, LeakyReLU 0.1."""

    def __init__(self, inputs: int, outputs: int, *, reflect: bool = False):
        super().__init__()
        self.conv = SameConv(inputs, outputs, 5, 2, reflect=reflect)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x_bchw), 0.1, inplace=True)


class Upscale(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: 3x3 convolution, LeakyReLU 0.1, depth-to-space."""

    def __init__(self, inputs: int, outputs: int, *, reflect: bool = False):
        super().__init__()
        self.conv = SameConv(inputs, outputs * 4, 3, reflect=reflect)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return depth_to_space(F.leaky_relu(self.conv(x_bchw), 0.1, inplace=True), 2)


class ToImage(nn.Module):
    """[B, C, H, W] -> [B, outputs, H, W] in 0..1: convolution, then a sigmoid in fp32."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 5):
        super().__init__()
        self.conv = SameConv(inputs, outputs, kernel)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x_bchw).float())


class Bottleneck(nn.Module):
    """[B, C, H, W] -> [B, outputs, size, size] through two dense layers, in NHWC order."""

    def __init__(self, inputs: int, nodes: int, outputs: int, size_px: int):
        super().__init__()
        self.outputs, self.size_px = outputs, size_px
        self.squeeze = skip_init(nn.Linear, inputs, nodes)
        self.expand = skip_init(nn.Linear, nodes, outputs * size_px**2)

    def forward(self, x_bchw: Tensor) -> Tensor:
        flat_bn = x_bchw.permute(0, 2, 3, 1).flatten(1)
        out_bn = self.expand(self.squeeze(flat_bn))
        return out_bn.view(-1, self.size_px, self.size_px, self.outputs).permute(0, 3, 1, 2)


class UpscaleDecoder(nn.Module):
    """A face from a code through `Upscale` blocks; with ``learn_mask`` a mask through its own."""

    def __init__(self, inputs: int, widths: tuple[int, ...], *, learn_mask: bool, reflect: bool):
        super().__init__()
        self.face = self._branch(inputs, widths, 3, reflect)
        self.mask = self._branch(inputs, widths, 1, reflect) if learn_mask else None

    @staticmethod
    def _branch(
        inputs: int, widths: tuple[int, ...], channels: int, reflect: bool
    ) -> nn.Sequential:
        steps = [
            Upscale(before, after, reflect=reflect)
            for before, after in zip((inputs, *widths), widths, strict=False)
        ]
        return nn.Sequential(*steps, ToImage(widths[-1], channels))

    def forward(self, code_bchw: Tensor) -> tuple[Tensor, ...]:
        face = self.face(code_bchw)
        return (face,) if self.mask is None else (face, self.mask(code_bchw))
