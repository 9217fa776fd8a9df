"""Three ways to run the same step: eager, compiled, and replayed as one CUDA graph.

A graph holds everything from the draw of the faces to the update of the weights, so an iteration is
one call of the driver, with no Python, no transfer and no wait in it.
"""

import hashlib
from collections.abc import Callable
from typing import Protocol

import torch

from ..data.feed import Batch
from .step import TrainStep

WARM_UP = 3
"""Iterations before the capture, in which libraries choose their algorithms and take memory."""


class Source(Protocol):
    """Where batches come from: a `Feed`."""

    is_capturable: bool
    """Whether `batch` leaves the host out."""

    def next(self, faces_seen: dict[str, int]) -> Batch:
        """The batch after so many faces of each side."""

    def seek(self, faces_seen: dict[str, int]) -> None:
        """Have the next batch be that one."""

    def batch(self) -> Batch:
        """The next batch, in tensors that stay in place; may be captured."""


def choose(setting: str, device: torch.device) -> tuple[str, str]:
    """``(name, why)`` of the engine that `train.engine` leads to.

    Raises:
        ValueError: The device cannot run so.
    """
    if setting == "graph" and device.type != "cuda":
        raise ValueError("--engine graph needs an Nvidia GPU; use eager or compile on the CPU")
    if setting != "auto":
        return setting, "as set"
    if device.type == "cuda":
        return "graph", "the whole step is one CUDA graph"
    return "eager", "the default on a CPU"


def make(
    name: str,
    step: TrainStep,
    feed: Source,
    warn: Callable[[str], None],
    *,
    noise_seed: int | None = None,
) -> "Engine":
    """The engine of this name.

    Args:
        name: As `choose` gives it.
        step: Trains on a batch.
        feed: Where batches come from.
        warn: Is told where the engine falls back, and why.
        noise_seed: Of a model that draws random numbers: fixes those of every iteration.
    """
    kinds = {"eager": Engine, "compile": Compiled, "graph": Graphed}
    return kinds[name](step, feed, warn, noise_seed)


class Engine:
    """Runs iterations one operation after the other."""

    name = "eager"

    def __init__(
        self,
        step: TrainStep,
        feed: Source,
        warn: Callable[[str], None],
        noise_seed: int | None = None,
    ):
        self.step, self.feed, self.warn, self.noise_seed = step, feed, warn, noise_seed

    def __call__(self, faces_seen: dict[str, int]) -> None:
        """Train on the batch after ``faces_seen`` faces of each side."""
        batch = self.feed.next(faces_seen)
        self._seed_noise(faces_seen)
        self.step(batch)

    def _seed_noise(self, faces_seen: dict[str, int]) -> None:
        """Have the iteration's dropout and noise depend on nothing but the seed and its faces.

        A graph, too, takes its seed from the generator when it is replayed.
        """
        if self.noise_seed is None:
            return
        place = f"{self.noise_seed} {sorted(faces_seen.items())}"
        digest = hashlib.blake2b(place.encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest))

    def _fall_back(self, reason: str) -> None:
        self.warn(f"the {self.name} engine cannot run here ({reason}); training goes on eagerly")
        self.name = "eager"


class Compiled(Engine):
    """Runs the network as torch.compile makes it; losses and update are kernels already."""

    name = "compile"
    is_tried = False

    def __call__(self, faces_seen: dict[str, int]) -> None:
        if not self.is_tried:
            self._try(faces_seen)
        super().__call__(faces_seen)

    def _try(self, faces_seen: dict[str, int]) -> None:
        """Compile on a batch that comes again, so a failure costs nothing but time."""
        self.is_tried = True
        plain = self.step.network
        self.step.network = torch.compile(plain, fullgraph=True, dynamic=False)
        try:
            self.step.outputs(self.feed.next(faces_seen).input_nchw)
        except RuntimeError as error:
            self.step.network = plain
            self._fall_back(_first_line(error))


class Graphed(Engine):
    """Replays an iteration that was captured once; needs a feed whose tensors stay in place."""

    name = "graph"

    def __init__(
        self,
        step: TrainStep,
        feed: Source,
        warn: Callable[[str], None],
        noise_seed: int | None = None,
    ):
        super().__init__(step, feed, warn, noise_seed)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = 0
        # One for all iterations before the replays: memory is cached by stream.
        self.stream = torch.cuda.Stream()
        if not feed.is_capturable:
            self._fall_back("the host gathers the faces of each batch from a file")

    def __call__(self, faces_seen: dict[str, int]) -> None:
        if self.name != "graph":
            return super().__call__(faces_seen)
        self.feed.seek(faces_seen)
        self._seed_noise(faces_seen)
        if self.graph is not None:
            self.graph.replay()
        elif self.warm < WARM_UP:
            self._warm_up()
        else:
            self._capture()

    def _iteration(self) -> None:
        self.step(self.feed.batch())

    def _warm_up(self) -> None:
        """A real iteration, on the stream of the capture to come."""
        self.warm += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._iteration()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self) -> None:
        """Record an iteration without running it, then run it."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        torch.cuda.reset_peak_memory_stats()  # libraries took more while they chose
        try:
            # thread_local: the saver's thread may copy to the host meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._iteration()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own in place
            torch.cuda.synchronize()
            self._fall_back(_first_line(error))
            self._iteration()
        else:
            self.graph = graph
            graph.replay()


def _first_line(error: BaseException) -> str:
    """What went wrong first: of errors that followed one another, the first one's first line."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__
