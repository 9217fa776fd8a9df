"""How libmien is built: which nvcc is taken, for which GPUs, and when it is fetched."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mien.kernels import native, toolkit

ALL = "75 80 86 87 88 89 90 100 103 110 120 121"
HOPPER, ADA, TURING = (
    toolkit.Card(name, generation)
    for name, generation in (("H100", 90), ("RTX 4090", 89), ("RTX 2080", 75))
)


def make_nvcc(path: Path, release: str = "13.0", generations: str = ALL) -> Path:
    """A program that answers as an nvcc does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"compute_{each}\\n" for each in generations.split())
    path.write_text(
        f'#!/bin/sh\ncase "$1" in\n--list-gpu-arch) printf "{listed}";;\n'
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.1";;\nesac\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without GPU, toolkit or packages; what it is to have, a test puts there."""
    for name in ("MIEN_CUDA", "MIEN_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setattr(toolkit, "_SYSTEM", str(tmp_path / "usr/local/cuda"))
    monkeypatch.setattr(toolkit, "_DEVICE", tmp_path / "dev/nvidiactl")
    monkeypatch.setattr(toolkit.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(toolkit, "driver", lambda: None)
    return tmp_path


def show(monkeypatch, *cards: toolkit.Card, cuda=(13, 0)):
    """Have the driver show these GPUs."""
    monkeypatch.setattr(toolkit, "driver", lambda: toolkit.Driver(cuda, cards, 0))


def packaged(machine: Path) -> Path:
    return machine / "site/nvidia/cu13/bin/nvcc"


def test_without_gpu_and_nvcc_it_is_the_cpu(machine):
    build = toolkit.choose()
    assert (build.cuda, build.compiler, build.generations) == ("AUTO", None, ())
    assert build.environment() == {}
    assert build.options() == ["-DMIEN_CUDA=OFF"]
    assert str(build) == "for the CPU alone: there is no nvcc that fits"


def test_without_gpu_an_nvcc_builds_for_all(machine):
    nvcc = make_nvcc(machine / "bin/nvcc")
    build = toolkit.choose()
    assert (build.cuda, build.compiler, build.generations) == ("AUTO", nvcc, ())
    assert build.options() == ["-DMIEN_CUDA=AUTO"]
    assert "for every GPU from sm_80 on" in str(build)


@pytest.mark.parametrize(
    ("place", "variable"),
    [
        ("bin", None),
        ("home/bin", "CUDA_HOME"),
        ("home/bin", "CUDA_PATH"),
        ("usr/local/cuda/bin", None),
        ("site/nvidia/cu13/bin", None),
    ],
)
def test_nvcc_is_found_where_it_may_lie(machine, monkeypatch, place, variable):
    nvcc = make_nvcc(machine / place / "nvcc")
    if variable:
        monkeypatch.setenv(variable, str(machine / "home"))
    assert toolkit.choose().compiler == nvcc


def test_it_is_built_for_the_gpus_that_are_here(machine, monkeypatch):
    nvcc = make_nvcc(machine / "bin/nvcc")
    show(monkeypatch, HOPPER, ADA, ADA, TURING)
    build = toolkit.choose()
    assert (build.cuda, build.compiler, build.generations) == ("ON", nvcc, (89, 90))
    assert build.options() == ["-DMIEN_CUDA=ON", "-DMIEN_CUDA_ARCHS=89;90"]
    assert "CUDA kernels for sm_89, sm_90" in str(build)


def test_a_gpu_too_old_is_told(machine, monkeypatch):
    make_nvcc(machine / "bin/nvcc")
    show(monkeypatch, TURING)
    build = toolkit.choose()
    assert build.cuda == "OFF"
    assert str(build) == "for the CPU alone: mien needs a GPU of sm_80 or newer, here is sm_75"


@pytest.mark.parametrize(
    ("own", "driver_cuda"),
    [
        ({"generations": "75 80 86"}, (13, 0)),  # does not know the card
        ({"release": "13.2"}, (12, 8)),  # makes what the driver does not run
        ({"generations": ""}, (13, 0)),  # does not run at all
    ],
)
def test_an_nvcc_that_does_not_fit_is_left(machine, monkeypatch, own, driver_cuda):
    make_nvcc(machine / "bin/nvcc", **own)
    show(monkeypatch, ADA, cuda=driver_cuda)
    assert toolkit.choose().compiler is None
    nvcc = make_nvcc(packaged(machine))
    assert toolkit.choose().compiler == nvcc


def test_variables_choose(machine, monkeypatch):
    own, of_packages = make_nvcc(machine / "bin/nvcc"), make_nvcc(packaged(machine))
    show(monkeypatch, ADA)
    monkeypatch.setenv("MIEN_CUDA_ARCHS", "90;80")
    assert toolkit.choose().generations == (80, 90)
    monkeypatch.setenv("MIEN_CUDA_ARCHS", "all")
    assert toolkit.choose().generations == ()
    monkeypatch.setenv("MIEN_CUDA_ARCHS", "sm_90")
    with pytest.raises(ValueError, match="MIEN_CUDA_ARCHS must be all, or .*, got sm_90"):
        toolkit.choose()
    monkeypatch.delenv("MIEN_CUDA_ARCHS")
    monkeypatch.setenv("MIEN_CUDA", "pypi")
    assert toolkit.choose().compiler == of_packages
    of_packages.unlink()
    assert toolkit.choose().compiler is None
    monkeypatch.setenv("MIEN_CUDA", "ON")
    assert toolkit.choose().compiler == own
    monkeypatch.setenv("MIEN_CUDA", "off")
    assert toolkit.choose().cuda == "OFF"
    monkeypatch.setenv("MIEN_CUDA", "yes")
    with pytest.raises(ValueError, match="MIEN_CUDA must be AUTO, ON, OFF or PYPI, got YES"):
        toolkit.choose()


def test_libraries_are_found_beside_the_compiler(machine, monkeypatch):
    nvcc = make_nvcc(packaged(machine))
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    libraries = str(machine / "site/nvidia/cu13/lib")
    assert toolkit.choose().environment() == {"CUDACXX": str(nvcc), "LIBRARY_PATH": libraries}
    monkeypatch.setenv("LIBRARY_PATH", "/mine")
    assert toolkit.choose().environment()["LIBRARY_PATH"] == f"{libraries}:/mine"


@pytest.fixture
def pip(machine, monkeypatch):
    """A stand-in for Python: notes what pip is asked for, and installs the packages' nvcc."""
    made = make_nvcc(machine / "wheel/nvcc")
    asked, python = machine / "asked", machine / "python"
    nvcc = packaged(machine)
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\n/bin/mkdir -p {nvcc.parent}\n/bin/cp {made} {nvcc}\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(toolkit, "_cuda_of_torch", lambda: "13.0")
    return asked


def test_the_compiler_is_fetched_for_a_gpu_once(machine, pip, monkeypatch, capsys):
    record = machine / "build/native"
    assert toolkit.main(record) == 0
    assert not pip.exists(), "there is no GPU"
    before = record.read_text()
    show(monkeypatch, ADA)
    assert toolkit.main(record) == 0
    (asked,) = pip.read_text().splitlines()
    packages = "nvcc crt runtime cccl".split()
    for name in [*(f"nvidia-cuda-{each}" for each in packages), "nvidia-nvvm"]:
        assert f"{name}==13.0.*" in asked
    told = capsys.readouterr().out
    assert "mien: fetches nvcc of CUDA 13.0 from PyPI" in told
    assert f"mien: builds libmien with CUDA kernels for sm_89, by {packaged(machine)}" in told
    assert record.read_text() != before
    written = record.stat().st_mtime_ns
    assert toolkit.main(record) == 0
    assert capsys.readouterr().out == ""
    assert record.stat().st_mtime_ns == written, "nothing has changed, so nothing is built"
    assert len(pip.read_text().splitlines()) == 1


def test_an_nvcc_that_fits_is_taken_as_it_is(machine, pip, monkeypatch):
    make_nvcc(machine / "bin/nvcc")
    show(monkeypatch, ADA)
    assert toolkit.main(machine / "native") == 0
    assert not pip.exists()


def test_a_gpu_that_cannot_be_asked_gets_all_kernels(machine, pip):
    (machine / "dev").mkdir()
    (machine / "dev/nvidiactl").touch()
    assert toolkit.has_gpu()
    assert toolkit.main(machine / "native") == 0
    assert "for every GPU from sm_80 on" in (machine / "native").read_text()


@pytest.mark.parametrize(("says", "found"), [("GPU 0: NVIDIA L4 (UUID: GPU-1)", True), ("", False)])
def test_nvidia_smi_is_believed_if_it_lists_a_gpu(machine, says, found):
    tool = machine / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "{says}"\n')
    tool.chmod(0o755)
    assert toolkit.has_gpu() is found


def test_where_it_cannot_be_fetched_the_cpu_is_built_for_unless_asked(machine, monkeypatch, capsys):
    show(monkeypatch, ADA)
    monkeypatch.setattr(sys, "executable", shutil.which("false", path=os.defpath))
    assert toolkit.main(machine / "native") == 0
    told = capsys.readouterr().out
    assert "mien: builds no CUDA kernels: nvcc could not be fetched from PyPI; install" in told
    assert (machine / "native").read_text().startswith("for the CPU alone")
    monkeypatch.setenv("MIEN_CUDA", "ON")
    assert toolkit.main(machine / "other") == 2
    assert "nvcc could not be fetched from PyPI" in capsys.readouterr().err
    monkeypatch.setattr(toolkit, "_cuda_of_torch", lambda: "12.8")
    assert toolkit.main(machine / "other") == 2
    assert "PyPI has no nvcc for torch's CUDA 12.8; install the CUDA" in capsys.readouterr().err
    assert not (machine / "other").exists()


def test_what_could_not_be_fetched_is_fetched_the_next_time(machine, pip, monkeypatch, capsys):
    show(monkeypatch, ADA)
    with monkeypatch.context() as without_network:
        without_network.setattr(sys, "executable", shutil.which("false", path=os.defpath))
        assert toolkit.main(machine / "native") == 0
    assert "; the next `make setup` tries again\n" in capsys.readouterr().out
    assert toolkit.main(machine / "native") == 0
    assert (machine / "native").read_text().startswith("with CUDA kernels for sm_89")


@pytest.mark.parametrize(
    ("line", "cuda"), [("'13.2'", "13.2"), ("None", "13.0"), ("'12.8'", "12.8")]
)
def test_the_cuda_of_torch_is_read_without_importing_it(tmp_path, monkeypatch, line, cuda):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit")
    text = f"from typing import Optional\ndebug = False\ncuda: Optional[str] = {line}\n"
    (tmp_path / "torch/version.py").write_text(text)
    spec = toolkit.importlib.util.spec_from_file_location("torch", tmp_path / "torch/__init__.py")
    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: spec)
    assert toolkit._cuda_of_torch() == cuda


LIBCUDA = """
#include <stdio.h>
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { return ERROR; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    return snprintf(name, size, "GPU %d", device) < 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device ? 12 : 8) : attribute == 76 ? (device ? 0 : 9) : -1;
    return 0;
}
"""


@pytest.mark.parametrize("error", [0, 803])
def test_the_driver_is_asked(tmp_path, error):
    source = tmp_path / "libcuda.c"
    source.write_text(LIBCUDA)
    compiler = shutil.which("cc")
    assert compiler
    library = ["-shared", "-fPIC", f"-DERROR={error}", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run([compiler, *library, source], check=True)
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['driver']())"
    command = [sys.executable, "-c", code, toolkit.__file__]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    cards = "Card(name='GPU 0', generation=89), Card(name='GPU 1', generation=120)"
    shown = "" if error else cards
    assert done.stdout == f"Driver(cuda=(12, 4), cards=({shown}), error={error})\n"


@pytest.mark.parametrize(
    ("build", "runs"),
    [
        ("13.0.88 80-real 86-real 90", {80, 86, 87, 89, 90, 100, 120}),
        ("13.0.88 89", {89, 90, 100, 120}),
        ("13.0.88 80-real 89-real", {80, 86, 87, 89}),
        ("12.4.1 86-virtual", {86, 87, 89, 90, 100, 120}),
        ("", set()),
    ],
)
def test_which_gpus_a_library_runs_on(monkeypatch, build, runs):
    cuda, *generations = build.split() or [""]
    monkeypatch.setattr(native, "cuda_build", lambda: (cuda, generations))
    tried = (75, 80, 86, 87, 89, 90, 100, 120)
    assert {each for each in tried if native.runs_on(each)} == runs


def test_the_command_that_rebuilds_fits_where_the_user_stands(tmp_path, monkeypatch):
    tree = tmp_path / "my tree"
    tree.mkdir()
    monkeypatch.setattr(toolkit, "ROOT", tree)
    monkeypatch.chdir(tmp_path)
    installed = toolkit.rebuild()
    python = shlex.quote(sys.executable)
    install = f"{python} -m pip install --force-reinstall --no-deps dist/mien-*.whl"
    assert installed == f"in mien's source tree run `make wheel && {install}`"
    (tree / "Makefile").write_text("setup:\n\t@echo made\n")
    elsewhere = toolkit.rebuild()
    assert elsewhere == f"run `make -C '{tree}' setup`"
    command = elsewhere.split("`")[1]
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "made" in done.stdout
    monkeypatch.chdir(tree)
    assert toolkit.rebuild() == "run `make setup`"


def test_the_library_tells_what_it_was_built_for():
    _, lib = native.library()
    cuda, generations = native.cuda_build()
    assert bool(generations) == bool(cuda) == bool(lib.mien_has_cuda())
