"""Networks that others trained, read from ONNX files and run by OpenCV on the CPU.

OpenCV does not report how large an image a network takes, so that is read from the file. ONNX is
a protobuf message; of its fields (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) these
are followed: ModelProto.graph 7, GraphProto.initializer 5 and .input 11, TensorProto.name 8,
ValueInfoProto.name 1 and .type 2, TypeProto.tensor_type 1, Tensor.shape 2,
TensorShapeProto.dim 1, Dimension.dim_value 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from ..system.durable_files import open_for_reading
from ..system.paths import expanded

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
# 64 bits in sevens: a longer one is no number of protobuf's.
_VARINT_BYTES = 10
_MAX_BYTES = 2**31 - 1
"""Bytes of the largest message that protobuf has."""


class Network:
    """A network from a picture to one row of numbers.

    Args:
        path: ONNX file; its one input is (1, 3, S, S) float32 with S fixed, in the order R, G, B;
            it has one output.
        setting: Name of the setting that names the file, for the texts.
        middle: Pixel value that the network sees as 0.
        span: Difference of pixel values that it sees as 1.

    Raises:
        ValueError: The file cannot be read, or takes another input.
    """

    def __init__(self, path: str, setting: str, *, middle: float = 0.0, span: float = 255.0):
        self.name = f"{setting}: {path}"
        self._middle, self._span = middle, span
        shape = _input_shape(expanded(path), self.name)
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or shape[2] < 1:
            shown = ", ".join(str(size) if size else "?" for size in shape)
            raise ValueError(
                f"{self.name} must take pictures (1, 3, S, S) of a fixed size S, takes ({shown})"
            )
        self.size_px = shape[2]
        with _one_line(f"{self.name} cannot be read by OpenCV"):
            self._net = cv2.dnn.readNetFromONNX(str(expanded(path)))
        num_outputs = len(self._net.getUnconnectedOutLayersNames())
        # Of several it could not be known which is meant.
        if num_outputs != 1:
            raise ValueError(f"{self.name} must have one output, has {num_outputs}")

    def __call__(self, picture_ssc: np.ndarray) -> np.ndarray:
        """The network's numbers, flat float32, for one (size_px, size_px, 3) uint8 BGR picture.

        Raises:
            ValueError: OpenCV cannot run the network.
        """
        blob_nchw = cv2.dnn.blobFromImage(
            # OpenCV takes the mean off first, and scales then.
            picture_ssc,
            1 / self._span,
            mean=(self._middle,) * 3,
            swapRB=True,
        )
        with _one_line(f"{self.name} cannot be run by OpenCV"):
            self._net.setInput(blob_nchw)
            return self._net.forward().ravel()


@contextmanager
def _one_line(text: str) -> Iterator[None]:
    """Make OpenCV's exception a ValueError of one line, and keep it from printing its own."""
    # It would print the same error itself, over the status line.
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    except cv2.error as error:
        raise ValueError(f"{text}: {' '.join(str(error.err or error).split())}") from None
    finally:
        cv2.utils.logging.setLogLevel(level)


def _input_shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of the network's one input; 0 where a size is not fixed."""
    try:
        with open_for_reading(path, follows_links=True) as file:
            # One byte more than there may be, so that a larger file shows.
            content = memoryview(file.read(_MAX_BYTES + 1))
        if len(content) > _MAX_BYTES:
            raise ValueError(f"{name} is larger than {_MAX_BYTES} bytes, which no ONNX file is")
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None
    try:
        graph = _messages(content, 7)[0]
        # Compared as bytes: names are never shown, and need be no valid text.
        stored = {bytes(text) for each in _messages(graph, 5) for text in _messages(each, 8)}
        # Older files list their weights among the inputs.
        inputs = [
            each for each in _messages(graph, 11) if bytes(_messages(each, 1)[0]) not in stored
        ]
        dimensions = inputs[0]
        # Type, its tensor, and the shape of that: the numbers stand at the top of the file.
        for number in (2, 1, 2):
            dimensions = _messages(dimensions, number)[0]
        sizes = [dict(_fields(each)).get(1, 0) for each in _messages(dimensions, 1)]
    except (IndexError, ValueError):
        raise ValueError(f"{name} is not an ONNX file of a network with an input") from None
    if len(inputs) != 1:
        raise ValueError(f"{name} must have one input, has {len(inputs)}")
    return tuple(size if isinstance(size, int) else 0 for size in sizes)


def _messages(message: memoryview, number: int) -> list[memoryview]:
    """The parts of a protobuf message that a field of this number holds."""
    return [
        value
        for field, value in _fields(message)
        if field == number and isinstance(value, memoryview)
    ]


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protobuf message; ValueError where it is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED_32, _FIXED_64):
            size = 4 if kind == _FIXED_32 else 8
        else:
            raise ValueError(f"a protobuf field has kind 0, 1, 2 or 5, got {kind}")
        # A slice would silently be shorter, and a network be read from half a file.
        if at + size > len(message):
            raise ValueError("the protobuf message is cut off")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at this byte, 7 bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES, 7):
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError(f"a protobuf number has at most {_VARINT_BYTES} bytes")
