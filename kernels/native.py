"""Load libmien and turn its status codes into Python errors.

The C header is the only list of signatures. cffi parses it, so a call with the wrong arguments
is a TypeError, and a library built from another header is refused.
"""

import errno
import functools
import hashlib
import os
import re
import threading
from pathlib import Path
from typing import Any

import cffi
import torch

from .toolkit import rebuild

_HERE = Path(__file__).parent
_HEADER = _HERE / "csrc/include/mien.h"


class NativeError(RuntimeError):
    """A call into libmien failed; the message is the library's own."""


def _declarations() -> str:
    text = _HEADER.read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.S)
    # Of the preprocessor's lines cffi takes those that define a whole number, and no other.
    text = re.sub(r"^#(?!define \w+ \d+$).*$", "", text, flags=re.M)
    return text.replace("MIEN_API", "")


_loading = threading.Lock()


def library() -> tuple[Any, Any]:
    """``(ffi, lib)``: cffi's view of the header and the loaded library.

    Raises:
        NativeError: There is no build, or it was made from another header; says what to run.
    """
    with _loading:  # two first callers would get two views, whose types do not fit each other
        return _library()


@functools.cache
def _library() -> tuple[Any, Any]:
    path = _HERE / "libmien.so"
    try:
        ffi = cffi.FFI()  # which loads a library of its own
        ffi.cdef(_declarations())
        lib = ffi.dlopen(str(path))
    except (OSError, ImportError) as error:
        reason = "raise `ulimit -n`" if _lacks_handles(error) else rebuild()
        raise NativeError(f"cannot load {path}; {reason}") from error
    built_from = ffi.string(lib.mien_header_hash()).decode()
    # A job of another layout would be misread, without an error.
    if built_from != hashlib.sha256(_HEADER.read_bytes()).hexdigest():
        raise NativeError(f"{path} was built from another mien.h; {rebuild()}")
    return ffi, lib


def _lacks_handles(error: OSError | ImportError) -> bool:
    """Whether a file could not be opened since too many are open; a loader says so in words."""
    return getattr(error, "errno", None) == errno.EMFILE or os.strerror(errno.EMFILE) in str(error)


def cuda_build() -> tuple[str, list[str]]:
    """``(CUDA, generations)`` of libmien's CUDA kernels, such as ("13.0.88", ["80-real", "90"]).

    Generations are as mien.h has them; there are none, and no CUDA, in a library for the CPU alone.
    """
    ffi, lib = library()
    cuda, *generations = ffi.string(lib.mien_cuda_build()).decode().split() or [""]
    return cuda, generations


def runs_on(generation: int) -> bool:
    """Whether libmien has CUDA kernels for a GPU of this generation (89: sm_89).

    Machine code runs on later GPUs of the same major number, PTX on all later ones.
    """
    for kind in cuda_build()[1]:
        built_for, _, form = kind.partition("-")
        number = int(built_for)
        is_compatible = form != "virtual" and number // 10 == generation // 10
        if number <= generation and (is_compatible or form != "real"):
            return True
    return False


def call(name: str, *args: object) -> None:
    """Call ``mien_<name>``; raise `NativeError` unless it returns MIEN_OK."""
    ffi, lib = library()
    if getattr(lib, f"mien_{name}")(*args) != lib.MIEN_OK:
        raise NativeError(f"{name}: {ffi.string(lib.mien_last_error()).decode()}")


def clear_upper_halves() -> None:
    """Clear the upper halves of this thread's vector registers, as mien.h has it."""
    _, lib = library()
    lib.mien_clear_upper_halves()


def launch(operation: str, device: torch.device, *args: object) -> None:
    """Call ``mien_<operation>_cuda`` on the current stream of ``device``, whichever is current.

    Raises:
        NativeError: The library refused the job or CUDA the launch.
    """
    ffi, _ = library()
    # The library launches on the device that is current in this thread.
    with torch.cuda.device(device):
        stream = ffi.cast("void *", torch.cuda.current_stream(device).cuda_stream)
        call(f"{operation}_cuda", *args, stream)
