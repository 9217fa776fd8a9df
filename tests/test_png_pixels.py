"""Pixels of PNGs by ISA-L and libmien: OpenCV's pixels, or left to OpenCV."""

import ctypes
import platform
import random
import shutil
import struct
import subprocess
import zlib

import cv2
import numpy as np
import pytest
from isal import isal_zlib

from mien.core.faces.picture import open_picture
from mien.core.faces.png_pixels import decode_rgb, encode_rgb
from mien.kernels import native

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(params=["baseline", "avx2"], autouse=True)
def build(request, monkeypatch):
    """The build of the library for one instruction set."""
    monkeypatch.setenv("MIEN_CPU", request.param)


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _header(columns, rows, depth=8, colours=2, interlaced=0):
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, depth, colours, 0, 0, interlaced))


def _filtered(filters, columns, seed=0):
    """Rows of random numbers, each led by its filter: whatever they mean, it is a picture."""
    rows = np.random.default_rng(seed).integers(0, 256, (len(filters), 1 + 3 * columns), np.uint8)
    rows[:, 0] = filters
    return rows.tobytes()


def _png(filters, columns, *, parts=1, before=b"", after=b""):
    deflated = zlib.compress(_filtered(filters, columns))
    size = -(-len(deflated) // parts)
    data = [_chunk(b"IDAT", deflated[at : at + size]) for at in range(0, len(deflated), size)]
    chunks = [_header(columns, len(filters)), before, *data, after, _chunk(b"IEND", b"")]
    return SIGNATURE + b"".join(chunks)


def _decode(png):
    return decode_rgb(np.frombuffer(png, np.uint8))


def _by_opencv(png):
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize("columns", [1, 2, 3, 17, 64])
@pytest.mark.parametrize(
    "filters", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0] * 4, [3, 3, 4, 4], [4] * 5]
)
def test_pixels_are_those_of_opencv(filters, columns):
    png = _png(filters, columns, parts=3)
    pixels = _decode(png)
    assert pixels.shape == (len(filters), columns, 3)
    np.testing.assert_array_equal(pixels, _by_opencv(png))


def test_every_face_is_decoded_so(faces_dir):
    paths = [path for path in sorted(faces_dir.rglob("*.png")) if path.parent.name != "bad"]
    assert paths
    for path in paths:
        encoded = np.fromfile(path, np.uint8)
        pixels = decode_rgb(encoded)
        assert pixels is not None, path
        np.testing.assert_array_equal(pixels, _by_opencv(encoded.tobytes()), err_msg=str(path))


def test_text_beside_the_picture_is_passed_over():
    text = _chunk(b"tEXt", b"Comment\0of nobody") + _chunk(b"gAMA", struct.pack(">I", 45455))
    png = _png([4, 1], 5, before=text, after=text)
    np.testing.assert_array_equal(_decode(png), _by_opencv(png))


def _of(header, data):
    return SIGNATURE + header + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


SOUND = _png([1, 4, 3], 4)
OTHERS = {
    "no PNG": b"\xff\xd8\xff" + SOUND[3:],
    "nothing": b"",
    "no header": SIGNATURE + SOUND[33:],
    "16 bits": _of(_header(2, 2, depth=16), bytes(26)),
    "grey": _of(_header(2, 2, colours=0), bytes(6)),
    "with alpha": _of(_header(2, 2, colours=6), bytes(18)),
    "interlaced": _of(_header(2, 2, interlaced=1), bytes(14)),
    "without columns": _of(_header(0, 2), bytes(2)),
    "of more columns than are": _of(_header(2**16 + 1, 1), bytes(4)),
    "more pixels than its size": _of(_header(2, 2), bytes(15)),
    "fewer pixels than its size": _of(_header(2, 2), bytes(13)),
    "a filter that is none": _of(_header(2, 2), b"\5" + bytes(13)),
    "a colour that is transparent": _png([0, 0], 3, before=_chunk(b"tRNS", bytes(6))),
    "a palette": _png([0, 0], 3, before=_chunk(b"PLTE", bytes(6))),
    "a header longer than it is": SIGNATURE + _chunk(b"IHDR", SOUND[16:29] + b"\0") + SOUND[33:],
    "text before its header": SIGNATURE + _chunk(b"tEXt", b"a\0b") + SOUND[8:],
    "a second header": _png([0, 0], 3, before=_header(3, 2)),
    "parted data": _png([0, 0], 3, after=_chunk(b"tEXt", b"a\0b") + _chunk(b"IDAT", b"")),
    "cut short": SOUND[:-20],
    "without an end": SOUND[:-12],
    "an end of a wrong checksum": SOUND[:-1] + b"\0",
    "no deflated data": SIGNATURE + _header(1, 1) + _chunk(b"IDAT", b"none") + SOUND[-12:],
    "data of a wrong sum": SIGNATURE
    + _header(2, 2)
    + _chunk(b"IDAT", zlib.compress(bytes(14))[:-1] + b"\2")
    + SOUND[-12:],
    "a chunk longer than the file": SOUND[:33] + b"\x7f\xff\xff\xff" + SOUND[37:],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_another_kind_is_left_to_opencv(name):
    assert _decode(OTHERS[name]) is None


def test_a_header_and_an_end_are_no_plain_picture():
    assert not _chunks(SIGNATURE + _header(1, 1) + SOUND[-12:])[0]


def test_a_bomb_is_inflated_no_further_than_its_picture(monkeypatch):
    bomb = zlib.compress(bytes(200_000_000), 9)
    png = SIGNATURE + _header(2, 2) + _chunk(b"IDAT", bomb) + _chunk(b"IEND", b"")
    assert _decode(png) is None


@pytest.mark.parametrize("seed", range(300))
def test_damaged_files_give_opencvs_pixels_or_none(seed):
    source = random.Random(seed)
    png = bytearray(_png([source.randrange(5) for _ in range(6)], 9, parts=source.randint(1, 3)))
    for _ in range(source.randint(1, 4)):
        png[source.randrange(len(png))] = source.randrange(256)
    pixels = _decode(bytes(png))
    if pixels is not None:
        np.testing.assert_array_equal(pixels, _by_opencv(bytes(png)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (33, 65)])
def test_what_is_written_reads_the_same_everywhere(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for given in (image, image[:, ::-1], np.asfortranarray(image)):
        png = encode_rgb(given)
        np.testing.assert_array_equal(_by_opencv(png), given)
        np.testing.assert_array_equal(_decode(png), given)


def test_a_picture_is_opened_the_same_either_way(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name, pixels in (("rgb", image), ("rgba", np.dstack([image, image[..., :1]]))):
        path = tmp_path / f"{name}.png"
        cv2.imwrite(str(path), pixels)
        assert (decode_rgb(np.fromfile(path, np.uint8)) is None) is (name == "rgba")
        with open_picture(path, 64) as opened:
            np.testing.assert_array_equal(opened, image)


def _chunks(png):
    """What libmien says of a whole file: whether it is plain, and its deflated data."""
    ffi, _ = native.library()
    deflated = ffi.new("uint8_t[]", max(len(png), 1))
    rooms = {"png": ffi.from_buffer("uint8_t[]", png), "deflated": deflated}
    job = ffi.new("mien_png_chunks_job *", rooms | {"num_bytes": len(png)})
    native.call("png_chunks_cpu", job)
    return bool(job.is_plain), bytes(ffi.buffer(deflated, job.num_deflated))


@pytest.mark.parametrize("length", [*range(150), 4095, 4096, 4097, 65_537, 1_000_003])
def test_checksums_are_those_of_zlib(length):
    """Data of every length: short ones go by tables, and so do the ends of the others."""
    data = random.Random(length).randbytes(length)
    png = SIGNATURE + _header(1, 1) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    assert _chunks(png) == (True, data)
    for at in {33 + 8 + length * part // 7 for part in range(8)}:
        damaged = bytearray(png)
        damaged[at] ^= 1 << at % 8
        assert not _chunks(bytes(damaged))[0]


@pytest.mark.parametrize("end", [0, 1, 7, 8, 19, 20, 32, 33, 41, 44])
def test_no_byte_behind_a_cut_file_is_read(end, at_end_of_memory):
    png = SIGNATURE + _header(1, 1) + _chunk(b"IDAT", bytes(3)) + _chunk(b"IEND", b"")
    ffi, _ = native.library()
    rooms = {
        "png": ffi.cast("uint8_t *", at_end_of_memory(png[:end])),
        "deflated": ffi.new("uint8_t[]", 64),
    }
    job = ffi.new("mien_png_chunks_job *", rooms | {"num_bytes": end})
    native.call("png_chunks_cpu", job)
    assert not job.is_plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows and columns must be 1"),
        ({"columns": 2**16 + 1}, "rows and columns must be 1"),
        ({"pixels": None}, "null pointer"),
        ({"filtered": None}, "null pointer"),
        ({}, "no filter of PNG"),
    ],
)
def test_the_library_refuses_jobs_that_cannot_be(change, message):
    ffi, _ = native.library()
    rooms = {"filtered": ffi.new("uint8_t[]", b"\7\0\0\0"), "pixels": ffi.new("uint8_t[]", 3)}
    job = {"rows": 1, "columns": 1} | rooms | change
    job = {name: ffi.NULL if value is None else value for name, value in job.items()}
    with pytest.raises(native.NativeError, match=message):
        native.call("png_rows_cpu", ffi.new("mien_png_job *", job))


@pytest.fixture(scope="module")
def are_upper_halves_in_use(tmp_path_factory):
    """A function that tells whether they are, of this thread's vector registers."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("no g++, or a processor that has no such halves")
    folder = tmp_path_factory.mktemp("state")
    (folder / "state.cpp").write_text(
        """
        #include <cpuid.h>
        #include <immintrin.h>
        extern "C" int are_upper_halves_in_use() {
            unsigned a, b, c, d;
            const bool is_told = __get_cpuid_count(13, 1, &a, &b, &c, &d) && a & 4;
            return is_told ? _xgetbv(1) >> 2 & 1 : 0;
        }
        """
    )
    library = folder / "state.so"
    options = ["-shared", "-fPIC", "-mxsave"]
    subprocess.run(["g++", *options, folder / "state.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library)).are_upper_halves_in_use


def test_what_isa_l_leaves_in_use_is_cleared(are_upper_halves_in_use):
    isal_zlib.crc32(bytes(1000))
    if not are_upper_halves_in_use():
        pytest.skip("ISA-L leaves no register in use, or this processor does not tell")
    native.clear_upper_halves()
    assert not are_upper_halves_in_use()
    image = _decode(_png([4, 4, 1], 300))
    assert not are_upper_halves_in_use()
    encode_rgb(image)
    assert not are_upper_halves_in_use()
