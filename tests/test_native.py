"""The border to libmien: a plain C header, no stale builds, errors that carry their reason."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mien
from mien.kernels import native
from mien.kernels.augment import MAX_OUTPUTS
from mien.kernels.draw import FACE_PARAMS

HEADER = Path(mien.__file__).parent / "kernels/csrc/include/mien.h"


@pytest.mark.parametrize("language", ["c", "c++"])
def test_header_is_plain_c(language):
    standard = "-std=c11" if language == "c" else "-std=c++17"
    flags = f"-x {language} {standard} -Wall -Wextra -pedantic -Werror -fsyntax-only".split()
    compiler = shutil.which("cc")
    assert compiler
    subprocess.run([compiler, *flags, HEADER], check=True)


def test_structures_agree_with_c():
    ffi, lib = native.library()
    assert ffi.sizeof("mien_face") == FACE_PARAMS.itemsize
    assert lib.MIEN_MAX_OUTPUTS == MAX_OUTPUTS
    for name in FACE_PARAMS.names:
        assert ffi.offsetof("mien_face", name) == FACE_PARAMS.fields[name][1], name


def test_library_was_built_from_this_header():
    ffi, lib = native.library()
    ours = hashlib.sha256(HEADER.read_bytes()).hexdigest()
    assert ffi.string(lib.mien_header_hash()).decode() == ours


def test_a_library_of_another_header_is_refused(tmp_path, monkeypatch):
    changed = tmp_path / "mien.h"
    changed.write_text(HEADER.read_text() + "\n")
    monkeypatch.setattr(native, "_HEADER", changed)
    native._library.cache_clear()
    try:
        with pytest.raises(native.NativeError, match="was built from another mien.h; run"):
            native.library()
    finally:
        native._library.cache_clear()


def test_a_missing_library_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_HERE", tmp_path)
    native._library.cache_clear()
    try:
        with pytest.raises(native.NativeError, match="cannot load .*; run `make setup`"):
            native.library()
    finally:
        native._library.cache_clear()


def test_errors_carry_the_reason():
    ffi, lib = native.library()
    job = ffi.new("mien_augment_job *", {"num_faces": [1, 0], "size_px": 5000})
    with pytest.raises(native.NativeError, match=r"augment_cpu: size_px must be 8\.\.4096, got"):
        native.call("augment_cpu", job, 1)
    job.size_px, job.input_px, job.num_outputs, job.count = 64, 64, 1, 1
    job.num_sides, job.input_channels, job.output_px[0] = 1, 3, 65
    with pytest.raises(native.NativeError, match=r"output_px must be 1\.\.64 .*, got 65"):
        native.call("augment_cpu", job, 1)
    job.output_px[0] = 64
    with pytest.raises(native.NativeError, match="null pointer"):
        native.call("augment_cpu", job, 1)
    job.input_type = 7
    with pytest.raises(native.NativeError, match="unknown type 7"):
        native.call("augment_cpu", job, 1)
    job.input_type, job.num_sides = 0, 3
    with pytest.raises(native.NativeError, match=r"num_sides must be 1\.\.2, got 3"):
        native.call("augment_cpu", job, 1)
    job.num_sides, job.num_faces[0] = 1, 2**31
    with pytest.raises(native.NativeError, match=r"num_faces must be 1\.\.2147483647, got 214748"):
        native.call("augment_cpu", job, 1)
    job.num_faces[0], job.count = 1, 2**62
    with pytest.raises(native.NativeError, match=r"count must be 0\.\.2147483647, got 46116860"):
        native.call("augment_cpu", job, 1)
    assert lib.mien_augment_workspace_bytes(job) == 0
    ranges = ffi.new("mien_ranges *", {"clahe_max_size": 9})
    draw_job = ffi.new("mien_draw_job *", {"num_sides": 1, "num_faces": [1], "size_px": 64})
    with pytest.raises(native.NativeError, match=r"clahe_max_size must be 0\.\.8, got 9"):
        native.call("draw_cpu", ranges, draw_job)


@pytest.mark.parametrize(
    ("name", "size"),
    [("faces", 8), ("params", 8), ("input", 16), ("mask", 4), ("targets", 4), ("weights", 4)],
)
def test_pointers_within_a_word_are_refused(name, size):
    ffi, _ = native.library()
    fields = {"num_sides": 1, "num_faces": [1], "count": 1, "size_px": 8, "num_outputs": 1}
    fields |= {"input_px": 8, "input_channels": 8, "output_px": [8]}
    addresses = {"faces": 4096, "params": 4096, "input": 4096, "mask": 4096}
    addresses |= {"targets": 4096, "weights": 4096, name: 4096 + size // 2}
    for each, address in addresses.items():
        pointer = ffi.cast("void *", address)  # of no memory: it is refused unread
        fields[each] = [pointer] if each in ("faces", "targets", "weights") else pointer
    job = ffi.new("mien_augment_job *", fields)
    with pytest.raises(native.NativeError, match=f"{name} must be aligned to {size} bytes, got"):
        native.call("augment_cpu", job, 1)


def test_a_wrong_argument_is_a_type_error():
    with pytest.raises(TypeError):
        native.call("augment_cpu", "no job", 1)


def test_first_callers_at_the_same_time_get_one_view():
    """Types of one view do not fit the functions of another."""
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
from mien.kernels import native
together = threading.Barrier(8)
def load(_):
    together.wait()
    return id(native.library()[0])
with ThreadPoolExecutor(8) as pool:
    assert len(set(pool.map(load, range(8)))) == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True)
