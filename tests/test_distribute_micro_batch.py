"""Micro-batches: the bits of one process on two and four, and from one number to another."""

import pytest
import torch
from conftest import CPU, tiny_config
from ranks import call

from mien.benchmarks.bench_step import make_batch
from mien.core.data.feed import Batch
from mien.core.distribute.ranks import ALONE, Ranks
from mien.core.distribute.tree import TreeSum
from mien.core.estimate.flops import meta_model
from mien.core.training import build
from mien.core.training import micro_batch as micro_batches
from mien.core.training.build import build_model, build_step
from mien.core.training.shared_start import notices_of_parts
from mien.models.batch_norm import BatchNorm

BATCH, STEPS = 8, 4
MODES = ("fp32", "bf16")


def _config(mode, trainer="lightweight", **train):
    options = {"width": 8} if trainer == "lightweight" else {"details": "good"}
    return tiny_config(
        {
            "train": {"batch_size": BATCH, "micro_batch": 1, "seed": 1, **train},
            "model": {"trainer": trainer, "options": options},
            "precision": {"mode": mode},
        }
    )


def _share(batch, share):
    """The faces of a batch that one rank trains on."""

    def own(x_n):
        rows = slice(share.first, share.first + share.count)
        return torch.cat([side[rows] for side in x_n.chunk(2)])

    return Batch(
        own(batch.input_nchw), tuple(map(own, batch.targets)), tuple(map(own, batch.weights)), None
    )


def _train(group, config, places, saved=None, *, has_norm=False):
    """What is saved after steps on the batches of these places, and the losses."""
    model, _ = build_model(config, CPU)
    if has_norm:
        model.encoder.append(BatchNorm(16))
    step = build_step(config, model, CPU, group=group)
    if saved is not None:
        step.update.load_weights(saved[0])
        step.update.load(saved[1])
    ranks = group.ranks if group else Ranks()
    for place in places:
        torch.manual_seed(place)
        batch = make_batch(model, BATCH, CPU, step.update.precision.compute)
        step(_share(batch, ranks.share(BATCH)))
        step.update.end_iteration()
    rows = step.loss_buffer.rows[: len(places)].clone()
    copies = [
        {name: each.clone() for name, each in tensors.items()}
        for tensors in (step.update.weights(), step.update.tensors())
    ]
    return *copies, rows


def _with_norms(group):
    """Weights of a model with batch norm after steps on micro-batches."""
    weights, *_ = _train(group, _config("fp32", micro_batch=2), range(2), has_norm=True)
    assert any(".running_" in name for name in weights)
    return {name: each for name, each in weights.items() if ".running_" not in name}


def _tree(group, num_summands=12):
    """Sum of random tensors over all ranks, which divide them."""
    rank, size = (group.ranks.rank, group.ranks.size) if group else (0, 1)
    num_own = num_summands // size
    tree = TreeSum([torch.empty(3, 50), torch.empty(7)], 2, num_own, group)

    def summand(number):
        torch.manual_seed(rank * num_own + number)
        return (torch.randn(3, 50), torch.randn(7)), torch.randn(2)

    tree(summand)
    return [each.clone() for each in (*tree.sums, tree.row_v)]


def _of_ranks(group, halves):
    """Unbroken runs, and ends of runs that another number of ranks has begun."""
    return {
        "tree": _tree(group),
        "norms": _with_norms(group),
        "runs": {mode: _train(group, _config(mode), range(STEPS)) for mode in MODES},
        "halves": {mode: _train(group, _config(mode), range(STEPS // 2)) for mode in MODES},
        "ends": {
            mode: _train(group, _config(mode), range(STEPS // 2, STEPS), saved)
            for mode, saved in halves.items()
        },
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks come to, and four that go on from the half of the two."""
    folder = tmp_path_factory.mktemp("ranks")
    two = call(2, _of_ranks, folder, {})
    return {2: two, 4: call(4, _of_ranks, folder, two[0]["halves"])}


def _assert_same_bits(ours, theirs):
    for one, two in zip(ours[:2], theirs[:2], strict=True):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_tree_is_the_same_on_any_number_of_ranks(ranks, num_ranks):
    alone = _tree(None)
    for rank in ranks[num_ranks]:
        for one, two in zip(rank["tree"], alone, strict=True):
            assert torch.equal(one, two)
    plain = torch.zeros(3, 50)
    for number in range(12):
        torch.manual_seed(number)
        plain += torch.randn(3, 50)
    torch.testing.assert_close(alone[0], plain)
    assert not torch.equal(alone[0], plain), "these summands show no order"


@pytest.mark.parametrize("mode", MODES)
def test_weights_have_the_bits_of_one_process(ranks, mode):
    alone = _train(None, _config(mode), range(STEPS))
    for num_ranks, states in ranks.items():
        for rank in states:
            _assert_same_bits(rank["runs"][mode], alone)
            assert torch.equal(rank["runs"][mode][2], alone[2]), num_ranks
    # Four ranks have gone on from two; here one process does.
    half = ranks[2][0]["halves"][mode]
    resumed = _train(None, _config(mode), range(STEPS // 2, STEPS), half)
    for state in (resumed, ranks[4][0]["ends"][mode], ranks[4][3]["ends"][mode]):
        _assert_same_bits(state, alone)


def test_batch_norm_of_micro_batches_is_that_of_one_process_but_for_its_estimates(ranks):
    alone = _with_norms(None)
    for rank in [*ranks[2], *ranks[4]]:
        for name, tensor in alone.items():
            assert torch.equal(rank["norms"][name], tensor), name


@pytest.mark.parametrize("place", [ALONE, Ranks(0, 2, 0, 2)])
def test_it_is_said_what_batch_norm_sees(place):
    config = _config("fp32", "dlight", micro_batch=2)
    notice, *of_ranks = notices_of_parts(config, meta_model(config), place)
    assert notice.startswith("dlight has batch norm, which with train.micro_batch sees 2 faces ")
    assert "the same bits" not in notice, "with dropout they have not"
    told = "dlight has dropout or noise, seeing the faces of one rank: "
    assert [each.startswith(told) for each in of_ranks] == [True] * (place.size > 1)
    whole = _config("fp32", "dlight", micro_batch=0)
    notices = notices_of_parts(whole, meta_model(whole), place)
    told = "dlight has batch norm and dropout or noise, seeing the faces of one rank: "
    assert [each.startswith(told) for each in notices] == [True] * (place.size > 1)
    plain = _config("fp32")
    model = meta_model(plain)
    assert notices_of_parts(plain, model, place) == []
    model.encoder.append(BatchNorm(16))
    [notice] = notices_of_parts(plain, model, ALONE)
    assert "; the weights have the same bits on any number of ranks, but its running " in notice


def test_micro_batches_are_a_batch_but_for_rounding():
    whole = _train(None, _config("fp32", micro_batch=0), range(2))
    parts = _train(None, _config("fp32", micro_batch=2), range(2))
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-5, atol=1e-6)
    for name, tensor in parts[1].items():
        if name.endswith(".mean"):
            torch.testing.assert_close(tensor, whole[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"train": {"micro_batch": 3}}, 1, "a multiple of 3, 1 process times .* got 8"),
        ({"train": {"micro_batch": 4}}, 4, "a multiple of 16, 4 processes times .* got 8"),
        ({"train": {"micro_batch": 1}}, 3, "is for 1, 2, 4, 8.. processes, got 3"),
        ({"train": {"micro_batch": 1, "distribution": "sharded"}}, 2, "distribution sharded"),
        ({"train": {"micro_batch": 1}, "optimizer": {"overlap": "on"}}, 1, "overlap on"),
        ({"train": {"micro_batch": 1}, "optimizer": {"fused_dense": True}}, 1, "fused_dense"),
    ],
)
def test_micro_batches_that_fit_nothing_are_refused(settings, size, message):
    settings["train"]["batch_size"] = BATCH
    with pytest.raises(ValueError, match=message):
        micro_batches.check(tiny_config(settings), Ranks(0, size, 0, size))


def test_an_automatic_batch_size_is_left_to_be_found():
    micro_batches.check(tiny_config({"train": {"micro_batch": 3, "batch_size": "auto"}}))


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "num_ranks", "has_two"),
    [
        (16, 0, 1, True),
        (17, 0, 1, False),
        (64, 0, 4, True),
        (68, 0, 4, False),
        (64, 16, 1, True),
        (64, 32, 2, False),
    ],
)
def test_two_streams_go_by_the_faces_that_a_gpu_computes_at_once(
    batch_size, micro_batch, num_ranks, has_two
):
    config = tiny_config({"train": {"batch_size": batch_size, "micro_batch": micro_batch}})
    ranks = Ranks(size=num_ranks)
    assert build._has_two_streams(config, torch.device("cuda"), ranks) == has_two
