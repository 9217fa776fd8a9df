"""What is told where a GPU is here and cannot be used: by training, by benchmarks, by doctor."""

import json
import sys

import pytest
import torch

from mien.cli import main
from mien.core.training import devices
from mien.kernels import native, toolkit

ALL = "80-real 86-real 89-real 90-real 100-real 120"
ADA = toolkit.Card("RTX 4090", 89)
NEWEST = toolkit.Driver((13, 0), (ADA,), 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set up a machine: what its driver, its torch and its libmien are."""
    (tmp_path / "Python.h").touch()

    def set_up(
        *,
        driver: toolkit.Driver | None = NEWEST,
        torch_cuda: str | None = "13.0",
        generation: int = 89,
        build: str = f"13.0.88 {ALL}",
        usable: bool = True,
    ):
        monkeypatch.setattr(toolkit, "driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(usable))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "RTX 4090")
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None: divmod(generation, 10)
        )
        cuda, *generations = build.split() or [""]
        monkeypatch.setattr(native, "cuda_build", lambda: (cuda, generations))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(toolkit, "has_gpu", lambda: True)
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name, scheme=None: str(tmp_path))
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    return set_up


UNFIT = {
    "no kernels": (
        {"build": ""},
        "libmien has no CUDA kernels for the GPU RTX 4090 (sm_89)",
        "run `make setup`",
    ),
    "other generations": (
        {"build": "13.0.88 90-real 100"},
        "libmien's CUDA kernels are for sm_90, sm_100, the GPU is RTX 4090 (sm_89)",
        "run `make setup`",
    ),
    "driver older than libmien": (
        {"driver": toolkit.Driver((12, 8), (ADA,), 0), "torch_cuda": "12.8"},
        "the Nvidia driver runs CUDA 12.8, and libmien is built for CUDA 13.0.88",
        "install a driver for CUDA 13 (R580 or newer)",
    ),
}

HIDDEN = {
    "torch for CPUs": (
        {"torch_cuda": None},
        f"torch {torch.__version__} is a build for CPUs, and this machine has an Nvidia GPU",
        f"install one for CUDA: `{sys.executable} -m pip install --force-reinstall torch==",
    ),
    "no driver": (
        {"driver": None},
        "this machine has an Nvidia GPU, but no driver library libcuda.so.1 is found",
        "install Nvidia's driver, or start the container with its GPUs",
    ),
    "driver older than torch": (
        {"driver": toolkit.Driver((12, 4), (ADA,), 0)},
        f"the Nvidia driver runs CUDA 12.4, and torch {torch.__version__} is built for CUDA 13.0",
        "install a driver for CUDA 13 (R580 or newer)",
    ),
    "driver refuses": (
        {"driver": toolkit.Driver((13, 0), (), 803)},
        "the Nvidia driver refuses (CUDA error 803)",
        "see what `nvidia-smi` says",
    ),
}


def cases(table):
    return pytest.mark.parametrize(("given", "what", "remedy"), table.values(), ids=table.keys())


def words_of_training(tmp_path, sides):
    folders = ["-A", str(sides[0]), "-B", str(sides[1]), "-m", str(tmp_path / "model")]
    small = ["-t", "lightweight", "--set", "model.options.width=8", "-b", "2", "-i", "1"]
    return ["train", *folders, *small, "--set", "preview.preview_images=2"]


@cases(UNFIT)
def test_training_stops_in_one_line(machine, tmp_path, sides, capsys, given, what, remedy):
    machine(**given)
    assert main(words_of_training(tmp_path, sides)) == 2
    told = capsys.readouterr().err
    assert told == f"mien train: {what}; {remedy}, or train on the CPU with --device cpu\n"
    assert main([*words_of_training(tmp_path, sides), "--device", "cpu"]) == 0


@cases(UNFIT)
def test_benchmarks_stop_in_one_line(machine, capsys, given, what, remedy):
    machine(**given)
    assert main(["bench", "kernels", "--no-save"]) == 2
    assert capsys.readouterr().err == f"mien bench: {what}; {remedy}\n"


@cases(HIDDEN)
def test_training_on_the_cpu_beside_a_gpu_is_told(machine, given, what, remedy):
    machine(**given, usable=False)
    told: list[str] = []
    assert devices.choose_device("auto", told.append) == torch.device("cpu")
    assert told[0].startswith(f"training runs on the CPU: {what}; {remedy}")
    with pytest.raises(ValueError, match="train.device is cuda, but ") as refused:
        devices.choose_device("cuda", told.append)
    assert f"{what}; {remedy}" in str(refused.value)
    assert devices.choose_device("cpu", told.append) == torch.device("cpu")
    assert len(told) == 1


def test_a_card_older_than_supported_leaves_the_cpu(machine):
    machine(generation=75)
    what = "the GPU RTX 4090 (sm_75) is older than mien supports; it needs sm_80 (Ampere"
    told: list[str] = []
    assert devices.choose_device("auto", told.append) == torch.device("cpu")
    assert told[0].startswith(f"training runs on the CPU: {what}")
    with pytest.raises(ValueError, match="is older than mien supports"):
        devices.choose_device("cuda", told.append)


def test_a_gpu_that_fits_is_chosen(machine, monkeypatch):
    machine()
    told: list[str] = []
    for setting in ("auto", "cuda"):
        assert devices.choose_device(setting, told.append) == torch.device("cuda", 0)
    assert told == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine(driver=toolkit.Driver((13, 0), (), 100), usable=False)
    devices.choose_device("auto", told.append)
    assert "CUDA_VISIBLE_DEVICES='' shows this process no GPU; `unset CUDA_VIS" in told[0]


def test_without_a_gpu_nothing_is_told(machine, monkeypatch):
    machine(driver=None, usable=False)
    monkeypatch.setattr(toolkit, "has_gpu", lambda: False)
    told: list[str] = []
    assert devices.choose_device("auto", told.append) == torch.device("cpu")
    assert told == []
    with pytest.raises(ValueError, match="train.device is cuda, but there is no Nvidia GPU"):
        devices.choose_device("cuda", told.append)


def test_what_triton_builds_with_is_asked_for(machine, monkeypatch, tmp_path):
    machine()
    (tmp_path / "Python.h").unlink()
    with pytest.raises(ValueError, match=r"Triton needs .*Python.h, .*`apt install python3\.\d+-d"):
        devices.choose_device("auto", print)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="Triton finds no C compiler; install one"):
        devices.choose_device("auto", print)


def test_a_library_that_cannot_be_loaded_is_one_line(tmp_path, sides, monkeypatch, capsys):
    monkeypatch.setattr(native, "_HERE", tmp_path)
    native._library.cache_clear()
    try:
        assert main(words_of_training(tmp_path, sides)) == 2
        told = capsys.readouterr().err
        assert told == f"mien train: cannot load {tmp_path}/libmien.so; run `make setup`\n"
        assert main(["doctor"]) == 1
        assert "BAD libmien" in capsys.readouterr().out
    finally:
        native._library.cache_clear()


@cases(UNFIT | HIDDEN)
def test_doctor_says_what_lacks_and_what_to_do(machine, capsys, given, what, remedy):
    machine(**given, usable=given in [case[0] for case in UNFIT.values()])
    assert main(["doctor", "--json"]) == 1
    gpu = next(each for each in json.loads(capsys.readouterr().out) if each["name"] == "gpu")
    assert not gpu["ok"]
    assert gpu["value"] == what
    assert gpu["remedy"].startswith(remedy)


def test_doctor_of_a_gpu_that_fits(machine, monkeypatch, capsys):
    machine()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for line in (
        "ok  gpu                     cuda:0 RTX 4090 (sm_89)",
        "ok  driver                  runs CUDA 13.0",
        "ok  libmien                 CPU threads; CUDA 13.0.88 kernels for sm_80, sm_86, sm_89",
        "ok  device                  cuda:0",
        "ok  kernels                 CUDA and Triton",
    ):
        assert line in report
