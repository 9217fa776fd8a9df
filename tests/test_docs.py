"""Pages of docs/: they build as a site, every link leads somewhere, their quotes are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mien.benchmarks import preset_costs
from mien.cli import looks_page
from mien.core.config import presets

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "cli", "kernels", "models", "benchmarks")


def test_the_site_builds_without_a_warning(tmp_path):
    """A page that is in no table of contents, or a link that leads nowhere, is a warning."""
    words = ["sphinx", "--quiet", "--fail-on-warning", "--nitpicky", str(ROOT / "docs")]
    done = subprocess.run(
        [sys.executable, "-m", *words, str(tmp_path / "site"), "-d", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages


def test_the_table_of_presets_is_that_of_their_costs():
    page = preset_costs.PAGE.read_text(encoding="utf-8")
    assert preset_costs.table(presets.costs()) in page, "run `make docs`"


def test_the_page_of_looks_is_the_one_that_is_drawn(tmp_path, monkeypatch):
    """The text; pictures may differ in a level where a JPEG is coded by another version."""
    monkeypatch.setattr(looks_page, "DOCS", tmp_path)
    looks_page.update()
    page = ROOT / "docs/looks.md"
    assert (tmp_path / "looks.md").read_text() == page.read_text(), "run `make docs`"
    drawn = sorted(path.name for path in (tmp_path / "looks").iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs/looks").iterdir())


TROUBLES = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = sorted(
    {
        quoted
        for line in TROUBLES.splitlines()
        if line.startswith("| `")
        for quoted in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
)


@pytest.fixture(scope="module")
def sources():
    """All code, with the strings that are written over several lines in one."""
    texts = (path.read_text() for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


@pytest.mark.parametrize("quoted", QUOTED)
def test_an_error_that_is_explained_is_one_that_comes_up(quoted, sources):
    assert quoted in sources


def test_there_are_errors_to_explain():
    assert len(QUOTED) >= 6
