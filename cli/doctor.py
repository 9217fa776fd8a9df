"""mien doctor: what this machine has, which path each part will take, what to do about problems."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from ..core.system.requirements import DALI, install_command, required, requirement
from .lines import tell, tell_json

SHOWN = ("torch", "triton", "numpy", "opencv-python-headless", "safetensors", "cffi")
"""Packages whose versions are told though they are there."""


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
    found = [*_versions(), *_machine()]
    if not all(finding.ok for finding in found):
        return found  # what follows cannot be loaded without the packages
    checks: list[Callable[[], list[Finding]]] = [_gpu, _native, _dali, _paths]
    return found + [finding for check in checks for finding in check()]


def _versions() -> list[Finding]:
    from .. import __version__

    found = [Finding("mien", __version__), Finding("python", platform.python_version())]
    for package in dict.fromkeys((*SHOWN, *required())):
        name, version = _installed(package)
        if not version and package != DALI:  # without which threads decode
            remedy = f"`{install_command(requirement(package))}`"
            found.append(Finding(package, "missing", ok=False, remedy=remedy))
        elif package in SHOWN:
            found.append(Finding(name, version))
    return found


def _installed(package: str) -> tuple[str, str]:
    """``(name, version)`` of a package that is installed, or of what stands in its place; an empty
    version: there is none."""
    # The preview's window needs OpenCV's package with a display.
    for name in (package, package.removesuffix("-headless")):
        with suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return package, ""


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
    """GPUs that torch can use, each with what keeps mien from it; or why there are none."""
    import torch

    from ..core.training.devices import card_of, why_hidden, why_unfit
    from ..kernels import toolkit

    driver = toolkit.driver()
    cuda = "none" if driver is None else f"runs CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    about = [Finding("driver", cuda), Finding("cuda", f"{torch.version.cuda or 'none'} of torch")]
    hidden = why_hidden()
    if hidden:
        return [Finding("gpu", hidden.what, ok=False, remedy=hidden.remedy), *about]
    if not torch.cuda.is_available():
        remedy = "where there is one, install Nvidia's driver, or start the container with its GPUs"
        return [Finding("gpu", "no Nvidia GPU is found", remedy=remedy), *about]
    found = []
    for number in range(torch.cuda.device_count()):
        unfit = why_unfit(torch.device("cuda", number))
        if unfit:
            found.append(Finding("gpu", unfit.what, ok=False, remedy=unfit.remedy))
        else:
            found.append(
                Finding("gpu", f"cuda:{number} {card_of(torch.device('cuda', number))[0]}")
            )
    return found + about


def _native() -> list[Finding]:
    from ..kernels import native, toolkit

    try:
        cuda, generations = native.cuda_build()
    except native.NativeError as error:
        return [Finding("libmien", str(error), ok=False, remedy=toolkit.rebuild())]
    if generations:
        kinds = ", ".join(f"sm_{kind.partition('-')[0]}" for kind in generations)
        return [Finding("libmien", f"CPU threads; CUDA {cuda} kernels for {kinds}")]
    return [Finding("libmien", "CPU threads only")]


def _dali() -> list[Finding]:
    import torch

    from ..core.data.decode import choose_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend, why = choose_backend("auto", device)
    wanted = device == "cuda" and sys.platform == "linux" and platform.machine() == "x86_64"
    missing = backend != "dali" and wanted
    command = f"`{install_command(requirement(DALI))}`; without DALI, threads decode"
    remedy = command if missing else ""
    return [Finding("decode", why, ok=not missing, remedy=remedy)]


def _paths() -> list[Finding]:

    from ..core.precision import resolve
    from ..core.system.threads import thread_count
    from ..core.training import engine
    from ..core.training.devices import choose_device, threads_in_words
    from ..kernels import toolkit

    compiler = toolkit.choose().compiler
    findings = [Finding("nvcc", str(compiler or "none"))]
    try:
        device = choose_device("auto", lambda reason: None)
    except ValueError as error:
        return [*findings, Finding("device", f"none: {error}", ok=False)]
    precision = resolve("auto", device)
    name, why = engine.choose("auto", device)
    on_gpu = device.type == "cuda"
    return [
        *findings,
        Finding("device", str(device)),
        Finding("precision", f"{precision.name} ({precision.why})"),
        Finding("engine", f"{name} ({why})"),
        Finding("kernels", "CUDA and Triton" if on_gpu else "C++ threads and PyTorch"),
        Finding("threads", threads_in_words(thread_count(0))),
    ]
