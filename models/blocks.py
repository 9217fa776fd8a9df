"""The layers that the families share.

Tensors are channels_last (NHWC in memory), so flattening, un-flattening and depth-to-space need no
reordering: dense weights are kept in NHWC order, and a shuffled pixel's channels lie together.
Convolutions are bare products of a library; all that stands between two of them is one kernel.

Shape letters: B faces, C channels, H rows, W columns.
"""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..kernels.upscale import activate, to_image, upscale
from .alignment import axis, pad_parameter


def _same_padding(size_px: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after one axis so that the output is ceil(size / stride)."""
    total = max((-(-size_px // stride) - 1) * stride + kernel - size_px, 0)
    return total // 2, total - total // 2


Border = tuple[int, int, int, int]
_NO_BORDER: Border = (0, 0, 0, 0)


def _frame_with_zeros(x_bchw: Tensor, border: Border) -> Tensor:
    return activate(x_bchw, None, slope=1, border=border)  # F.pad takes two passes for it


def _frame_by_reflection(x_bchw: Tensor, border: Border) -> Tensor:
    return F.pad(x_bchw, border, mode="reflect")


class SameConv(nn.Module):
    """Convolution whose output is ceil(size / stride), the smaller share of the padding first.

    Its bias is not added here but by the kernel that follows it, together with all else that comes
    before the next convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        reflect: bool = False,
        output_groups: int = 1,
    ):
        super().__init__()
        self.kernel, self.stride, self.reflect = kernel, stride, reflect
        self.output_groups = output_groups
        # Even padding on both ends is the convolution's own affair; anything else is padded first.
        self.built_in = stride == 1 and kernel % 2 == 1 and not reflect
        self.conv = skip_init(
            nn.Conv2d, inputs, outputs, kernel, stride, padding=kernel // 2 if self.built_in else 0
        )

    @property
    def bias(self) -> Tensor:
        """(outputs,), for the kernel that follows."""
        return self.conv.bias

    def border(self, rows: int, columns: int) -> Border:
        """Pixels (left, right, top, bottom) by which an input of this size is to be framed."""
        if self.built_in:
            return _NO_BORDER
        vertical = _same_padding(rows, self.kernel, self.stride)
        return *_same_padding(columns, self.kernel, self.stride), *vertical

    def forward(self, x_bchw: Tensor, *, framed: bool = False) -> Tensor:
        """The products, without the bias; ``framed``: the input has its border already."""
        border = _NO_BORDER if framed else self.border(*x_bchw.shape[2:])
        missing = self.conv.weight.shape[1] - x_bchw.shape[1]  # of an aligned model: see `align`
        if missing:
            x_bchw = F.pad(x_bchw, (0, 0, 0, 0, 0, missing))
        if any(border):
            framed_by = _frame_by_reflection if self.reflect else _frame_with_zeros
            x_bchw = framed_by(x_bchw, border)
        return F.conv2d(x_bchw, self.conv.weight, None, self.stride, self.conv.padding)

    def align(self, multiple: int) -> None:
        """Pad the channels to a multiple; see `alignment`."""
        outputs, inputs = self.conv.weight.shape[:2]
        by_output = axis(0, self.output_groups, outputs, multiple)
        pad_parameter(self.conv, "weight", (by_output, axis(1, 1, inputs, multiple)))
        pad_parameter(self.conv, "bias", (by_output,))


class Downscale(nn.Module):
    """[B, C, H, W] -> [B, outputs, ceil(H / 2), ceil(W / 2)]: 5x5 convolution, LeakyReLU 0.1."""

    def __init__(self, inputs: int, outputs: int, *, reflect: bool = False):
        super().__init__()
        self.conv = SameConv(inputs, outputs, 5, 2, reflect=reflect)

    def forward(
        self, x_bchw: Tensor, *, framed: bool = False, border: Border = _NO_BORDER
    ) -> Tensor:
        """``framed``: the input has its border already; ``border``: the output gets one."""
        product = self.conv(x_bchw, framed=framed)
        return activate(product, self.conv.bias, slope=0.1, border=border)


class Downscales(nn.Sequential):
    """`Downscale` blocks in a row; each frames its output with the zeros that the next one needs.

    So no pass over memory only pads.
    """

    def __init__(self, inputs: int, widths: Sequence[int], *, reflect: bool = False):
        pairs = zip((inputs, *widths), widths, strict=False)
        super().__init__(*(Downscale(i, o, reflect=reflect) for i, o in pairs))
        self.reflect = reflect

    def forward(self, x_bchw: Tensor) -> Tensor:
        rows, columns = x_bchw.shape[2:]
        blocks, framed = cast(Sequence[Downscale], self), False
        for number, block in enumerate(blocks, 1):
            rows, columns = -(-rows // 2), -(-columns // 2)
            frames_next = number < len(blocks) and not self.reflect
            border = blocks[number].conv.border(rows, columns) if frames_next else _NO_BORDER
            x_bchw = block(x_bchw, framed=framed, border=border)
            framed = frames_next
        return x_bchw


class Upscale(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: 3x3 convolution, LeakyReLU 0.1, depth-to-space."""

    def __init__(self, inputs: int, outputs: int, *, reflect: bool = False):
        super().__init__()
        self.conv = SameConv(inputs, outputs * 4, 3, reflect=reflect, output_groups=4)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return upscale(self.conv(x_bchw), self.conv.bias, slope=0.1)


class ToImage(nn.Module):
    """[B, C, H, W] -> [B, outputs, H, W] in 0..1: convolution, then a sigmoid in fp32."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 5):
        super().__init__()
        self.outputs = outputs
        self.conv = SameConv(inputs, outputs, kernel)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return to_image(self.conv(x_bchw), self.conv.bias, channels=self.outputs)


class Bottleneck(nn.Module):
    """[B, C, H, W] -> [B, outputs, size, size] through two dense layers, in NHWC order."""

    def __init__(self, pixels: int, channels: int, nodes: int, outputs: int, size_px: int):
        super().__init__()
        self.pixels, self.size_px = pixels, size_px
        self.squeeze = skip_init(nn.Linear, pixels * channels, nodes)
        self.expand = skip_init(nn.Linear, nodes, outputs * size_px**2)

    def forward(self, x_bchw: Tensor) -> Tensor:
        flat_bn = x_bchw.permute(0, 2, 3, 1).flatten(1)
        out_bn = self.expand(self.squeeze(flat_bn))
        return out_bn.view(out_bn.shape[0], self.size_px, self.size_px, -1).permute(0, 3, 1, 2)

    def align(self, multiple: int) -> None:
        """Pad the channels of the pictures on both sides; see `alignment`."""
        inputs, outputs = self.squeeze.in_features, self.expand.out_features
        by_output = axis(0, self.size_px**2, outputs, multiple)
        pad_parameter(self.squeeze, "weight", (axis(1, self.pixels, inputs, multiple),))
        pad_parameter(self.expand, "weight", (by_output,))
        pad_parameter(self.expand, "bias", (by_output,))


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
