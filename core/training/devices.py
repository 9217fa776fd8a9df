"""Device that a run trains on, and what keeps a GPU that is here from being it."""

import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels import native, toolkit
from ..data.store import available_host_bytes
from ..distribute.ranks import ALONE, Ranks
from ..system.printable import plural
from ..system.requirements import install_command

_DRIVERS = {12: "R525 or newer", 13: "R580 or newer"}
"""Nvidia's drivers that run a CUDA of this major number."""


@dataclass(frozen=True)
class Problem:
    """What keeps a GPU from being used."""

    what: str
    remedy: str
    """The command that mends it, or what else there is to do; a clause."""

    is_final: bool = False
    """Whether nothing can be done about it on this machine."""

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def choose_device(setting: str, warn: Callable[[str], None], ranks: Ranks = ALONE) -> torch.device:
    """The device that `train.device` leads to; of several ranks each takes a GPU of its own.

    Args:
        setting: auto, cpu, cuda, or cuda:N.
        warn: Called where the CPU trains though an Nvidia GPU is here, and why.
        ranks: Place of this process among those that train together.

    Raises:
        ValueError: A GPU is set, or was chosen, and cannot be used, or libmien cannot be
            loaded; says what to do.
    """
    try:
        native.library()
    except native.NativeError as error:
        raise ValueError(str(error)) from error
    # Only now: without libmien there is no training on the CPU, either.
    if setting == "cpu":
        return torch.device("cpu")
    if not _torch_has_gpu():
        hidden = why_hidden()
        if setting != "auto":
            reason = hidden or "there is no Nvidia GPU, or none is shown to this process"
            raise ValueError(f"train.device is {setting}, but {reason}")
        if hidden:
            warn(f"training runs on the CPU: {hidden}")
        return torch.device("cpu")
    device = _numbered(setting) if ranks.local_size == 1 else _own(setting, ranks)
    unfit = why_unfit(device)
    # What can be mended is refused: the run would go on far slower, and few would look why.
    if unfit and unfit.is_final and setting == "auto":
        warn(f"training runs on the CPU: {unfit}")
        return torch.device("cpu")
    if unfit:
        raise ValueError(f"{unfit}, or train on the CPU with --device cpu")
    return device


def _numbered(setting: str) -> torch.device:
    """The GPU of cuda:N; of auto and cuda the current one."""
    _, _, number = setting.partition(":")
    # The current one: a program that trains from Python may have chosen it with torch.
    index = int(number) if number else torch.cuda.current_device()
    num_gpus = torch.cuda.device_count()
    if index < num_gpus:
        return torch.device("cuda", index)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
    raise ValueError(
        f"train.device is {setting}, but the last GPU is cuda:{num_gpus - 1}{why}; "
        f"use --device cuda:0 to cuda:{num_gpus - 1}"
    )


def _own(setting: str, ranks: Ranks) -> torch.device:
    """The GPU of one of several ranks of this machine."""
    num_gpus = torch.cuda.device_count()
    if setting not in ("auto", "cuda"):
        raise ValueError(
            f"train.device is {setting}, but {ranks.local_size} ranks train on this machine, each "
            "on a GPU of its own; set it to auto, and choose GPUs by --gpus or CUDA_VISIBLE_DEVICES"
        )
    if num_gpus == 1:  # srun shows each task its own
        return torch.device("cuda", 0)
    if ranks.local_size > num_gpus:
        raise ValueError(
            f"{ranks.local_size} ranks are started on this machine, which shows them {num_gpus} "
            f"GPUs; start {num_gpus}, or show them more by CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", ranks.local_rank)


def require_fit_gpu() -> None:
    """Refuse, with a ValueError, a GPU that torch would use and mien cannot."""
    if _torch_has_gpu():
        unfit = why_unfit(torch.device("cuda", torch.cuda.current_device()))
        if unfit:
            raise ValueError(str(unfit))


def count_gpus() -> int:
    """Number of GPUs that a run can be spread over.

    Raises:
        ValueError: There is none; says why and what to do.
    """
    if _torch_has_gpu():
        return torch.cuda.device_count()
    reason = why_hidden() or "there is no Nvidia GPU, or none is shown to this process"
    raise ValueError(
        f"distribute.gpus and exclude_gpus choose among GPUs, but {reason}; leave them out, or "
        "train in several processes of the CPU with --device cpu --gpus 2"
    )


def _torch_has_gpu() -> bool:
    """Whether torch can use a GPU; what it warns of is what `why_hidden` says in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def why_hidden() -> Problem | None:
    """Problem that keeps torch from the Nvidia GPU of this machine; None: it can use it, or there
    is none."""
    if _torch_has_gpu() or not toolkit.has_gpu():
        return None
    # In the order in which each hides the next: torch's build, the library, the driver's age.
    driver, version = toolkit.driver(), torch.__version__
    if torch.version.cuda is None:
        build = f"torch=={version.partition('+')[0]}"
        return Problem(
            f"torch {version} is a build for CPUs, and this machine has an Nvidia GPU",
            f"install one for CUDA: `{install_command('--force-reinstall', build)}`",
        )
    if driver is None:
        return Problem(
            "this machine has an Nvidia GPU, but no driver library libcuda.so.1 is found",
            "install Nvidia's driver, or start the container with its GPUs (`--gpus all`)",
        )
    too_old = _too_old(driver, torch.version.cuda, f"torch {version}")
    if too_old:
        return too_old
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        return Problem(
            f"CUDA_VISIBLE_DEVICES={visible!r} shows this process no GPU",
            "`unset CUDA_VISIBLE_DEVICES`",
        )
    return Problem(
        f"the Nvidia driver refuses (CUDA error {driver.error})",
        "see what `nvidia-smi` says; after an update of the driver restart the machine",
    )


def card_of(device: torch.device) -> tuple[str, int]:
    """``(name, generation)`` of a GPU: such as "NVIDIA L4 (sm_89)" and 89."""
    major, minor = torch.cuda.get_device_capability(device)
    generation = 10 * major + minor
    return f"{torch.cuda.get_device_name(device)} (sm_{generation})", generation


def why_unfit(device: torch.device) -> Problem | None:
    """Problem that keeps mien from training on this GPU, which torch can use; None: it can."""
    card, generation = card_of(device)
    if generation < toolkit.OLDEST:
        return Problem(
            f"the GPU {card} is older than mien supports",
            f"it needs sm_{toolkit.OLDEST} (Ampere, such as an RTX 3060 or A100) or newer",
            is_final=True,
        )
    try:
        cuda, generations = native.cuda_build()
    except native.NativeError as error:
        return Problem(str(error).partition(";")[0], toolkit.rebuild())
    if not generations:
        return Problem(f"libmien has no CUDA kernels for the GPU {card}", toolkit.rebuild())
    if not native.runs_on(generation):
        made_for = ", ".join(f"sm_{kind.partition('-')[0]}" for kind in generations)
        return Problem(
            f"libmien's CUDA kernels are for {made_for}, the GPU is {card}", toolkit.rebuild()
        )
    # libmien brings a CUDA runtime of its own, so torch's may run where libmien's does not.
    return _too_old(toolkit.driver(), cuda, "libmien") or _no_c_compiler()


def _too_old(driver: toolkit.Driver | None, cuda: str, of: str) -> Problem | None:
    """Whether a driver is older than the major number of the CUDA of a library."""
    needed = int(cuda.partition(".")[0])
    # The major number alone: within it a driver runs what is built for a newer minor one.
    if driver is None or driver.cuda[0] >= needed:
        return None
    runs = ".".join(map(str, driver.cuda))
    return Problem(
        f"the Nvidia driver runs CUDA {runs}, and {of} is built for CUDA {cuda}",
        f"install a driver for CUDA {needed} ({_DRIVERS.get(needed, 'the newest')})",
    )


def _no_c_compiler() -> Problem | None:
    """Triton builds its launcher with a C compiler and Python's headers when it is first used."""
    # As Triton itself looks for it.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return Problem("Triton finds no C compiler", "install one (`apt install gcc`)")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    # Debian's Python names a scheme whose headers are those of the plain one.
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if not header.exists():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return Problem(
            f"Triton needs {header}, which is not there",
            f"install Python's headers (`apt install {version}-dev`)",
        )
    return None


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that this process may use for training."""
    if device.type != "cuda":
        return available_host_bytes()
    # What torch's allocator has reserved is free for this process, and for no other.
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def threads_in_words(num_threads: int) -> str:
    """What works on the CPU: threads that decode and augment, and those of PyTorch, which come
    from the environment (OMP_NUM_THREADS)."""
    threads = plural(num_threads, "thread")
    return f"{num_threads} CPU {threads}, {torch.get_num_threads()} of PyTorch"
