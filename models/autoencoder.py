"""What every family is: one shared encoder, one decoder a side.

Shape letters: B faces of one side, N = 2B faces of both, C channels, H rows, W columns.
"""

import abc
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import Bottleneck, SameConv
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


def require_step(name: str, value: int, low: int, high: int, step: int) -> None:
    """ValueError naming the nearest valid value unless ``value`` is low, low + step .. high."""
    if low <= value <= high and (value - low) % step == 0:
        return
    near = low + min(max(round((value - low) / step), 0), (high - low) // step) * step
    raise ValueError(
        f"{name} must be {low} to {high} in steps of {step}, got {value}; the nearest is {near}"
    )


class Autoencoder(nn.Module, abc.ABC):
    """A face goes through `encode`, which both sides share, then through `decode` of one side."""

    Config: Any
    tiny: Any
    """The family's smallest sensible settings, for tests and smoke runs."""

    input_px: int
    output_px: tuple[int, ...]
    """Edge of each face output, small to large."""

    build: Build

    @classmethod
    def sizes(cls, _options: Any) -> tuple[int, tuple[int, ...]]:
        """``(input_px, output_px)`` of a model with these options, without making it."""
        return cls.input_px, cls.output_px

    @abc.abstractmethod
    def encode(self, faces_nchw: Tensor) -> Codes:
        """What the two sides share, computed once for any number of faces, 0..1."""

    @abc.abstractmethod
    def decode(self, codes: Codes, side: Side) -> Outputs:
        """Faces of ``side``, small to large, 0..1 fp32; then the mask where one is learned."""

    def forward(
        self, faces_nchw: Tensor, side_stream: torch.cuda.Stream | None = None
    ) -> tuple[Outputs, Outputs]:
        """Outputs of A for the first half of the batch, of B for the second.

        Args:
            faces_nchw: A's faces, then as many of B, 0..1.
            side_stream: Decode B there while A is decoded; the backward pass then does likewise.
                The codes must live until then: an encoder's last operation keeps its result.
        """
        codes = self.encode(faces_nchw)
        # Split, not sliced: the gradients of both halves then meet in one copy.
        code_a, code_b = zip(*(c.split(c.shape[0] // 2) for c in codes), strict=True)
        if side_stream is None:
            return self.decode(code_a, "a"), self.decode(code_b, "b")
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            outputs_b = self.decode(code_b, "b")
        outputs_a = self.decode(code_a, "a")
        torch.cuda.current_stream().wait_stream(side_stream)
        return outputs_a, outputs_b

    def swap(self, faces_bchw: Tensor, side: Side) -> Outputs:
        """Any faces, decoded as ``side``: its own faces are re-created, the other's swapped."""
        return self.decode(self.encode(faces_bchw), side)

    def align(self, multiple: int) -> None:
        """Pad channels to a multiple where the tensor cores want it; see `alignment`."""
        for module in self.modules():
            if isinstance(module, SameConv | Bottleneck):
                module.align(multiple)

    def initialize(self, seed: int) -> None:
        """Fill every weight as a pure function of ``seed`` and lay them out channels_last."""
        initialize(self, torch.Generator().manual_seed(seed))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
