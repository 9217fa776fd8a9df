"""Launches are counted exactly, and a step keeps its budget."""

import pytest
import torch
import torch.nn.functional as F

from mien.benchmarks import bench_models, bench_step, launches
from mien.benchmarks.variants import names, variant
from mien.core.distribute.ranks import ALONE


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (lambda: torch.ones(3).add_(1).view(3), 2),  # ones and add_; the view is free
        (lambda: torch.empty(3), 0),
        (lambda: torch.empty_like(torch.empty(2, 3)).t(), 0),
        (lambda: torch.cat((torch.empty(2), torch.empty(3))), 1),
        (lambda: torch.empty(3).copy_(torch.empty(3)), 1),
        (lambda: torch.empty(3).to(torch.float64), 1),
        (lambda: F.pad(torch.empty(1, 1, 4, 4), (1, 2, 1, 2)), 2),
        (lambda: torch.empty(2, 3) @ torch.empty(3, 4), 1),
        (lambda: F.conv2d(torch.empty(1, 2, 5, 5), torch.empty(3, 2, 3, 3)), 1),
        (lambda: F.conv2d(torch.empty(1, 2, 5, 5), torch.empty(3, 2, 3, 3), torch.empty(3)), 2),
        (lambda: torch._foreach_add([torch.empty(2), torch.empty(3)], 1), 1),
    ],
)
def test_launches_of_operations(run, wanted):
    assert launches.count(run) == wanted


@pytest.mark.parametrize("asked", [(True, False, False), (False, True, True), (True, True, True)])
def test_a_convolution_backward_launches_once_a_gradient(asked):
    x, weight, bias = (
        torch.rand(*shape, requires_grad=wanted)
        for shape, wanted in zip(((1, 2, 5, 5), (3, 2, 3, 3), (3,)), asked, strict=True)
    )
    out = F.conv2d(x, weight, bias)
    grad = torch.ones_like(out)
    needed = [t for t in (x, weight, bias) if t.requires_grad]

    def backward():
        torch.autograd.grad(out, needed, grad, retain_graph=True)

    assert launches.count(backward) == sum(asked)


def test_operations_of_mien_launch_what_their_module_says(monkeypatch):
    @torch.library.custom_op("mien::launch_test", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return (x + 1) * 2

    x = torch.rand(3)
    with pytest.raises(KeyError, match="mien::launch_test"):
        launches.count(lambda: twice(x))
    monkeypatch.setattr(launches, "launches_of_mien", lambda: {"mien::launch_test": 5})
    assert launches.count(lambda: twice(x)) == 5


def test_phases_are_counted_in_order():
    made = []
    phases = {
        "make": lambda: made.append(torch.ones(2)),
        "use": lambda: made[-1].mul_(2).add_(1),
    }
    assert launches.count_phases(phases) == {"make": 1, "use": 2}


@pytest.mark.budget
def test_a_step_keeps_its_budget():
    """Equality: a step that launches less lowers the budget, so that it stays low.

    Of two models all phases; of every model the network's, which is where they differ.
    """
    torch.use_deterministic_algorithms(False)  # with them, a resize is made of many operations
    counts = {name: bench_models.network_launches(variant(name)) for name in names()}
    for name in ("original", "lightweight"):
        counts[name] = bench_step.phase_launches(name)
    counts["ranks"] = launches.read_budget()["ranks"]  # which the last test here counts
    assert counts == launches.read_budget(), (
        f"now {counts}; where that is meant, call launches.write_budget with it"
    )


@pytest.mark.budget
def test_the_budget_does_not_depend_on_the_batch():
    assert bench_step.phase_launches("original", batch_size=3) == launches.read_budget()["original"]


@pytest.mark.budget
def test_gradients_that_stay_factors_cost_one_launch():
    """Two weight gradients less; Gram matrices, their product and an update of their own more."""
    budget = launches.read_budget()["original"]
    fused = bench_step.phase_launches("original", without="dense_gradients")
    changed = {phase: fused[phase] - count for phase, count in budget.items()}
    assert {phase: count for phase, count in changed.items() if count} == {
        "backward": -2,
        "update": 3,
        "all": 1,
    }


class _OneRank:
    """A rank by itself, whose collectives are a launch each."""

    ranks = ALONE

    def all_reduce(self, tensor):
        tensor.add_(0)

    reduce_scatter = all_gather = all_reduce


@pytest.mark.budget
def test_a_step_of_ranks_keeps_its_budget():
    """Launches of each of 5 parts: a copy and a sum, or a sum by slices and a gathering; the
    losses' share and sum; of slices the sum of squares, here and over the ranks. Two gradients
    that lie in another way than their parameters are not copied once more."""
    torch.use_deterministic_algorithms(False)
    counts = bench_step.rank_launches("lightweight", _OneRank())
    assert counts == {"mirrored": 5 * 2 + 2 - 2, "sharded": 5 * 3 + 2 + 2 - 2}
    assert counts == launches.read_budget()["ranks"]
