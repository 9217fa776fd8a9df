"""Steps that ranks take together: the faces, weights and losses of one process."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, tiny_config, tiny_options
from ranks import call

from mien.benchmarks.bench_step import make_batch
from mien.core.checkpoint.model_folder import SaveError
from mien.core.data.feed import Batch
from mien.core.distribute.failure import Failure, RankLost
from mien.core.training import pacing
from mien.core.training.build import build_model, build_step
from mien.core.training.gathering import gather

BATCH, STEPS = 7, 20
CONFIG = {
    "train": {"batch_size": BATCH, "seed": 1},
    "model": {"trainer": "lightweight", "options": {"width": 8}},
    "optimizer": {"learning_rate": 1e-4, "overlap": "off"},
}


def _share(batch, share):
    """The faces of a batch that one rank trains on."""

    def cut(tensor):
        rows = slice(share.first, share.first + share.count)
        return torch.cat([side[rows] for side in tensor.chunk(2)]).contiguous(
            memory_format=torch.channels_last
        )

    mask = None if batch.mask_n1hw is None else cut(batch.mask_n1hw)
    sides = (tuple(map(cut, tensors)) for tensors in (batch.targets, batch.weights))
    return Batch(cut(batch.input_nchw), *sides, mask)


def _train(group, slow_rank=None):
    """Weights, losses and the first gradient of some steps on one batch."""
    config = tiny_config(CONFIG)
    model, _ = build_model(config, CPU)
    step = build_step(config, model, CPU, group=group)
    torch.manual_seed(3)
    batch = make_batch(model, BATCH, CPU, torch.float32)
    first, move = [], step.update._move

    def note(part, gradients):
        first.extend([each.clone() for each in gradients] if not first else [])
        move(part, gradients)

    step.update._move = note
    if group is not None:
        batch = _share(batch, group.ranks.share(BATCH))
    for _ in range(STEPS):
        if group is not None and group.ranks.rank == slow_rank:
            torch.rand(600, 600) @ torch.rand(600, 600)  # it comes late to every exchange
        step(batch)
        step.update.end_iteration()
    return step.update.weights(), step.loss_buffer.rows[:STEPS].clone(), first


@pytest.fixture(scope="module")
def alone():
    """Weights, losses and first gradient of one process."""
    return _train(None)


def _rms(tensors):
    return sum(tensor.double().square().sum() for tensor in tensors).sqrt()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shares_of_any_size_train_as_the_whole_batch_does(num_ranks, alone, tmp_path):
    results = call(num_ranks, _train, tmp_path)
    (weights, losses, gradients), *others = results
    for other, other_losses, _ in others:
        assert all(torch.equal(weights[name], other[name]) for name in weights)
        assert torch.equal(losses, other_losses)
    _, wanted_losses, wanted = alone
    # Later ones part: Adam magnifies gradients of which little but rounding is left.
    difference = _rms(ours - theirs for ours, theirs in zip(gradients, wanted, strict=True))
    assert difference < 1e-6 * _rms(wanted)
    torch.testing.assert_close(losses[:3], wanted_losses[:3], rtol=0, atol=1e-6)


def test_a_slow_rank_changes_nothing(tmp_path):
    steady, slow = (
        call(2, _train, tmp_path / name, rank)[0] for name, rank in (("x", None), ("y", 1))
    )
    assert all(torch.equal(steady[0][name], slow[0][name]) for name in steady[0])
    assert torch.equal(steady[1], slow[1])


def _train_on_nan(group, settings):
    """Whether a step moves the weights when one rank's gradient is not finite; and the losses."""
    config = tiny_config(CONFIG | {"optimizer": CONFIG["optimizer"] | settings})
    model, _ = build_model(config, CPU)
    step = build_step(config, model, CPU, group=group)
    batch = _share(make_batch(model, BATCH, CPU, torch.float32), group.ranks.share(BATCH))
    if group.ranks.rank == 1:
        batch.targets[0][0, 0, 0, 0] = torch.nan
    begin = {name: each.clone() for name, each in step.update.weights().items()}
    for _ in range(config.optimizer.gradient_accumulation):
        step(batch)
        step.update.end_iteration()
    is_same = all(torch.equal(begin[name], now) for name, now in step.update.weights().items())
    return is_same, step.loss_buffer.rows[0].clone(), int(step.update.skipped)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clipping": "norm"},
        {"gradient_clipping": "autoclip", "gradient_accumulation": 2},
    ],
)
def test_a_gradient_of_one_rank_that_is_not_finite_moves_nothing_anywhere(settings, tmp_path):
    for is_same, row_v, num_skipped in call(2, _train_on_nan, tmp_path, settings):
        assert is_same
        assert row_v.isnan().any()
        assert num_skipped >= 1


def _norms(group):
    """Running estimates of every rank before they are gathered, and those of this one after."""
    options = tiny_options("dlight") | {"details": "good"}
    config = tiny_config(CONFIG | {"model": {"trainer": "dlight", "options": options}})
    model, _ = build_model(config, CPU)
    step = build_step(config, model, CPU, group=group)
    batch = make_batch(model, BATCH, CPU, torch.float32)
    step(_share(batch, group.ranks.share(BATCH)))
    own = torch.cat([norm.running_mean for norm in step.norms])
    setup = SimpleNamespace(step=step, model=model, state=SimpleNamespace(iterations=1))
    gather(setup, group)
    refused = ""
    if group.ranks.rank == 1:
        model.get_parameter(step.update.names[0]).data.add_(1)
    try:
        gather(setup, group)
    except SaveError as error:
        refused = str(error)
    return own, torch.cat([norm.running_mean for norm in step.norms]), refused


def test_running_estimates_are_averaged_and_weights_compared_for_a_save(tmp_path):
    (own, gathered, refused), (other, others, none) = call(2, _norms, tmp_path)
    assert not torch.equal(own, other)
    assert torch.equal(gathered, others)
    torch.testing.assert_close(gathered, (4 * own + 3 * other) / 7)
    assert refused.startswith("rank 1 has other weights than rank 0 at iteration 1")
    assert none == ""


def test_a_step_of_a_gpu_that_waits_for_a_lost_rank_is_given_up(monkeypatch):
    monkeypatch.setattr(pacing, "_SEARCH_PAUSE_S", 0.0)
    lost = RankLost(Failure("rank 1 (GPU 1, pid 7) ended with signal 9", 1))
    seen = iter([None, lost])
    council = SimpleNamespace(
        group=SimpleNamespace(members=SimpleNamespace(lost=lambda: next(seen)))
    )
    step = SimpleNamespace(query=lambda: False)  # the end of a step that never comes
    with pytest.raises(RankLost, match="ended with signal 9"):
        pacing.Pacing(CPU, council)._watch(step, council)
    monkeypatch.setattr(pacing, "_LEAST_DEADLINE_S", 0.01)
    council.group.members.lost = lambda: None
    with pytest.raises(RankLost, match="another rank hangs"):
        pacing.Pacing(CPU, council)._watch(step, council)
