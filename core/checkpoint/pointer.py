"""The pointer of a model folder, its top `state.json`: the generation in use, and the main counts.

It is for people and for programs that watch. No start depends on it: the manifests say which
generation is newest, since a kill may come between the rename of a generation and this file.
"""

import json
from pathlib import Path
from typing import Any

from ..system.durable_files import DamagedError, replace_file
from .format import STATE, read_json
from .generations import is_name

KEYS = ("schema", "run_id", "trainer", "iterations", "sessions", "lowest_mean_loss")
"""Keys of a generation's state that the pointer repeats."""


def write_pointer(model_dir: Path, name: str, state: dict[str, Any]) -> None:
    """Write down that a generation, with this state, is in use; OSError where the disk refuses."""
    replace_file(model_dir / STATE, _content(name, state))


def read_pointer(model_dir: Path) -> str | None:
    """Name of the generation that is said to be in use; None where nothing says so.

    Raises:
        DamagedError: The file is not one of mien's.
    """
    # A missing pointer is none to warn of: a kill before the first save's end leaves that.
    path = model_dir / STATE
    if not path.exists():
        return None
    name = read_json(path).get("generation")
    return name if isinstance(name, str) and is_name(name) else None


def is_same_save(one: Path, other: Path) -> bool:
    """Whether two model folders have the same state in use, under whatever name."""
    try:
        first, second = (read_json(folder / STATE) for folder in (one, other))
    except (DamagedError, OSError):
        return False
    # The name may differ: a second save of one iteration has a number behind it.
    return first | {"generation": None} == second | {"generation": None}


def _content(name: str, state: dict[str, Any]) -> bytes:
    # Those that are there: a save need only name its run, its trainer and its iterations.
    pointer = {key: state[key] for key in KEYS if key in state} | {"generation": name}
    return json.dumps(pointer, indent=1).encode()
