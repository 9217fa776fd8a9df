"""How the weights are moved: unscale, non-finite check, norm, clip and Adam, all on the device.

The optimizer keeps the fp32 weights; where the network computes in 16 bits, its parameters are the
low-precision copies that each update writes. A step whose gradient is not finite changes nothing
but the count of such steps; with fp16 it also halves the loss scale.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.adam import (
    BETA_1_POWER,
    BETA_2_POWER,
    GOOD_STEPS,
    LEARNING_RATE,
    SCALE,
    SKIPPED,
    STEP,
    adam,
    new_control,
)
from ...kernels.tables import Tables
from ...models.alignment import axes_of, crop, pad
from ..config import OptimizerConfig
from .frozen import Frozen
from .precision import Precision

_FIRST_SCALE = 65536.0
_SAVED = {  # what a resume needs of the control numbers, by name
    "step": STEP,
    "beta_1_power": BETA_1_POWER,
    "beta_2_power": BETA_2_POWER,
    "scale": SCALE,
    "good_steps": GOOD_STEPS,
}
_COUNTS = ("step", "beta_1_power", "beta_2_power")


@dataclass(frozen=True)
class Part:
    """Parameters that are moved together, with a finite check and a count of steps of their own."""

    numbers: list[int]
    """Which they are, of the model's."""

    tables: Tables
    control: Tensor


class Update:
    """The optimizer of one model and, with fp16, the loss scale.

    Takes over the model's weights: where the precision is of 16 bits, the model's parameters become
    copies in it. Parameters that require no gradient are left as they are.
    """

    is_whole = True
    """Whether a step that is not finite moves nothing at all."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        precision: Precision,
    ):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        others = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.model, self.precision = model, precision
        self.frozen = Frozen(others, precision.compute)
        self.names, self.parameters = list(named), list(named.values())
        self.masters = [parameter.detach() for parameter in self.parameters]
        self.copies: list[Tensor] = []
        if precision.compute is not torch.float32:
            for parameter in self.parameters:
                parameter.data = parameter.data.to(precision.compute)
            self.copies = [parameter.detach() for parameter in self.parameters]
        self.means = [torch.zeros_like(master) for master in self.masters]
        self.squares = [torch.zeros_like(master) for master in self.masters]
        control = new_control(
            self.masters[0].device,
            learning_rate=config.learning_rate,
            scale=_FIRST_SCALE if precision.scales_loss else 1.0,
        )
        self.parts = [self._part(list(range(len(self.parameters))), control)]
        self.rate = config.learning_rate
        self.settings: dict[str, Any] = {
            "beta_1": config.ada_beta_1,
            "beta_2": config.ada_beta_2,
            "epsilon": 10.0**config.epsilon_exponent,
            "dynamic_scale": precision.scales_loss,
        }

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Move the weights by the gradients of the (scaled) loss, one of each parameter."""
        self._move(self.parts[0], gradients)

    def beside_backward(self) -> AbstractContextManager[None]:
        """Wherein the backward pass is to run; here nothing is done beside it."""
        return nullcontext()

    @property
    def scale(self) -> Tensor | None:
        """What the loss's gradient is multiplied with, on the device; None: nothing."""
        return self.parts[0].control[SCALE].float() if self.precision.scales_loss else None

    def set_rate(self, rate: float) -> None:
        """Have the next update take this rate; nothing is read from the device."""
        if rate != self.rate:
            self.rate = rate
            for part in self.parts:
                part.control[LEARNING_RATE].fill_(rate)

    @property
    def skipped(self) -> Tensor:
        """Steps of this session that were not finite, of the part with the most; on the device."""
        return torch.stack([part.control[SKIPPED] for part in self.parts]).amax()

    @property
    def num_parameters(self) -> int:
        """Numbers in `weights`."""
        return sum(tensor.numel() for tensor in self.weights().values())

    def weights(self) -> dict[str, Tensor]:
        """The model's state in fp32, as a checkpoint holds it."""
        state = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        return state | self._cropped(self.masters) | self.frozen.weights

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `weights` gave.

        Raises:
            ValueError: A tensor is missing, unknown or of another shape.
        """
        own = self.weights()
        if tensors.keys() != own.keys():
            odd = sorted(tensors.keys() ^ own.keys())[0]
            raise ValueError(f"{odd} is in only one of them")
        masters = dict(zip(self.names, self.masters, strict=True))
        state = self.model.state_dict()
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name} has another shape")
            if name in masters:
                masters[name].copy_(self._padded(name, tensor))
            elif name in self.frozen.weights:
                self.frozen.load_weight(name, tensor)
            else:
                state[name].copy_(tensor)
        for copy, master in zip(self.copies, self.masters, strict=False):
            copy.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """What a resume needs besides, by name: `<parameter>.mean`, `.square`, `step`, `scale`.."""
        controls_p10 = torch.stack([part.control for part in self.parts])
        furthest = controls_p10[:, STEP].argmax(0, keepdim=True)
        control = controls_p10.index_select(0, furthest)[0]
        found = {name: control[index] for name, index in _SAVED.items()}
        for kind, tensors in (("mean", self.means), ("square", self.squares)):
            found |= {f"{k}.{kind}": v for k, v in self._cropped(tensors).items()}
        return found | self.frozen.state

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave; the rate and epsilon stay as configured now.

        A parameter of which there is nothing was frozen until now, and begins at zero. Then the
        count of steps begins anew for all, for Adam's correction of young means needs it: with the
        old count the first steps of such a parameter would be several times the rate. The others
        take shorter steps for some hundred iterations.

        Raises:
            ValueError: A tensor is missing or has another shape.
        """
        own = self.tensors()
        thawed = self._zeros_of_thawed(tensors)
        fresh = {name: own[name] for name in _COUNTS} if thawed else {}
        tensors = thawed | tensors | fresh
        for name, wanted in own.items():
            if name not in tensors or tensors[name].shape != wanted.shape:
                found = tuple(tensors[name].shape) if name in tensors else "none"
                raise ValueError(
                    f"optimizer state of {name} has shape {found}, the model {tuple(wanted.shape)}"
                )
        for name, index in _SAVED.items():
            is_scale = name in ("scale", "good_steps")
            if not is_scale or (self.precision.scales_loss and float(tensors["scale"]) > 1):
                for part in self.parts:
                    part.control[index] = tensors[name].to(part.control)
        for name, mean, square in zip(self.names, self.means, self.squares, strict=True):
            mean.copy_(self._padded(name, tensors[f"{name}.mean"]))
            square.copy_(self._padded(name, tensors[f"{name}.square"]))
        self.frozen.load_state(tensors)

    def _zeros_of_thawed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means and squares of the parameters of which these tensors hold neither."""
        kinds = ("mean", "square")
        return {
            f"{name}.{kind}": torch.zeros_like(mean)
            for name, mean in self._cropped(self.means).items()
            if not any(f"{name}.{kind}" in tensors for kind in kinds)
            for kind in kinds
        }

    def _part(self, numbers: list[int], control: Tensor) -> Part:
        lists = (self.masters, self.means, self.squares, self.copies)
        own = [[tensors[number] for number in numbers] if tensors else [] for tensors in lists]
        return Part(numbers, Tables(*own), control)

    def _split(self, groups: list[list[int]]) -> None:
        """Have each group of parameters be a part, where there was one for all."""
        control = self.parts[0].control
        self.parts = [self._part(numbers, control.clone()) for numbers in groups]

    def _move(self, part: Part, gradients: Sequence[Tensor]) -> None:
        tables = part.tables
        adam(
            tables.parameters,
            gradients,
            tables.means,
            tables.squares,
            tables.copies,
            part.control,
            tables=tables,
            **self.settings,
        )

    def _cropped(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """By parameter, without the channels that alignment added."""
        return {
            name: crop(tensor, axes_of(parameter)) if axes_of(parameter) else tensor
            for name, parameter, tensor in zip(self.names, self.parameters, tensors, strict=True)
        }

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        return pad(tensor, axes_of(self.parameters[self.names.index(name)]))
