"""Paths that a model folder may name: those inside it, and those that this user has given it here.

The settings of a model are saved in its folder, which may come from a stranger. So a path in them
counts only

    - where it lies inside the model folder,
    - where the user gives it again, or
    - where this user has used it with this model on this machine before.

For the last, what a user gives is remembered outside the model folder, in `mien/models` of the
user's folder for state ($XDG_STATE_HOME, ~/.local/state): a file for each model, named after the
SHA-256 of its run and its absolute path, that lists the latest paths of each setting. Only the user
can read it. The files of the models that were used least lately are removed. A file that is absent
or damaged remembers nothing, and nothing else follows from it.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..system.durable_files import DamagedError, replace_file
from ..system.user_folders import state_folder
from .format import read_json

MAX_MODELS = 1000
MAX_PATHS = 16
"""Largest number of paths that are remembered of one setting of one model."""


class KnownPaths:
    """The paths that count in the settings of one model.

    Args:
        model_dir: The model folder.
        run_id: Identity of the model's run.
    """

    def __init__(self, model_dir: Path, run_id: str) -> None:
        self._model_dir = os.path.realpath(model_dir)
        self._run_id = run_id
        # Both: a copy elsewhere, or another model in its place, is not what was trusted.
        identity = f"{run_id} ".encode(errors="surrogatepass") + os.fsencode(self._model_dir)
        self._name = f"{hashlib.sha256(identity).hexdigest()}.json"

    def trust(self, setting: str, path: str) -> bool:
        """Whether an absolute path, as saved for a setting, counts without being given again."""
        return self._is_inside(path) or path in self._read().get(setting, [])

    def remember(self, paths: Iterable[tuple[str, str]]) -> str | None:
        """Remember what the user gives, pairs of setting and absolute path; why it cannot be, if
        so."""
        known = self._read()
        for setting, path in paths:
            if not self._is_inside(path):
                earlier = [other for other in known.get(setting, []) if other != path]
                # The newest last; the oldest fall out.
                known[setting] = [*earlier[1 - MAX_PATHS :], path]
        if not known:
            return None
        values = {"model_dir": self._model_dir, "run_id": self._run_id, "paths": known}
        try:
            file = self._file()
            # Of this user alone: folders of faces are nobody else's business.
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(file, json.dumps(values, indent=1).encode(), mode=0o600)
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"{file}: {error.strerror or error}"
        with suppress(OSError):  # another run may do the same
            _remove_oldest(file.parent)
        return None

    def _is_inside(self, path: str) -> bool:
        """Whether it lies in the model folder, and is no pipe or device there."""
        try:
            # Resolved: a link inside the folder could lead anywhere.
            place = os.path.realpath(path)
        except ValueError:  # no path at all, as one with a zero byte
            return False
        inside = os.path.commonpath([place, self._model_dir]) == self._model_dir
        return inside and (
            os.path.isfile(place) or os.path.isdir(place) or not os.path.lexists(place)
        )

    def _file(self) -> Path:
        """File with this user's paths; ValueError where the user has no home."""
        return state_folder() / "models" / self._name

    def _read(self) -> dict[str, list[str]]:
        try:
            paths = read_json(self._file()).get("paths")
        except (OSError, ValueError, DamagedError):
            return {}
        if not isinstance(paths, dict):
            return {}
        return {name: listed for name, listed in paths.items() if isinstance(listed, list)}


def _remove_oldest(folder: Path) -> None:
    """Leave the files of the models that were used last."""
    files = [entry for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    if len(files) <= MAX_MODELS:
        return
    # By the time of the last write, which is the last start with a path.
    files.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns)
    for entry in files[: len(files) - MAX_MODELS]:
        os.unlink(entry.path)
