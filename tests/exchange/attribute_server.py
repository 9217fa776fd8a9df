"""Attributes of many HDF5 files, each read by a process of its own that has the library already.

It does what `read_attributes` does for one file, less the start of Python and the import of h5py.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from mien.core.exchange import legacy_attributes

_MAX_SECONDS = 120


class AttributeServer:
    """The process whose children read; it ends with its context."""

    def __enter__(self) -> "AttributeServer":
        command = [sys.executable, "-P", __file__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def read(self, path: Path, *names: str) -> dict[str, str]:
        """As `read_attributes`."""
        self._process.stdin.write(json.dumps([str(path), *names]) + "\n")
        self._process.stdin.flush()
        status, text = json.loads(self._process.stdout.readline())
        if status:
            raise ValueError("its HDF5 part is damaged")
        return json.loads(text)


def _serve() -> None:
    import h5py  # noqa: F401  # for all children

    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(words: list[str]) -> tuple[int, str]:
    """Status of the child that reads, and what it has printed."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:  # its copy of the source is closed with it
        signal.alarm(_MAX_SECONDS)
        os.dup2(sink, sys.stdout.fileno())
        try:
            legacy_attributes.main(*words)
            sys.stdout.flush()
        except BaseException:  # noqa: BLE001  # its status says so, as `read_attributes` sees it
            os._exit(1)
        os._exit(0)
    os.close(sink)
    with open(source, encoding="utf-8") as stream:
        text = stream.read()
    return os.waitpid(child, 0)[1], text


if __name__ == "__main__":
    _serve()
