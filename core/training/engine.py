"""Three ways to run the same step: eager, compiled, and replayed as one CUDA graph.

A graph holds everything from the loss of one batch to the update of the weights, and the draw and
augmentation of the next batch during the backward pass, so an iteration is one call of the driver,
with no Python, no transfer and no wait in it.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from ...kernels.tensor_table import drop_capture, finish_capture
from ..data.feed import Batch
from .step import TrainStep

WARM_UP = 3
"""Iterations before the capture, in which libraries choose their algorithms and take memory.
Chosen, unmeasured on a GPU."""

FIRST_REPLAY = WARM_UP + 2
"""Iterations before the first that captures nothing, where all are of one kind: each of the two
sets of batches has a graph of its own."""


class Source(Protocol):
    """Source of batches: a `Feed`."""

    is_capturable: bool
    """Whether `batch` leaves the host out."""

    def next(self, faces_seen: dict[str, int]) -> Batch:
        """The batch after so many faces of each side."""

    def seek(self, faces_seen: dict[str, int]) -> None:
        """Have the next batch be that one."""

    def batch(self, turn: int = 0) -> Batch:
        """The next batch, in set 0 or 1 of tensors that stay in place; may be captured."""

    def following(self, faces_seen: dict[str, int]) -> dict[str, int]:
        """The faces of each side that have been seen after the batch after ``faces_seen``."""


@dataclass(frozen=True)
class Noise:
    """Seeds of dropout and noise, a function of what is trained on and nothing else."""

    seed: int
    """Seed of the run."""

    first_face: int = 0
    """Faces of each side and batch before this rank's, so that each draws numbers of its own."""

    def seed_of(self, faces_seen: dict[str, int]) -> int:
        """The seed of the iteration after so many faces of each side."""
        # A hash, so that the seed and the faces of both sides are one number of 64 bits.
        # Sorted, so that the order of a mapping changes no seed.
        first = sorted((side, number + self.first_face) for side, number in faces_seen.items())
        digest = hashlib.blake2b(f"{self.seed} {first}".encode(), digest_size=8).digest()
        return int.from_bytes(digest)


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
    noise: Noise | None = None,
    agree: Callable[[bool], bool] = bool,
) -> "Engine":
    """The engine of this name.

    Args:
        name: Name as `choose` gives it.
        step: Trains on a batch.
        feed: Source of batches.
        warn: Called where the engine falls back, and why.
        noise: Seeds of a model that draws random numbers; None: it draws none.
        agree: Whether what is true here is true on all ranks that train together; called by all of
            them at the same point.
    """
    kinds = {"eager": Engine, "compile": Compiled, "graph": Graphed}
    return kinds[name](step, feed, warn, noise, agree)


class Engine:
    """Runs iterations one operation after the other."""

    name = "eager"

    def __init__(
        self,
        step: TrainStep,
        feed: Source,
        warn: Callable[[str], None],
        noise: Noise | None = None,
        agree: Callable[[bool], bool] = bool,
    ):
        self.step, self.feed, self.warn = step, feed, warn
        self.noise, self.agree = noise, agree

    def __call__(self, faces_seen: dict[str, int]) -> None:
        """Train on the batch after ``faces_seen`` faces of each side."""
        batch = self.feed.next(faces_seen)
        self._seed_noise(faces_seen)
        self.step(batch)
        self.step.update.end_iteration()

    def _seed_noise(self, faces_seen: dict[str, int]) -> None:
        """Have the iteration's dropout and noise depend on nothing but the seed and its faces.

        A graph, too, takes its seed from the generator when it is replayed.
        """
        if self.noise is not None:
            torch.manual_seed(self.noise.seed_of(faces_seen))

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
        # Also where it fails: each trial takes minutes.
        self.is_tried = True
        plain = self.step.network
        # fullgraph: a break in the graph would cost what compiling brings, without a word.
        # dynamic=False: all batches of a session have the same shapes.
        self.step.network = torch.compile(plain, fullgraph=True, dynamic=False)
        try:
            # `outputs` moves no running estimate: a resumed run must not show this pass.
            self.step.outputs(self.feed.next(faces_seen).input_nchw)
        except RuntimeError as error:
            self.step.network = plain
            self._fall_back(_first_line(error))


class Graphed(Engine):
    """Replays captured iterations; needs a feed whose tensors stay in place.

    Beside its backward pass an iteration makes the batch of the next one, which depends on the
    number of faces seen alone. So there are two sets of tensors for batches, which take turns, and
    a graph for each: one that trains on the first set and fills the second, and the reverse. Where
    iterations differ in what the update does, there is such a pair for each `Update.phase`.
    """

    name = "graph"

    def __init__(
        self,
        step: TrainStep,
        feed: Source,
        warn: Callable[[str], None],
        noise: Noise | None = None,
        agree: Callable[[bool], bool] = bool,
    ):
        super().__init__(step, feed, warn, noise, agree)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        """Graphs by the set of tensors that they train on, and the phase of the update."""

        self.batches: list[Batch | None] = [None, None]
        self.turn = 0
        """The set of tensors that the next iteration trains on."""

        self.made_for: dict[str, int] | None = None
        """The faces seen before the batch that is in that set; None: it holds none."""

        self.warm: Counter[int] = Counter()
        """Iterations before a capture, by the phase of the update."""

        # One for all iterations before the replays: memory is cached by stream.
        self.stream, self.batch_stream = torch.cuda.Stream(), torch.cuda.Stream()
        # On all ranks or on none: a sum in a graph does not wait for one that is called.
        if not agree(feed.is_capturable):
            self._fall_back("the host gathers the faces of each batch from a file")

    def __call__(self, faces_seen: dict[str, int]) -> None:
        if self.name != "graph":
            return super().__call__(faces_seen)
        following = self.feed.following(faces_seen)
        # At the first iteration, and where the sequence was left, as by the search for a rate.
        if faces_seen != self.made_for:
            self.feed.seek(faces_seen)
            self.batches[self.turn] = self.feed.batch(self.turn)
        # The feed stands at the next batch, which this iteration makes while it trains.
        # Here and not in the iteration: a capture would do it again at every replay.
        self.feed.seek(following)
        self._seed_noise(faces_seen)
        # A graph has no branches, so each kind of iteration has one of its own.
        phase = self.step.update.phase
        if (self.turn, phase) in self.graphs:
            self.graphs[self.turn, phase].replay()
        elif self.warm[phase] < WARM_UP:
            # By phase: what one kind of iteration alone calls must have run before its capture.
            self.warm[phase] += 1
            self._warm_up()
        else:
            self._capture((self.turn, phase), faces_seen)
        self.step.update.end_iteration()
        # After a warm-up, too: the next batch is in the other set.
        self.turn, self.made_for = 1 - self.turn, following

    def _iteration(self) -> None:
        batch = self.batches[self.turn]
        assert batch is not None
        self.step(batch, self._making_the_next())

    @contextmanager
    def _making_the_next(self) -> Iterator[None]:
        """Make the next batch on a stream of its own, during what runs inside; it is then there."""
        other = 1 - self.turn
        # The other set of tensors may still be read by the iteration before.
        self.batch_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.batch_stream):
            self.batches[other] = self.feed.batch(other)
        yield
        # What follows reads the batch, and a capture must have joined every stream that it forked.
        torch.cuda.current_stream().wait_stream(self.batch_stream)

    def _warm_up(self) -> None:
        """A real iteration, on the stream of the capture to come."""
        # The steps before, and the batch, may still be queued on the caller's stream.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._iteration()
        # Back as well: what follows on the caller's stream reads what was made on this one.
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, key: tuple[int, int], faces_seen: dict[str, int]) -> None:
        """Record an iteration without running it, then run it."""
        # Not `make_graphed_callables`, which leaves the update and the next batch to the host.
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if not self.graphs:
            torch.cuda.reset_peak_memory_stats()  # libraries took more while they chose
        # Nothing of one graph is needed in another, and they run by turns: one pool for all.
        pool = next((each.pool() for each in self.graphs.values()), None)
        obstacle = ""
        try:
            # thread_local: the saver's thread may copy to the host meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                self._iteration()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own in place
            torch.cuda.synchronize()
            drop_capture()
            # Of memory that has crossed streams nothing is freed any more after a failed capture.
            self.step.side_stream = None
            _renew_generator()
            obstacle = _first_line(error)
        else:
            # Here: within the capture the transfer would have become a part of every replay.
            finish_capture()
        # A capture runs nothing; the iteration that was recorded is owed.
        # All ranks ask, also those whose own capture has failed: to agree is a collective.
        if self.agree(not obstacle):
            self.graphs[key] = graph
            graph.replay()
        else:
            # None is replayed any more, and their pool holds memory.
            self.graphs.clear()
            self._fall_back(obstacle or "it cannot on another rank")
            batch = self.batches[self.turn]
            assert batch is not None
            # Again: numbers that were drawn for a capture are no part of the iteration.
            self._seed_noise(faces_seen)
            self.step(batch)


def _renew_generator() -> None:
    """Have the current GPU draw random numbers again after a capture that failed.

    PyTorch 2.11 leaves the state of its generator in the capture, and refuses to draw from it.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _first_line(error: BaseException) -> str:
    """What went wrong first: of errors that followed one another, the first one's first line."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__
