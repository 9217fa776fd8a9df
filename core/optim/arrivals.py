"""Gradients handled in parts, each once the backward pass has formed the last one of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ...models.autoencoder import Autoencoder


class Arrivals:
    """Parts of a model's gradients, handled one after the other while the backward pass goes on.

    A part waits for those before it, so that their order does not hang on the backward pass.

    Args:
        parameters: Parameters that the gradients are of.
        parts: Numbers of parameters; each of them is in one part.
        handle: Called with the number of a part and its gradients.
        stream: Stream on which a part is handled during the backward pass; None: the CPU has none.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        parts: Sequence[Sequence[int]],
        handle: Callable[[int, list[Tensor]], None],
        stream: torch.cuda.Stream | None,
    ):
        self.parameters, self.parts = parameters, parts
        self.handle, self.stream = handle, stream
        self.arrived: dict[int, Tensor] = {}
        """Gradients by the number of their parameter, in the order in which they came."""

        self.num_handled = 0
        """Parts that the backward pass has handled and `finish` is not to handle again."""

        # Sets: of one part's gradients many came on the same stream, which is waited for once.
        self._came_on: list[set[torch.cuda.Stream]] = []

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Handle parts during the backward pass inside; afterwards the current stream waits.

        The gradients must live as long as the context.
        """
        self.arrived, self.num_handled = {}, 0
        self._came_on = [set() for _ in self.parts]
        part_of = {number: i for i, part in enumerate(self.parts) for number in part}
        # For this backward pass alone: the hooks of another must handle nothing.
        handles = [
            parameter.register_hook(partial(self._take, number, part_of[number]))
            for number, parameter in enumerate(self.parameters)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        # What follows on the current stream reads what was made of the parts.
        if self.stream and self.num_handled:
            torch.cuda.current_stream().wait_stream(self.stream)

    def finish(self, gradients: Sequence[Tensor]) -> list[int]:
        """Handle the parts that the backward pass has not; the order in which gradients came."""
        for index in range(self.num_handled, len(self.parts)):
            self.handle(index, [gradients[number] for number in self.parts[index]])
        order = list(self.arrived)
        self.arrived, self.num_handled = {}, 0
        return order

    def _take(self, number: int, index: int, gradient: Tensor) -> None:
        """Note the gradient of one parameter; handle each part that is due and misses no other.

        A hook of the parameter. Autograd calls it with the sum over all uses, on the stream where
        that is ready, when every operation that used the parameter has queued its own gradients.
        So nothing queued later reads the old value, or autograd would refuse to go on.
        """
        self.arrived[number] = gradient
        if self.stream:
            self._came_on[index].add(torch.cuda.current_stream())
        while self.num_handled < len(self.parts):
            part = self.parts[self.num_handled]
            if not all(each in self.arrived for each in part):
                return
            if self.stream:
                # A gradient is ready on the stream that computed it; two decoders have two.
                for stream in self._came_on[self.num_handled]:
                    self.stream.wait_stream(stream)
            with torch.cuda.stream(self.stream):  # None: does nothing
                self.handle(self.num_handled, [self.arrived[each] for each in part])
            self.num_handled += 1


def grouped(order: Sequence[int], sizes: Sequence[int], least: int) -> list[list[int]]:
    """Numbers of parameters in this order, at least ``least`` elements in each group but the last.

    Args:
        order: Numbers of parameters.
        sizes: Elements of every parameter.
        least: Elements at which a group ends.
    """
    groups: list[list[int]] = [[]]
    num_elements = 0
    for number in order:
        groups[-1].append(number)
        num_elements += sizes[number]
        if num_elements >= least:
            num_elements = 0
            groups.append([])
    # Without the empty one that is begun behind a last full group.
    return [group for group in groups if group]


def arrival_order(model: Autoencoder) -> list[int]:
    """Numbers of the trained parameters, in the order in which a backward pass forms gradients.

    It depends on the model alone, so every process that trains it finds the same.

    Args:
        model: Model on the meta device; its parameters are left as they are.
    """
    order: list[int] = []
    parameters = [each for each in model.parameters() if each.requires_grad]
    handles = [
        parameter.register_hook(lambda _, number=number: order.append(number))
        for number, parameter in enumerate(parameters)
    ]
    # The order shows in the graph alone, so nothing has to be computed.
    faces_nchw = torch.empty(4, 3, model.input_px, model.input_px, device="meta")
    outputs = [each for side in model(faces_nchw) for each in side if each.requires_grad]
    torch.autograd.grad(outputs, parameters, [torch.empty_like(each) for each in outputs])
    for handle in handles:
        handle.remove()
    return order
