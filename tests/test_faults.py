"""A short fault campaign; `tests/faults/campaign.py` is the long one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "faults" / "campaign.py"


@pytest.mark.parametrize("module", ["disks", "faces"])
def test_every_moment_of_a_fault_is_before_a_function_that_is_there(module, monkeypatch):
    """The short campaign takes some of them by chance."""
    monkeypatch.syspath_prepend(CAMPAIGN.parent)
    for moment, (owner, name, _) in importlib.import_module(module).MOMENTS.items():
        place, _, inner = owner.partition(":")
        place = importlib.import_module(place)
        assert callable(getattr(getattr(place, inner) if inner else place, name, None)), moment


@pytest.mark.slow
def test_a_short_campaign_loses_nothing(tmp_path):
    words = ["--short", "--kills", "12", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        row["fault"]: row for row in json.loads((tmp_path / "figures.json").read_text())["faults"]
    }
    assert rows["kill"]["passed"] + rows["kill-in-stage-change"]["passed"] == 12
    for name, row in rows.items():
        assert row["passed"] + row["skipped"] > 0, f"{name} had no case"
    for name in sorted(rows):
        print(name, rows[name]["seen"])
