"""Engines: eager, compiled and graphed steps are the same training."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, tiny_config, tiny_step

from mien.core.data.feed import Feed
from mien.core.data.store import FaceStore
from mien.core.training import dry_run
from mien.core.training import engine as engines
from mien.core.training.step import TrainStep
from mien.kernels import tensor_table
from mien.models.batch_norm import BatchNorm, update_running_stats

NOTHING = nullcontext()

NOISE = engines.Noise(3)
PLAIN_UPDATE = SimpleNamespace(phase=0, end_iteration=lambda: None)
"""What an engine asks of an update, where each iteration is like every other."""


def _store(seed, device):
    generator = torch.Generator().manual_seed(seed)
    faces = torch.randint(0, 256, (30, 64, 64, 8), dtype=torch.uint8, generator=generator)
    names = [f"{i}.png" for i in range(30)]
    return FaceStore(faces.to(device), "host", names, [], "", "", reused=False, seconds=0.0)


def _trained(name, mode="fp32", device=CPU, iterations=6, batch_size=2, streams=False, warn=None):
    """Losses and weights after some iterations of a tiny model, and the engine."""
    settings = {"train": {"batch_size": batch_size}, "precision": {"mode": mode}}
    config = tiny_config(settings)
    step, _ = tiny_step(settings, device, streams=streams)
    feed = Feed(
        {side: _store(seed, device) for seed, side in enumerate("ab")},
        config,
        input_px=64,
        output_px=(64,),
        device=device,
        dtype=step.update.precision.compute,
        num_threads=1,
        input_channels=8 if device.type == "cuda" else 3,
    )
    try:
        engine = engines.make(name, step, feed, warn or pytest.fail)
        for iteration in range(iterations):
            engine(dict.fromkeys("ab", iteration * batch_size))
        return step.loss_buffer.fetch(iterations)(), step.update.weights(), engine
    finally:
        feed.close()


def _assert_same_bits(one, two):
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=0)
    for name, tensor in one[1].items():
        assert torch.equal(tensor, two[1][name]), name


def test_the_engine_is_chosen_by_the_device():
    assert engines.choose("auto", CPU)[0] == "eager"
    assert engines.choose("auto", torch.device("cuda"))[0] == "graph"
    assert engines.choose("compile", CPU) == ("compile", "as set")
    with pytest.raises(ValueError, match="graph needs an Nvidia GPU; use eager or compile"):
        engines.choose("graph", CPU)


def test_eager_iterations_are_the_same_twice():
    _assert_same_bits(_trained("eager"), _trained("eager"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_compiled_step_trains_as_an_eager_one(mode):
    rows, weights, engine = _trained("compile", mode)
    assert engine.name == "compile", "it fell back"
    eager_rows, eager_weights, _ = _trained("eager", mode)
    torch.testing.assert_close(rows, eager_rows, rtol=1e-4, atol=1e-5)
    moved = 6 * 5e-5  # no weight moves further than this in six steps of Adam
    for name, tensor in weights.items():
        assert (tensor - eager_weights[name]).abs().max() < 0.05 * moved or mode == "bf16", name


def test_a_step_that_cannot_be_compiled_runs_eagerly_and_says_why(monkeypatch):
    def compiled(network, **_):
        def fail(*_):
            raise RuntimeError("no working C++ compiler\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    warnings = []
    result = _trained("compile", warn=warnings.append)
    assert result[2].name == "eager"
    assert warnings == [
        "the compile engine cannot run here (no working C++ compiler); training goes on eagerly"
    ]
    _assert_same_bits(result, _trained("eager"))


def _noise(faces_seen, noise=NOISE):
    """Random numbers that a step of these faces draws."""
    drawn = []

    def step(_):
        drawn.append(torch.rand(4))

    feed = SimpleNamespace(next=lambda _: None)
    step.update = PLAIN_UPDATE
    engine = engines.make("eager", step, feed, pytest.fail, noise=noise)
    engine(dict.fromkeys("ab", faces_seen))
    return drawn[0]


def test_the_noise_of_a_step_follows_from_its_seed_and_faces_alone():
    first = _noise(8)
    assert torch.equal(first, _noise(8))
    assert not torch.equal(first, _noise(16))
    assert not torch.equal(first, _noise(8, noise=engines.Noise(4)))
    assert not torch.equal(first, _noise(8, noise=engines.Noise(3, first_face=4)))


def test_a_model_without_noise_leaves_the_generator_alone():
    assert not torch.equal(_noise(8, noise=None), _noise(8, noise=None))


def _noisy(name, device):
    """Outputs of three steps of dropout alone, as an engine of this name runs them."""
    x = torch.ones(1000, device=device)
    out = torch.zeros(3, 1000, device=device)
    place = torch.zeros(1, dtype=torch.int64, device=device)

    def step(_, during_backward=NOTHING):
        with during_backward:
            out.index_copy_(0, place, F.dropout(x)[None])

    feed = SimpleNamespace(
        next=lambda _: None,
        batch=lambda turn: turn,
        seek=lambda _: None,
        following=lambda seen: seen,
        is_capturable=True,
    )
    step.update = PLAIN_UPDATE
    engine = engines.make(name, step, feed, pytest.fail, noise=NOISE)
    for number in range(engines.WARM_UP + 3):
        place.fill_(max(number - engines.WARM_UP, 0))
        engine(dict.fromkeys("ab", number))
    return out.cpu()


@pytest.mark.gpu
def test_a_replayed_graph_draws_the_noise_of_an_eager_step():
    eager, graphed = _noisy("eager", "cuda"), _noisy("graph", "cuda")
    assert torch.equal(eager, graphed)
    assert not torch.equal(graphed[0], graphed[1])


def test_a_trial_compilation_leaves_running_estimates_alone(monkeypatch):
    """The network runs once more than the step does; a resumed run must not show it."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    network, faces = BatchNorm(3), torch.rand(4, 3, 2, 2)
    step = TrainStep(network, None, SimpleNamespace(parameters=()), None)
    feed = SimpleNamespace(next=lambda _: SimpleNamespace(input_nchw=faces))
    engine = engines.make("compile", step, feed, pytest.fail)
    engine._try({})
    assert torch.equal(network.running_mean, torch.zeros(3))
    assert torch.equal(network.running_var, torch.ones(3))
    step.forward(faces)
    once = BatchNorm(3)
    once(faces)
    update_running_stats([once])
    assert torch.equal(network.running_mean, once.running_mean)
    assert torch.equal(network.running_var, once.running_var)


class Recorder:
    """A GPU that runs queued work at once, and within a capture only records it."""

    def __init__(self, monkeypatch, failing=()):
        self.recording, self.captures, self.failing = None, 0, failing
        stream = SimpleNamespace(wait_stream=lambda _: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Recording())
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        # The CPU's generator, from which the tests draw, is in no capture.
        monkeypatch.setattr(engines, "_renew_generator", lambda: None)

    @contextmanager
    def _graph(self, graph, **_):
        self.captures += 1
        self.recording = graph
        try:
            yield
            if self.captures in self.failing:
                raise RuntimeError("forbidden")
        finally:
            self.recording = None

    def run(self, work):
        if self.recording is None:
            work()
        else:
            self.recording.work.append(work)


class Recording:
    """A graph: work that each replay does again."""

    def __init__(self):
        self.work = []

    def pool(self):
        return None

    def replay(self):
        for work in self.work:
            work()


class CountingFeed:
    """A feed whose batches are lists of one number, that of A's faces seen before it."""

    is_capturable = True

    def __init__(self, gpu):
        self.gpu, self.seen, self.sets, self.made = gpu, 0, [[-1], [-1]], 0

    def following(self, faces_seen):
        return {side: number + 4 for side, number in faces_seen.items()}

    def seek(self, faces_seen):
        assert self.gpu.recording is None, "a capture would do it again at every replay"
        self.seen = faces_seen["a"]

    def batch(self, turn=0):
        def make():
            self.sets[turn][0], self.seen = self.seen, self.seen + 4
            self.made += 1

        self.gpu.run(make)
        return self.sets[turn]

    def next(self, faces_seen):
        self.seek(faces_seen)
        return self.batch()


def _numbers_trained_on(monkeypatch, places, failing=()):
    """The batches that a graphed engine trains on when it is asked for these places."""
    gpu, trained, warnings = Recorder(monkeypatch, failing), [], []
    feed = CountingFeed(gpu)

    def step(batch, during_backward=NOTHING):
        with during_backward:
            gpu.run(lambda: trained.append(batch[0]))

    step.side_stream, step.update = "beside", PLAIN_UPDATE
    engine = engines.make("graph", step, feed, warnings.append)
    for place in places:
        engine({"a": place, "b": place})
    return trained, engine, feed, warnings


def test_a_graph_trains_on_each_batch_and_makes_the_next_one(monkeypatch):
    places = [4 * n for n in range(20)]
    trained, engine, feed, warnings = _numbers_trained_on(monkeypatch, places)
    assert trained == places
    assert (engine.name, engine.graphs.keys(), warnings) == ("graph", {(0, 0), (1, 0)}, [])
    assert feed.made == len(places) + 1, "a batch was made twice, or one is not made ahead"


def test_the_step_that_a_dry_run_times_is_a_replay(monkeypatch):
    def captures(count):
        return _numbers_trained_on(monkeypatch, range(0, 4 * count, 4))[2].gpu.captures

    timed = dry_run.num_steps("graph")
    assert captures(timed) == captures(timed - 1) == captures(engines.FIRST_REPLAY) == 2
    assert captures(engines.FIRST_REPLAY - 1) == 1
    assert dry_run.num_steps("eager") == dry_run.STEPS


class _Accumulating:
    """An update that is due every third time."""

    def __init__(self):
        self.phase = 0

    def end_iteration(self):
        self.phase = {0: 1, 1: 3, 3: 0}[self.phase]


def test_there_is_a_graph_for_each_kind_of_iteration(monkeypatch):
    gpu, trained, update = Recorder(monkeypatch), [], _Accumulating()
    feed = CountingFeed(gpu)

    def step(batch, during_backward=NOTHING):
        phase = update.phase
        with during_backward:
            gpu.run(lambda: trained.append((batch[0], phase)))

    step.side_stream, step.update = "beside", update
    engine = engines.make("graph", step, feed, pytest.fail)
    for number in range(40):
        engine({"a": 4 * number, "b": 4 * number})
    assert trained == [(4 * number, (0, 1, 3)[number % 3]) for number in range(40)]
    assert engine.graphs.keys() == {(turn, phase) for turn in (0, 1) for phase in (0, 1, 3)}
    assert set(engine.warm.values()) == {engines.WARM_UP}


def test_a_graph_goes_on_from_any_place(monkeypatch):
    """As after the search for a rate, which begins again at the first face."""
    places = [0, 4, 8, 0, 4, 40, 44, 0, 0, 4, 8, 12, 400, 404]
    assert _numbers_trained_on(monkeypatch, places)[0] == places


@pytest.mark.parametrize("failing", [{1}, {2}], ids=["first", "second"])
def test_where_a_capture_fails_the_same_batches_are_trained_on(monkeypatch, failing):
    places = [4 * n for n in range(10)]
    trained, engine, _, warnings = _numbers_trained_on(monkeypatch, places, failing)
    assert trained == places
    assert engine.name == "eager"
    assert len(warnings) == 1
    # What has crossed streams would never be freed again.
    assert engine.step.side_stream is None


def test_where_a_capture_fails_what_it_was_to_send_is_dropped(monkeypatch):
    """Else it would hold its table's memory, and go with the next capture, of another one."""
    gpu, sent = Recorder(monkeypatch, failing={1}), []

    def step(batch, during_backward=NOTHING):
        with during_backward:
            if gpu.recording is not None:
                tensor_table._unsent.append(lambda: sent.append(batch))

    step.side_stream, step.update = None, PLAIN_UPDATE
    engine = engines.make("graph", step, CountingFeed(gpu), lambda _: None)
    for number in range(8):
        engine({"a": 4 * number, "b": 4 * number})
    assert (gpu.captures, engine.name) == (1, "eager")
    assert (tensor_table._unsent, sent) == ([], [])


@pytest.mark.parametrize("failing", [{1}, {2}], ids=["first", "second"])
def test_where_a_capture_fails_the_noise_is_that_of_an_eager_run(monkeypatch, failing):
    def noise_of(name):
        gpu, drawn = Recorder(monkeypatch, failing), []

        def step(batch, during_backward=NOTHING):
            # As PyTorch does, whether the work is queued or recorded.
            number = torch.rand(()).item()
            with during_backward:
                gpu.run(lambda: drawn.append(number))

        step.side_stream, step.update = None, PLAIN_UPDATE
        noise = engines.Noise(seed=0)
        engine = engines.make(name, step, CountingFeed(gpu), lambda _: None, noise=noise)
        for number in range(8):
            engine({"a": 4 * number, "b": 4 * number})
        assert engine.name == "eager"
        return drawn

    assert noise_of("graph") == noise_of("eager")


@pytest.mark.gpu
@pytest.mark.usefixtures("same_algorithms")
@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_graphed_step_has_the_bits_of_an_eager_one(mode, streams):
    cuda = torch.device("cuda", torch.cuda.current_device())
    graphed = _trained("graph", mode, cuda, iterations=12, streams=streams)
    assert graphed[2].graphs.keys() == {(0, 0), (1, 0)}
    _assert_same_bits(graphed, _trained("eager", mode, cuda, iterations=12, streams=streams))


@pytest.mark.gpu
@pytest.mark.usefixtures("same_algorithms")
def test_a_capture_that_fails_is_told_and_training_goes_on(monkeypatch):
    """Last in this file: PyTorch 2.11 can capture nothing more in a process where one failed."""
    forward = TrainStep.forward

    def waits(self, input_nchw):
        if torch.cuda.is_current_stream_capturing():
            input_nchw.sum().item()
        return forward(self, input_nchw)

    monkeypatch.setattr(TrainStep, "forward", waits)
    warnings = []
    cuda = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.current_stream()
    result = _trained("graph", "bf16", cuda, iterations=6, warn=warnings.append)
    assert torch.cuda.current_stream() == before
    assert result[2].name == "eager"
    assert len(warnings) == 1
    assert "the graph engine cannot run here" in warnings[0]
    torch.rand(1, device=cuda)  # which a generator that is still in the capture refuses
    _assert_same_bits(result, _trained("eager", "bf16", cuda, iterations=6))
