"""Ranks of a run: their place as launchers name it, and their shares of a batch."""

import pytest

from mien.core.distribute.ranks import Ranks, Share, from_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (TORCHRUN, Ranks(3, 4, 1, 2)),
        (SRUN, Ranks(6, 7, 2, 3)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, Ranks(6, 7, 2, 4)),
        (SRUN | TORCHRUN, Ranks(3, 4, 1, 2)),  # torchrun within a step of srun
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, None),  # sbatch's script
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "a"},
            Ranks(1, 2, 1, 2),
        ),
    ],
)
def test_place_is_read_from_the_environment_of_each_launcher(environment, place):
    assert from_environment(environment) == place


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "4"}, "rank 4 of 4"),
        ({"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "local rank 1 of 5"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number from 0, got 'two'"),
        ({"WORLD_SIZE": "0"}, "rank 3 of 0"),
        ({"RANK": "-1"}, "RANK must be a whole number from 0, got '-1'"),
    ],
)
def test_half_a_place_is_refused_in_one_line(change, words):
    environment = {k: v for k, v in (TORCHRUN | change).items() if v is not None}
    with pytest.raises(ValueError, match=words) as refusal:
        from_environment(environment)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x"}, "must be numbers such as"),
        (SRUN | {"SLURM_NODEID": "2"}, "names 2 machines"),
    ],
)
def test_impossible_step_of_srun_is_refused(environment, words):
    with pytest.raises(ValueError, match=words):
        from_environment(environment)


def test_shares_follow_one_another_and_the_first_ranks_take_what_is_left():
    shares = [Ranks(rank, 3, rank, 3).share(16) for rank in range(3)]
    assert shares == [Share(0, 6), Share(6, 5), Share(11, 5)]
    assert [share.weight(16) for share in shares] == [6 / 16, 5 / 16, 5 / 16]


def test_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(ValueError, match="train.batch_size must be at least 3.*got 2"):
        Ranks(0, 3, 0, 3).share(2)
