"""What is kept of parameters that a session does not train.

The network computes with them in its own precision; a checkpoint holds their exact fp32 numbers,
and whatever state an optimizer left of them, so that a later session can go on with both.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.optimizer_rules import MOMENTS
from ...models.alignment import axes_of, crop, pad
from . import optimizer_state


class Frozen:
    """Parameters that are left as they are. Their exact numbers are kept on the host.

    Args:
        parameters: fp32, by name; they become ``compute``.
        compute: What the network computes in.
    """

    def __init__(self, parameters: Mapping[str, Tensor], compute: torch.dtype):
        self.parameters = parameters
        self.weights = {
            # On the host: no GPU memory for numbers that no step reads.
            name: crop(parameter.detach(), axes_of(parameter)).to("cpu", copy=True)
            for name, parameter in parameters.items()
        }
        """Weights in fp32, without the channels that alignment added."""

        self.state: dict[str, Tensor] = {}
        """State of an earlier session's optimizer, whichever it was: `<parameter>.mean`,
        `.square`.."""

        for parameter in parameters.values():
            # After the exact numbers were kept above: 16 bits cannot give them back.
            parameter.data = parameter.data.to(compute)

    @property
    def num_parameters(self) -> int:
        """Numbers in `weights`."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def load_weight(self, name: str, tensor: Tensor) -> None:
        """Take up one parameter's numbers, as `weights` holds them."""
        self.weights[name].copy_(tensor)
        parameter = self.parameters[name]
        # In both places: the network computes with the parameter, a save reads the exact numbers.
        parameter.detach().copy_(pad(tensor, axes_of(parameter)))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Keep what a checkpoint's optimizer holds of these parameters, as it is.

        Raises:
            ValueError: It has another shape or number format than its parameter, or holds a number
                that no optimizer does.
        """
        for name, weight in self.weights.items():
            for key in (f"{name}.{kind}" for kind in MOMENTS):
                tensor = tensors.get(key)
                # Another optimizer, or none, may have left the state: what is missing is no fault.
                if tensor is None:
                    continue
                optimizer_state.check(key, tensor, weight)
                self.state[key] = tensor.to("cpu", copy=True)
