"""A file *.keras: a zip with the graph as JSON and the arrays as HDF5.

Only these parts are looked at. What else Keras puts there, such as the optimizer's state, which is
a pickle, stays unread.
"""

import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ...models.fields import shown
from ..system.durable_files import open_for_reading

METADATA, CONFIG, WEIGHTS = "metadata.json", "config.json", "model.weights.h5"
_UNREAD = {METADATA, "optimizer.pt"}
# Keras writes three or four.
_MOST_ENTRIES = 64
_MOST_JSON_BYTES = 8 << 20  # the largest seen has 0.6 MB
_PIECE_BYTES = 1 << 20

# What the library raises over a zip that is damaged, encrypted or packed in some rare way.
_NO_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


class Archive:
    """An open *.keras file."""

    def __init__(self, path: Path, zipped: zipfile.ZipFile) -> None:
        self.path, self._zip = path, zipped
        names = [entry.filename for entry in zipped.infolist()]
        # Two entries of one name are read differently by different programs.
        if len(names) > _MOST_ENTRIES or len(set(names)) != len(names):
            raise ValueError(f"{path} holds {len(names)} files, which no Keras model does")
        for needed in (CONFIG, WEIGHTS):
            if needed not in names:
                raise ValueError(f"{path} is no Keras model: it has no {needed}")
        known = {CONFIG, WEIGHTS, *_UNREAD}
        foreign = next((n for n in names if n not in known and not n.startswith("assets/")), None)
        if foreign is not None:
            raise ValueError(f"{path} is no model of faceswap: it holds {shown(foreign)}")

    def graph(self) -> Any:
        """What config.json says.

        Raises:
            ValueError: It is no JSON, or too large.
        """
        content = b"".join(self._pieces(CONFIG, _MOST_JSON_BYTES))
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{CONFIG} of {self.path} is not valid JSON") from error

    @contextmanager
    def unpacked_weights(self, max_bytes: int) -> Iterator[IO[bytes]]:
        """A copy of the HDF5 part, of at most so many bytes, without a name that a kill leaves.

        Raises:
            ValueError: The part is damaged or larger, or there is no room for the copy.
        """
        # HDF5 is read by places, which a zip's stream does not offer.
        with _making_room():
            copy = tempfile.TemporaryFile()
        try:
            for piece in self._pieces(WEIGHTS, max_bytes):
                with _making_room():
                    copy.write(piece)
            with _making_room():
                copy.flush()
            yield copy
        finally:
            # What had no room when it was flushed has none now, and would hide the error above.
            with suppress(OSError):
                copy.close()

    def _pieces(self, name: str, max_bytes: int) -> Iterator[bytes]:
        """Contents of one entry; ValueError before more than ``max_bytes`` come of it."""
        too_large = ValueError(
            f"{name} of {self.path} must have at most {max_bytes} bytes for such a model, got more"
        )
        # What the zip says, and below what really comes: it may say anything.
        if self._zip.getinfo(name).file_size > max_bytes:
            raise too_large
        left = max_bytes
        try:
            with self._zip.open(name) as stream:
                while piece := stream.read(_PIECE_BYTES):
                    left -= len(piece)
                    if left < 0:
                        break
                    yield piece
        except _NO_ZIP as error:
            raise ValueError(f"{self.path} is damaged: {name} cannot be unpacked") from error
        if left < 0:
            raise too_large


@contextmanager
def _making_room() -> Iterator[None]:
    """Say in one line, by a ValueError, where a temporary file has no room."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{WEIGHTS} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}; free "
            "space there, or set TMPDIR to another folder"
        ) from error


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """A *.keras file.

    Raises:
        ValueError: It is no such file, is damaged, or holds what no Keras model does.
        OSError: The disk refuses.
    """
    with open_for_reading(path, follows_links=True) as stream:
        try:
            zipped = zipfile.ZipFile(stream)
        except _NO_ZIP as error:
            raise ValueError(f"{path} is no Keras model: it is not a whole zip file") from error
        with zipped:
            yield Archive(path, zipped)
