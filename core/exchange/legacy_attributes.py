"""Attributes of an HDF5 file as JSON, read by a process of its own.

The library trusts the lengths of texts in attributes: a damaged one makes it take gigabytes, or
crash. Here that ends a process that nothing depends on. It runs this file by its path, and takes no
modules from the working folder, which may be a stranger's.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

# As much as a config.json may have (`keras_archive`).
_MOST_CHARACTERS = 8 << 20
_MOST_BYTES = 1 << 30
"""Memory of the process beside its code."""

# Far more than a sound file takes; a damaged one may keep the library busy. Chosen.
_MAX_SECONDS = 120


def read_attributes(path: Path, *names: str) -> dict[str, str]:
    """Texts of some attributes of a file; empty for one that there is not, or is no such text.

    Raises:
        ValueError: The file is damaged, or there can be no such process.
    """
    command = [sys.executable, "-P", __file__, str(path), *names]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_MAX_SECONDS, check=True)
    except OSError as error:
        raise ValueError(
            f"its HDF5 part cannot be read: no process could be started for it ({error.strerror}); "
            "free memory, or raise `ulimit -u`"
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ValueError("its HDF5 part is damaged") from error
    return json.loads(done.stdout)


def main(path: str, *names: str) -> None:
    """Print the attributes of a file."""
    # Not by `require_h5py`: a file that is run by its path can import nothing of its package.
    import h5py

    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    with h5py.File(path, "r") as file:
        texts = {name: _text(file, name) for name in names}
    sys.stdout.write(json.dumps(texts))


def _text(file: Any, name: str) -> str:
    value = file.attrs[name] if name in file.attrs else ""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text if isinstance(text, str) and len(text) <= _MOST_CHARACTERS else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
