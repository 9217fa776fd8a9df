"""What every family is: one shared encoder, one decoder a side, or one for both.

Shape letters: B faces of one side, N = 2B faces of both, C channels, H rows, W columns.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from .graph import Network, Value
from .initializers import initialize

Side = Literal["a", "b"]
Codes = tuple[Tensor, ...]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """Settings that shape every family alike."""

    learn_mask: bool = False
    """Give each decoder a second branch that predicts the face mask."""

    reflect_padding: bool = False
    """Pad by reflection in the blocks that allow it."""

    icnr_init: bool = False
    """Draw the convolutions before a depth-to-space so that no checkerboard shows at the start."""

    conv_aware_init: bool = False
    """Draw convolutions convolution-aware."""


class Autoencoder(nn.Module, abc.ABC):
    """Encoder of both sides and their decoders: `encode` is of both, `side_code` and `decode` of
    one."""

    Config: Any
    tiny: Any
    """The family's smallest sensible settings, for tests and smoke runs."""

    input_px: int
    output_px: tuple[int, ...]
    """Edge of each face output, small to large."""

    build: Build

    encoder: nn.Module
    decoder_a: nn.Module
    decoder_b: nn.Module

    has_one_decoder = False
    """Whether both sides meet the same decoder, which then takes them as one batch."""

    freeze_layers: tuple[str, ...] = ("encoder",)
    """Sub-networks that ``--freeze-weights`` leaves as they are."""

    load_layers: tuple[str, ...] = ("encoder",)
    """Sub-networks that ``--load-weights`` takes from another model."""

    frozen: tuple[str, ...] = ()
    """Sub-networks that `freeze` has set aside."""

    @classmethod
    def sizes(cls, _options: Any) -> tuple[int, tuple[int, ...]]:
        """``(input_px, output_px)`` of a model with these options, without making it."""
        return cls.input_px, cls.output_px

    @abc.abstractmethod
    def __init__(self, config: Any, build: Build):
        """Layers without weights yet, for `initialize` or a checkpoint to fill."""
        super().__init__()
        self.config, self.build = config, build

    def encode(self, faces_nchw: Tensor) -> Codes:
        """What the two sides share, computed once for any number of faces, 0..1."""
        return (self.encoder(faces_nchw),)

    def side_code(self, codes: Codes, _side: Side) -> Codes:
        """Input of the decoder of a side, from what `encode` gave for both."""
        return codes

    def decode(self, codes: Codes, side: Side) -> Outputs:
        """Faces of ``side``, small to large, 0..1 fp32; then the mask where one is learned."""
        return (self.decoder_a if side == "a" else self.decoder_b)(*codes)

    def forward(
        self, faces_nchw: Tensor, side_stream: torch.cuda.Stream | None = None
    ) -> tuple[Outputs, Outputs]:
        """Outputs of A for the first half of the batch, of B for the second.

        Args:
            faces_nchw: A's faces, then as many of B, 0..1.
            side_stream: Decode B there while A is decoded; the backward pass then does likewise.
                The codes must live until then: an encoder's last operation keeps its result, and
                for those of a frozen one see `record_stream`.
        """
        codes = self.encode(faces_nchw)
        record_stream(codes, side_stream)
        # Split, not sliced: the gradients of both sides then meet in one copy.
        code_a, code_b = split_sides(codes)
        # One call of the decoder for both sides in place of two.
        if self.has_one_decoder:
            mixed = zip(self.side_code(code_a, "a"), self.side_code(code_b, "b"), strict=True)
            outputs = self.decode(tuple(torch.cat(sides) for sides in mixed), "a")
            return split_sides(outputs)
        return decode_on_streams(
            lambda: self._as_side(code_a, "a"), lambda: self._as_side(code_b, "b"), side_stream
        )

    def _as_side(self, codes: Codes, side: Side) -> Outputs:
        return self.decode(self.side_code(codes, side), side)

    def swap(self, faces_bchw: Tensor, side: Side) -> Outputs:
        """Decode any faces as ``side``: its own faces are re-created, the other's swapped."""
        return self._as_side(self.encode(faces_bchw), side)

    def graph(self) -> Network:
        """Description of the model for exporters: two faces in, then all outputs of A, all of B.

        Raises:
            ValueError: A part of it cannot be described, or one of its weights has no place in the
                description; it is named.
        """
        model = Network(self.graph_name)
        edge_px = self.input_px
        faces = [model.input((edge_px, edge_px, 3), f"face_in_{side}") for side in ("a", "b")]
        for face, side in zip(faces, cast(tuple[Side, ...], ("a", "b")), strict=True):
            model.outputs += self.describe_side(model, face, side)
        # By identity: two weights may hold equal numbers, none may be left out of a file.
        described = {id(entry.tensor) for layer in model.layers() for entry in layer.weights}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if id(tensor) not in described:
                raise ValueError(f"{name} of {self.Config.family} has no place in a graph")
        return model

    @property
    def graph_name(self) -> str:
        """Name of the model as a graph."""
        return self.Config.family.replace("-", "_")

    def describe_side(self, model: Network, face: Value, side: Side) -> tuple[Value, ...]:
        """Add what a face of one side goes through to a graph; the outputs."""
        name = f"decoder_{side}"
        return model.run(name, getattr(self, name), *model.run("encoder", self.encoder, face))

    def subnetwork(self, path: str) -> nn.Module:
        """The part at this path of attributes, such as `encoder`.

        Raises:
            ValueError: There is none; those at the top are named.
        """
        found = dict(self.named_modules()).get(path) if path else None
        if found is None:
            has = ", ".join(name for name, _ in self.named_children())
            raise ValueError(f"{self.Config.family} has no sub-network {path!r}; it has: {has}")
        return found

    def freeze(self) -> None:
        """Leave the `freeze_layers` as they are from now on, running estimates and all.

        Raises:
            ValueError: The model lacks one of them, or nothing would be left to train.
        """
        for path in self.freeze_layers:
            self.subnetwork(path).requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(
                f"nothing of {self.Config.family} is left to train when "
                f"{', '.join(self.freeze_layers)} are frozen; freeze less of it"
            )
        self.frozen = self.freeze_layers
        # Frozen parts go to evaluation at once, whatever mode the model is in.
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """A frozen part computes as in evaluation always: no dropout, the running estimates."""
        super().train(mode)
        # After the call above, which has put every part into the same mode.
        for path in self.frozen:
            self.subnetwork(path).eval()
        return self

    @property
    def is_noisy(self) -> bool:
        """Whether a training step draws random numbers (dropout, noise)."""
        return any(
            module.p > 0
            if isinstance(module, nn.Dropout | nn.Dropout2d)
            else hasattr(module, "is_noise")
            for module in self.modules()
        )

    def align(self, multiple: int) -> None:
        """Pad channels to a multiple where the tensor cores want it; see `alignment`.

        A model with statistics over channels stays as it is: zeros would count in them.
        """
        # All or none: a padded block before a norm that cannot be padded would not fit it.
        for module in self.modules():
            if any(run % multiple for run in getattr(module, "normal_channels", ())):
                return
        for module in self.modules():
            if module is not self and hasattr(module, "align"):
                cast(Any, module).align(multiple)

    def initialize(self, seed: int) -> None:
        """Fill every weight as a pure function of ``seed``."""
        initialize(
            self,
            # On the CPU, whose numbers do not depend on the machine.
            torch.Generator().manual_seed(seed),
            icnr_init=self.build.icnr_init,
            conv_aware_init=self.build.conv_aware_init,
        )

    def load_pretrained(self) -> None:
        """Take up weights that somebody else trained, where the options ask for it.

        Raises:
            ValueError: They are not where the options say.
        """

    def to_channels_last(self) -> None:
        """Put the weights in channels_last order."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def record_stream(codes: Codes, side_stream: torch.cuda.Stream | None) -> None:
    """Reserve the memory of codes without a history until the side stream is past them.

    A backward pass drops them when B's part is queued, not done. Codes with a history live longer.
    """
    if side_stream is not None:
        for code in codes:
            if not code.requires_grad:
                code.record_stream(side_stream)


def split_sides(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Parts of A and of B of each batch: its first and its last half."""
    first, last = zip(*(t.split(t.shape[0] // 2) for t in tensors), strict=True)
    return first, last


def decode_on_streams(
    of_a: Callable[[], Outputs], of_b: Callable[[], Outputs], side_stream: torch.cuda.Stream | None
) -> tuple[Outputs, Outputs]:
    """Outputs of both sides; B's on the side stream, if there is one, while A's are computed."""
    if side_stream is None:
        return of_a(), of_b()
    # B reads codes that the current stream may still be computing. Before A's decoder is queued
    # there, for which B would have to wait as well.
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        outputs_b = of_b()
    outputs_a = of_a()
    # What follows reads B's outputs as well.
    torch.cuda.current_stream().wait_stream(side_stream)
    return outputs_a, outputs_b
