"""Headers of faces by libmien: what it reads is what the reader in Python reads, and no more."""

import random

import numpy as np
import pytest
from test_faces_png import make_header, make_landmarks, png_with

from mien.core.faces import png
from mien.core.faces.png import FaceFileError, read_header, read_placement
from mien.core.faces.usual_header import read_usual
from mien.kernels import native

MASK = {
    "mask": bytes(range(256)),
    "affine_matrix": np.eye(3).tolist(),
    "interpolator": 1,
    "stored_size": 64,
    "stored_centering": "face",
}
SOURCE = {
    "alignments_version": 2.4,
    "original_filename": "fünf \"quoted\" 'and' 顔.png",
    "face_index": 0,
    "source_is_video": True,
    "source_frame_dims": (720, 960),
    "note": None,
}


def content(**changes) -> dict:
    """A header as extraction writes it, with changes to its alignments."""
    alignments = {
        **{"x": -3, "y": 4, "w": 50, "h": 60},
        "landmarks_xy": make_landmarks().tolist(),
        "mask": {"components": MASK, "vgg-clear": MASK},
        "identity": {"vggface2": [0.5, -1e-9, 1e05]},
    }
    return {"alignments": alignments | changes, "source": SOURCE}


def by_python(text: str) -> tuple[np.ndarray, float | None]:
    header = png._header_of(text)
    return header.landmarks_l2, header.version


def assert_agrees(text: str) -> bool:
    """Whether libmien has read the text; then the reader in Python reads the same."""
    usual = read_usual(text.encode())
    if usual is None:
        return False
    landmarks_l2, version = by_python(text)
    assert usual[0].dtype == landmarks_l2.dtype
    # Their bits: to a comparison of numbers, zero has no sign.
    np.testing.assert_array_equal(usual[0].view(np.uint32), landmarks_l2.view(np.uint32))
    assert repr(usual[1]) == repr(version)
    return True


def landmarks(change) -> str:
    """A header whose landmarks are those of `make_landmarks` as a function leaves them."""
    points = make_landmarks().astype(np.float64)
    change(points)
    return repr(content(landmarks_xy=points.tolist()))


def put_far(points, spreads: float) -> None:
    """Move the first landmark so many spreads of the others away, of which 10 are too many."""
    centre = points[17:].mean(axis=0)
    points[0] = centre + (spreads * np.linalg.norm(points[17:] - centre), 0)


def test_what_extraction_writes_is_read(oracle_paths):
    for sample in oracle_paths("samples/*.png"):
        assert assert_agrees(png._read_text(sample)[1]), sample.name


def test_real_faces_are_read(faces_dir):
    for path in sorted(faces_dir.rglob("*.png")):
        if "bad" not in path.parts:
            assert assert_agrees(png._read_text(path)[1]), path.name


def read_by(read, path) -> object:
    """What a function reads of a file, or its reason not to."""
    try:
        return read(path)
    except FaceFileError as error:
        return str(error)


def test_broken_specimens_are_what_the_reader_in_python_says(specimens):
    for name, path in specimens.items():
        found, expected = read_by(read_placement, path), read_by(read_header, path)
        if isinstance(expected, str):
            assert found == expected, name
            continue
        edge_px, header = expected
        assert (found.edge_px, found.version) == (edge_px, header.version), name
        np.testing.assert_array_equal(found.landmarks_l2, header.landmarks_l2)


@pytest.mark.parametrize(
    "text",
    [
        repr(content()),
        repr({"source": SOURCE, **content()}),
        repr({"alignments": content()["alignments"]}),
        repr(content(mask={}, identity={})),
        repr(content() | {"source": {}}),
        repr(content() | {"source": {"alignments_version": 2}}),
        repr(content() | {"source": {"alignments_version": None}}),
        repr(content() | {"more": [(), [], {}, (1, 2), -0.5e-3, "\\", "'", b"\\'\r\n\t\0"]}),
        repr(content() | {"source": {"original_filename": "C:\\faces\\it's.png"}}),
        repr(content() | {"deep": [[[[[[[[[[[[[[[]]]]]]]]]]]]]]]}),
        landmarks(lambda points: np.rint(points, out=points)),
        repr(content(landmarks_xy=np.rint(make_landmarks()).astype(int).tolist())),
        repr(content(landmarks_xy=[[np.float32(x), np.float64(y)] for x, y in make_landmarks()])),
        "  " + repr(content()).replace(", ", "  ,  ") + " ",
        repr(content() | {"source": {"alignments_version": "ZERO"}}).replace("'ZERO'", "-0"),
        repr(content() | {"source": {"alignments_version": -0.0}}),
        repr(content(landmarks_xy=[["ZERO", -0.0], *make_landmarks().tolist()[1:]])).replace(
            "'ZERO'", "-0"
        ),
        repr(content()).replace("-3", "np.float32(-3e+02)"),
        repr(content()).replace("-3", "-3E2"),
    ],
)
def test_usual_texts_are_read(text):
    assert assert_agrees(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        repr(content())[:-1],
        repr(content()) + "}",
        repr(content()).replace("'alignments'", "alignments"),
        repr(content()).replace("True", "Truer"),
        repr(content()).replace("-3", "--3"),
        repr(content()).replace("-3", "+3"),
        repr(content()).replace("-3", "03"),
        repr(content()).replace("-3", "3."),
        repr(content()).replace("-3", "1e999"),
        repr(content()).replace("-3", "nan"),
        repr(content()).replace("-3", "np.float64(3E2)"),
        repr(content()).replace("-3", "np.float64(3"),
        repr(content()).replace("-3", "np.uint8(3)"),
        repr(content()).replace("'x'", "'\\\0'"),
        repr(content()).replace("'face'", "'\0bytes'"),
        repr(content()).replace("b'\\x00", "b'\\\0"),
        repr(content()).replace("-3", "__import__('os')"),
        repr(content()).replace("'x'", "b'x'"),
        repr(content()).replace("(720, 960)", "(720, 960]"),
        repr(content()).replace("(720, 960)", "(720,)"),
        repr(content()).replace("b'\\x00", "b'\\x0"),
        repr(content()).replace("b'\\x00", "b'é"),
        repr(content()).replace("b'\\x00", "'\\x00bytes', b'"),
        repr(content()).replace("'y'", "'landmarks_xy'"),
        repr(content())[:-1] + ", 'alignments': {}}",
        repr(content())[:-1] + ", 'source': {}}",
        repr(content())[:-2] + ", 'alignments_version': 1.5}}",
        repr(content()) + repr(content()),
        repr(content() | {"deep": [[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]}),
        repr(content() | {"many": [0] * 60_000}),
        repr(content() | {"source": {"alignments_version": "2.4"}}),
        repr(content() | {"source": {"alignments_version": True}}),
        repr(content() | {"source": []}),
        repr(content(landmarks_xy=make_landmarks()[:67].tolist())),
        repr(content(landmarks_xy=[*make_landmarks().tolist(), [1.0, 2.0]])),
        repr(content(landmarks_xy=[[*point, 0.0] for point in make_landmarks().tolist()])),
        repr(content(landmarks_xy=[point[:1] for point in make_landmarks().tolist()])),
        repr(content(landmarks_xy=make_landmarks().ravel().tolist())),
        repr(content(landmarks_xy=[])),
        repr(content(landmarks_xy=None)),
        landmarks(lambda points: points.fill(3.0)),
        landmarks(lambda points: points[:, 1].fill(3.0)),
        landmarks(lambda points: np.multiply(points, 1e-4, out=points)),
        landmarks(lambda points: np.multiply(points, 1e5, out=points)),
        landmarks(lambda points: points[:1].fill(1e5)),
        landmarks(lambda points: np.add(points, 999_999.5 - points.max(), out=points)),
        landmarks(lambda points: put_far(points, 9.95)),
    ],
)
def test_all_else_is_left_to_the_reader_in_python(text):
    assert read_usual(text.encode()) is None


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_damaged_texts_are_read_alike_or_left():
    """One character, or a piece, put in, taken out or moved: 4,000 times."""
    texts = [repr(content()), repr(content(landmarks_xy=make_landmarks().astype(int).tolist()))]
    pieces = [*"'\"\\b()[]{},:eE1.- \0\né", "True", "np.float32(", "\\x", "'source'", "nan", "0x1"]
    generator = random.Random(0)
    num_read = 0
    for number in range(4000):
        text = texts[number % 2]
        at, to = sorted(generator.choices(range(len(text)), k=2))
        cut = at + generator.choice((0, 1, 2))
        piece = generator.choice([*pieces, text[to : to + 5]])
        num_read += assert_agrees(text[:at] + piece + text[cut:])
    assert 200 < num_read < 3800


def test_no_byte_behind_a_cut_text_is_read(at_end_of_memory):
    """Cut everywhere: no word, number or escape is looked for beyond the end."""
    text = b"{'a': [1, -0.5e-3, np.float64(2.5), True, None, (), b'\\x01\\'', 'it\\'s'], \"b\": {}}"
    ffi, lib = native.library()
    landmarks_l2 = ffi.new("float[]", 2 * lib.MIEN_LANDMARKS)
    for end in range(len(text) + 1):
        rooms = {
            "text": ffi.cast("char *", at_end_of_memory(text[:end])),
            "landmarks": landmarks_l2,
        }
        job = ffi.new("mien_face_header_job *", rooms | {"num_bytes": end})
        native.call("face_header_cpu", job)
        assert not job.is_usual


def test_a_header_in_another_form_has_its_place_all_the_same(tmp_path):
    value = content() | {"source": {"alignments_version": "2.4"}}
    path = png_with(tmp_path / "face.png", repr(value), compressed=True)
    edge_px, landmarks_l2, version = read_placement(path)
    assert (edge_px, version) == (64, 2.4)
    np.testing.assert_array_equal(landmarks_l2, make_landmarks())


def test_what_mien_writes_is_read(tmp_path):
    path = tmp_path / "face.png"
    header = make_header(source=SOURCE)
    png.write_face(path, np.zeros((64, 64, 3), np.uint8), header)
    assert assert_agrees(png._read_text(path)[1])
