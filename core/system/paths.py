"""Paths as users write them, and what a disk that refuses them says."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EROFS: "make the disk writable",
    errno.EMFILE: "raise `ulimit -n`",
}
"""What to do about a refusal, by its number, whichever file it is about."""

_REMEDIES = DISK_REMEDIES | {
    errno.EACCES: "let this user read and write it, or name another",
    errno.EPERM: "let this user read and write it, or name another",
    errno.EROFS: "make the disk writable, or name another",
    errno.ENAMETOOLONG: "use a shorter name",
}

# DOTALL, for a folder's name may hold a line end.
_SHARED = re.compile(r"(?P<folder>.+):(?P<share>[0-9]+\.?[0-9]*|\.[0-9]+)", re.DOTALL)


def expanded(path: str | os.PathLike[str]) -> Path:
    """The same path with the home folder in the place of `~` or `~name`.

    Raises:
        ValueError: Nobody knows that folder.
    """
    try:
        # A shell does so only where the word begins with it: not in --set, not in TOML.
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{os.fspath(path)}: that home folder is not known here; write the path without ~"
        ) from None


def split_share(text: str) -> tuple[str, float | None]:
    """A folder as a setting names it, and the share of draws behind its colon; None: there is none.

    A path that exists is one, whatever it ends with.
    """
    match = _SHARED.fullmatch(text)
    if match is None or os.path.lexists(expanded(text)):
        return text, None
    return match["folder"], float(match["share"])


def refusal(error: OSError) -> str | None:
    """What the disk refuses, and what to do, in a line; None where that is not known.

    A file that is named is the user's, or one beside it: its path is too long, or this user may not
    read it. A refusal without a name may be a fault of ours.
    """
    if error.filename is None:
        return None
    path, reason = os.fsdecode(error.filename), error.strerror or str(error)
    return f"{path}: {reason}; {_REMEDIES.get(error.errno or 0, 'check it, or name another')}"


@contextmanager
def refusals_told() -> Iterator[None]:
    """Make such a refusal, inside, a ValueError, as any other mistake in the input."""
    try:
        yield
    except OSError as error:
        told = refusal(error)
        if told is None:
            raise
        raise ValueError(told) from error


def require_working_folder() -> None:
    """Refuse to work where there is no folder to work in: MKL then ends the process, telling that
    it cannot load PyTorch.

    Raises:
        ValueError: Somebody has removed the working folder, or this user may not enter it.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ValueError(
            f"the working folder is gone ({error.strerror}); change to another, as with `cd`"
        ) from None
