"""Every form of the Triton kernels compiled for GPUs that are not here: stack, registers, widths.

`make aot` compiles all of them, for every target; here one of each kind, for one of the targets.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forms import FILE, Form, read_all

from mien.kernels import native

FOLDER = Path(__file__).parent / "aot"
TARGETS = (80, 89, 90, 100, 120)

ONCE_BROKEN = {
    100: '["bias_act._backward_kernel", 4, 3, "*bf16/16", "*bf16/16", "*bf16/16", "*fp32/16", '
    '"*bf16/16", "*i32/16", "i32/16", 1, "i32", "i32", "i32", "i32", "i32", "i32/16", "i32/16", '
    "0.1, false, false, 2, 16, 128, 16]",
    120: '["bias_act._backward_kernel", 4, 3, "*bf16/16", "*bf16/16", "*bf16/16", "*fp32/16", '
    '"*bf16/16", "*i32/16", "i32/16", 1, "i32/16", "i32", "i32", "i32", "i32", 1, 1, 0.1, true, '
    "true, 1, 256, 32, 64]",
}
"""Forms that broke a bound on one target alone: compiled for it besides those of every kind."""

pytestmark = pytest.mark.aot


def run(script, *words, forms=()):
    """A script of the folder, in a process in which kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, FOLDER / script, *map(str, words)]
    lines = "".join(f"{form}\n" for form in forms)
    return subprocess.run(
        command, input=lines, capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_the_list_holds_what_training_asks_for_now(tmp_path):
    found = tmp_path / "forms.jsonl"
    done = run("walk.py", found)
    assert done.returncode == 0, done.stderr[-2000:]
    now, listed = (set(file.read_text().splitlines()) for file in (found, FILE))
    assert now == listed, (
        f"{len(now - listed)} forms are new, such as {min(now - listed, default='none')}, "
        f"{len(listed - now)} have gone: `make aot` lists and compiles them anew"
    )


def test_the_list_has_every_kernel():
    kernels = set()
    for file in Path(native.__file__).parent.glob("*.py"):
        if "@triton.jit" in file.read_text():
            module = importlib.import_module(f"mien.kernels.{file.stem}")
            kernels |= {f"{file.stem}.{name}" for name in vars(module) if name.endswith("_kernel")}
    assert {form.kernel for form in read_all()} == kernels


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(TARGETS)), ids=[f"sm_{each}" for each in TARGETS])
def test_a_form_of_every_kind_keeps_its_bounds(number):
    kinds, target = {form.kind(): form for form in read_all()}, TARGETS[number]
    chosen = [*kinds.values()][number :: len(TARGETS)]
    if target in ONCE_BROKEN:
        chosen.append(Form.read(ONCE_BROKEN[target]))
    done = run("compile_forms.py", target, forms=chosen)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.endswith(f"{len(chosen)} forms for 1 targets, 0 break a bound\n")


def test_what_breaks_a_bound_is_told():
    tile = Form.read(
        '["bias_act._forward_kernel", 1, 3, "*bf16/16", "*bf16/16", null, "*bf16/16", "i32/16", '
        '"i32/16", "i32/16", "i32/16", "i32/16", "i32", "i32", 0.1, false, false, 1, 2048, 8, 2048]'
    )
    done = run("compile_forms.py", 90, forms=[tile])
    assert done.returncode == 1, done.stderr[-2000:]
    assert "bytes of stack" in done.stdout
    assert "1 forms for 1 targets, 1 break a bound" in done.stdout
