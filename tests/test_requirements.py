"""Commands that install what is missing, and `mien doctor` where a package is."""

import importlib.metadata
import json
import shlex
import subprocess
import sys

import pytest

from mien.cli import main
from mien.core.system import requirements

METADATA = [
    "torch<2.14,>=2.11",
    'triton<3.8,>=3.6; platform_system == "Linux"',
    "torch-extras>=9",
    'h5py>=3.11; extra == "exchange"',
]


def test_a_command_is_for_the_python_that_runs():
    command = requirements.install_command("mien[film]", "torch<2.14,>=2.11")
    python = shlex.quote(sys.executable)
    assert command == f"{python} -m pip install 'mien[film]' 'torch<2.14,>=2.11'"
    command = requirements.uninstall_command("opencv-python-headless")
    assert command == f"{python} -m pip uninstall --yes opencv-python-headless"


def test_versions_are_those_that_mien_takes(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)
    assert requirements.requirement("torch") == "torch<2.14,>=2.11"
    assert requirements.requirement("triton") == "triton<3.8,>=3.6"
    assert requirements.requirement("h5py") == "h5py>=3.11"
    assert requirements.requirement("unheard-of") == "unheard-of"
    assert requirements.required() == ["torch", "triton", "torch-extras"]


def test_a_tree_that_is_only_on_the_path_has_names_alone(monkeypatch):
    def refuse(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", refuse)
    assert requirements.requirement("torch") == "torch"
    assert requirements.required() == []


WITHOUT = """
import importlib.metadata, sys
name, package = sys.argv[1:]
real = importlib.metadata.version
def version(asked):
    if asked == package:
        raise importlib.metadata.PackageNotFoundError(asked)
    return real(asked)
importlib.metadata.version = version
sys.modules[name] = None  # an import of it fails
from mien.cli import main
sys.exit(main(["doctor", "--json"]))
"""


@pytest.mark.parametrize(
    ("name", "package"),
    [("torch", "torch"), ("cv2", "opencv-python-headless"), ("isal", "isal")],
)
def test_doctor_names_a_package_that_is_missing(name, package):
    command = [sys.executable, "-c", WITHOUT, name, package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    (bad,) = (each for each in json.loads(done.stdout) if not each["ok"])
    assert (bad["name"], bad["value"]) == (package, "missing")
    assert bad["remedy"] == f"`{requirements.install_command(requirements.requirement(package))}`"
    assert package in bad["remedy"]


def test_doctor_takes_opencv_with_a_display(monkeypatch, capsys):
    real = importlib.metadata.version
    versions = {"opencv-python": "5.0.0.93"}

    def version(package):
        if package == "opencv-python-headless":
            raise importlib.metadata.PackageNotFoundError(package)
        return versions.get(package) or real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor", "--json"]) == 0
    told = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert told["opencv-python"]["value"] == "5.0.0.93"
    assert "opencv-python-headless" not in told
