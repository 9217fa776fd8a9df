"""The face PNG: what is read, what is refused and why, and that nothing is ever evaluated."""

import ast
import json
import random
import re
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest

from mien.core.faces.masks import named_mask
from mien.core.faces.png import (
    MAX_HEADER_BYTES,
    SIGNATURE,
    FaceFileError,
    FaceHeader,
    StoredMask,
    parse_literal,
    read_header,
    write_face,
)

# Each specimen of broken input with what its reason must name; None where the file can be used.
SPECIMENS = {
    "all_black.png": None,
    "good_control.png": None,
    "grey16_with_header.png": "16-bit grey",
    "grey8_with_header.png": "8-bit grey",
    "header_67_points.png": "67 landmarks where 68",
    "header_after_idat.png": "no face header before its picture data",
    "header_bad_crc.png": "checksum",
    "header_cut_literal.png": "ends inside a string",
    "header_empty_dict.png": "no entry 'alignments'",
    "header_expression.png": "not a plain literal",
    "header_extra_key.png": None,
    "header_json_no_mask.png": None,
    "header_length_lies.png": "bytes long",
    "header_mask_not_zlib.png": None,
    "header_no_landmarks.png": "no landmarks",
    "header_no_masks.png": None,
    "header_not_python.png": "not a plain literal",
    "header_other_keyword.png": "no face header",
    "header_point_huge.png": "outside any picture",
    "header_point_nan.png": "not finite",
    "header_points_coincide.png": "one place or on one line",
    "header_second_chunk.png": None,
    "jpeg_named.png": "no PNG but a JPEG",
    "no_header.png": "no face header",
    "not_square.png": "px, not square",
    "one_pixel.png": "1 px wide",
    "photo.jpg": "no PNG but a JPEG",
    "rgb16_no_header.png": "16-bit RGB",
    "rgb16_with_header.png": "16-bit RGB",
    "rgba_with_header.png": "8-bit RGBA",
    "text_file.png": "is no PNG",
    "truncated_header.png": "cut short",
    "truncated_idat.png": None,  # seen when the picture is decoded
    "truncated_signature.png": "ends after",
    "zero_bytes.png": "0 bytes",
}


def make_landmarks() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    ring = np.column_stack([np.cos(angle), np.sin(angle)]) * 60
    return (ring * np.linspace(0.4, 1, 68)[:, None] + 200).astype(np.float32)


def make_header(**changes) -> FaceHeader:
    pixels = np.arange(64 * 64, dtype=np.uint32).astype(np.uint8).tobytes()
    mask = StoredMask(zlib.compress(pixels), 64, "face", np.eye(3) * 1.25)
    source = {
        "alignments_version": 2.4,
        "original_filename": "fünf \"quoted\" 'and' \\ \x01 \u2028.png",
        "source_is_video": True,
        "note": None,
        "source_frame_dims": (720, 960),
    }
    values = {"masks": {"vgg-clear": mask}, "box": (-3, 4, 50, 60), "source": source} | changes
    return FaceHeader(make_landmarks(), **values)


def make_image(edge_px: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (edge_px, edge_px, 3), np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png_with(path, text: str | bytes, *, before: bytes = b"", compressed: bool = False):
    """A 64 px PNG with that text as its face header."""
    body = text.encode() if isinstance(text, str) else text
    flags = b"\1\0\0\0" if compressed else b"\0\0\0\0"
    header = chunk(b"iTXt", b"faceswap\0" + flags + (zlib.compress(body) if compressed else body))
    picture = cv2.imencode(".png", make_image())[1].tobytes()
    path.write_bytes(picture[:33] + before + header + picture[33:])
    return path


def literal_of(**changes) -> dict:
    alignments = {"x": 1, "y": 2, "w": 3, "h": 4, "landmarks_xy": make_landmarks().tolist()}
    return {"alignments": alignments | changes, "source": {}}


def reason_of(path) -> str:
    with pytest.raises(FaceFileError) as caught:
        read_header(path)
    reason = str(caught.value)
    assert "\n" not in reason
    assert str(path.parent) not in reason
    return reason


def test_written_face_reads_back(tmp_path):
    path, header, image = tmp_path / "face.png", make_header(), make_image()
    write_face(path, image, header)
    edge_px, found = read_header(path)
    assert edge_px == 64
    assert np.array_equal(found.landmarks_l2, header.landmarks_l2)
    assert found.landmarks_l2.dtype == np.float32
    assert found.box == header.box
    assert found.source == header.source | {"source_frame_dims": [720, 960]}
    assert np.array_equal(found.masks["vgg-clear"].affine_33, np.eye(3) * 1.25)
    assert found.masks["vgg-clear"].data == header.masks["vgg-clear"].data
    assert np.array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["face.png"]


def test_chunk_is_laid_out_as_the_format_says(tmp_path):
    write_face(tmp_path / "face.png", make_image(), make_header())
    content = (tmp_path / "face.png").read_bytes()
    length = int.from_bytes(content[33:37], "big")
    assert content[37:54] == b"iTXtfaceswap" + bytes(5)
    text = content[54 : 41 + length].decode("utf-8")
    assert int.from_bytes(content[41 + length : 45 + length], "big") == zlib.crc32(
        content[37 : 41 + length]
    )
    assert content[49 + length : 53 + length] == b"IDAT"
    written = ast.literal_eval(text)
    assert list(written) == ["alignments", "source"]
    assert list(written["alignments"]) == "x y w h landmarks_xy mask identity".split()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "face.png"
    write_face(path, make_image(), make_header())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("mien.core.faces.png.os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_face(path, make_image(96), make_header())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["face.png"]


def test_write_refuses_other_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"must be \(N, N, 3\) uint8, got \(64, 32, 3\)"):
        write_face(tmp_path / "face.png", make_image()[:, :32], make_header())


@pytest.mark.oracle
def test_literal_equals_python_on_oracle_headers(oracle_paths):
    for sample in oracle_paths("samples/*.png"):
        content = sample.read_bytes()
        start = content.index(b"iTXtfaceswap")
        length = int.from_bytes(content[start - 4 : start], "big")
        text = content[start + 17 : start + 4 + length].decode("utf-8")
        expected = ast.literal_eval(text)
        found = parse_literal(text)
        for name in expected["alignments"].pop("identity"):
            assert found["alignments"]["identity"].pop(name) == []
        found["alignments"].pop("identity")
        dims = expected["source"]["source_frame_dims"]
        expected["source"]["source_frame_dims"] = list(dims)
        assert found == expected, sample.name
        _, header = read_header(sample)
        for name, mask in header.masks.items():
            entry = expected["alignments"]["mask"][name]
            raw = zlib.decompress(entry["mask"])
            assert mask.pixels().tobytes() == raw
            assert np.array_equal(mask.affine_33[:2], np.array(entry["affine_matrix"])[:2])
            assert mask.affine_33[2].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, 1e-7, True, False, None], "b": (), "c": (1,), "d": ((1, 2), [3])},
        {"quotes": "it's", 'more "of" them': "'\"\\'", "end": "\\"},
        {"bytes": b"", "more": bytes(range(256)), "quotes": b"'\"\\'", "end": b"\\"},
        {"text": "Zoë 顔 😀 \t\n\r\x00\x7f\x85\u2028\ud800", "None": "True"},
        {"identity": {}, "list": ["identity", b"identity"]},
        {"identity": {"a": [0.5, -1e-9], "b": []}, "after": [1, 2]},
        ["True (not) [closed", "b'x'", b"b'x'"],
    ],
)
def test_literals_equal_python(value):
    def plain(entry):
        if isinstance(entry, dict):
            return {key: plain(item) for key, item in entry.items()}
        return [plain(item) for item in entry] if isinstance(entry, list | tuple) else entry

    expected = plain(value)
    if isinstance(expected, dict) and "after" in expected:
        expected["identity"] = {"a": [], "b": []}
    assert parse_literal(repr(value)) == expected


def test_random_bytes_equal_python():
    generator = random.Random(0)
    for _ in range(200):
        value = [generator.randbytes(generator.randrange(40)) for _ in range(3)]
        assert parse_literal(repr(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()",
        "{'a': open('x')}",
        "{'a': 1 + 1}",
        "{'a': x}",
        "{'a': [i for i in ()]}",
        "{'a': 'b' 'c'}",
        "{'a': f'{1}'}",
        "{'a': nan}",
        "{'a': inf}",
        "{'a': NaN}",
        "{'a': -Infinity}",
        "{'a': 1e}",
        "{'a': Truex}",
        "{'identity': {'a': [1.0, __import__('os')]}}",
        "{'identity': {'a': [1.0, x]}}",
        "{'a': '\\x00bytes'}",
        "{'\\x00bytes': 0}",
        "{'a': b'\\x4'}",
        "{'a': b'\u00e9'}",
        "{1: 2}",
        "{'a': {1, 2}}",
        "{'a': 1",
        "'a",
        "b'a\\'",
        "",
        "é",
        "[" * 17 + "]" * 17,
        "[" * 100_000,
        "[" + "0," * 1_000_001 + "0]",
        "1" * 5000,
        " " * (MAX_HEADER_BYTES + 1),
    ],
)
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(FaceFileError, match="its face header"):
        parse_literal(text)


@pytest.mark.timeout(120)
def test_hostile_text_takes_no_long_time():
    """Seconds, where each text would take hours if its length counted squared."""
    quarter = MAX_HEADER_BYTES // 4
    texts = ["'" + "\\'" * quarter, "'" + "\\" * quarter, "['" + "','" * quarter, "(" * quarter]
    texts.append("[" + "'\"'," * quarter)
    for text in texts:
        with pytest.raises(FaceFileError):
            parse_literal(text)


def test_nothing_is_run(tmp_path):
    mark = tmp_path / "ran"
    call = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    path = png_with(tmp_path / "face.png", f"{{'alignments': {call}, 'source': {{}}}}")
    assert "not a plain literal" in reason_of(path)
    assert not mark.exists()


def test_specimens_are_refused_with_their_reason(specimens):
    for name, path in specimens.items():
        expected = SPECIMENS.get(name, "")
        if expected is None:
            edge_px, header = read_header(path)
            assert (edge_px, edge_px) == struct.unpack(">II", path.read_bytes()[16:24])
            assert np.isfinite(header.landmarks_l2).all()
        elif expected:
            assert expected in reason_of(path), name


def test_tolerant_of_what_older_files_lack(tmp_path):
    value = literal_of(extra=[1])
    for key in "xywh":
        del value["alignments"][key]
    del value["source"]
    _, header = read_header(png_with(tmp_path / "face.png", repr(value)))
    landmarks = make_landmarks()
    assert header.masks == {}
    assert header.source == {}
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    assert header.box == tuple(round(float(v)) for v in (*low, *(high - low)))


def test_other_chunks_and_compressed_text_are_read(tmp_path):
    other = chunk(b"iTXt", b"Comment\0\0\0\0\0faceswap\0") + chunk(b"tEXt", b"faceswap\0\0\0\0\0{}")
    text = repr(literal_of())
    for compressed in (False, True):
        path = png_with(tmp_path / "face.png", text, before=other, compressed=compressed)
        assert read_header(path)[1].box == (1, 2, 3, 4)


def test_only_what_lies_before_the_picture_is_read(tmp_path):
    path = tmp_path / "face.png"
    write_face(path, make_image(), make_header())
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"IDAT") + 4])
    assert read_header(path)[0] == 64


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({}, "no data for mask 'm'"),
        (None, "no data for mask 'm'"),
        ({"mask": "text"}, "no data for mask 'm'"),
        ({"stored_size": 5000}, "stored_size is not 1 to 4096 px"),
        ({"stored_size": 64.0}, "stored_size is not 1 to 4096 px"),
        ({"stored_centering": "nose"}, "stored_centering is none of"),
        ({"affine_matrix": None}, "not all numbers"),
        ({"affine_matrix": [[1.0, 0.0], [0.0, 1.0]]}, "affine_matrix is not 3 x 3"),
    ],
)
def test_a_mask_is_refused_where_it_is_asked_for(tmp_path, entry, reason):
    """One that nobody asks for makes no face unusable."""
    good = {
        "mask": zlib.compress(bytes(64 * 64)),
        "stored_size": 64,
        "stored_centering": "face",
        "affine_matrix": np.eye(3).tolist(),
    }
    odd = good | entry if entry else entry
    path = png_with(tmp_path / "face.png", repr(literal_of(mask={"m": odd, "good": good})))
    _, header = read_header(path)
    assert named_mask(header, "good").size_px == 64
    with pytest.raises(FaceFileError, match=re.escape(reason)):
        named_mask(header, "m")
    write_face(path, make_image(), header)
    assert list(read_header(path)[1].masks) == ["good"]


def test_a_mask_without_a_centering_is_one_of_the_face(tmp_path):
    entry = {
        "mask": zlib.compress(bytes(64 * 64)),
        "stored_size": 64,
        "affine_matrix": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
    }
    for more in ({}, {"stored_centering": None}):
        path = png_with(tmp_path / "face.png", repr(literal_of(mask={"m": entry | more})))
        assert named_mask(read_header(path)[1], "m").centering == "face"


@pytest.mark.parametrize("masks", [None, [1], "text", {"m" * 65: {}}, {"a\x1b[1m\n": {}}])
def test_what_are_no_masks_makes_no_face_unusable(tmp_path, masks):
    _, header = read_header(png_with(tmp_path / "face.png", repr(literal_of(mask=masks))))
    assert header.masks == {}


def test_no_more_masks_are_read_than_a_file_can_need(tmp_path):
    many = {f"m{number}": {} for number in range(9_000)}
    _, header = read_header(png_with(tmp_path / "face.png", repr(literal_of(mask=many))))
    assert len(header.masks) == 64
    with pytest.raises(FaceFileError) as caught:
        named_mask(header, "vgg-clear")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"x": "1"},
        {"x": 1e7},
        {"w": None},
        {"h": [1]},
        {"x": 10**400},
    ],
)
def test_a_box_that_cannot_be_is_the_one_round_the_landmarks(tmp_path, changes):
    _, header = read_header(png_with(tmp_path / "face.png", repr(literal_of(**changes))))
    low, high = header.landmarks_l2.min(axis=0), header.landmarks_l2.max(axis=0)
    assert header.box == tuple(round(float(v)) for v in (*low, *(high - low)))


@pytest.mark.parametrize(
    ("value", "version"),
    [
        (2.4, 2.4),
        (1, 1.0),
        ("1.0", 1.0),
        (None, None),
    ],
)
def test_version_of_the_extraction(tmp_path, value, version):
    text = repr(literal_of() | {"source": {"alignments_version": value}})
    assert read_header(png_with(tmp_path / "face.png", text))[1].version == version


@pytest.mark.parametrize("source", [None, [1], "text"])
def test_a_source_that_is_none_makes_no_face_unusable(tmp_path, source):
    text = repr(literal_of() | {"source": source})
    header = read_header(png_with(tmp_path / "face.png", text))[1]
    assert (header.source, header.version) == ({}, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'x': np.int64(112), 'y': np.int32(-3)}", {"x": 112, "y": -3}),
        ("[np.float32(1.5), np.float64(-2e-07), np.float16(3.0)]", [1.5, -2e-07, 3.0]),
        ("[np.uint8(255), np.int8(-1), np.int16(2), np.uint64(9)]", [255, -1, 2, 9]),
        ("{'a': np.True_, 'b': (np.False_, True)}", {"a": True, "b": [False, True]}),
        (
            "['np.int64(1)', \"np.True_\", b'np.int64(1)']",
            ["np.int64(1)", "np.True_", b"np.int64(1)"],
        ),
        ("{'identity': {'v': [np.float32(0.5)]}}", {"identity": {"v": []}}),
    ],
)
def test_scalars_of_numpy_are_read_as_plain_ones(text, value):
    assert parse_literal(text) == value


def test_the_scalars_above_are_what_numpy_writes():
    values = {"x": np.int64(112), "z": [np.float32(1.5), np.float64(-2e-07)], "b": np.True_}
    assert parse_literal(repr(values)) == {"x": 112, "z": [1.5, -2e-07], "b": True}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{'a': np.float64(nan)}", "not finite"),
        ("{'a': np.float32(inf)}", "not finite"),
        ("{'a': array([1., 2.])}", "written by NumPy"),
        ("{'a': np.str_('x')}", "written by NumPy"),
        ("{'a': np.int64(np.int64(1))}", "written by NumPy"),
        ("{'a': np.int64(1 + 1)}", "written by NumPy"),
        ("{'a': np.load('x')}", "written by NumPy"),
        ("{'a': np.int64(x)}", "literal"),
        ("{'a': xnp.int64(1)}", "literal"),
        ("{'a': np.int640(1)}", "written by NumPy"),
    ],
)
def test_what_else_numpy_writes_is_refused_by_name(text, reason):
    with pytest.raises(FaceFileError, match=reason):
        parse_literal(text)


def test_a_text_cut_at_its_bound_is_called_too_long(tmp_path):
    path = png_with(tmp_path / "face.png", "é" * MAX_HEADER_BYTES, compressed=True)
    assert "longer than 16 MiB" in reason_of(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"landmarks_xy": None}, "no landmarks"),
        ({"landmarks_xy": [[1.0, 2.0]] * 67 + [[1.0]]}, "unequal lengths"),
        ({"landmarks_xy": [["1", "2"]] * 68}, "not all numbers"),
        ({"landmarks_xy": [[True, False]] * 68}, "not all numbers"),
        ({"landmarks_xy": [[10**400, 1]] * 68}, "not all numbers"),
        ({"landmarks_xy": 5}, "0 landmarks"),
        ({"landmarks_xy": [[float(i), 2.0 * i] for i in range(68)]}, "on one line"),
    ],
)
def test_entries_of_the_wrong_kind_are_named(tmp_path, change, reason):
    assert reason in reason_of(png_with(tmp_path / "face.png", repr(literal_of(**change))))


def test_infinite_landmark_is_refused(tmp_path):
    text = repr(literal_of()).replace("[[", "[[1e999, 0.0], [", 1)
    assert "finite" in reason_of(png_with(tmp_path / "face.png", text))


def test_bad_text_and_missing_file_are_refused(tmp_path):
    assert "no text" in reason_of(png_with(tmp_path / "a.png", b"\xff\xfe"))
    assert "16 MiB" in reason_of(png_with(tmp_path / "c.png", b" " * (MAX_HEADER_BYTES * 2)))
    assert "No such file" in reason_of(tmp_path / "none.png")
    (tmp_path / "d.png").write_bytes(SIGNATURE + chunk(b"IDAT", bytes(13)))
    assert "IHDR" in reason_of(tmp_path / "d.png")


def test_compressed_text_is_bounded(tmp_path):
    path = png_with(tmp_path / "face.png", b" " * (MAX_HEADER_BYTES * 8), compressed=True)
    tracemalloc.start()
    try:
        assert "16 MiB" in reason_of(path)
        assert tracemalloc.get_traced_memory()[1] < MAX_HEADER_BYTES * 5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cut_at", [8, 20, 33, 37, 41, 60])
def test_every_cut_is_named(tmp_path, cut_at):
    path = tmp_path / "face.png"
    write_face(path, make_image(), make_header())
    path.write_bytes(path.read_bytes()[:cut_at])
    assert "cut short" in reason_of(path)


def test_random_damage_never_escapes(tmp_path):
    path = tmp_path / "face.png"
    write_face(path, make_image(), make_header())
    content = path.read_bytes()
    end = content.index(b"IDAT")
    generator = random.Random(0)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(end)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except FaceFileError:
            num_refused += 1
    assert num_refused > 30


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_random_damage_of_the_text_never_escapes(tmp_path):
    text = repr(literal_of(mask={"m": {"mask": b"x'y\"\x00", "stored_size": 1}}))
    generator = random.Random(0)
    num_refused = 0
    for _ in range(1000):
        damaged = list(text)
        damaged[generator.randrange(len(damaged))] = generator.choice("'\"\\b()[]{},:eE1 \x00é")
        try:
            json.dumps(parse_literal("".join(damaged)), default=repr)
        except FaceFileError:
            num_refused += 1
    assert num_refused > 300


def stored(data: bytes, size_px: int) -> StoredMask:
    return StoredMask(data, size_px, "face", np.eye(3))


def test_mask_pixels_are_bounded():
    assert stored(zlib.compress(bytes(range(16))), 4).pixels().tolist()[1] == [4, 5, 6, 7]
    bomb = zlib.compress(bytes(200_000_000))
    tracemalloc.start()
    with pytest.raises(FaceFileError, match="holds more pixels"):
        stored(bomb, 128).pixels()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1_000_000
    with pytest.raises(FaceFileError, match="holds fewer pixels"):
        stored(zlib.compress(bytes(15)), 4).pixels()
    with pytest.raises(FaceFileError, match="no zlib data"):
        stored(b"not zlib", 4).pixels()
    with pytest.raises(FaceFileError, match="1 to 4096 px"):
        stored(bomb, 100_000).pixels()
