"""How the weights are moved: unscale, non-finite check and Adam, with nothing read by the host.

A step whose gradient is not finite changes nothing but the count of such steps; with fp16 it also
halves the loss scale. PyTorch's fused Adam takes the scale and the verdict as device scalars.
"""

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from .precision import Precision

_FIRST_SCALE, _GROWTH_STEPS = 65536.0, 2000


class Update:
    """The optimizer of one model and, with fp16, the loss scale."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, precision: Precision):
        self.names, self.parameters = [], []
        for name, parameter in model.named_parameters():
            self.names.append(name)
            self.parameters.append(parameter)
        self.precision = precision
        self.adam = torch.optim.Adam(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.ada_beta_1, config.ada_beta_2),
            eps=10.0**config.epsilon_exponent,
            fused=True,
        )
        device = self.parameters[0].device
        self.scale = torch.tensor(_FIRST_SCALE if precision.scales_loss else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        """Finite steps since the scale last changed."""

        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps of this session that were not finite and so changed nothing."""

    def __call__(self, loss: Tensor) -> None:
        """Back-propagate a scalar loss and move the weights."""
        with self.precision.backward():
            (loss * self.scale).backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = (~torch.isfinite(norm)).float()
        self.adam.grad_scale = self.scale  # type: ignore[attr-defined]
        self.adam.found_inf = bad  # type: ignore[attr-defined]
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.skipped += bad.long()
        if self.precision.scales_loss:
            self._rescale(bad)

    def _rescale(self, bad: Tensor) -> None:
        """Halve the scale after an overflow; double it after 2,000 good steps."""
        good = (self.good_steps + 1) * (1 - bad)
        grown = good >= _GROWTH_STEPS
        factor = torch.where(bad > 0, 0.5, torch.where(grown, 2.0, 1.0))
        self.scale.mul_(factor)
        self.good_steps.copy_(torch.where(grown, 0.0, good))

    def tensors(self) -> dict[str, Tensor]:
        """What a resume needs, by name: `<parameter>.mean`, `.square`, `.step`, `scale`.."""
        found = {"scale": self.scale, "good_steps": self.good_steps}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            state = self.adam.state.get(parameter)
            if state:
                found[f"{name}.mean"] = state["exp_avg"]
                found[f"{name}.square"] = state["exp_avg_sq"]
                found[f"{name}.step"] = state["step"]
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave; rates and epsilon stay as configured now.

        Raises:
            ValueError: A tensor is missing or has another shape.
        """
        if self.precision.scales_loss and float(tensors["scale"]) > 1:
            self.scale.copy_(tensors["scale"])
            self.good_steps.copy_(tensors["good_steps"])
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if f"{name}.step" not in tensors:
                continue  # saved before the first step
            mean, square = tensors[f"{name}.mean"], tensors[f"{name}.square"]
            if mean.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state of {name} has shape {tuple(mean.shape)}, "
                    f"the model {tuple(parameter.shape)}"
                )
            self.adam.state[parameter] = {
                "step": tensors[f"{name}.step"].to(parameter.device, torch.float32),
                "exp_avg": torch.empty_like(parameter).copy_(mean),
                "exp_avg_sq": torch.empty_like(parameter).copy_(square),
            }
