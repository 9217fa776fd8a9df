"""The layers that the families share.

Tensors are channels_last (NHWC in memory), so flattening, un-flattening and depth-to-space need no
reordering: dense weights are kept in NHWC order, and a shuffled pixel's channels lie together.
Convolutions are bare products of a library; all that stands between two of them is one kernel.

A block's ``channels`` are the runs of its output (see `alignment`); what follows takes them as its
inputs. An activation that comes before a shuffle and one that comes after it are one: the slopes of
negative values multiply.

Shape letters: B faces, C channels, H rows, W columns.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..kernels.bias_act import bias_act, bias_act_depth_to_space
from ..kernels.dense import dense
from ..kernels.enlarge import enlarge
from ..kernels.to_image import to_image
from ..kernels.wide_products import convolution, linear
from .alignment import Runs, axis, pad_parameter, runs_of
from .graph import Network, Value, describe
from .initializers import Draw, depthwise_he_uniform, glorot_uniform, he_uniform, small_uniform
from .keras_weights import keras_entries


def _same_padding(size_px: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after one axis so that the output is ceil(size / stride)."""
    total = max((-(-size_px // stride) - 1) * stride + kernel - size_px, 0)
    return total // 2, total - total // 2


Border = tuple[int, int, int, int]
_NO_BORDER: Border = (0, 0, 0, 0)


def uninitialized(kind: type[nn.Module], *sizes: int, **settings: Any) -> Any:
    """A layer whose weights have no numbers yet; on the meta device it takes no memory at all."""
    return skip_init(kind, *sizes, device=torch.get_default_device(), **settings)


def _framed(x_bchw: Tensor, border: Border, *, reflect: bool = False) -> Tensor:
    # F.pad takes two passes for zeros, and adds up gradients of reflections in no fixed order.
    return bias_act(x_bchw, None, negative_slope=1, border=border, reflect=reflect)


class SameConv(nn.Module):
    """Convolution whose output is ceil(size / stride), the smaller share of the padding first.

    Its bias is not added here but by the kernel that follows it, together with all else that comes
    before the next convolution. ``shuffled``: groups of output channels that a shuffle takes apart;
    ``valid``: no padding at all, unless it is by reflection.
    """

    def __init__(
        self,
        inputs: int | Runs,
        outputs: int | Runs,
        kernel: int,
        stride: int = 1,
        *,
        reflect: bool = False,
        valid: bool = False,
        shuffled: int = 1,
        bias: bool = True,
        draw: Draw = he_uniform,
    ):
        super().__init__()
        self.kernel, self.stride, self.reflect, self.shuffled = kernel, stride, reflect, shuffled
        self.inputs, self.channels = runs_of(inputs), runs_of(outputs)
        # Even padding on both ends is the convolution's own affair; anything else is padded first.
        self.built_in = stride == 1 and kernel % 2 == 1 and not reflect and not valid
        self.is_valid = valid and not reflect
        self.conv = uninitialized(
            nn.Conv2d,
            sum(self.inputs),
            sum(self.channels) * shuffled,
            kernel,
            stride,
            padding=kernel // 2 if self.built_in else 0,
            bias=bias,
        )
        # On the layer, where `initialize` looks for it.
        self.conv.draw = draw

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), for the kernel that follows; None of a convolution without."""
        return self.conv.bias

    def border(self, rows: int, columns: int) -> Border:
        """Pixels (left, right, top, bottom) by which an input of this size is to be framed."""
        if self.built_in or self.is_valid:
            return _NO_BORDER
        vertical = _same_padding(rows, self.kernel, self.stride)
        return *_same_padding(columns, self.kernel, self.stride), *vertical

    def forward(self, x_bchw: Tensor, *, framed: bool = False) -> Tensor:
        """The products, without the bias; ``framed``: the input has its border already."""
        border = _NO_BORDER if framed else self.border(*x_bchw.shape[2:])
        missing = self.conv.weight.shape[1] - x_bchw.shape[1]  # of an aligned model: see `align`
        # Faces that no feed has padded, as those of a preview, have 3 channels.
        if missing:
            x_bchw = F.pad(x_bchw, (0, 0, 0, 0, 0, missing))
        if any(border):
            x_bchw = _framed(x_bchw, border, reflect=self.reflect)
        padding = self.kernel // 2 if self.built_in else 0
        return convolution(x_bchw, self.conv.weight, self.stride, padding)

    def describe(self, network: Network, x: Value, *, name: str = "") -> Value:
        """Add the layers of this block to a graph; their output, with the bias."""
        if self.reflect:
            x = network.add("ReflectionPadding2D", x, stride=self.stride, kernel_size=self.kernel)
        return network.add(
            "Conv2D",
            x,
            weights=self.conv,
            name=name,
            filters=self.conv.out_channels,
            kernel_size=self.kernel,
            strides=self.stride,
            padding="valid" if self.reflect or self.is_valid else "same",
            use_bias=self.bias is not None,
        )

    def align(self, multiple: int) -> None:
        """Pad the channels to a multiple; see `alignment`."""
        by_output = axis(0, self.channels, self.shuffled, multiple)
        pad_parameter(self.conv, "weight", (by_output, axis(1, self.inputs, 1, multiple)))
        pad_parameter(self.conv, "bias", (by_output,))


class ConvBlock(nn.Module):
    """[B, C, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]; if ``valid``, less.

    Convolution, then ``norm`` (a module over the picture) if there is one, then LeakyReLU.
    """

    def __init__(
        self,
        inputs: int | Runs,
        outputs: int | Runs,
        kernel: int = 5,
        stride: int = 2,
        *,
        slope: float = 0.1,
        norm: nn.Module | None = None,
        reflect: bool = False,
        valid: bool = False,
        draw: Draw = he_uniform,
    ):
        super().__init__()
        self.conv = SameConv(
            inputs, outputs, kernel, stride, reflect=reflect, valid=valid, draw=draw
        )
        self.norm, self.slope, self.channels = norm, slope, self.conv.channels

    def forward(
        self,
        x_bchw: Tensor,
        *,
        framed: bool = False,
        border: Border = _NO_BORDER,
        reflect: bool = False,
    ) -> Tensor:
        """``framed``: the input has its border already; ``border``: the output gets one, of zeros
        or, with ``reflect``, of its own reflection."""
        product, bias = self.conv(x_bchw, framed=framed), self.conv.bias
        # A norm needs the bias before it; without one the same kernel adds it and activates.
        if self.norm is not None:
            product, bias = self.norm(bias_act(product, bias, negative_slope=1)), None
        return bias_act(product, bias, negative_slope=self.slope, border=border, reflect=reflect)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output."""
        x = self.conv.describe(network, x)
        x = x if self.norm is None else describe(network, self.norm, x)
        return network.leaky_relu(x, self.slope)


class ConvBlocks(nn.Sequential):
    """`ConvBlock`s in a row; each frames its output as the next one needs it.

    So no pass over memory only pads.
    """

    def forward(self, x_bchw: Tensor) -> Tensor:
        rows, columns = x_bchw.shape[2:]
        blocks, framed = cast(Sequence[ConvBlock], self), False
        for number, block in enumerate(blocks, 1):
            stride = block.conv.stride
            if block.conv.is_valid:
                rows, columns = rows - block.conv.kernel + 1, columns - block.conv.kernel + 1
            rows, columns = -(-rows // stride), -(-columns // stride)
            follower = blocks[number].conv if number < len(blocks) else None
            # The pass that writes the output writes the border too.
            border = follower.border(rows, columns) if follower else _NO_BORDER
            reflect = follower is not None and follower.reflect
            x_bchw = block(x_bchw, framed=framed, border=border, reflect=reflect)
            framed = follower is not None
        return x_bchw

    @property
    def channels(self) -> Runs:
        """Runs of the output."""
        return cast(ConvBlock, self[-1]).channels


def downscales(
    inputs: int, widths: Sequence[int], *, reflect: bool = False, draw: Draw = he_uniform
) -> ConvBlocks:
    """A `ConvBlock` of 5x5 and stride 2 for each width."""
    pairs = zip((inputs, *widths), widths, strict=False)
    return ConvBlocks(*(ConvBlock(i, o, reflect=reflect, draw=draw) for i, o in pairs))


class Upscale(nn.Module):
    """[B, C, H, W] -> [B, outputs, factor H, factor W]: convolution, LeakyReLU ``slope``,
    depth-to-space, LeakyReLU ``after``."""

    def __init__(
        self,
        inputs: int | Runs,
        outputs: int,
        *,
        kernel: int = 3,
        factor: int = 2,
        slope: float = 0.1,
        after: float = 1.0,
        reflect: bool = False,
        draw: Draw = he_uniform,
    ):
        super().__init__()
        self.factor, self.slopes, self.channels = factor, (slope, after), runs_of(outputs)
        # Of a negative value both LeakyReLUs multiply; a shuffle between them changes no value.
        self.slope = slope * after
        self.conv = SameConv(
            inputs, outputs, kernel, reflect=reflect, shuffled=factor**2, draw=draw
        )
        # ICNR then draws one kernel for all pixels that a shuffle makes of one.
        self.conv.conv.icnr_groups = factor**2

    def forward(self, x_bchw: Tensor) -> Tensor:
        return bias_act_depth_to_space(
            self.conv(x_bchw), self.conv.bias, negative_slope=self.slope, factor=self.factor
        )

    def branches(self, x_bchw: Tensor, *slopes: float) -> tuple[Tensor, ...]:
        """The output with each of several slopes, of one convolution."""
        product = self.conv(x_bchw)
        return tuple(
            bias_act_depth_to_space(
                product, self.conv.bias, negative_slope=slope, factor=self.factor
            )
            for slope in slopes
        )

    def describe(self, network: Network, x: Value, *, after: bool = True) -> Value:
        """Add the layers of this block to a graph; their output.

        Args:
            network: Network that gets them.
            x: Input.
            after: Add the LeakyReLU after all as well.
        """
        x = network.leaky_relu(self.conv.describe(network, x), self.slopes[0])
        x = network.add("PixelShuffler", x, size=self.factor)
        return network.leaky_relu(x, self.slopes[1]) if after else x


class HybridUpscale(nn.Module):
    """Half of the channels from `Upscale`, half from a convolution that is enlarged bilinearly.

    [B, C, H, W] -> [B, 2 (outputs - outputs // 2), factor H, factor W]. LeakyReLU ``slope`` is of
    the first half alone, ``after`` of both.
    """

    def __init__(
        self,
        inputs: int | Runs,
        outputs: int,
        *,
        factor: int = 2,
        slope: float = 0.1,
        after: float = 1.0,
        reflect: bool = False,
    ):
        super().__init__()
        half = outputs - outputs // 2
        self.factor, self.slope, self.after = factor, slope * after, after
        self.channels = (half, half)
        self.shuffled = Upscale(inputs, half, factor=factor, slope=slope, reflect=reflect)
        self.enlarged = SameConv(inputs, half, 3)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.branches(x_bchw, (self.slope, self.after))[0]

    def branches(self, x_bchw: Tensor, *slopes: tuple[float, float]) -> tuple[Tensor, ...]:
        """The output with each of several pairs of slopes, of one pair of convolutions."""
        shuffled = self.shuffled.branches(x_bchw, *(slope for slope, _ in slopes))
        # The bias is added behind: enlarged, it is what it was.
        enlarged = enlarge(self.enlarged(x_bchw), self.factor)
        return tuple(
            torch.cat((first, bias_act(enlarged, self.enlarged.bias, negative_slope=slope)), dim=1)
            for first, (_, slope) in zip(shuffled, slopes, strict=True)
        )

    def describe(self, network: Network, x: Value, *, after: bool = True) -> Value:
        """Add the layers of this block to a graph; their output. ``after``: see `Upscale`."""
        first = self.shuffled.describe(network, x)
        second = self.enlarged.describe(network, x)
        second = network.add("UpSampling2D", second, size=self.factor, interpolation="bilinear")
        x = network.add("Concatenate", first, second, axis=-1)
        return network.leaky_relu(x, self.after) if after else x


class FastUpscale(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: the sum of both ways of `HybridUpscale`, and of it
    LeakyReLU ``after``."""

    def __init__(
        self, inputs: int | Runs, outputs: int, *, after: float = 1.0, reflect: bool = False
    ):
        super().__init__()
        self.after = after
        self.enlarged = SameConv(inputs, outputs, 3)
        self.shuffled = Upscale(inputs, outputs, reflect=reflect)
        self.channels = self.shuffled.channels

    def forward(self, x_bchw: Tensor) -> Tensor:
        enlarged, shuffled = enlarge(self.enlarged(x_bchw)), self.shuffled(x_bchw)
        return bias_act(
            enlarged, self.enlarged.bias, negative_slope=self.after, residual_bchw=shuffled
        )

    def describe(self, network: Network, x: Value, *, after: bool = True) -> Value:
        """Add the layers of this block to a graph; their output. ``after``: see `Upscale`."""
        enlarged = self.enlarged.describe(network, x)
        enlarged = network.add("UpSampling2D", enlarged, size=2, interpolation="bilinear")
        x = network.add("Add", enlarged, self.shuffled.describe(network, x))
        return network.leaky_relu(x, self.after) if after else x


class Residual(nn.Module):
    """LeakyReLU 0.2 of x plus two convolutions of it, the first with LeakyReLU 0.2."""

    def __init__(
        self,
        channels: int | Runs,
        *,
        kernel: int = 3,
        bias: bool = True,
        reflect: bool = False,
        draw: Draw = he_uniform,
    ):
        super().__init__()
        self.channels = runs_of(channels)
        first, second = (
            SameConv(channels, channels, kernel, reflect=reflect, draw=rule, bias=bias)
            # The second begins near 0, so that a new block hardly changes what goes through it.
            for rule in (draw, small_uniform)
        )
        self.first, self.second = first, second

    def forward(self, x_bchw: Tensor) -> Tensor:
        y_bchw = bias_act(self.first(x_bchw), self.first.bias, negative_slope=0.2)
        y_bchw = self.second(y_bchw)
        return bias_act(y_bchw, self.second.bias, negative_slope=0.2, residual_bchw=x_bchw)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output."""
        y = network.leaky_relu(self.first.describe(network, x), 0.2)
        return network.leaky_relu(network.add("Add", self.second.describe(network, y), x), 0.2)


class SeparableConv(nn.Module):
    """[B, C, H, W] -> [B, outputs, ceil(H / 2), ceil(W / 2)]: each channel by itself with 5x5 and
    stride 2, then all channels of a pixel, then ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        draw: Draw = depthwise_he_uniform,
        mix: Draw = he_uniform,
    ):
        super().__init__()
        self.channels = runs_of(outputs)
        self.depthwise = uninitialized(nn.Conv2d, inputs, inputs, 5, 2, groups=inputs, bias=False)
        self.depthwise.draw = draw
        self.pointwise = SameConv(inputs, outputs, 1, draw=mix)

    def forward(self, x_bchw: Tensor) -> Tensor:
        left, right = _same_padding(x_bchw.shape[3], 5, 2)
        top, bottom = _same_padding(x_bchw.shape[2], 5, 2)
        framed = _framed(x_bchw, (left, right, top, bottom))
        mixed = convolution(framed, self.depthwise.weight, 2, groups=self.depthwise.groups)
        return bias_act(self.pointwise(mixed), self.pointwise.bias, negative_slope=0)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output."""
        arrays = (*keras_entries(self.depthwise), *keras_entries(self.pointwise))
        x = network.add(
            "SeparableConv2D",
            x,
            weights=arrays,
            filters=self.pointwise.conv.out_channels,
            kernel_size=5,
            strides=2,
            padding="same",
            use_bias=True,
            depth_multiplier=1,
        )
        return network.add("Activation", x, activation="relu")


class ToImage(nn.Module):
    """[B, C, H, W] -> [B, outputs, H, W] in 0..1: convolution, then a sigmoid in fp32."""

    def __init__(self, inputs: int | Runs, outputs: int, kernel: int = 5):
        super().__init__()
        self.outputs = outputs
        self.conv = SameConv(inputs, outputs, kernel)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return to_image(self.conv(x_bchw), self.conv.bias, channels=self.outputs)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output, named for what it shows."""
        name = f"{'mask' if self.outputs == 1 else 'face'}_out_{x.shape[0]}_{network.name}"
        x = self.conv.describe(network, x, name=f"{name}_conv2d")
        return network.add("Activation", x, name=name, activation="sigmoid")


class Dense(nn.Module):
    """A dense layer between vectors [B, N], from or to pictures [B, C, S, S], in NHWC order.

    ``inputs`` and ``outputs`` are lengths of vectors, or ``(edge in px, channels)`` of pictures.
    """

    is_low_rank = False
    """Whether the backward pass leaves the factors of the weight's gradient; see `dense`."""

    def __init__(
        self,
        inputs: int | tuple[int, int | Runs],
        outputs: int | tuple[int, int | Runs],
        *,
        draw: Draw = glorot_uniform,
    ):
        super().__init__()
        self.inputs, self.outputs = _picture(inputs), _picture(outputs)
        self.linear = uninitialized(nn.Linear, _numbers(self.inputs), _numbers(self.outputs))
        self.linear.draw = draw
        self.channels = self.outputs[1]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            pixels = x.shape[2] * x.shape[3]
            missing = self.linear.weight.shape[1] // pixels - x.shape[1]  # see `SameConv`
            x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
            # NHWC is the order in memory, so that flattening copies nothing.
            x = x.permute(0, 2, 3, 1).flatten(1)
        # Low rank: the weight's gradient stays two factors, which the update multiplies.
        layer = self.linear
        out_bn = (dense if self.is_low_rank else linear)(x, layer.weight, layer.bias)
        edge = self.outputs[0]
        if not edge:
            return out_bn
        return out_bn.view(out_bn.shape[0], edge, edge, -1).permute(0, 3, 1, 2)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output, a picture if it makes one."""
        x = self.describe_product(network, x)
        edge, channels = self.outputs
        if not edge:
            return x
        return network.add("Reshape", x, target_shape=(edge, edge, sum(channels)))

    def describe_product(self, network: Network, x: Value) -> Value:
        """Add the layers of this block but the last, which makes a picture of a vector."""
        x = network.add("Flatten", x) if len(x.shape) == 3 else x
        units = self.linear.out_features
        return network.add("Dense", x, weights=self.linear, units=units, use_bias=True)

    def align(self, multiple: int) -> None:
        """Pad the channels of pictures on either side; see `alignment`."""
        by_output, by_input = (
            axis(number, runs, max(edge, 1) ** 2, multiple if edge else 1)
            for number, (edge, runs) in enumerate((self.outputs, self.inputs))
        )
        pad_parameter(self.linear, "weight", (by_output, by_input))
        pad_parameter(self.linear, "bias", (by_output,))


def _picture(shape: int | tuple[int, int | Runs]) -> tuple[int, Runs]:
    """(edge, runs of channels); of a vector the edge is 0."""
    return (0, (shape,)) if isinstance(shape, int) else (shape[0], runs_of(shape[1]))


def _numbers(picture: tuple[int, Runs]) -> int:
    edge, runs = picture
    return max(edge, 1) ** 2 * sum(runs)


class Decoder(nn.Module):
    """A face from a code and, where there is a second branch, its mask."""

    def __init__(self, face: nn.Module, mask: nn.Module | None):
        super().__init__()
        self.face, self.mask = face, mask

    def forward(self, code_bchw: Tensor) -> tuple[Tensor, ...]:
        face = self.face(code_bchw)
        return (face,) if self.mask is None else (face, self.mask(code_bchw))

    def describe(self, network: Network, code: Value) -> tuple[Value, ...]:
        """Add the layers of both branches to a graph; their outputs."""
        branches = (self.face,) if self.mask is None else (self.face, self.mask)
        return tuple(describe(network, branch, code) for branch in branches)


def branch(
    inputs: int | Runs,
    widths: Iterable[int],
    outputs: int,
    *,
    kernel: int = 3,
    reflect: bool = False,
    draw: Draw = he_uniform,
) -> nn.Sequential:
    """`Upscale` to each width in turn, then a picture of 3 channels or a mask of 1."""
    steps: list[nn.Module] = []
    for width in widths:
        steps.append(Upscale(inputs, width, kernel=kernel, reflect=reflect, draw=draw))
        inputs = width
    return nn.Sequential(*steps, ToImage(inputs, outputs))


def upscale_decoder(
    inputs: int | Runs, widths: Sequence[int], *, learn_mask: bool, reflect: bool
) -> Decoder:
    """A face through `Upscale` blocks; with ``learn_mask`` a mask through its own."""
    face = branch(inputs, widths, 3, reflect=reflect)
    return Decoder(face, branch(inputs, widths, 1, reflect=reflect) if learn_mask else None)


def residual_upscale(
    inputs: int | Runs,
    outputs: int,
    *,
    kernel: int = 3,
    residuals: int = 1,
    reflect: bool = False,
    draw: Draw = he_uniform,
    first: Draw = he_uniform,
) -> list[nn.Module]:
    """`Upscale` with LeakyReLU 0.2 after it, then `Residual` blocks whose first convolution is
    drawn by ``first``."""
    step = Upscale(inputs, outputs, kernel=kernel, slope=1, after=0.2, reflect=reflect, draw=draw)
    return [step, *(Residual(outputs, reflect=reflect, draw=first) for _ in range(residuals))]
