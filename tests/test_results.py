"""Results files: what is written fits the schema, is compared with the past, reaches the README."""

import itertools
import json
import platform
import re
from pathlib import Path

import jsonschema
import pytest
import torch

from mien.benchmarks import (
    bench_augment,
    bench_data,
    bench_kernels,
    bench_machine,
    bench_step,
    bench_swap,
    bench_train,
    ceilings,
    compare,
    harness,
    report,
    roofline,
)
from mien.benchmarks.variants import Variant
from mien.cli import main

SCHEMA = json.loads((harness.RESULTS.parent / "schema.json").read_text())
COMMITTED = sorted(harness.RESULTS.glob("*.json"))

CEILINGS = {
    "device": "CPU of a test",
    "num_sms": 2,
    "copy_gb_s": 10.0,
    "gemm_edge": 64,
    "gemm_tflops": {"bf16": 0.5, "fp32": 0.25},
    "batch_size": 1,
    "convolutions": [
        {"models": ["original"], "shape": "2x3x67x67 -> 128, 5x5/2", "phase": phase}
        | {"precision": "fp32", "tflops": 0.1, "median_ms": 2.0, "p10_ms": 1.9, "p90_ms": 2.2}
        for phase in ("forward", "data", "weight")
    ],
}


def step_row(eg_per_s=20.0, ms=1000.0, **more):
    return {
        "kind": "step",
        "model": "original",
        "batch_size": 16,
        "precision": "bf16",
        "engine": "mien-eager",
        "threads": 2,
        "eg_per_s": eg_per_s,
        "eg_per_cpu_s": eg_per_s / 2,
        "median_ms": ms,
        "p10_ms": 0.98 * ms,
        "p90_ms": 1.02 * ms,
        "share_of_ceiling": 0.5,
        "peak_mib": None,
        "python_calls": 1200,
        "launches": 300,
    } | more


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results are kept here; this machine's ceilings are known."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device: CEILINGS)
    quick = harness.Pace(2, 0.0, 0)
    for module in (bench_kernels, bench_step):
        monkeypatch.setattr(module, "pace", lambda kind, device_type: quick)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_fit_the_schema(path):
    jsonschema.validate(harness.read_results(path), SCHEMA)


def test_a_row_of_a_swapped_film_fits_the_schema(monkeypatch):
    for name, value in {"_HEAD_PX": 64, "HEIGHT_PX": 170, "WIDTH_PX": 180, "NUM_FRAMES": 5}.items():
        monkeypatch.setattr(bench_swap, name, value)
    rows = bench_swap.rows()
    content = {"schema": 2, **harness.environment(), "ceilings": CEILINGS, "conditions": {}}
    jsonschema.validate(content | {"rows": [next(rows)]}, SCHEMA)
    rows.close()  # its film is removed, and PyTorch has its threads again


def test_the_schema_refuses_what_it_does_not_know():
    content = {"schema": 2, **harness.environment(), "ceilings": CEILINGS, "conditions": {}}
    jsonschema.validate(content | {"rows": [step_row()]}, SCHEMA)
    for bad in (
        step_row(speed=3),
        step_row(eg_per_s=-1),
        {"kind": "step"},
        {"kind": "kernel", "kernel": "x", "variant": "mien", "case": {}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content | {"rows": [bad]}, SCHEMA)


def test_identity_and_figures_share_no_field():
    """Every field of a row is in the schema; those that name what was measured are IDENTITY."""
    assert harness.IDENTITY <= SCHEMA["$defs"]["row"]["properties"].keys() | {"phase"}


def test_equal_measurements_are_replaced_and_others_kept(folder):
    harness.write_results([step_row(1.0), step_row(5.0, batch_size=64)], ceilings=CEILINGS)
    state = {"before": None, "after": {"sm_mhz": 1980.0}}
    path = harness.write_results([step_row(2.5)], conditions={"step": state})
    content = harness.read_results(path)
    assert [row["eg_per_s"] for row in content["rows"]] == [5.0, 2.5]
    assert content["ceilings"] == CEILINGS
    assert content["conditions"] == {"step": state}
    assert harness.known_ceilings() == CEILINGS
    jsonschema.validate(content, SCHEMA)


@pytest.mark.parametrize("words", [["machine"], ["step"], ["step", "--results", "named"]])
def test_ceilings_are_measured_once_wherever_they_are_written(folder, monkeypatch, words):
    measured = []
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda _: measured.append(1) or CEILINGS)
    for bench in (bench_machine, bench_step):
        monkeypatch.setattr(bench, "rows", lambda _: iter([step_row(20.0)]))
    monkeypatch.setattr(bench_machine, "table", lambda *_: "")
    harness.RESULTS.mkdir(parents=True, exist_ok=True)
    (harness.RESULTS / "package.json").write_text('{"name": "of somebody"}')
    (harness.RESULTS / "cut.json").write_text("{")
    for _ in range(2):
        assert main(["bench", *words]) == 0
    assert len(measured) == 1


def cases():
    x = torch.rand(2**16, device="cuda" if torch.cuda.is_available() else "cpu")
    for num in (2**12, 2**16):
        what = {"num": num, "dtype": torch.float32, "bytes": 8 * num, "flops": num}
        # Twenty times one another: a machine that is busy with other work changes no order.
        for variant, delay in (("mien", 20), ("torch-eager", 1), ("torch-compile", 400)):
            yield what | {"variant": variant}, lambda n=num, d=delay: [x[:n] + 1 for _ in range(d)]

    def fail():
        raise RuntimeError("no such kernel\nat line 1")

    yield {"num": 0}, fail


def test_kernels_are_put_beside_their_rivals(folder, monkeypatch, capsys):
    from mien import kernels

    monkeypatch.setattr(kernels, "OPERATIONS", ("augment",))
    monkeypatch.setattr(bench_augment, "cases", cases)
    assert main(["bench", "kernels"]) == 1, "one case failed"
    printed = capsys.readouterr().out
    assert "loses to torch-eager: augment {'num': 4096, 'dtype': 'torch.float32'}" in printed
    (path,) = harness.RESULTS.glob("*.json")
    content = harness.read_results(path)
    jsonschema.validate(content, SCHEMA)
    assert len(content["rows"]) == 7
    ours = [row for row in content["rows"] if row["variant"] == "mien"]
    assert ours[0]["case"] == {"num": 4096, "dtype": "torch.float32"}
    assert ours[0]["loses_to"] == ["torch-eager"]
    assert ours[0]["speedup_over_torch_eager"] < 1 < ours[0]["speedup_over_torch_compile"]
    assert ours[0]["share_of_ceiling"] == pytest.approx(ours[0]["gb_per_s"] / 10, rel=0.01)
    assert ours[2]["error"] == "no such kernel"


def test_every_part_writes_rows_that_fit(folder, monkeypatch):
    """Real rows of short runs; only the models are few and the faces small."""
    narrow = Variant("lightweight", {"width": 8})
    for module in (bench_step, roofline, ceilings, report):
        monkeypatch.setattr(module, "variant", lambda _name: narrow)
    for cases in ("CASES", "GPU_CASES"):
        monkeypatch.setattr(bench_step, cases, [("lightweight", 1)])
    monkeypatch.setattr(bench_data, "SIZES", [(64, 64)])
    monkeypatch.setattr(bench_data, "Pace", lambda *_: harness.Pace(2, 0.0, 0))
    monkeypatch.setattr(bench_augment, "_STORE_BYTES", 2**16)
    first = {"kind": "data", "name": "first_start", "num_faces": 9, "png_px": 64, "size_px": 64}
    first |= dict.fromkeys(("first_s", "bare_dali_s", "second_s", "ratio", "cpu_ratio"), 1.5)
    monkeypatch.setattr(bench_data, "first_start", lambda *_: first)
    loop = {"kind": "train", "model": "lightweight", "batch_size": 1, "precision": "bf16"}
    loop |= {"engine": "eager", "iterations": 7, "eg_per_s": 6.5, "data_wait": 0.25}
    monkeypatch.setattr(bench_train, "rows", lambda: iter([loop | {"peak_mib": None}]))
    monkeypatch.setattr(roofline, "names", lambda: ["lightweight"])
    for kind in ("data", "step", "train", "roofline", "ceilings"):
        assert main(["bench", kind, "--json"]) == 0
    assert main(["bench", "models", "--only", "lightweight", "--json"]) == 0
    (path,) = harness.RESULTS.glob("*.json")
    content = harness.read_results(path)
    jsonschema.validate(content, SCHEMA)
    kinds = [row["kind"] for row in content["rows"]]
    assert [kind for kind, _ in itertools.groupby(kinds)][:3] == ["data", "step", "train"]
    places = [row["placement"] for row in content["rows"] if row.get("name") == "batches"]
    assert places == (["gpu", "host"] if torch.cuda.is_available() else ["host", "file"])
    bf16 = [row for row in content["rows"] if row["kind"] == "step" and row["precision"] == "bf16"]
    assert all(0 < row["share_of_ceiling"] for row in bf16)


def test_changes_are_held_against_the_spread():
    old = [step_row(20, 1000), step_row(30, 700, precision="fp32"), step_row(9, engine="gone")]
    new = [step_row(25, 800), step_row(29, 710, precision="fp32"), step_row(9, engine="new")]
    better, same = compare.changes(old, new)
    assert (better.figure, better.old, better.new) == ("median_ms", 1000, 800)
    assert (better.ratio, better.verdict) == (0.8, "better")
    assert same.verdict == "within the spread"
    (worse,) = compare.changes(new[:1], old[:1])
    assert worse.verdict == "worse"
    (rate,) = compare.changes(
        [{"kind": "train", "model": "m", "eg_per_s": 10.0}],
        [{"kind": "train", "model": "m", "eg_per_s": 11.0}],
    )
    assert rate.verdict == "spread unknown"


def test_compare_on_the_command_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "rows", lambda known: iter([step_row(25, 800)]))
    old = {"schema": 2, **harness.environment(), "commit": "0ld", "rows": [step_row(20, 1000)]}
    before = folder / "before.json"
    before.write_text(json.dumps(old))
    table = folder / "table.md"
    words = ["bench", "step", "--no-save", "--compare", str(before)]
    assert main([*words, "--markdown", str(table)]) == 0
    name = "step original 16 bf16 mien-eager"
    assert f"{name}: median_ms 1000 -> 800 (x 0.800, better)" in capsys.readouterr().out
    assert f"| {name} | median_ms | 1000 | 800 | 0.800 | better |" in table.read_text()
    assert not harness.RESULTS.exists()

    before.write_text(json.dumps(old | {"card": "Another"}))
    assert main(words) == 2
    refusal = capsys.readouterr().err
    assert "the file is of Another, this is " + harness.environment()["card"] in refusal
    for text, complaint in (
        ("no", "not valid JSON"),
        ("{}", "not a results file"),
        ('{"card": "", "commit": "", "rows": []}', "lacks card or rows"),
    ):
        before.write_text(text)
        assert main(words) == 2
        assert complaint in capsys.readouterr().err
    assert main([*words[:-1], str(folder / "none")]) == 2
    assert main(["bench", "step", "--markdown", "x"]) == 2
    assert main(["bench", "kernels", "--only", "nothing"]) == 2
    assert "no kernel 'nothing'; there are: " in capsys.readouterr().err


def test_two_files_are_compared_and_nothing_is_measured(folder, capsys, monkeypatch):
    monkeypatch.setattr(bench_step, "rows", lambda *_: pytest.fail("measured"))
    content = {"schema": 2, **harness.environment(), "ceilings": CEILINGS, "conditions": {}}
    paths = [folder / "one.json", folder / "two.json"]
    for path, card, row in zip(
        paths, ("H100", "H200"), (step_row(20.0), step_row(30.0)), strict=True
    ):
        path.write_text(json.dumps(content | {"card": card, "rows": [row]}))
    table = folder / "table.md"
    words = ["bench", "--compare", *map(str, paths)]
    assert main([*words, "--markdown", str(table)]) == 0
    assert capsys.readouterr().out.startswith("H100 -> H200\nstep original 16 bf16 mien-eager: ")
    assert table.read_text().startswith("before: **H100**, after: **H200**\n")
    paths[1].write_text(json.dumps(content | {"rows": []}))
    assert main(words) == 2
    assert "nothing was measured in both" in capsys.readouterr().err
    assert main([*words, str(paths[0])]) == 2
    assert "--compare takes one file or two, got 3" in capsys.readouterr().err


def test_without_a_word_the_speed_of_this_machine_is_one_table(folder, capsys, monkeypatch):
    """It is the user's own, so it goes to the user's folder, and not into the source tree."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(bench_machine, "CPU_MODELS", ("lightweight",))
    monkeypatch.setattr(bench_machine, "GPU_MODELS", ("lightweight",))
    monkeypatch.setattr(bench_machine, "BATCH_SIZES", (1, 2))
    longest = dict.fromkeys(("cpu", "cuda"), float("inf"))  # whatever else this machine does
    monkeypatch.setattr(bench_machine, "_LONGEST_S", longest)
    monkeypatch.setattr(bench_machine, "_BUDGET_S", float("inf"))
    monkeypatch.setattr(
        bench_machine, "_PACE", dict.fromkeys(("cpu", "cuda"), harness.Pace(1, 0.0, 0))
    )
    assert main(["bench"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    # Of the batch size that was faster, which other work on this machine may decide.
    limit = r"(1 │ optimizer|2 │ arithmetic)"
    assert re.search(rf"lightweight +│ bf16 +│ +[\d.,]+ │ +[\d.,]+ │ +{limit}", printed)
    (path,) = folder.glob("state/mien/benchmarks/*.json")
    assert printed.endswith(f"written to {path}\n")
    written = harness.read_results(path)
    jsonschema.validate(written, SCHEMA)
    assert not harness.RESULTS.exists()
    # Not measured once more: only where rows go is another matter now.
    monkeypatch.setattr(bench_machine, "rows", lambda ceilings: iter(written["rows"]))
    assert main(["bench", "--no-save", "--json", "--results", str(folder / "never")]) == 0
    assert {row["kind"] for row in json.loads(capsys.readouterr().out)} == {"machine"}
    assert not (folder / "never").exists()


def test_a_model_whose_cells_take_too_long_is_left_out(monkeypatch):
    row = {"model": "original", "precision": "bf16", "batch_size": 8, "eg_per_s": 20.0}
    rows = [row | {"binds": "update"}, row | {"batch_size": 16, "eg_per_s": 20.5, "binds": "gaps"}]
    drawn = bench_machine.table(rows, {"card": "a card"})
    cells = [list(column.cells) for column in drawn.columns]
    assert [cell for (cell,) in cells] == ["original", "bf16", "20", "20.5", "-", "8", "optimizer"]
    monkeypatch.setattr(bench_machine, "_BUDGET_S", 0.0)
    assert list(bench_machine.rows(CEILINGS)) == []


def test_the_readme_and_the_picture(folder):
    loop = {"kind": "train", "model": "lightweight", "batch_size": 2, "precision": "fp32"}
    loop |= {"engine": "eager", "iterations": 7, "eg_per_s": 2.5, "data_wait": 0.25}
    loop |= {"saves": "every minute"}
    kernel = {"kind": "kernel", "kernel": "upscale", "variant": "mien", "case": {"px": 64}}
    kernel |= {"median_ms": 0.5, "p10_ms": 0.4, "p90_ms": 0.6, "timed": "graph"}
    kernel |= {"share_of_ceiling": 0.81, "loses_to": ["torch-compile"]}
    kernel |= {"speedup_over_torch_compile": 0.9, "gb_per_s": None}
    rows = [step_row(20.0), step_row(16.0, without="channel alignment"), loop, kernel]
    rows += [step_row(9.0, engine="plain-torch")]
    harness.write_results(rows, ceilings=CEILINGS)
    readme, docs = Path("README.md"), Path("docs")
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(readme, docs)
    text, everything = readme.read_text(), (docs / "figures.md").read_text()
    headline = "`original`, batch 16, bf16: 20.0 EG/s; plain PyTorch in the same run: 9.0\n"
    assert headline in text
    assert "| lightweight | 2 | fp32 | eager | every minute | 2.5 | 25.0 % | 7 |" in everything
    assert "| original | 16 | bf16 | mien-eager | 20.0 | 10.0 | 50.0 % | 1200 | 300 |" in everything
    assert "| upscale | px=64 | 0.5 |  |  | 81.0 % |  | 0.9 |" in everything
    assert "| upscale | px=64 | torch-compile | 0.9 |" in everything
    row = "| step | original | 16 | bf16 | mien-eager | channel alignment | 16.0 | 20.0 |"
    assert row in everything
    assert "-20.0 %" in everything
    assert "| 10.0 | 0.5 | 0.25 |" in everything, "the ceilings"
    assert "![EG/s and the roofline's ceiling](docs/figures.png)" in text
    assert "[docs/figures.md](docs/figures.md)" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert (docs / "figures.png").stat().st_size > 10_000
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.update(readme, docs)


def test_a_report_of_an_installed_mien_is_printed(folder, monkeypatch, capsys):
    """A wheel has no README of its own; that of the working folder is somebody else's."""
    monkeypatch.setattr(harness, "IS_SOURCE_TREE", False)
    Path("README.md").write_text("mine")
    assert main(["bench", "report"]) == 2
    error = capsys.readouterr().err
    assert error == f"mien bench: no results in {folder}/results yet; `mien bench` measures\n"
    harness.write_results([step_row(20.0)])
    assert main(["bench", "report"]) == 0
    row = "| original | 16 | bf16 | mien-eager | 20.0 |"
    assert row in capsys.readouterr().out
    # Also in a source tree: results of a folder that was named are not mien's own.
    monkeypatch.setattr(harness, "IS_SOURCE_TREE", True)
    assert main(["bench", "report", "--results", "results"]) == 0
    assert row in capsys.readouterr().out
    assert Path("README.md").read_text() == "mine"
    assert not Path("docs").exists()


def test_a_report_without_the_readme_is_refused_in_one_line(folder, capsys):
    assert main(["bench", "report"]) == 2
    assert "there is no README.md here: run `mien bench report` in" in capsys.readouterr().err
    assert not Path("docs").exists()


def test_results_that_cannot_be_written_are_refused_in_one_line(folder, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setattr(harness, "RESULTS", folder / "file/results")
    with pytest.raises(ValueError, match=r"cannot write .*: Not a directory; make its folder wri"):
        harness.write_results([step_row(20.0)])


def test_a_card_without_steps_draws_nothing(folder):
    harness.write_results([], ceilings=CEILINGS)
    assert not report.draw(report.newest_results(), folder / "picture.png")
    assert not (folder / "picture.png").exists()


def test_graphs_hold_more_than_a_cache():
    calls = bench_kernels._graph_calls
    assert calls(None) == calls(10 * 2**30) == 64
    assert calls(2**20) * 2**20 == 128 * 2**20
    assert calls(8) == 1024


def test_the_spread_of_a_loop_is_that_of_its_parts():
    steps = [{"iteration": 10 * i, "time": 2.0 * i} for i in range(10)]
    steps.append({"iteration": 100, "time": 22.0})  # the last part: 20 iterations in 6 s
    spread = bench_train._spread(steps, 32)
    assert spread == {"eg_per_s_low": 106.7, "eg_per_s_high": 160.0}
    assert bench_train._spread(steps[:3], 32) == {}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nmodel\t\t: 3\n",
            "AMD EPYC, family 26, model 2",
        ),
        ("model name\t: Some CPU\n", "Some CPU"),
        ("CPU implementer\t: 0x41\n", platform.machine()),
    ],
)
def test_cpus_of_one_name_are_told_apart(monkeypatch, tmp_path, text, name):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(harness, "Path", lambda _: tmp_path / "cpuinfo")
    assert harness.device_name("cpu") == f"CPU {name}"
