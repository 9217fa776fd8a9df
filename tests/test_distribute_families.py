"""Every family on two ranks: both come to the same weights, whole or in slices."""

import itertools

import pytest
import torch
from conftest import CPU, tiny_config, tiny_options
from ranks import call

from mien import models
from mien.benchmarks.bench_step import make_batch
from mien.core.training.build import build_model, build_step

# Begun so that dfl-sae is not in fp16, in which a CPU takes seconds for its convolutions.
MODES = itertools.cycle(("fp16", "fp32", "bf16"))
DISTRIBUTIONS = itertools.cycle(("sharded", "mirrored"))
CASES = [*zip(models.available(), MODES, DISTRIBUTIONS, strict=False)]


def _step(group, family, mode, distribution):
    """Weights of the network before and after a step, steps left out, and the losses."""
    config = tiny_config(
        {
            "train": {"batch_size": 2, "distribution": distribution, "seed": 1},
            "model": {"trainer": family, "options": tiny_options(family)},
            "precision": {"mode": mode},
        }
    )
    model, _ = build_model(config, CPU)
    step = build_step(config, model, CPU, group=group)
    begin = [each.detach().clone() for each in step.parameters]
    torch.manual_seed(group.ranks.rank)
    batch = make_batch(model, 1, CPU, step.update.precision.compute)
    step(batch)
    parameters = [each.detach() for each in step.parameters]
    return begin, parameters, int(step.update.skipped), step.loss_buffer.rows[:1].clone()


def _all(group):
    return [_step(group, *case) for case in CASES]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """States of every family on each of two ranks."""
    return call(2, _all, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_a_family_trains_on_two_ranks(two_ranks, number):
    (begin, ours, skipped, rows), (_, theirs, _, rows_there) = (rank[number] for rank in two_ranks)
    assert skipped == 0
    assert rows.isfinite().all()
    assert torch.equal(rows, rows_there), "the losses are those of all faces"
    for one, two in zip(ours, theirs, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, two)
    moved = [not torch.equal(one, before) for one, before in zip(ours, begin, strict=True)]
    assert sum(moved) > len(moved) / 2, "of some the change is lost where 16 bits round it"
