"""Updates on several ranks: the bits of one process, whoever moves the weights.

Gradients are multiples of 1/64, so that every sum of them and of their squares is exact and its
order shows nowhere.
"""

import functools
import itertools

import pytest
import torch
from conftest import CPU, tiny_config, tiny_options
from ranks import call
from torch import nn

from mien.core import precision as precisions
from mien.core.config import OptimizerConfig
from mien.core.distribute import layout as layouts
from mien.core.distribute.layout import ALIGNMENT, Layout
from mien.core.distribute.sharded import ShardedUpdate
from mien.core.distribute.update import MirroredUpdate
from mien.core.estimate.flops import meta_model
from mien.core.optim.arrivals import arrival_order
from mien.core.optim.optimizer import Update
from mien.core.training.build import build_model
from mien.core.training.lr_finder import _restorer_of

KINDS = {"mirrored": MirroredUpdate, "sharded": ShardedUpdate}
PART_BYTES = 2000
ITERATIONS = 4


class _Net(nn.Module):
    """Tensors of odd sizes, of one element, in channels_last, and one over several slices."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)
        self.large = nn.Linear(33, 61)
        self.last = nn.Linear(5, 1)


def _gradients(update, rank, iteration):
    """Gradients of one rank and iteration, in the type of the network."""
    generator = torch.Generator().manual_seed(100 * iteration + rank)
    scale = 1 if update.scale is None else float(update.scale)
    return [
        (torch.randint(-8, 9, each.shape, generator=generator) * (scale / 64))
        .to(each.dtype)
        .contiguous(
            memory_format=torch.channels_last if each.ndim == 4 else torch.contiguous_format
        )
        for each in update.parameters
    ]


def _move(update, gradients):
    """A step by a loss that has these gradients."""
    loss = sum((p * g).sum() for p, g in zip(update.parameters, gradients, strict=True))
    with update.overlap_backward():
        gradients = torch.autograd.grad(loss, update.parameters)
    update(gradients)
    update.end_iteration()


def _config(settings):
    defaults = {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "overlap": "off"}
    return OptimizerConfig(**defaults | settings)


def _make(group, mode, kind, settings, overlaps=False):
    precision = precisions.resolve(mode, CPU)
    rest = {name: value for name, value in settings.items() if name != "ema"}
    model, config, ema = _Net(), _config(rest), settings.get("ema", 0.0)
    if group is None:
        return Update(model, config, precision, ema)
    order = [*range(len([*model.parameters()]))][::-1]
    make = functools.partial(KINDS[kind], group=group, order=order, overlaps=overlaps)
    update = make(model, config, precision, ema)
    update.is_beside = True  # as on a GPU
    return update


def _saved(update):
    """What the first rank saves, and what the network computes with."""
    update.gather()
    tensors = {}
    if not isinstance(update, MirroredUpdate) or update.group.ranks.is_first:
        tensors = {name: each.clone() for name, each in update.weights().items()}
        tensors |= {f"state of {name}": each.clone() for name, each in update.tensors().items()}
        tensors |= {f"average of {name}": each.clone() for name, each in update.averages.items()}
    return tensors, [each.detach().clone() for each in update.parameters]


CASES = [
    (mode, {"gradient_clipping": clipping, "clipping_value": 0.5}, False)
    for mode, clipping in [
        *itertools.product(("fp32",), ("none", "value", "norm", "global_norm", "autoclip")),
        *itertools.product(("bf16",), ("none", "norm")),
        *itertools.product(("fp16",), ("none", "autoclip")),
    ]
]
CASES += [("fp32", {}, True), ("bf16", {"gradient_clipping": "norm", "clipping_value": 0.5}, True)]
CASES += [(mode, {"gradient_accumulation": 2}, False) for mode in ("fp32", "bf16", "fp16")]
CASES += [
    ("fp32", {"optimizer": "nadam", "gradient_clipping": "autoclip"}, False),
    ("bf16", {"optimizer": "lion", "reduce": "fp32"}, False),
    ("bf16", {"ada_amsgrad": True}, False),
    ("bf16", {"ema": 0.3}, False),
    ("fp32", {"ema": 0.3, "optimizer": "lion"}, True),
    ("fp32", {"optimizer": "schedule-free"}, False),
    ("bf16", {"optimizer": "schedule-free"}, True),
]
IDS = [f"{mode} {' '.join(map(str, s.values()))}{' overlap' * o}" for mode, s, o in CASES]


def _run(group, case, kind=None, poisoned=None):
    """The state after some steps; of one process by the sums of what two ranks have."""
    mode, settings, overlaps = case
    update = _make(group, mode, kind, settings, overlaps)
    skipped = []
    for iteration in range(ITERATIONS):
        ranks = (0, 1) if group is None else (group.ranks.rank,)
        each = [_gradients(update, rank, iteration) for rank in ranks]
        if iteration == poisoned and 1 in ranks:
            each[-1][2].view(-1)[17] = float("nan")
        _move(update, [sum(tensors) for tensors in zip(*each, strict=True)])
        skipped.append(int(update.skipped))
    return *_saved(update), skipped


RESUMED = [
    ("bf16", {"ema": 0.3}),
    ("bf16", {"optimizer": "schedule-free"}),
    ("fp32", {"gradient_accumulation": 3}),
    ("fp16", {"reduce": "fp32"}),
    ("fp32", {"gradient_clipping": "autoclip", "autoclip_history": 3}),
]


def _continued(group, path, kind, case):
    """The state after steps that go on from a save."""
    mode, settings = case
    update = _make(group, mode, kind, settings)
    weights, state, averages = torch.load(path)
    update.load_weights(weights)
    update.load(state)
    update.load_averages(averages)
    for iteration in range(2, ITERATIONS):
        ranks = (0, 1) if group is None else (group.ranks.rank,)
        each = [_gradients(update, rank, iteration) for rank in ranks]
        _move(update, [sum(tensors) for tensors in zip(*each, strict=True)])
    return _saved(update)


def _resumed(group, folder):
    """The states after steps of one kind of update, a save, and steps of the other kind."""
    states = {}
    for number, (mode, settings) in enumerate(RESUMED):
        for first, second in (("mirrored", "sharded"), ("sharded", "mirrored")):
            saved = _make(group, mode, first, settings)
            for iteration in range(2):
                _move(saved, _gradients(saved, group.ranks.rank, iteration))
            saved.gather()
            path = folder / f"{number} {first}"
            if group.ranks.is_first:
                torch.save((saved.weights(), saved.tensors(), saved.averages), path)
            group.barrier()
            states[number, first] = _continued(group, path, second, RESUMED[number])
    return states


def _searched(group):
    """Whether a search for a rate leaves a sharded update as it was."""
    update = _make(group, "bf16", "sharded", {"ema": 0.3})
    _move(update, _gradients(update, group.ranks.rank, 0))
    before, restore = _saved(update), _restorer_of(update)
    for iteration in (1, 2):
        _move(update, _gradients(update, group.ranks.rank, iteration))
    restore()
    return before, _saved(update)


SENDINGS = [(False, False), (False, True), (True, False)]
"""Whether weights move beside the backward pass, and whether the exchange is put there anyway."""


def _sent(group, kind, *, overlaps, is_beside):
    """Parts that are sent during a backward pass, the parts there are, and the weights after it."""
    precision, order = precisions.resolve("bf16", CPU), [*range(6)][::-1]
    make = functools.partial(KINDS[kind], group=group, order=order, overlaps=overlaps)
    update = make(_Net(), _config({}), precision)
    update.is_beside = update.is_beside or is_beside
    gradients = _gradients(update, group.ranks.rank, 0)
    loss = sum((p * g).sum() for p, g in zip(update.parameters, gradients, strict=True))
    with update.overlap_backward():
        gradients = torch.autograd.grad(loss, update.parameters)
        sent = update.exchange.arrivals.num_handled
    update(gradients)
    return sent, len(update.layout.parts), [each.detach().clone() for each in update.parameters]


def _of_ranks(group, folder):
    """What one rank comes to."""
    layouts.PART_BYTES = PART_BYTES
    runs = {
        (number, kind, poisoned): _run(group, case, kind, poisoned)
        for number, case in enumerate(CASES)
        for kind in KINDS
        for poisoned in (None, 1)
    }
    sent = {
        kind: [_sent(group, kind, overlaps=o, is_beside=b) for o, b in SENDINGS] for kind in KINDS
    }
    resumed, searched = _resumed(group, folder), _searched(group)
    return {"runs": runs, "resumed": resumed, "searched": searched, "sent": sent}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks has come to, and the folder of their saves."""
    folder = tmp_path_factory.mktemp("ranks")
    return call(2, _of_ranks, folder, folder), folder


def _assert_same(ours, theirs, *, is_exact=True):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if "accumulator" in name:  # of which nothing counts where the sum has ended
            continue
        if is_exact:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-7)


def _assert_moved_alike(two_ranks, number, kind, poisoned):
    """The first rank has what one process has, and both compute with the same."""
    (saved, ours, skipped), (_, theirs, skipped_there) = (
        rank["runs"][number, kind, poisoned] for rank in two_ranks[0]
    )
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)
    assert skipped == skipped_there
    alone, _, skipped_alone = _run(None, CASES[number], poisoned=poisoned)
    if poisoned is not None and CASES[number][2]:
        # With overlap only the part that is not finite is kept back.
        assert skipped == [0, 1, 1, 1]
        assert all(each.isfinite().all() for each in saved.values() if each.is_floating_point())
        return
    assert skipped == skipped_alone
    clipping = CASES[number][1].get("gradient_clipping", "none")
    # The norm is that of slices, which is rounded elsewhere than that of tensors.
    is_exact = kind == "mirrored" or clipping in ("none", "value")
    _assert_same(saved, alone, is_exact=is_exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_two_ranks_move_the_weights_as_one_process(two_ranks, number, kind):
    _assert_moved_alike(two_ranks, number, kind, poisoned=None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_what_is_not_finite_on_one_rank_moves_nothing_on_any(two_ranks, number, kind):
    _assert_moved_alike(two_ranks, number, kind, poisoned=1)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("number", range(len(RESUMED)))
def test_a_save_goes_on_with_the_other_kind_and_on_one_process(two_ranks, number, first):
    ranks, folder = two_ranks
    mode, settings = RESUMED[number]
    unbroken, *_ = _run(None, (mode, settings, False))
    # The norm is that of slices, which is rounded elsewhere than that of tensors.
    is_exact = "gradient_clipping" not in settings
    _assert_same(ranks[0]["resumed"][number, first][0], unbroken, is_exact=is_exact)
    alone, _ = _continued(None, folder / f"{number} {first}", None, RESUMED[number])
    _assert_same(alone, unbroken, is_exact=is_exact)


def test_a_search_for_a_rate_leaves_slices_as_they_were(two_ranks):
    for rank in two_ranks[0]:
        (saved, parameters), (saved_after, parameters_after) = rank["searched"]
        assert all(torch.equal(each, saved_after[name]) for name, each in saved.items())
        for one, two in zip(parameters, parameters_after, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_sends_after_the_backward_pass_where_nothing_moves_beside_it(two_ranks, kind):
    after, beside, overlapped = two_ranks[0][0]["sent"][kind]
    assert after[0] == 0
    assert beside[0] == beside[1] == overlapped[0] == after[1] > 1
    for one, two, three in zip(after[2], beside[2], overlapped[2], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 64])
def test_pieces_are_every_element_once(num_ranks, monkeypatch):
    monkeypatch.setattr(layouts, "PART_BYTES", PART_BYTES)
    parameters = [each.detach() for each in _Net().parameters()]
    layout = Layout(parameters, [3, 2, 5, 4, 1, 0], num_ranks=num_ranks, element_bytes=4)
    assert len(layout.parts) == 2
    flat = layout.new_flat(torch.int64, CPU)
    views, own_places = layout.views(flat), [[] for _ in range(num_ranks)]
    for number, view in enumerate(views):
        view.copy_(torch.arange(view.numel()).view_as(view) * 10 + number)
    seen = [torch.zeros(each.numel(), dtype=torch.int64) for each in parameters]
    for index in range(len(layout.parts)):
        for rank in range(num_ranks):
            for piece in layout.pieces(index, rank):
                assert piece.place % ALIGNMENT == piece.own_place % ALIGNMENT == 0
                own_places[rank].append(range(piece.own_place, piece.own_place + piece.length))
                whole = views[piece.number].as_strided(
                    (seen[piece.number].numel(),), (1,), layout.starts[piece.number]
                )
                taken = whole[piece.first : piece.first + piece.length]
                assert torch.equal(flat[piece.place :][: len(taken)], taken)
                seen[piece.number][piece.first : piece.first + piece.length] += 1
    assert all((each == 1).all() for each in seen)
    for ranges in own_places:
        places = [place for each in ranges for place in each]
        assert len(places) == len({*places})
        assert max(places) < layout.length // num_ranks


@pytest.mark.parametrize("family", ["original", "iae", "phaze-a"])
def test_the_order_of_gradients_is_known_without_memory(family):
    """A part whose gradients came late would hold up the parts behind it."""
    config = tiny_config({"model": {"trainer": family, "options": tiny_options(family)}})
    model, _ = build_model(config, CPU)
    parameters, came = [*model.parameters()], []
    for number, parameter in enumerate(parameters):
        parameter.register_hook(lambda _, number=number: came.append(number))
    faces = torch.rand(4, 3, model.input_px, model.input_px)
    loss = sum(output.sum() for side in model(faces) for output in side)
    torch.autograd.grad(loss, parameters)
    assert arrival_order(meta_model(config)) == came
