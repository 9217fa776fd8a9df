"""The benchmark of several ranks: what they measure, and how it stands beside the prediction."""

import json

import jsonschema
import pytest
import ranks
import torch
from conftest import tiny_options

from mien.benchmarks import bench_scaling, harness, scaling_rank
from mien.benchmarks.variants import Variant
from mien.core.distribute.group import Group
from mien.core.distribute.ranks import ALONE

CEILINGS = {"device": "a CPU", "num_sms": 2, "copy_gb_s": 30.0, "gemm_tflops": {"bf16": 0.4}}
CPU = torch.device("cpu")
SCHEMA = json.loads((harness.RESULTS.parent / "schema.json").read_text())


def _fits_the_schema(row):
    jsonschema.validate(row, {"$defs": SCHEMA["$defs"], "$ref": "#/$defs/row"})


def _jobs(size):
    """What is measured on a CPU, of small exchanges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_scaling, "_CPU_CASES", [("lightweight", 4)])
        patch.setattr(bench_scaling, "_CPU_SIZES", [2**16])
        return list(bench_scaling._jobs(size, 2))


def _figures(group):
    """Rows of this rank."""
    done = []
    for job in _jobs(2):
        if job["kind"] == "scaling":
            found = scaling_rank.step_figures(group, group.ranks, CPU, job)
        elif job["kind"] == "link":
            found = scaling_rank.link_figures(group, CPU, job)
        else:
            found = scaling_rank.meeting_figures(group)
        done.append(job | found)
    return done


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of one rank and of two, which train a tiny model."""
    tiny = Variant("lightweight", tiny_options("lightweight"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (bench_scaling, scaling_rank):
            patch.setattr(module, "variant", lambda name: tiny)
        alone = [job | scaling_rank.step_figures(None, ALONE, CPU, job) for job in _jobs(1)]
        of_two = ranks.call(2, _figures, tmp_path_factory.mktemp("ranks"))[0]
        done = {1: alone, 2: of_two}
        patch.setattr(bench_scaling, "_measured", lambda size, jobs: done[size])
        return list(bench_scaling.rows(CEILINGS))


def test_rows_of_links_meetings_and_steps_are_valid(rows):
    for row in rows:
        _fits_the_schema(row)
    kinds = [row["kind"] for row in rows]
    assert [kinds.count(kind) for kind in ("link", "meeting", "scaling")] == [1, 1, 10]
    assert len({harness.identity(row) for row in rows}) == len(rows)


def test_two_ranks_stand_beside_one_and_beside_their_prediction(rows):
    steps = [row for row in rows if row["kind"] == "scaling"]
    assert [row["batch_size"] for row in steps if row["ranks"] == 1] == [2, 4]
    of_two = [row for row in steps if row["ranks"] == 2]
    assert {row["batch_size"] for row in of_two} == {4, 8}
    one_ms = {row["batch_size"]: row["median_ms"] for row in steps if row["ranks"] == 1}
    for row in of_two:
        same_work_ms = one_ms[4] * row["batch_size"] / 4
        assert row["speedup"] == pytest.approx(same_work_ms / row["median_ms"], rel=1e-3)
        assert row["threads"] == 1
        assert ("predicted_eg_per_s" in row) == (row["exchange"] == "after")
        if row["exchange"] == "after":
            off = abs(row["predicted_eg_per_s"] / row["eg_per_s"] - 1)
            assert row["off"] == pytest.approx(off, abs=2e-2)


def test_ranks_are_processes_that_print_rows():
    jobs = [job for job in _jobs(2) if job["kind"] != "scaling"]
    measured = list(bench_scaling._measured(2, jobs))
    assert [row["kind"] for row in measured] == ["link", "meeting"]
    for row in measured:
        _fits_the_schema(row)


def test_what_is_left_out_of_an_exchange_is_put_back():
    sends = Group.all_reduce
    with scaling_rank._exchange("none"):
        assert Group.all_reduce is not sends
    assert Group.all_reduce is sends
