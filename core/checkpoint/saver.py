"""Asynchronous saves: the tensors are copied at once, and written by a thread of its own."""

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .format import Tensors
from .model_folder import ModelFolder

_SPARE_GPU_BYTES = 1 << 30
"""Bytes of GPU memory that a save leaves free when it duplicates the tensors there. Chosen on the
CPU, unmeasured on a GPU."""


@dataclass(frozen=True)
class Saved:
    """One finished save, for the record."""

    path: Path
    iterations: int
    seconds: float
    snapshot: Path | None = None
    """A snapshot of it that was due; None where the disk refused that."""


class Saver:
    """Saves while training goes on: copies on the caller's thread, writes on one of its own.

    The copies live in buffers that every save uses again (pinned host memory where the tensors are
    on a GPU), so two saves never overlap: a save waits for the one before it.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        # One thread: saves are numbered in their order, and share their buffers.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mien-save")
        self._pending: Future[Saved] | None = None
        self._finished: list[Saved] = []
        # One for each name: the library that writes them refuses tensors that share memory.
        self._buffers: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        model: Tensors,
        optimizer: Tensors | None,
        state: dict[str, Any],
        ema: Tensors | None = None,
        *,
        is_best: bool = False,
        with_snapshot: bool = False,
    ) -> float:
        """Seconds that the caller had to wait for the save before this one.

        ``ema`` holds averages of the weights, where they are kept.
        The best one so far becomes the backup too, and a snapshot is made where it is due. When
        this returns the tensors may change: what is written is what they held at the call (on a
        GPU: what the work queued on the current stream until then makes of them).

        Raises:
            SaveError: Where the save *before* failed; this one has then not begun.
        """
        started = time.monotonic()
        self.wait()
        waited = time.monotonic() - started
        parts = {"model": model, "optimizer": optimizer, "ema": ema}
        labelled = {
            f"{part}/{name}": tensor
            for part, tensors in parts.items()
            for name, tensor in (tensors or {}).items()
        }
        in_flight = self._stage(labelled)
        copies = {
            part: {name: self._buffers[f"{part}/{name}"] for name in tensors}
            for part, tensors in parts.items()
            if tensors is not None
        }
        self._pending = self._pool.submit(
            self._write,
            in_flight,
            copies,
            # Training goes on in these dictionaries while they are written.
            copy.deepcopy(state),
            is_best,
            with_snapshot,
        )
        return waited

    def wait(self) -> None:
        """Return when no save is under way; raise what the last one raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            # Taken out before it can raise, so that an error is told once.
            self._finished.append(pending.result())

    def finished(self) -> list[Saved]:
        """The saves that ended since the last call, without waiting; raises as `wait`."""
        if self._pending is not None and self._pending.done():
            self.wait()
        done, self._finished = self._finished, []
        return done

    def close(self) -> None:
        """Finish the save that is under way and end the thread; raises as `wait`."""
        # Before the buffers go, which the thread may be reading.
        self._pool.shutdown(wait=True)
        self._buffers.clear()
        self.wait()

    def _write(
        self,
        in_flight: list[tuple[torch.cuda.Event, list[Tensor]]],
        copies: dict[str, Tensors],
        state: dict[str, Any],
        is_best: bool,
        with_snapshot: bool,
    ) -> Saved:
        started = time.monotonic()
        for event, sources in in_flight:
            # A thread begins at the first GPU, where CUDA would take half a GB for the wait alone.
            with torch.cuda.device(event.device):
                # Waited for on this thread: the caller is at the next steps already.
                event.synchronize()
                sources.clear()  # the GPU memory of the staged copies goes back only now
        path = self._folder.save(copies["model"], copies.get("optimizer"), state, copies.get("ema"))
        # After the save itself, which must not fail for a copy of it.
        if is_best:
            self._folder.back_up(path)
        snapshot = self._folder.snapshot() if with_snapshot else None
        return Saved(path, state["iterations"], time.monotonic() - started, snapshot)

    def _stage(self, tensors: dict[str, Tensor]) -> list[tuple[torch.cuda.Event, list[Tensor]]]:
        """Copy into the buffers; for each GPU, the event of its copies' arrival."""
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            # Detached: autograd would record the copy of a parameter, and the buffer hold its
            # graph.
            by_device.setdefault(tensor.device, {})[name] = tensor.detach()
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                self._buffers[name] = torch.empty(
                    # Pinned once and used again: to pin memory takes longer than to copy it.
                    tensor.shape,
                    dtype=tensor.dtype,
                    pin_memory=tensor.is_cuda,
                )
        in_flight = []
        for device, group in by_device.items():
            if device.type == "cuda":
                in_flight.append(self._copy_from_gpu(device, group))
            else:
                for name, tensor in group.items():
                    self._buffers[name].copy_(tensor)
        return in_flight

    def _copy_from_gpu(
        self, device: torch.device, tensors: dict[str, Tensor]
    ) -> tuple[torch.cuda.Event, list[Tensor]]:
        """Queue the copies on a stream of their own, while training goes on.

        Where the GPU has room, the tensors are first duplicated on it (at memory speed, in the
        training's own stream), so the next step need not wait for PCIe. Where it has none, the
        training's stream waits until the copies have left.
        """
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        copies = self._streams[device]
        training = torch.cuda.current_stream(device)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        # The driver's count: what the allocator keeps for the next step is not free to it, and
        # stays kept.
        has_room = torch.cuda.mem_get_info(device)[0] > num_bytes + _SPARE_GPU_BYTES
        if has_room:
            # In the layout of the buffers: else the copy to the host would have to rearrange them
            # first.
            tensors = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        # What is queued on the training's stream is still to change the tensors.
        copies.wait_stream(training)
        with torch.cuda.stream(copies):
            for name, tensor in tensors.items():
                # It goes on after the call, since the buffer is page-locked.
                self._buffers[name].copy_(tensor, non_blocking=True)
            # Blocking: the thread that waits sleeps, and leaves its core to others.
            event = copies.record_event(torch.cuda.Event(blocking=True))
        # The step that follows may change the tensors: it waits on the device, not on the host.
        if not has_room:
            training.wait_event(event)
        # The list keeps them alive until the event: the allocator knows nothing of the other
        # stream, and would give their memory to the next step.
        return event, list(tensors.values())
