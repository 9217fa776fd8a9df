"""The losses of the last iterations, kept on the device until the host has time for them.

Letters: V numbers of an iteration, N iterations.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CAPACITY = 4096
"""Iterations; a loop must fetch at least this often. Chosen, unmeasured."""


class LossBuffer:
    """Rows of numbers, pushed by the step without the host, fetched without a wait."""

    def __init__(self, num_values: int, device: torch.device):
        self.rows = torch.zeros(CAPACITY, num_values, device=device)
        # index_copy_ takes no smaller integers for its places.
        self.next_row = torch.zeros(1, dtype=torch.int64, device=device)

    def push(self, row_v: Tensor) -> None:
        """Keep the numbers of one iteration."""
        # The row's number lives on the device: a captured graph replays with the next one.
        self.rows.index_copy_(0, self.next_row, row_v[None])
        self.next_row.add_(1)

    def clear(self) -> None:
        """Forget the numbers so far, where nobody fetches them."""
        self.next_row.zero_()

    def fetch(self, count: int) -> Callable[[], np.ndarray]:
        """A function that waits for all rows since the last call, ``count`` of them, (N, V).

        The copy is queued now, so rows that are pushed later do not reach it.

        Raises:
            ValueError: More rows than are kept.
        """
        if count > CAPACITY:
            raise ValueError(f"the last {CAPACITY} rows are kept, asked for {count}")
        # The device works in order, so the copy is made before any later row is written.
        copies = to_host(self.rows[:count])
        # Queued behind the copy, like it: the rows are written from the front again.
        self.next_row.zero_()
        return lambda: copies()[0]


def to_host(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """A function that returns copies of the tensors as they are now; it waits, this does not."""
    on_gpu = tensors[0].is_cuda
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=on_gpu) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        # Pinned memory: only into that does a copy go on while the host does other things.
        copy.copy_(tensor, non_blocking=True)
    # Of an event and not of the device: steps that are queued later need not be waited for.
    copied = torch.cuda.Event() if on_gpu else None
    if copied:
        copied.record()

    def result() -> list[np.ndarray]:
        if copied:
            copied.synchronize()
        return [copy.numpy() for copy in copies]

    return result
