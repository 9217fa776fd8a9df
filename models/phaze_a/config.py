"""Options of phaze-a, the numbers that follow from them, and what does not go together."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..fields import fields_of
from ..options import Options, option
from . import backbones
from .curves import capped, curve, halvings

Conflicts = Callable[["Config"], Iterator[tuple[str, str]]]
"""(option, rule that it breaks) of all that does not go together."""

NETWORKS = (
    "encoder",
    "fc_a",
    "fc_b",
    "fc_both",
    "fc_shared",
    "fc_gblock",
    "g_block_a",
    "g_block_b",
    "g_block_both",
    "decoder_a",
    "decoder_b",
    "decoder_both",
)
"""Sub-networks that a model may have, in the order in which they are made."""

_UPSCALES = ("subpixel", "resize_images", "upscale_fast", "upscale_hybrid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Options):
    """Options of the family.

    Raises:
        ValueError: On a value that breaks its rule or does not go with the others; the option, the
            rule and, where there is one, the nearest value that does are named.
    """

    output_size: int = option(128, low=64, high=2048, step=16)
    """Edge of the decoded face in px."""

    shared_fc: str = option("none", choices=("none", "full", "half"))
    """Whether a side gets a code that both share, beside its own. full: of one more network; half:
    of A's."""

    enable_gblock: bool = option(True)
    """Put a block between code and decoder in which noise and a shared style shape the code."""

    split_fc: bool = option(True)
    """A fully connected network for each side, else one for both."""

    split_gblock: bool = option(False)
    """A g-block for each side, else one for both."""

    split_decoders: bool = option(False)
    """A decoder for each side, else one for both."""

    enc_architecture: str = option("fs_original", choices=backbones.NAMES)
    """The encoder: fs_original, shaped by the options that begin so, or a known network."""

    enc_scaling: int = option(7, low=0, high=200)
    """Edge of the encoder's picture in percent of its usual one (fs_original: 1024 px), rounded
    down to a multiple of 16."""

    enc_load_weights: bool = option(True)
    """Start a known network from pretrained weights."""

    enc_weights: str = option("", free=True, path=True)
    """File of pretrained weights, or a folder of such files; empty: the environment variable
    MIEN_BACKBONES names the folder."""

    enc_normalize: str = option("auto", choices=("auto", "reference", "pretrained"))
    """How a known network scales its picture and pads. pretrained: as its weights were trained;
    auto: so if it starts from pretrained weights, else as in models of the reference."""

    bottleneck_type: str = option(
        "dense", choices=("average_pooling", "dense", "max_pooling", "flatten")
    )
    """What makes one vector of the encoder's picture."""

    bottleneck_norm: str = option("none", choices=("none", "instance", "layer", "rms"))
    """Normalisation before the bottleneck."""

    bottleneck_size: int = option(1024, low=128, high=4096, step=128)
    """Length of the vector, of a dense bottleneck."""

    bottleneck_in_encoder: bool = option(True)
    """The bottleneck ends the encoder, else it begins each fully connected network."""

    fc_depth: int = option(1, low=0, high=16)
    """Dense layers of a fully connected network."""

    fc_min_filters: int = option(1024, low=16, high=5120, step=16)
    """Channels that the first dense layer is sized for."""

    fc_max_filters: int = option(1024, low=16, high=5120, step=16)
    """Channels of the picture that the last dense layer makes."""

    fc_dimensions: int = option(4, low=1, high=16)
    """Edge of that picture in px."""

    fc_filter_slope: float = option(-0.5, low=-0.99, high=0.99)
    """Whether the layers' sizes change early (below 0) or late (above) on the way."""

    fc_dropout: float = option(0.0, low=0.0, high=0.99, free=True)
    """Share of values dropped before each dense layer, in training."""

    fc_upsampler: str = option("upsample2d", choices=(*_UPSCALES, "upsample2d"))
    """How that picture is scaled up; upsample2d has no weights."""

    fc_upsamples: int = option(1, low=0, high=4)
    """Times that it doubles."""

    fc_upsample_filters: int = option(512, low=16, high=5120, step=16)
    """Channels then, of a way with weights."""

    fc_gblock_depth: int = option(3, low=1, high=16)
    """Dense layers of the network that makes the g-block's style."""

    fc_gblock_min_nodes: int = option(512, low=128, high=5120, step=64)
    """Length of its first layer's vector."""

    fc_gblock_max_nodes: int = option(512, low=128, high=5120, step=64)
    """Length of its last layer's vector."""

    fc_gblock_filter_slope: float = option(-0.5, low=-0.99, high=0.99)
    """Same as ``fc_filter_slope``, for these layers."""

    fc_gblock_dropout: float = option(0.0, low=0.0, high=0.99, free=True)
    """Same as ``fc_dropout``, for these layers."""

    dec_upscale_method: str = option("subpixel", choices=(*_UPSCALES, "upscale_dny"))
    """How the decoder doubles the picture."""

    dec_upscales_in_fc: int = option(0, low=0, high=6)
    """Upscales that are done at the end of the fully connected networks instead."""

    dec_norm: str = option("none", choices=("none", "batch", "group", "instance", "layer", "rms"))
    """Normalisation after each upscale."""

    dec_min_filters: int = option(64, low=8, high=512, step=8)
    """Channels of the last upscale."""

    dec_max_filters: int = option(512, low=8, high=5120, step=8)
    """Channels of the first upscale."""

    dec_slope_mode: str = option("full", choices=("full", "cap_max", "cap_min"))
    """How channels fall from first to last. full: along a curve over all upscales; cap_max: by a
    fixed share at the end; cap_min: by a fixed share at the beginning."""

    dec_filter_slope: float = option(-0.45, low=-0.99, high=0.99)
    """full: as ``fc_filter_slope``; else the share, without its sign."""

    dec_res_blocks: int = option(1, low=0, high=8)
    """Residual blocks after each upscale of the face."""

    dec_output_kernel: int = option(5, low=1, high=9, step=2)
    """Edge of the last convolution's kernel in px."""

    dec_gaussian: bool = option(True)
    """Add noise after each upscale of the face, in training."""

    dec_skip_last_residual: bool = option(True)
    """Leave out residual blocks after the last upscale of a network."""

    freeze_layers: tuple[str, ...] = option(
        ("keras_encoder",), choices=(*NETWORKS, "keras_encoder"), free=True
    )
    """Sub-networks that ``--freeze-weights`` leaves as they are; keras_encoder: the known network
    in the encoder. Those that the model does not have are passed over."""

    load_layers: tuple[str, ...] = option(("encoder",), choices=NETWORKS)
    """Sub-networks that ``--load-weights`` takes from another model."""

    fs_original_depth: int = option(4, low=2, high=10)
    """Times that fs_original halves the picture."""

    fs_original_min_filters: int = option(128, low=8, high=2048, step=2)
    """Channels of its first convolution; they double with every halving."""

    fs_original_max_filters: int = option(1024, low=8, high=8192, step=2)
    """Channels beyond which they do not double."""

    fs_original_use_alt: bool = option(False)
    """Two convolutions to each halving by maxima; the last one takes 4 px to 1."""

    mobilenet_width: float = option(1.0, low=0.1, high=2.0)
    """Multiplies the channels of a MobileNet."""

    mobilenet_depth: int = option(1, low=1, high=10)
    """Filters for each channel in the depthwise convolutions of mobilenet."""

    mobilenet_dropout: float = option(0.001, low=0.001, high=2.0)
    """Dropout of mobilenet's classifier, which is not there: without effect."""

    mobilenet_minimalistic: bool = option(False)
    """A MobileNet v3 of plain parts."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        self._refuse(_conflicts)

    def check_reflection(self) -> None:
        """Raise ValueError where there are too few pixels for padding by reflection."""
        self._refuse(_conflicts_of_reflection)

    def _refuse(self, conflicts: Conflicts) -> None:
        conflict = next(conflicts(self), None)
        if conflict is None:
            return
        name, rule = conflict
        near = _nearest(self, name, conflicts)
        hint = "" if near is None else f"; the nearest is {near}"
        raise ValueError(
            f"model.options.{name} of {self.family} must be {rule}, got {getattr(self, name)}{hint}"
        )

    @property
    def is_original(self) -> bool:
        """Whether the encoder is made of blocks here, and is no known network."""
        return self.enc_architecture == "fs_original"

    @property
    def starts_pretrained(self) -> bool:
        """Whether a new model gets pretrained weights."""
        return self.enc_load_weights and not self.is_original

    @property
    def input_px(self) -> int:
        """Edge of the encoder's picture."""
        return backbones.input_size(
            self.enc_architecture, self.enc_scaling, pretrained=self.starts_pretrained
        )

    @property
    def fit_px(self) -> int:
        """Edge for whose pixels the channels of the code are made to fit."""
        return halvings(self.output_size, self._assumed_px)[-1]

    @property
    def _assumed_px(self) -> int:
        # Of each doubling but the first too little, as the reference has it.
        return self.fc_dimensions * (self.fc_upsamples + 1)

    def fitted(self, filters: int) -> int:
        """Channels, rounded down so that they can be dealt out to the pixels of `fit_px`."""
        # As in the reference, which rounds nothing where the two agree.
        pixels = 1 if self.fit_px == self._assumed_px else self.fit_px**2
        return filters // pixels * pixels

    @property
    def fc_channels(self) -> int:
        """Channels of the picture that the last dense layer makes."""
        return self.fitted(self.fc_max_filters)

    @property
    def fc_nodes(self) -> tuple[int, ...]:
        """Outputs of each dense layer."""
        pixels = self.fc_dimensions**2
        first, last = self.fitted(self.fc_min_filters) * pixels, self.fc_channels * pixels
        return curve(first, last, self.fc_depth, self.fc_filter_slope)

    @property
    def style_nodes(self) -> tuple[int, ...]:
        """Outputs of each dense layer of the g-block's style."""
        first, last = self.fc_gblock_min_nodes, self.fc_gblock_max_nodes
        return curve(first, last, self.fc_gblock_depth, self.fc_gblock_filter_slope)

    @property
    def fc_px(self) -> int:
        """Edge of the code when it is scaled up."""
        return self.fc_dimensions * 2**self.fc_upsamples

    @property
    def fc_has_filters(self) -> bool:
        """Whether the code is scaled up by layers with weights."""
        return self.fc_upsampler != "upsample2d" and self.fc_upsamples > 0

    @property
    def start_px(self) -> int:
        """Edge at which the decoder's upscales begin."""
        return halvings(self.output_size, self.fc_px)[-1]

    @property
    def dec_filters(self) -> tuple[int, ...]:
        """Channels of each upscale, those in the fully connected networks first."""
        count = (self.output_size // self.start_px).bit_length() - 1
        first, last, slope = self.dec_max_filters, self.dec_min_filters, self.dec_filter_slope
        if self.dec_slope_mode == "full":
            return curve(first, last, count, slope)
        return capped(first, last, count, slope, at_end=self.dec_slope_mode == "cap_min")


def _halves(channels: int) -> int:
    """Channels that a hybrid upscale gives, of two equal halves."""
    return 2 * (channels - channels // 2)


def _conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """What does not go together in any model."""
    fit = f"{config.fit_px}^2"
    for name, is_used in (
        ("fc_max_filters", True),
        ("fc_min_filters", config.fc_depth > 0),
        ("fc_upsample_filters", config.fc_has_filters),
    ):
        if is_used and not config.fitted(getattr(config, name)):
            yield "output_size", f"one for which {name} is {fit} or more"
    yield from _conflicts_of_nodes(config)
    start, num_upscales = config.start_px, len(config.dec_filters)
    if config.fc_px**2 * _start_channels(config) % start**2:
        yield (
            "output_size",
            (
                f"one to which {config.fc_px} x {config.fc_px} x {_start_channels(config)} values "
                f"double from a square of whole channels, not {start} x {start}"
            ),
        )
    if config.dec_upscales_in_fc > num_upscales:
        yield "dec_upscales_in_fc", f"0 to {num_upscales}, the upscales that there are"
    is_hybrid = config.dec_upscale_method == "upscale_hybrid"
    widths = [_halves(width) if is_hybrid else width for width in config.dec_filters]
    # The norm has 32 groups.
    if config.dec_norm == "group" and any(width % 32 for width in widths):
        filters = ", ".join(map(str, widths))
        yield "dec_norm", f"another where upscales have not multiples of 32 filters ({filters})"
    if config.is_original and config.fs_original_use_alt:
        halvings_left = (config.input_px // 4).bit_length()
        if config.fs_original_depth > halvings_left:
            size = f"{config.input_px} px (enc_scaling {config.enc_scaling})"
            yield "fs_original_depth", f"2 to {halvings_left} with fs_original_use_alt at {size}"


def _conflicts_of_nodes(config: Config) -> Iterator[tuple[str, str]]:
    values = config.fc_channels * config.fc_dimensions**2
    # `curve` rounds its numbers down to multiples of 8, as the reference's; the picture is not.
    if config.fc_depth and values % 8:
        yield (
            "fc_max_filters",
            (
                f"of a multiple of 8 values, not {config.fc_channels} x {config.fc_dimensions}^2 "
                f"(fitted to output_size {config.output_size})"
            ),
        )
    # A curve of one point has only its beginning.
    if config.fc_depth == 1 and config.fc_nodes[0] != values:
        yield "fc_min_filters", f"fc_max_filters ({config.fc_max_filters}) where fc_depth is 1"
    if 0 in config.fc_nodes:
        yield "fc_min_filters", "of 8 values or more"


def _start_channels(config: Config) -> int:
    """Channels of the picture with which the decoder's upscales begin."""
    channels = config.fc_channels
    if config.fc_has_filters:
        channels = config.fitted(config.fc_upsample_filters)
        channels = _halves(channels) if config.fc_upsampler == "upscale_hybrid" else channels
    # Upscales in the networks come before their codes are joined with the shared one.
    both = config.shared_fc != "none" and config.dec_upscales_in_fc == 0
    return 2 * channels if both else channels


def _conflicts_of_reflection(config: Config) -> Iterator[tuple[str, str]]:
    """Conflicts of reflect padding: a convolution mirrors no more pixels than lie behind the
    first."""
    deepest, size_px = 1, -(-config.input_px // 2)
    while size_px > 2:  # of which an odd size mirrors 2, as an even one
        deepest, size_px = deepest + 1, -(-size_px // 2)
    if config.is_original and not config.fs_original_use_alt:
        if config.fs_original_depth > deepest:
            size = f"{config.input_px} px (enc_scaling {config.enc_scaling})"
            yield "fs_original_depth", f"2 to {deepest} with reflect_padding at {size}"
    mirrors = ("subpixel", "upscale_fast", "upscale_hybrid")
    # The 4x4 convolution of `dny_entry` mirrors 2 px at the far end.
    least_px = 3 if config.dec_upscale_method == "upscale_dny" else 2
    if config.fc_has_filters and config.fc_upsampler in mirrors and config.fc_dimensions < 2:
        yield "fc_dimensions", "2 or more with reflect_padding"
    if config.dec_upscale_method != "resize_images" and config.start_px < least_px:
        yield (
            "fc_dimensions",
            (
                f"such that the decoder begins with {least_px} px or more with reflect_padding, "
                f"not {config.start_px} px"
            ),
        )


def _nearest(config: Config, name: str, conflicts: Conflicts) -> int | str | None:
    """The value of one option, nearest to its own, that is not refused."""
    rule, own = fields_of(type(config))[name], getattr(config, name)
    for value in rule.choices or sorted(rule.numbers, key=lambda number: abs(number - own)):
        # Not by its constructor, which would refuse the other conflicts.
        other = copy.copy(config)
        object.__setattr__(other, name, value)
        if name not in (refused for refused, _ in conflicts(other)):
            return value
    return None
