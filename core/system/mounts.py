"""Disks as the system has mounted them: whether a lock holds on every machine that has the disk."""

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

_SHARING_OPTIONS: dict[str, set[str]] = {
    "nfs": {"local_lock=none", "local_lock=posix"},
    "nfs4": {"local_lock=none", "local_lock=posix"},
    "lustre": {"flock"},
    # No option of these says what becomes of a lock.
    **{
        kind: set()
        for kind in ("9p", "beegfs", "cifs", "fuse", "orangefs", "smb3", "vboxsf", "virtiofs")
    },
}
"""Kinds of disk that several machines may have and whose flock may hold on one of them alone, each
with the options of which one says that it holds on all."""


def shares_flock(folder: Path) -> bool:
    """Whether flock in a folder keeps out every machine that has its disk, as far as the kind of
    the disk and its options say; True for the disk of one machine."""
    kind, options = _mount_of(folder)
    # A file system of a program, such as sshfs, is "fuse.<its name>"; "fuseblk" is a local disk.
    sharing = _SHARING_OPTIONS.get(kind.partition(".")[0])
    return sharing is None or bool(sharing & options)


def _mount_of(folder: Path) -> tuple[str, set[str]]:
    """Kind and options of the disk that a folder lies on; empty where the system shows none."""
    path, deepest, found = folder.resolve(), -1, ("", set[str]())
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        # "<id> <parent> <device> <root> <place> <options> ... - <kind> <source> <options>"
        mount, _, disk = line.partition(" - ")
        words, of_disk = mount.split(" "), disk.split(" ")
        if len(words) < 6 or len(of_disk) < 3:
            continue
        place = Path(_unescaped(words[4]))
        # Of several at one place the last: it covers the others.
        if path.is_relative_to(place) and len(place.parts) >= deepest:
            deepest = len(place.parts)
            found = of_disk[0], {*words[5].split(","), *of_disk[2].split(",")}
    return found


def _unescaped(place: str) -> str:
    r"""A path of the list of mounts, which has its spaces as \040."""
    octal = re.compile(rb"\\([0-7]{3})")
    return os.fsdecode(octal.sub(lambda match: bytes([int(match[1], 8)]), os.fsencode(place)))
