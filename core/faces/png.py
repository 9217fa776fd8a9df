"""The face PNG: a square picture with one text chunk that says where the face was found.

The chunk is an `iTXt` named `faceswap` before the first `IDAT`; its text is a Python literal, not
JSON. It is read here without evaluating anything: one pass turns strings and bytes into JSON
strings and references, brackets are counted, and the C JSON decoder does the rest. Numbers that
NumPy wrote as `np.float32(1.5)` are taken for what they hold. Whatever else it does not know
(names, calls, nan) is refused, as is anything beyond the limits below. Where only the landmarks are
wanted, libmien reads the usual texts, and this reader what it leaves.

Letters: 68 landmarks, l = landmark, 2 = (x, y) in px of the source frame.
"""

import errno
import json
import math
import os
import re
import struct
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import cv2
import numpy as np

from ..system.durable_files import discard, open_plain, temporary_name
from ..system.image_text import png_chunk
from ..system.printable import plural
from .usual_header import read_usual

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"faceswap"
NUM_LANDMARKS = 68
CENTERING_NAMES = ("face", "head", "legacy")
AS_PICTURE = "picture"
"""Centering of a mask that lies over the picture as it is, wherever the face is in it."""

# Smaller pictures show no face to learn, larger ones are no face of any film. Chosen.
MIN_EDGE_PX = 32
MAX_EDGE_PX = 16384
MAX_MASK_PX = 4096
# A usual header has 20 KB; all of these bound a stranger's file.
MAX_HEADER_BYTES = 16 * 1024**2
MAX_DEPTH = 16
MAX_ITEMS = 100_000
MAX_COORDINATE_PX = 1_000_000.0
MAX_CHUNKS = 1000
MAX_MASKS = 64
MAX_NAME_LENGTH = 64
MAX_SPREAD = 10.0
FIRST_HEAD_VERSION = 2.0
"""Alignments version from which on extraction centres the picture on the head."""

_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_OTHER_FORMATS = {
    b"\xff\xd8\xff": "a JPEG",
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"RIFF": "a WebP",
    b"II*\x00": "a TIFF",
    b"MM\x00*": "a TIFF",
}
_VERSION = "alignments_version"
_AGAIN = "extract the face again"
_CUT_SHORT = "the file is cut short: copy it or extract the face again"

_NOT_BRACKETS = bytes(code for code in range(256) if code not in b"[]{}()")
_OF_NUMBERS = b"0123456789+-.e, "
_LAST_COMMA = re.compile(r",\s*(?=[\])}])")
_PLAIN_TEXT = re.compile(r'[^"\\\x00-\x1f]*\Z')
_BYTES_KEY = "\x00bytes"
_NUMPY_SCALAR = re.compile(
    r"\bnp\.(?:(True|False)_|(?:u?int(?:8|16|32|64)|float(?:16|32|64))\(([-+.0-9a-z]+)\))"
)
_NOT_FINITE = re.compile(r"[\[(, -](?:nan|inf|NaN|Infinity)[\]), }]")
_NO_TEXT = "is no text"
_TOO_LONG = f"is longer than {MAX_HEADER_BYTES // 1024**2} MiB"
_NUMPY = re.compile(r"\b(?:np|numpy)\.|\barray\(")
_BY_NUMPY = "was written by NumPy, with arrays or numbers that are no plain literal"
_NO_LITERAL = "is damaged or not a plain literal"


# One at a time: a hostile header takes 100 MB while it is parsed, and Python's lock lets no two
# be parsed at once anyway.
_parsing = threading.Lock()


class FaceFileError(ValueError):
    """Reason that a file cannot be used as a face, in one line without its path."""

    def alone(self) -> "FaceFileError":
        """The same, to be kept: without the frames that it was raised in, which hold the file."""
        return type(self)(*self.args)


class NotExtractedError(FaceFileError):
    """Reason that a file is none that extraction wrote."""


@dataclass
class StoredMask:
    """One mask of a header, still compressed.

    centering: what it covers, or AS_PICTURE. affine_33: maps px of the source frame, or of the
    picture that the landmarks are in, to px of the mask, float64.
    """

    data: bytes
    size_px: int
    centering: str
    affine_33: np.ndarray

    def pixels(self) -> np.ndarray:
        """The mask, (size_px, size_px) uint8: 0 is outside, 255 inside.

        Raises FaceFileError where the data do not hold exactly that many pixels.
        """
        if not 0 < self.size_px <= MAX_MASK_PX:
            raise FaceFileError(f"mask edge must be 1 to {MAX_MASK_PX} px, got {self.size_px}")
        num_pixels = self.size_px**2
        decoder = zlib.decompressobj()
        try:
            # One byte more than belongs there shows a stream that goes on; the rest stays packed.
            raw = decoder.decompress(self.data, num_pixels + 1)
        except zlib.error:
            raise FaceFileError(f"a stored mask is damaged (no zlib data): {_AGAIN}") from None
        if len(raw) != num_pixels:
            raise FaceFileError(
                f"a stored mask of {self.size_px} x {self.size_px} px holds "
                f"{'more' if len(raw) > num_pixels else 'fewer'} pixels: {_AGAIN}"
            )
        return np.frombuffer(raw, np.uint8).reshape(self.size_px, self.size_px)


@dataclass
class FaceHeader:
    """What extraction wrote into a face PNG.

    landmarks_l2: (68, 2) float32, px of the source frame. masks: by name; of one that cannot be
    used, why. box: detector's left, top, width, height in the same px. source: where the face came
    from, as written.
    """

    landmarks_l2: np.ndarray
    masks: Mapping[str, StoredMask | str] = field(default_factory=dict)
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> float | None:
        """Alignments version of the extraction; None where the file tells none."""
        return _version_in(self.source)


class Placement(NamedTuple):
    """Place of a face in its PNG: what of the header training needs.

    landmarks_l2: (68, 2) float32, px of the source frame. version: of the alignments; None where
    the file tells none.
    """

    edge_px: int
    landmarks_l2: np.ndarray
    version: float | None


def _version_in(source: dict[str, Any]) -> float | None:
    value = source.get(_VERSION)
    # To Python a bool is an int, and True would pass for version 1.0.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        version = float(value)
    except (ValueError, OverflowError):
        return None
    return version if math.isfinite(version) else None


def unreadable(error: OSError) -> ValueError:
    """The reason that a face could not be read; no `FaceFileError` where it is not the face's."""
    if error.errno in (errno.EMFILE, errno.ENFILE):  # to leave faces out would train on others
        return ValueError(
            "too many files are open to read the faces: raise the limit (`ulimit -n 4096`)"
        )
    return FaceFileError(f"cannot be read: {error.strerror or error}")


def read_header(path: str | os.PathLike[str]) -> tuple[int, FaceHeader]:
    """Edge of the picture in px, and its header. Nothing beyond the first `IDAT` is read.

    Raises FaceFileError with the reason and the remedy where the file is no usable face.
    """
    edge_px, text = _read_text(path)
    return edge_px, _header_of(text)


def read_placement(path: str | os.PathLike[str]) -> Placement:
    """What of the header training needs, in a tenth of the time; errors as of `read_header`."""
    edge_px, text = _read_text(path)
    usual = read_usual(text.encode())
    if usual is not None:
        return Placement(edge_px, *usual)
    header = _header_of(text)
    return Placement(edge_px, header.landmarks_l2, header.version)


def _read_text(path: str | os.PathLike[str]) -> tuple[int, str]:
    """Edge of the picture in px, and the text of its header."""
    try:
        opener = partial(open_plain, follows_links=True)
        # A usual header comes with one read of so many bytes.
        with open(path, "rb", buffering=65536, opener=opener) as file:
            return _read_edge(file), _text_of(_find_text(file))
    except OSError as error:
        raise unreadable(error) from None


def _header_of(text: str) -> FaceHeader:
    # Only the parsing: reading the files goes on side by side.
    with _parsing:
        return _header_from(parse_literal(text))


def encode_face(image_bgr: np.ndarray, header: FaceHeader) -> bytes:
    """The content of a face PNG.

    image_bgr: (N, N, 3) uint8, head-centred crop.
    """
    edge_px = image_bgr.shape[0]
    if image_bgr.shape != (edge_px, edge_px, 3) or image_bgr.dtype != np.uint8:
        raise ValueError(
            f"image_bgr must be (N, N, 3) uint8, got {image_bgr.shape} {image_bgr.dtype}"
        )
    # By OpenCV, as extraction does: the files that mien writes are like those it reads.
    encoded, picture = cv2.imencode(".png", image_bgr)
    if not encoded:
        raise RuntimeError(f"OpenCV could not encode a picture of {edge_px} px as PNG")
    return insert_header(picture.tobytes(), header)


def write_face(path: str | os.PathLike[str], image_bgr: np.ndarray, header: FaceHeader) -> None:
    """Write a face PNG, whole or not at all.

    image_bgr: (N, N, 3) uint8, head-centred crop.
    """
    content, path = encode_face(image_bgr, header), Path(path)
    # In the same folder, since a name can be moved to no other disk in one step.
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        discard(temporary)


def insert_header(png: bytes, header: FaceHeader) -> bytes:
    """The PNG with the header before its first `IDAT`; any header it had is replaced."""
    # A Python literal, which is what faceswap reads (`ast.literal_eval`), not JSON.
    text = repr(_as_dict(header)).encode("utf-8")
    # Five zeros: end of the keyword, not compressed, and no language nor translation.
    chunk = png_chunk(b"iTXt", KEYWORD + bytes(5) + text)
    parts = [SIGNATURE]
    position = len(SIGNATURE)
    while True:
        length, kind = struct.unpack_from(">I4s", png, position)
        end = position + 12 + length
        # faceswap looks for the header before the picture, and nowhere else.
        if kind == b"IDAT":
            return b"".join([*parts, chunk, png[position:]])
        if not (kind == b"iTXt" and png[position + 8 :].startswith(KEYWORD + b"\0")):
            parts.append(png[position:end])
        position = end


def max_file_bytes(edge_px: int) -> int:
    """Bytes that no face of that edge can exceed: its pixels unpacked and as many again, two
    headers and some."""
    return 2 * 3 * edge_px**2 + 3 * MAX_HEADER_BYTES


def edge_of(png: bytes | np.ndarray) -> int | None:
    """Edge in px that the start of a PNG tells, None where it is no square one."""
    start = bytes(png[:24])
    if len(start) < 24 or not start.startswith(SIGNATURE):
        return None
    width, height = struct.unpack(">II", start[16:])
    return width if width == height else None


def is_complete(png: bytes | memoryview) -> bool:
    """Whether every chunk up to `IEND` is there: decoders print of their own where one is cut."""
    position = len(SIGNATURE)
    while position + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        position += 12 + length
        if kind == b"IEND":
            return position <= len(png)
    return False


def parse_literal(text: str) -> Any:
    """The value of a Python literal of dicts, lists, tuples, text, bytes, numbers, True/False/None.

    Tuples come back as lists, NumPy's scalars as plain ones; the names true, false and null of JSON
    are understood as well. Lists of numbers in a dictionary 'identity' come back empty: training
    has no use for embeddings, and they take as long to read as all the rest. Nothing is evaluated.
    Raises FaceFileError for anything else, and for a literal that is too large or too deep.
    """
    if len(text) > MAX_HEADER_BYTES:
        _refuse(_TOO_LONG)
    plain, quoted = _split(text)
    plain = [_NUMPY_SCALAR.sub(r"\1\2", piece) if "np." in piece else piece for piece in plain]
    # Before anything is decoded: what is refused has cost one pass over its text.
    _check_size(plain)
    _leave_out_identity(plain, quoted)
    stored: list[bytes] = []
    pieces: list[str] = [""] * (len(plain) + len(quoted))
    pieces[0::2] = [_plain_to_json(piece) for piece in plain]
    # Strings apart from the rest, so that a bracket or a name inside of one changes nothing.
    pieces[1::2] = [_string_to_json(piece, stored) for piece in quoted]

    def restore(entries: dict[str, Any]) -> Any:
        return stored[entries[_BYTES_KEY]] if _BYTES_KEY in entries else entries

    try:
        return json.loads("".join(pieces), object_hook=restore, parse_constant=_no_number)
    except ValueError:
        if _NOT_FINITE.search(" ".join(plain)):
            _refuse("holds a number that is not finite")
        if _NUMPY.search(" ".join(plain)):
            _refuse(_BY_NUMPY, "have its writer turn them into plain numbers and lists (.tolist())")
        _refuse(_NO_LITERAL)


def _split(text: str) -> tuple[list[str], list[str]]:
    """The text between the quoted literals, and those (quotes and the b of bytes included)."""
    plain: list[str] = []
    quoted: list[str] = []
    position = 0
    single, double = text.find("'"), text.find('"')
    while single >= 0 or double >= 0:
        start = min(single, double) if single >= 0 and double >= 0 else max(single, double)
        quote = text[start]
        end = text.find(quote, start + 1)
        while end > 0 and text[end - 1] == "\\" and _is_escaped(text, end):
            end = text.find(quote, end + 1)
        if end < 0:
            _refuse("ends inside a string")
        # Its prefix, which would else be left over as a name.
        if start > position and text[start - 1] == "b":
            start -= 1
        plain.append(text[position:start])
        quoted.append(text[start : end + 1])
        position = end + 1
        # Searched on only where it was passed: each quote of the text is looked for once.
        if 0 <= single < position:
            single = text.find("'", position)
        if 0 <= double < position:
            double = text.find('"', position)
        if len(quoted) > MAX_ITEMS:
            _refuse(f"has more than {MAX_ITEMS} entries")
    plain.append(text[position:])
    return plain, quoted


def _is_escaped(text: str, position: int) -> bool:
    """Whether an odd number of backslashes stands before a position."""
    start = position
    while text[start - 1] == "\\":
        start -= 1
    return (position - start) % 2 == 1


def _check_size(plain: list[str]) -> None:
    try:
        joined = "".join(plain).encode("ascii")
    except UnicodeEncodeError:
        _refuse(_NO_LITERAL)
    if joined.count(b",") > MAX_ITEMS:
        _refuse(f"has more than {MAX_ITEMS} entries")
    # The decoder of JSON recurses: here its limit is met in a line.
    depth = 0
    for bracket in joined.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{(" else -1
        if depth > MAX_DEPTH:
            _refuse(f"is nested deeper than {MAX_DEPTH}")


def _leave_out_identity(plain: list[str], quoted: list[str]) -> None:
    """Empty the lists of numbers of an embedding: {'identity': {name: [number, ...]}}."""
    for index, literal in enumerate(quoted[:-1]):
        if literal[1:-1] != "identity" or plain[index + 1] != ": {":
            continue
        # Up to its closing bracket: one entry for each network that has looked at the face.
        for later in range(index + 2, len(plain)):
            piece = plain[later]
            end = piece.find("]")
            if not piece.startswith(": [") or end < 0:
                break
            # Only what is nothing but numbers, so that no fault of the text is hidden by this.
            if not piece[3:end].encode("ascii").translate(None, _OF_NUMBERS):
                plain[later] = ": [" + piece[end:]
            if "}" in piece:
                break


def _plain_to_json(piece: str) -> str:
    """What lies between two strings: brackets, commas, numbers and names."""
    if "(" in piece or ")" in piece:
        # JSON knows no tuples, nor a comma behind the last entry, as `(1,)` has.
        piece = _LAST_COMMA.sub("", piece).replace("(", "[").replace(")", "]")
    return piece.replace("True", "true").replace("False", "false").replace("None", "null")


def _string_to_json(literal: str, stored: list[bytes]) -> str:
    """The JSON of one quoted literal; bytes are put into ``stored`` and referred to."""
    try:
        if literal[0] == "b":
            body = literal[2:-1].encode("ascii")
            stored.append(body.decode("unicode_escape").encode("latin-1"))
            return f'{{"\\u0000bytes": {len(stored) - 1}}}'
        value = literal[1:-1]
        if "\\" in value:
            value = value.encode("ascii", "backslashreplace").decode("unicode_escape")
    except UnicodeError:
        _refuse("holds a string that cannot be decoded")
    # Else a stranger's dictionary could stand for the bytes of another entry.
    if value == _BYTES_KEY:
        _refuse("holds a reserved name")
    return f'"{value}"' if _PLAIN_TEXT.match(value) else json.dumps(value)


def _refuse(what: str, remedy: str = _AGAIN) -> NoReturn:
    raise FaceFileError(f"its face header {what}: {remedy}")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not finite")


def _ends_after(num_bytes: int) -> str:
    return f"ends after {num_bytes} {plural(num_bytes, 'byte')}: {_CUT_SHORT}"


def _read_edge(file: BinaryIO) -> int:
    """Edge in px, from the signature and the `IHDR` chunk."""
    start = file.read(33)
    if not start:
        raise FaceFileError(f"is empty (0 bytes): copy it again or {_AGAIN}")
    if not start.startswith(SIGNATURE):
        if SIGNATURE.startswith(start):
            raise FaceFileError(_ends_after(len(start)))
        kind = next((n for magic, n in _OTHER_FORMATS.items() if start.startswith(magic)), None)
        found = f"is no PNG but {kind}" if kind else "is no PNG"
        raise NotExtractedError(f"{found}: only PNGs that extraction wrote can be used")
    if len(start) < 33:
        raise FaceFileError(_ends_after(len(start)))
    if start[8:16] != b"\0\0\0\rIHDR":
        raise FaceFileError(f"does not begin with an IHDR chunk: {_AGAIN}")
    # A flipped bit in a size would else show as a picture of another size, with no word of damage.
    _check_crc(b"IHDR", start[16:29], start[29:33])
    width, height, depth, colour = struct.unpack(">IIBB", start[16:26])
    # OpenCV would convert them silently; extraction writes no other, so the file was edited.
    if depth != 8 or colour != 2:
        name = _COLOUR_TYPES.get(colour, f"colour type {colour}")
        raise FaceFileError(f"is {depth}-bit {name}, not 8-bit RGB: {_AGAIN}")
    if width != height:
        raise FaceFileError(f"is {width} x {height} px, not square: {_AGAIN}, do not crop it")
    if not MIN_EDGE_PX <= width <= MAX_EDGE_PX:
        raise FaceFileError(
            f"is {width} px wide, not {MIN_EDGE_PX} to {MAX_EDGE_PX}: {_AGAIN} at 256 px or more"
        )
    return width


def _find_text(file: BinaryIO) -> bytes:
    """The face header's chunk less its keyword; the file stands after its `IHDR` chunk."""
    size = os.fstat(file.fileno()).st_size
    position = file.tell()
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise FaceFileError(f"ends before its picture data: {_CUT_SHORT}")
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"IEND"):
            raise NotExtractedError(
                "has no face header before its picture data: not written by extraction, or saved "
                "by another program since; extract the faces again"
            )
        # Against the file's own size: a length from a stranger must not decide what is read.
        left = size - position - 12
        if length > left:
            name = kind.decode("latin-1")
            raise FaceFileError(
                f"its {name!a} chunk is {length} {plural(length, 'byte')} long and the file has "
                f"{max(left, 0)} left: {_CUT_SHORT}"
            )
        position += 12 + length
        if kind == b"iTXt":
            if length > MAX_HEADER_BYTES:
                _refuse(_TOO_LONG)
            data = file.read(length)
            # Other programs have chunks of this kind, too.
            if data.startswith(KEYWORD + b"\0"):
                _check_crc(kind, data, file.read(4))
                return data[len(KEYWORD) + 1 :]
        file.seek(position)
    raise FaceFileError(f"has more than {MAX_CHUNKS} chunks before its face header: {_AGAIN}")


def _text_of(data: bytes) -> str:
    """Text of an `iTXt` chunk from which the keyword is cut off."""
    try:
        _, _, text = data[2:].split(b"\0", 2)
        # Compressed by somebody: faceswap writes plain text, and the format allows both.
        if data[0]:
            decoder = zlib.decompressobj()
            text = decoder.decompress(text, MAX_HEADER_BYTES + 1)
    except (ValueError, zlib.error):  # too few parts
        _refuse(_NO_TEXT)
    if len(text) > MAX_HEADER_BYTES:
        _refuse(_TOO_LONG)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        _refuse(_NO_TEXT)


def _check_crc(kind: bytes, data: bytes, crc: bytes) -> None:
    if zlib.crc32(data, zlib.crc32(kind)).to_bytes(4, "big") != crc:
        raise FaceFileError(
            f"its {kind.decode()} chunk is damaged (checksum differs): copy it again or {_AGAIN}"
        )


def _header_from(content: Any) -> FaceHeader:
    """The header of what was read. What training does without may be missing or odd."""
    if not isinstance(content, dict) or not isinstance(content.get("alignments"), dict):
        _refuse("has no entry 'alignments'")
    alignments = content["alignments"]
    landmarks_l2 = _landmarks_from(alignments.get("landmarks_xy"))
    source = content.get("source")
    source = source if isinstance(source, dict) else {}
    if source.get(_VERSION) is not None and _version_in(source) is None:  # the crop depends on it
        _refuse("names an alignments version that is no number")
    return FaceHeader(
        landmarks_l2=landmarks_l2,
        masks=_masks_from(alignments.get("mask")),
        box=_box_from(alignments, landmarks_l2),
        source=source,
    )


def _numbers(value: Any, name: str) -> np.ndarray:
    """Nested lists of finite numbers as float64."""
    try:
        array = np.array(value)
    except ValueError:  # lists of unequal lengths
        _refuse(f"has {name} of unequal lengths")
    except OverflowError:
        _refuse(f"has {name} that are too large")
    # Text, booleans and lists of objects make arrays, too.
    if array.dtype.kind not in "if":
        _refuse(f"has {name} that are not all numbers")
    if not np.isfinite(array).all():
        _refuse(f"has {name} that are not all finite")
    return array.astype(np.float64)


def _landmarks_from(value: Any) -> np.ndarray:
    if value is None:
        _refuse("has no landmarks ('landmarks_xy')")
    return checked_landmarks(_numbers(value, "landmarks"))


def checked_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """The landmarks as training takes them, (68, 2) float32.

    landmarks: finite, float64. Raises FaceFileError where they are no face's.
    """
    if landmarks.shape != (NUM_LANDMARKS, 2):
        count = landmarks.shape[0] if landmarks.ndim else 0
        _refuse(
            f"has {count} {plural(count, 'landmark')} where {NUM_LANDMARKS} are needed",
            f"{_AGAIN}, with an aligner that finds {NUM_LANDMARKS}",
        )
    farthest = landmarks.flat[np.abs(landmarks).argmax()]
    if abs(farthest) > MAX_COORDINATE_PX:
        _refuse(f"has a landmark at {farthest:.3g} px, outside any picture")
    # Without the jaw, as the alignment: it is fitted to these points alone.
    inner = landmarks[17:] - landmarks[17:].mean(axis=0)
    xx, yy, xy = (inner.T @ inner)[[0, 1, 0], [0, 1, 1]]
    # Drawing takes time by the distance: a point may not lie arbitrarily far from its face.
    if np.abs(landmarks - landmarks[17:].mean(axis=0)).max() > MAX_SPREAD * np.sqrt(xx + yy):
        _refuse("has a landmark far away from the others")
    # Area against extent: 0 for points in one place or on one line, 0.1 to 1 for a face.
    if 4 * (xx * yy - xy * xy) <= 1e-4 * (xx + yy) ** 2 or xx + yy < 1:
        _refuse("has landmarks that all lie in one place or on one line")
    return landmarks.astype(np.float32)


def _masks_from(entries: Any) -> dict[str, StoredMask | str]:
    """The masks by name; of one that cannot be used, why, for whoever asks for it.

    Names that no setting can hold are passed over, and all after the first 64.
    """
    if not isinstance(entries, dict):
        return {}
    masks: dict[str, StoredMask | str] = {}
    for name, entry in entries.items():
        if len(masks) == MAX_MASKS:
            break
        if name.isprintable() and len(name) <= MAX_NAME_LENGTH:
            try:
                masks[name] = _mask_from(name, entry)
            except FaceFileError as error:
                # Kept as a reason: a mask that nobody asks for must not cost the face.
                masks[name] = str(error)
    return masks


def _mask_from(name: str, entry: Any) -> StoredMask:
    if not isinstance(entry, dict) or not isinstance(entry.get("mask"), bytes):
        _refuse(f"has no data for mask {name!r}")
    size_px = entry.get("stored_size")
    if type(size_px) is not int or not 0 < size_px <= MAX_MASK_PX:
        _refuse(f"has a mask {name!r} whose stored_size is not 1 to {MAX_MASK_PX} px")
    centering = entry.get("stored_centering")
    if centering is None:  # until version 2.2 all were centred on the face
        centering = "face"
    if centering not in CENTERING_NAMES:
        _refuse(f"has a mask {name!r} whose stored_centering is none of {CENTERING_NAMES}")
    affine = _numbers(entry.get("affine_matrix"), f"matrix entries of mask {name!r}")
    if affine.shape == (2, 3):
        # Both forms are in use; one of them is kept, so that matrices can be multiplied.
        affine = np.vstack([affine, [0.0, 0.0, 1.0]])
    if affine.shape != (3, 3):
        _refuse(f"has a mask {name!r} whose affine_matrix is not 3 x 3")
    return StoredMask(entry["mask"], size_px, centering, affine)


def _box_from(alignments: dict[str, Any], landmarks_l2: np.ndarray) -> tuple[int, int, int, int]:
    """The detector's box; where a file has none that can be, the box round the landmarks."""
    try:
        box = _numbers([alignments.get(key) for key in ("x", "y", "w", "h")], "a box")
    except FaceFileError:
        box = np.empty(0)
    if box.shape != (4,) or np.abs(box).max() > MAX_COORDINATE_PX:
        low, high = landmarks_l2.min(axis=0), landmarks_l2.max(axis=0)
        box = np.concatenate([low, high - low])
    left, top, width, height = np.rint(box).astype(int).tolist()
    return left, top, width, height


def _as_dict(header: FaceHeader) -> dict[str, Any]:
    """The header as it is written, in the order in which it is written."""
    left, top, width, height = header.box
    alignments = {
        "x": left,
        "y": top,
        "w": width,
        "h": height,
        "landmarks_xy": header.landmarks_l2.tolist(),
        "mask": {
            name: {
                "mask": mask.data,
                "affine_matrix": mask.affine_33.tolist(),
                # For pasting a mask back into its frame, which training never does.
                "interpolator": cv2.INTER_LINEAR,
                "stored_size": mask.size_px,
                "stored_centering": mask.centering,
            }
            for name, mask in header.masks.items()
            if isinstance(mask, StoredMask)
        },
        # Empty but there: the format has the entry from version 2.3 on.
        "identity": {},
    }
    return {"alignments": alignments, "source": header.source}
