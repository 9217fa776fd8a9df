"""mien doctor: what this machine has, which path each part will take, what to do about problems."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from .lines import tell, tell_json


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    ok: bool = True
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print every finding; 0, or 1 where something that mien needs is broken."""
    findings = examine()
    if args.json:
        tell_json([asdict(finding) for finding in findings])
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = "ok " if finding.ok else "BAD"
            tell(f"{mark} {finding.name:<{width}}  {finding.value}")
            if finding.remedy:
                tell(f"    {'':<{width}}  -> {finding.remedy}")
    return 0 if all(finding.ok for finding in findings) else 1


def examine() -> list[Finding]:
    """Everything there is to say about this machine."""
    checks: list[Callable[[], list[Finding]]] = [_versions, _machine, _gpu, _native, _dali, _paths]
    return [finding for check in checks for finding in check()]


def _versions() -> list[Finding]:
    from .. import __version__

    found = [Finding("mien", __version__), Finding("python", platform.python_version())]
    for package in ("torch", "triton", "numpy", "opencv-python-headless", "safetensors", "cffi"):
        try:
            found.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, "missing", ok=False, remedy="run `make setup`"))
    return found


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(".").free / 2**30
    return [
        Finding("cores", str(cores)),
        Finding("memory", f"{memory:.1f} GiB"),
        Finding("disk", f"{free:.1f} GiB free here"),
    ]


def _gpu() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        names = []
        for number in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(number)
            name = torch.cuda.get_device_name(number)
            names.append(f"cuda:{number} {name} (sm_{major}{minor})")
        cuda = Finding("cuda", f"{torch.version.cuda} of torch")
        return [Finding("gpu", ", ".join(names)), cuda]
    if torch.version.cuda is None:
        remedy = "for a GPU, install a CUDA build of torch 2.11 to 2.13"
        return [Finding("gpu", "none: this torch is a CPU build", remedy=remedy)]
    remedy = "check that `nvidia-smi` lists a GPU; the driver may be missing or too old"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        remedy = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} may hide it: unset it"
    return [Finding("gpu", f"none usable by torch's CUDA {torch.version.cuda}", remedy=remedy)]


def _native() -> list[Finding]:
    from ..kernels import native

    try:
        _, lib = native.library()
    except native.NativeError as error:
        return [Finding("libmien", str(error), ok=False, remedy="run `make setup`")]
    if lib.mien_has_cuda():
        return [Finding("libmien", "CPU threads and CUDA kernels")]
    remedy = "install the CUDA toolkit's nvcc and run `make setup` again to train on a GPU"
    return [Finding("libmien", "CPU threads only (built without nvcc)", remedy=remedy)]


def _dali() -> list[Finding]:
    from ..core.data.decode import choose_backend

    backend, why = choose_backend("auto")
    wanted = sys.platform == "linux" and platform.machine() == "x86_64"
    missing = backend != "dali" and wanted
    remedy = "run `make setup`; without DALI, OpenCV decodes" if missing else ""
    return [Finding("decode", why, ok=not missing, remedy=remedy)]


def _paths() -> list[Finding]:
    import torch

    from ..core.train import engine
    from ..core.train.precision import resolve
    from ..core.train.prepare import choose_device

    device = choose_device("auto")
    precision = resolve("auto", device)
    name, why = engine.choose("auto", device)
    compiler = shutil.which("nvcc")
    nvcc = "none"
    if compiler:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
        nvcc = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "broken"
    on_gpu = device.type == "cuda"
    return [
        Finding("nvcc", nvcc),
        Finding("device", str(device)),
        Finding("precision", f"{precision.name} ({precision.why})"),
        Finding("engine", f"{name} ({why})"),
        Finding("kernels", "CUDA and Triton" if on_gpu else "C++ threads and PyTorch"),
        Finding("threads", f"{torch.get_num_threads()} of torch"),
    ]
