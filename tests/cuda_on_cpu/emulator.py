"""mien's CUDA kernels on a CPU: built by g++ against this folder's `cuda_runtime.h`, and checked.

    with Emulator(build(folder)).running():
        augment(...)    # CPU tensors, through mien_augment_cuda and its kernels

The `.cu` files are the real ones. Two things in them are no C++ and are rewritten in a copy:
launches, and declarations of shared memory. Everything else comes from the header.
"""

import contextlib
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import pytest
import torch

import mien
from mien.kernels import dispatch, native

HERE = Path(__file__).parent
CSRC = Path(mien.__file__).parent / "kernels/csrc"
KERNELS = ("augment.cu", "face_loss.cu", "filtered_loss.cu")
ORDERS = ("forward", "reverse", "random")

Memories = Iterator[tuple[str, Any, int, str]]
"""Name, address and bytes of memory; w: kernels may write it, r: and read it before they do."""

Unit = tuple[str, str, list[str]]
"""Name of an object, its source, and with which options it is compiled."""

_FLAGS = "-std=c++17 -fPIC -ffp-contract=off -fno-math-errno -w -pthread".split()
_KERNEL = ["-O1", "-fsanitize=thread", "-x", "c++"]  # which has them call the checks of block.cpp
_SANITIZED = (
    "-O0 -g1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all "
    "-fno-omit-frame-pointer"
).split()

_BLOCK: Unit = ("block", str(HERE / "block.cpp"), ["-O2"])

_LAUNCH = re.compile(r"((\w+)(?:<[^;<>]*>)?)<<<(.*?)>>>\(", re.S)
_SHARED = re.compile(r"__shared__\s+(union\s*\{.*?\}|[^;{}]*?)\s*\b(\w+)((?:\[[^]]*\])*);", re.S)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(\w+)\s+(\w+)\[\];")

DECLARATIONS = """
void emulated_order(int order, unsigned seed);
void emulated_last(unsigned last);
void emulated_memory(const char *name, void *begin, size_t bytes, int is_written, int holds);
int emulated_end(void);
"""


@dataclass(frozen=True)
class Fault:
    """A mistake to plant: ``old``, which stands once in ``file``, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    shows: str
    """What is seen of it: in the emulator's words, or that the result is another."""


def rewritten(text: str) -> str:
    """CUDA C++ as C++: launches are calls, and shared memory belongs to the running block."""
    text = _DYNAMIC.sub(r"auto *\2 = static_cast<\1 *>(emulated::dynamic_memory());", text)
    number = 0

    def declared(found: re.Match) -> str:
        nonlocal number
        number += 1
        kind, name, bounds = found.groups()
        own = f"Shared{number}"
        return (
            f"struct {own} {{ {kind} {name}{bounds}; }}; "
            f'auto &{name} = emulated::shared<{own}>("{name}").{name};'
        )

    text = _SHARED.sub(declared, text)
    return _LAUNCH.sub(r'emulated::launch("\2", {\3}, \1, ', text)


def build(folder: Path, fault: Fault | None = None) -> Path:
    """The library with emulated kernels, in ``folder``; made unless it lies there already.

    A fault is planted for the kernels alone: what runs on the CPU's threads stays right.
    """
    sources = _sources()
    whole = _made_of(folder, sources)
    _compile(sources, whole, [*_host_units(), *(_kernel_unit(name) for name in KERNELS), _BLOCK])
    if fault is None:
        return whole / "libmien.so"
    assert sources[fault.file].count(fault.old) == 1, f"{fault.name}: nowhere to plant it"
    sources[fault.file] = sources[fault.file].replace(fault.old, fault.new)
    touched = [name for name in KERNELS if fault.file.startswith(Path(name).stem)] or KERNELS[:1]
    others = [file for file in whole.glob("*.o") if file.stem not in touched]
    made = whole / re.sub(r"\W", "-", fault.name)
    return _compile(sources, made, map(_kernel_unit, touched), others)


def build_sanitized(folder: Path) -> Path:
    """The same, where every access and every overflow is checked by g++ itself, not by block.cpp.

    A process that loads it must have libasan from its start.
    """
    sources = _sources()
    units = [
        (name, source, options if "baseline" in name else [*_SANITIZED, *options])
        for name, source, options in [*_host_units(), *((n, n, ["-x", "c++"]) for n in KERNELS)]
    ]  # the baseline does what the kernels do
    return _compile(sources, _made_of(folder, sources, "sanitized"), [*units, _BLOCK], _SANITIZED)


def build_sample(folder: Path) -> Path:
    """The kernels of sample.cu alone."""
    sources = {"sample.cu": (HERE / "sample.cu").read_text()}
    units = [_kernel_unit("sample.cu"), _BLOCK]
    return _compile(sources, _made_of(folder, sources, "sample"), units)


def _sources() -> dict[str, str]:
    files = [file for file in sorted(CSRC.rglob("*")) if file.is_file()]
    return {str(file.relative_to(CSRC)): file.read_text() for file in files}


def _made_of(folder: Path, sources: dict[str, str], kind: str = "checked") -> Path:
    """Folder of the build of these sources, and of this folder's."""
    ours = [file.read_text() for file in sorted(HERE.iterdir()) if file.is_file()]
    return folder / f"{kind}-{hashlib.sha256(repr([sources, ours]).encode()).hexdigest()[:16]}"


def _kernel_unit(name: str) -> Unit:
    return name, name, _KERNEL


def _host_units() -> list[Unit]:
    header = hashlib.sha256((CSRC / "include/mien.h").read_bytes()).hexdigest()
    options = ["-DMIEN_WITH_CUDA=1", f'-DMIEN_HEADER_HASH="{header}"']
    options.append('-DMIEN_CUDA_BUILD="0.0 emulated"')
    names = ("status", "threads", "augment_cpu", "face_loss_cpu", "filtered_loss_cpu")
    units = [(name, f"{name}.cpp", options) for name in names]
    wide = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
    for name in ("augment_face", "face_loss_face", "filtered_loss_face"):
        macro = f"-DMIEN_{name.upper()}={name}"
        first = [f"{macro}_baseline", "-DMIEN_AUGMENT_BASELINE=1"]
        units.append((f"{name}_baseline", f"{name}.cpp", first))
        units.append((f"{name}_avx2", f"{name}.cpp", [f"{macro}_avx2", *wide]))
    return units


def _compile(
    sources: dict[str, str],
    folder: Path,
    units: Iterable[Unit],
    others: Iterable[Path | str] = (),
) -> Path:
    """The shared library of the units, and of other objects, in ``folder``: all of it or nothing.

    Nothing is done where it lies there already.
    """
    if (folder / "libmien.so").exists():
        return folder / "libmien.so"
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / "made"
        for path, text in sources.items():
            file = made / "csrc" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(rewritten(text) if path.endswith(".cu") else text)
        objects = list(others)
        for unit, source, options in units:
            objects.append(made / f"{unit}.o")
            includes = ["-I", "include", "-I", ".", "-I", HERE]
            words = [compiler, *_FLAGS, *includes, *options, "-c", source, "-o", objects[-1]]
            subprocess.run(words, check=True, cwd=made / "csrc")
        words = [compiler, "-shared", "-pthread", *objects, "-o", made / "libmien.so"]
        subprocess.run(words, check=True)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "libmien.so").exists():  # else another process was as fast
                raise
    return folder / "libmien.so"


class Emulator:
    """A library with emulated kernels, which makes the calls that would go to a GPU."""

    def __init__(self, library: Path):
        self.ffi = cffi.FFI()
        self.ffi.cdef(native._declarations() + DECLARATIONS)
        self.lib = self.ffi.dlopen(str(library))
        self.is_checked = True
        """Whether kernels may touch only what a call gives them, and that in order."""

        self.num_launches = 0
        """Kernels of the last call."""

    def set_order(self, order: str, seed: int = 0) -> None:
        """Have the threads of a block, of those that can go on, run in this order."""
        self.lib.emulated_order(ORDERS.index(order), seed)

    @contextlib.contextmanager
    def last_blocks(self, num: int) -> Iterator[None]:
        """Run only the last rows of blocks, or blocks of a row, of every grid inside, unchecked."""
        self.lib.emulated_last(num)
        self.is_checked = False
        try:
            yield
        finally:
            self.is_checked = True
            self.lib.emulated_last(0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Tensors of the CPU go through the emulated kernels inside, as those of a GPU would."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "library", lambda: (self.ffi, self.lib))
            patch.setattr(native, "launch", self.launch)
            patch.setattr(dispatch, "uses_cuda", lambda device: True)
            yield

    def launch(self, operation: str, device: torch.device, *args: Any) -> None:
        """Call ``mien_<operation>_cuda``, as `native.launch` does.

        Raises:
            NativeError: The library refused the call, or a kernel did what it must not.
        """
        assert device.type == "cpu"
        memories = getattr(self, f"_memories_of_{operation}")(*args) if self.is_checked else ()
        names = []  # the library borrows them until the end
        for name, pointer, size, access in memories:
            if pointer != self.ffi.NULL:
                names.append(self.ffi.new("char[]", name.encode()))
                self.lib.emulated_memory(names[-1], pointer, size, "w" in access, "r" in access)
        try:
            native.call(f"{operation}_cuda", *args, self.ffi.NULL)
        finally:
            self.num_launches = self.lib.emulated_end()

    def _memories_of_draw(self, ranges: Any, job: Any) -> Memories:
        yield "params", job.params, job.num_sides * job.count * self.ffi.sizeof("mien_face"), "w"
        yield "counters", job.counters, job.num_sides * 8, "rw"

    def _memories_of_augment(self, job: Any, workspace: Any, workspace_bytes: int) -> Memories:
        yield "workspace", workspace, workspace_bytes, "w"
        yield "params", job.params, job.count * self.ffi.sizeof("mien_face"), "r"
        for side in range(job.num_sides):
            in_store = job.num_faces[side]
            faces = job.count // job.num_sides if job.gathered else in_store
            yield f"faces[{side}]", job.faces[side], faces * job.size_px**2 * 8, "r"
            yield f"landmarks[{side}]", job.landmarks[side], in_store * 68 * 2 * 4, "r"
            yield f"nearest[{side}]", job.nearest[side], in_store * 10 * 4, "r"
        pixels = job.count * job.input_px**2
        yield "input", job.input, pixels * job.input_channels * _bytes_of(job.input_type), "w"
        for i in range(job.num_outputs):
            pixels = job.count * job.output_px[i] ** 2
            yield f"targets[{i}]", job.targets[i], pixels * 3 * _bytes_of(job.target_type), "w"
            yield f"weights[{i}]", job.weights[i], pixels * 4, "w"
        yield "mask", job.mask, pixels * 4, "w"

    def _memories_of_face_loss(self, job: Any, workspace: Any, workspace_bytes: int) -> Memories:
        pixels = job.batch * job.height * job.width
        in_preds = pixels * job.channels * _bytes_of(job.pred_type)
        yield "workspace", workspace, workspace_bytes, "w"
        for side in range(2):
            yield f"preds[{side}]", job.preds[side], in_preds, "r"
            yield f"gradients[{side}]", job.gradients[side], in_preds, "w"
        yield "target", job.target, 2 * pixels * job.channels * _bytes_of(job.target_type), "r"
        yield "weight", job.weight, 2 * pixels * 4, "r"
        yield "scale", job.scale, 4, "r"
        yield "means", job.means, 2 * job.num_losses * 4, "w"

    def _memories_of_filtered_loss(
        self, job: Any, workspace: Any, workspace_bytes: int
    ) -> Memories:
        filters = [job.filters[i] for i in range(job.num_filters)]
        pixels = job.faces * job.size**2
        taps = sum(f.size * f.num_taps + f.from_size * f.num_turned for f in filters)
        yield "workspace", workspace, workspace_bytes, "w"
        yield "pred", job.pred, pixels * job.channels * 4, "r"
        yield "target", job.target, pixels * job.channels * 4, "r"
        yield "weight", job.weight, pixels * 4, "r"
        yield "values", job.values, job.faces * job.channels * 4, "w"
        yield "gradient", job.gradient, pixels * job.channels * 4, "w"
        yield "firsts", job.firsts, sum(f.size + f.from_size for f in filters) * 4, "r"
        yield "taps", job.taps, taps * 4, "r"


def _bytes_of(mien_type: int) -> int:
    """Bytes of one number of a `mien_type`."""
    return 4 if mien_type == 0 else 2
