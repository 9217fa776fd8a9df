"""How libmien is built on this machine: with which CUDA compiler, and for which GPUs.

`make setup` runs this file, and setup.py reads it, before mien can be imported: it needs the
standard library alone. The compiler is the user's own nvcc where that fits; on a machine with a GPU
and none, it is that of Nvidia's packages on PyPI (the group `nvcc` of pyproject.toml).

The variable MIEN_CUDA chooses: AUTO; ON, which fails where CUDA kernels cannot be built; OFF;
PYPI, which takes the packages even where an nvcc is installed, and builds without a GPU too.
MIEN_CUDA_ARCHS names the generations to build for ("90", or "all"), in place of the GPUs that are
here.
"""

import ctypes
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = 80
"""The first generation that the kernels are written for: sm_80, Ampere."""

DEFAULT_CUDA = "13.0"
"""Version of the compiler that is fetched where the installed torch is a build for CPUs."""

_SYSTEM = "/usr/local/cuda"
_DEVICE = Path("/dev/nvidiactl")
_MAJOR, _MINOR = 75, 76  # numbers of device attributes in cuda.h


@dataclass(frozen=True)
class Card:
    """A GPU, as its driver tells it."""

    name: str
    generation: int
    """Number of its compute capability: 89 for sm_89."""


@dataclass(frozen=True)
class Driver:
    """What the CUDA driver says of itself."""

    cuda: tuple[int, int]
    """The newest CUDA that it runs."""

    cards: tuple[Card, ...]
    error: int
    """A CUresult: why there are no cards; 0: nothing is wrong."""


@functools.cache
def driver() -> Driver | None:
    """The driver of this process, with the GPUs that CUDA_VISIBLE_DEVICES leaves; None: none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    cards = tuple(_card(cuda, number) for number in range(0 if error else count.value))
    # 13020 stands for CUDA 13.2.
    return Driver((version.value // 1000, version.value % 1000 // 10), cards, error)


def _card(cuda: ctypes.CDLL, number: int) -> Card:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), number)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Card(name.value.decode(errors="replace"), 10 * major.value + minor.value)


def pci_address(number: int) -> str:
    """Address of a GPU that the driver shows, as /sys/bus/pci/devices names it; empty: unknown."""
    if number >= len(cards()):
        return ""
    cuda, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    address = ctypes.create_string_buffer(32)
    cuda.cuDeviceGet(ctypes.byref(device), number)
    cuda.cuDeviceGetPCIBusId(address, len(address), device)
    return address.value.decode(errors="replace").lower()


def cards() -> tuple[Card, ...]:
    """The GPUs that the driver shows."""
    own_driver = driver()
    return own_driver.cards if own_driver else ()


def has_gpu() -> bool:
    """Whether there is an Nvidia GPU, be it usable or not."""
    if cards() or _DEVICE.exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and "GPU " in _said_by(Path(tool), "-L")


@dataclass(frozen=True)
class Build:
    """How libmien is built."""

    cuda: str
    """AUTO, ON or OFF: what is done where the compiler does not work."""

    why: str = ""
    """Reason that there are no CUDA kernels, where there is no compiler."""

    compiler: Path | None = None
    generations: tuple[int, ...] = ()
    """GPUs to build for; empty: all that mien supports."""

    def options(self) -> list[str]:
        """What CMake is told."""
        cuda = "OFF" if self.cuda == "AUTO" and self.compiler is None else self.cuda
        generations = ";".join(map(str, self.generations))
        named = [f"-DMIEN_CUDA_ARCHS={generations}"] if generations else []
        return [f"-DMIEN_CUDA={cuda}", *named]

    def environment(self) -> dict[str, str]:
        """Variables by which CMake finds the compiler, and the compiler its libraries."""
        if self.compiler is None:
            return {}
        # In Nvidia's packages they lie in lib, where this compiler looks into lib64.
        libraries = str(self.compiler.parents[1] / "lib")
        paths = [libraries, *filter(None, [os.environ.get("LIBRARY_PATH")])]
        return {"CUDACXX": str(self.compiler), "LIBRARY_PATH": ":".join(paths)}

    def __str__(self) -> str:
        if self.compiler is None:
            return f"for the CPU alone: {self.why}"
        kinds = ", ".join(f"sm_{each}" for each in self.generations) or "every GPU from sm_80 on"
        return f"with CUDA kernels for {kinds}, by {self.compiler} ({_release(self.compiler)})"


def choose() -> Build:
    """How libmien is to be built, with what is installed now.

    Raises:
        ValueError: A variable says what mien does not know.
    """
    mode = _mode()
    if mode == "OFF":
        return Build("OFF", "as MIEN_CUDA says")
    here = {card.generation for card in cards()}
    supported = {generation for generation in here if generation >= OLDEST}
    if mode == "AUTO" and here > supported == set():
        return Build("OFF", f"mien needs a GPU of sm_{OLDEST} or newer, here is sm_{max(here)}")
    named = _named()
    generations = sorted(supported if named is None else named)
    # The packages are there only where no nvcc fitted, or where they were asked for.
    packaged = _packaged_compilers()
    own = [] if mode == "PYPI" else _own_compilers()
    fitting = (nvcc for nvcc in (*packaged, *own) if _fits(nvcc, generations))
    compiler = next(fitting, next(iter(packaged), None))
    # With a GPU an nvcc that does not work is an error, not a reason to do without.
    is_needed = mode != "AUTO" or bool(here and compiler)
    cuda = "ON" if is_needed else mode
    return Build(cuda, "there is no nvcc that fits", compiler, tuple(generations))


def _mode() -> str:
    mode = os.environ.get("MIEN_CUDA", "AUTO").upper()
    if mode not in ("AUTO", "ON", "OFF", "PYPI"):
        raise ValueError(f"MIEN_CUDA must be AUTO, ON, OFF or PYPI, got {mode}")
    return mode


def _named() -> list[int] | None:
    """The generations that MIEN_CUDA_ARCHS names; empty: all; None: it names none."""
    named = os.environ.get("MIEN_CUDA_ARCHS", "").replace(";", " ").split()
    if not named or named == ["all"]:
        return [] if named else None
    if not all(word.isdecimal() for word in named):
        raise ValueError(
            f"MIEN_CUDA_ARCHS must be all, or generations such as '80;90', got {' '.join(named)}"
        )
    return [int(word) for word in named]


def _own_compilers() -> list[Path]:
    """Every nvcc that the user has installed, the one that is named first."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _SYSTEM]
    named = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates = [*filter(None, named), *(f"{home}/bin/nvcc" for home in homes if home)]
    return [Path(path) for path in candidates if Path(path).exists()]


def _packaged_compilers() -> list[Path]:
    """The nvcc of Nvidia's packages, where they are installed."""
    return sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))


def _fits(nvcc: Path, generations: list[int]) -> bool:
    """Whether it knows these generations, and the driver that is here runs what it makes."""
    own_driver = driver()
    release = _release(nvcc)
    # Within a major number, an older driver runs what a newer compiler makes.
    if own_driver and release and int(release.partition(".")[0]) > own_driver.cuda[0]:
        return False
    # An nvcc that lacks one of them passes CMake's check of the language, then ends the build.
    known = re.findall(r"compute_(\d+)$", _said_by(nvcc, "--list-gpu-arch"), re.M)
    return bool(known) and set(map(str, generations)) <= set(known)


def _said_by(program: Path, word: str) -> str:
    """What a program prints when it is asked; empty where it fails."""
    try:
        done = subprocess.run([program, word], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _release(nvcc: Path) -> str:
    """The CUDA that an nvcc is of, such as 13.0; empty where it does not run."""
    release = re.search(r"release (\d+\.\d+)", _said_by(nvcc, "--version"))
    return release[1] if release else ""


def _cuda_of_torch() -> str:
    """The CUDA that the installed torch is built for, such as 13.0; torch is not imported."""
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is None or torch_spec.origin is None:
        return DEFAULT_CUDA
    version = Path(torch_spec.origin).with_name("version.py").read_text()
    cuda = re.search(r"^cuda\b.*= *'(\d+\.\d+)", version, re.M)
    return cuda[1] if cuda else DEFAULT_CUDA


def fetch_compiler() -> None:
    """Install Nvidia's packages of nvcc beside torch, of the CUDA that torch is built for.

    Raises:
        ValueError: They cannot be had; one line says what else can be done.
    """
    cuda = _cuda_of_torch()
    otherwise = f"install the CUDA toolkit {cuda}, whose nvcc is then found, or set MIEN_CUDA=OFF"
    if int(cuda.partition(".")[0]) < 13:
        raise ValueError(f"PyPI has no nvcc for torch's CUDA {cuda}; {otherwise}")
    with (ROOT / "pyproject.toml").open("rb") as file:
        names = tomllib.load(file)["dependency-groups"]["nvcc"]
    _tell(f"fetches nvcc of CUDA {cuda} from PyPI, as none here fits (0.1 GB, once)")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    packages = [f"{name}=={cuda}.*" for name in names]
    if subprocess.run([*install, *packages], check=False).returncode:
        again = "the next `make setup` tries again"
        raise ValueError(f"nvcc could not be fetched from PyPI; {otherwise}; {again}")


def prepare() -> Build:
    """How libmien is to be built; the compiler is fetched where a GPU waits for one."""
    build = choose()
    needs_compiler = build.cuda != "OFF" and build.compiler is None
    if needs_compiler and (build.cuda == "ON" or has_gpu()):
        try:
            fetch_compiler()
        except ValueError as error:
            if build.cuda == "ON":
                raise
            _tell(f"builds no CUDA kernels: {error}")
        build = choose()
    return build


def rebuild() -> str:
    """What gives a libmien that fits this machine, as a clause with the command."""
    if not (ROOT / "Makefile").exists():
        # Forced: pip takes a wheel of the version that is installed for the same.
        pip = shlex.join([sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps"])
        return f"in mien's source tree run `make wheel && {pip} dist/mien-*.whl`"
    if os.path.samefile(".", ROOT):
        return "run `make setup`"
    return f"run `{shlex.join(['make', '-C', str(ROOT), 'setup'])}`"


def _tell(text: str) -> None:
    print(f"mien: {text}", flush=True)


def main(record: Path) -> int:
    """Prepare the build, and write down in ``record`` how it is done, where that has changed."""
    try:
        build = prepare()
    except ValueError as error:
        print(f"mien: {error}", file=sys.stderr)
        return 2
    # Only where it has changed: make takes a newer file for a reason to build.
    if not record.exists() or record.read_text() != f"{build}\n":
        _tell(f"builds libmien {build}")
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{build}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
