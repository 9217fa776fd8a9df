"""The folders that the desktop's rules (XDG) give a user for settings and for state."""

import os
from pathlib import Path


def settings_folder() -> Path:
    """Folder of a user's own settings; ValueError where the user has no home."""
    return _folder("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path:
    """Folder where programs remember what they have seen; ValueError where the user has no home."""
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, in_home: str) -> Path:
    given = os.environ.get(variable, "")
    # The rules have a relative one ignored.
    if os.path.isabs(given):
        return Path(given, "mien")
    try:
        return Path.home() / in_home / "mien"
    except RuntimeError:
        raise ValueError(f"this user has no home folder; set HOME or {variable}") from None
