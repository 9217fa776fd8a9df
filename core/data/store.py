"""The faces of one side, decoded once to the processing size, and where they are kept.

A pixel is 8 bytes (blue, green, red, face mask, eye area, mouth area, 0, 0), so that the augment
kernel reads it with one load. The faces lie in GPU memory, in host memory (pinned where there is a
GPU) or in a memory-mapped file, by measured room; each is one tensor of the same layout.

The raw file `<key>.faces` is what the next start reads instead of decoding. Its key covers the
names, sizes and times of the face files, the crop and the mask. It is two lines of JSON, spaces up
to a multiple of 4096 bytes, then the pixels:

    {"schema": "mien.faces/1", "header_bytes": 8192, "sha256": "<of the second line>"}
    {"key": ..., "folder": ..., "size_px": ..., "settings": ..., "names": ..., "rejected": ...,
     "empty": ..., "areas_outside": ...}

It is written beside its place, synced and renamed, so it is whole or absent; a file that is not
exactly what it should be is made anew. In a folder that several trainings share, files of the same
faces under other settings stay beside it: those used last, so that disks do not fill. A disk that
maps no files, as some network disks do not, keeps it all the same: it is then written from memory,
and read into it.

Letters: f = face, s = edge at the processing size, c = the 8 bytes of a pixel.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ..checkpoint.lock import NO_FLOCK
from ..config import DataConfig
from ..faces import masks
from ..faces.folder import FaceFolder, Rejected
from ..faces.geometry import Crop
from ..faces.png import FaceFileError
from ..system.durable_files import discard, open_for_reading, open_plain, sync_folder
from ..system.printable import plural
from .decode import decoded_by
from .pipeline import FaceDecoder, decoding

SCHEMA = "mien.faces/1"
BYTES_PER_PIXEL = 8
BLOCK_BYTES = 4096
"""Multiple at which pixels begin in a file: a page, so that they can be mapped."""

# Room for the names of a million faces; bounds what a stranger's file takes.
MAX_HEADER_BYTES = 256 * 1024**2
# As in faceswap.
MINIMUM_FACES = 25
ROOM_SHARE = 0.5
"""Share of the free memory that faces may take; training needs the rest. Chosen, unmeasured."""

CONTENT_VERSION = 2
"""Version that is raised where the same files and settings give other pixels, or more is stored of
them."""

COPY_BYTES = 256 * 1024**2
"""Bytes that go to a GPU at a time. Chosen, unmeasured on a GPU."""

NUM_SHARED = 4
"""Raw files of one face folder that a store shared by several trainings keeps: as many settings can
take turns without decoding anew, and the disk has a bound. Chosen."""

_GIB = 1024**3
_OLD_SECONDS = 86_400.0  # a day: longer than decoding takes; chosen, unmeasured
_NOT_OFFERED = {errno.ENODEV, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
"""How a disk says that it maps no files, or reserves no room for them."""

_NOT_RAW = (OSError, ValueError, KeyError, TypeError, RecursionError)
"""What comes of reading a file as a raw one that is none."""

_PART = ".part"
_PLACES = {"gpu": "GPU memory", "host": "host memory"}
# Channels of (blue, green, red, face, eye, mouth), each with its byte in the pixel.
_TO_PIXEL = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


# Without `==`: comparing tensors gives a tensor, which is neither true nor false.
@dataclass(eq=False)
class FaceStore:
    """One side's decoded faces.

    faces_fssc: (f, s, s, 8) uint8: blue, green, red, face mask, eye area, mouth area, 0, 0.
    names: file name of each face. rejected: faces that the store had to leave out (those that the
    folder had rejected before are not repeated). why: where the faces are kept and the reason;
    backend: what decoded them; both are sentences for the start-up lines. path: the raw file, None
    where none could be kept; warnings: what went wrong without stopping anything. empty: faces that
    are there, but with (almost) nothing inside their mask, and why. areas_outside: number of faces
    whose eye or mouth area lies outside the crop.
    """

    faces_fssc: torch.Tensor
    placement: str
    names: list[str]
    rejected: list[Rejected]
    why: str
    backend: str
    reused: bool
    seconds: float
    path: Path | None = None
    warnings: list[str] = field(default_factory=list)
    empty: list[Rejected] = field(default_factory=list)
    areas_outside: dict[str, int] = field(default_factory=dict)

    @property
    def num_faces(self) -> int:
        return self.faces_fssc.shape[0]

    @property
    def size_px(self) -> int:
        return self.faces_fssc.shape[1]

    @property
    def nbytes(self) -> int:
        return self.faces_fssc.numel()

    @property
    def gpu_bytes(self) -> int:
        """Memory of the GPU that the faces take, which a training has no more."""
        return self.nbytes if self.faces_fssc.is_cuda else 0


@dataclass(frozen=True)
class _Facts:
    """What a raw file says of itself."""

    key: str
    folder: str
    size_px: int
    settings: dict[str, Any]
    names: list[str]
    rejected: list[list[str]]
    empty: list[list[str]] = field(default_factory=list)
    areas_outside: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: bytes) -> "_Facts":
        """The facts in a raw file's second line, which anybody may have written.

        Raises:
            ValueError, TypeError: It holds others, or of another type.
        """
        # An unknown key is a TypeError, so that a later version's file is made anew.
        facts = cls(**json.loads(text))
        reasons, areas = (facts.rejected, facts.empty), facts.areas_outside
        if not all(isinstance(each, list) for each in (facts.names, *reasons)):
            raise ValueError("a list is none")
        holds = (
            all(isinstance(each, str) for each in (facts.key, facts.folder, *facts.names))
            # `type`, since true and false are whole numbers to `isinstance`.
            and type(facts.size_px) is int
            and facts.size_px > 0
            and isinstance(facts.settings, dict)
            and all(_is_reason(each) for each in chain(*reasons))
            and isinstance(areas, dict)
            and areas.keys() <= set(masks.AREAS)
            and all(type(each) is int and 0 <= each <= len(facts.names) for each in areas.values())
        )
        if not holds:
            raise ValueError("a fact is of another type")
        return facts

    def fit(self, plan: "_Facts") -> bool:
        """Whether they are those of the planned faces, of which some may be left out."""
        # The plan counts on every face; a file knows which of them decoding rejected.
        left_out = {name for name, _ in self.rejected}
        names = [name for name in plan.names if name not in left_out]
        expected = (plan.key, plan.size_px, plan.settings, names)
        is_known = left_out <= set(plan.names) and {name for name, _ in self.empty} <= set(names)
        return is_known and (self.key, self.size_px, self.settings, self.names) == expected

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.names), self.size_px, self.size_px, BYTES_PER_PIXEL

    @property
    def num_bytes(self) -> int:
        return len(self.names) * self.size_px**2 * BYTES_PER_PIXEL


def open_store(
    folder: FaceFolder,
    crop: Crop,
    data: DataConfig,
    *,
    store_dir: Path | None,
    earlier_dir: Path | None = None,
    device: torch.device,
    decoder: FaceDecoder | None = None,
    progress: Callable[[int, int], None] | None = None,
    minimum: int = MINIMUM_FACES,
    num_readers: int = 1,
    num_kept: int = 1,
) -> FaceStore:
    """The folder's faces, from the raw file in store_dir where one fits, else decoded now.

    store_dir: None keeps no file. earlier_dir: a folder whose files are read too, and left alone.
    decoder: what has begun to decode these faces; the caller closes it. progress: called with
    (faces done, faces in all). num_readers: processes of this machine that hold these faces, of
    which each may take its part of the memory. num_kept: raw files of this folder that store_dir
    keeps, this one among them; a new one takes the place of those that were used longest ago.

    Raises ValueError, one line, where fewer than `minimum` faces are usable, where a face is not
    and data.strict is set, or where the faces do not fit in the place that is asked for.
    """
    begin = time.perf_counter()
    report_progress = progress or (lambda done, total: None)
    facts = _plan(folder, crop, data)
    path = Path(store_dir) / f"{facts.key}.faces" if store_dir is not None else None
    warnings: list[str] = []
    with contextlib.ExitStack() as stack:
        # The folder's own first: a file that is there twice is read from where it may stay.
        saved = _find_raw([store_dir, earlier_dir], facts, stack)
        if saved:
            file, facts, header_bytes = saved
            path = Path(file.name)
            _check_usable(facts, folder, data.strict, minimum)
            # Not the plan's bytes: faces that were rejected take no room.
            placement, why = choose_placement(data.placement, facts.num_bytes, device, num_readers)
            pixels_fssc = _pixels(file, facts, header_bytes, is_to_stay=placement == "file")
            faces_fssc = _placed(pixels_fssc, placement, device)
            backend = f"faces were decoded at an earlier start, they are read from {path}"
            report_progress(len(folder.faces), len(folder.faces))
        else:
            _check_usable(facts, folder, data.strict, minimum)  # no more of them become usable
            backend = decoded_by(folder.faces, data.decoder, str(device))
            placement, why = choose_placement(data.placement, facts.num_bytes, device, num_readers)
            build = stack.enter_context(_Build(facts, path, placement, device, num_kept))
            if not decoder:
                decoder = stack.enter_context(decoding(folder.faces, crop, data, device))
            decoded = _decode_into(build.pixels_fssc, folder, decoder, data.strict, report_progress)
            facts = dataclasses.replace(facts, **decoded)
            _check_usable(facts, folder, data.strict, minimum)
            faces_fssc = build.end(facts)
            warnings, path = build.warnings + decoder.warnings, build.path
            if not build.path:
                why += f"; not kept for the next start ({build.obstacle})"
    return FaceStore(
        faces_fssc=faces_fssc,
        placement=placement,
        names=facts.names,
        rejected=[Rejected(folder.path / name, reason) for name, reason in facts.rejected],
        why=why,
        backend=backend,
        reused=saved is not None,
        seconds=time.perf_counter() - begin,
        path=path,
        warnings=warnings,
        empty=[Rejected(folder.path / name, reason) for name, reason in facts.empty],
        areas_outside=facts.areas_outside,
    )


def is_decoded(folders: Sequence[Path], *raw_dirs: Path | None) -> bool:
    """Whether the faces of these folders were decoded at some earlier start, be it otherwise."""
    raw_files = chain.from_iterable(raw.glob("*.faces") for raw in raw_dirs if raw)
    return any(_is_of(path, _written(folders)) for path in raw_files)


def _written(folders: Sequence[Path]) -> str:
    """Folders as a raw file has them."""
    return "\n".join(str(folder.resolve()) for folder in folders)


def choose_placement(
    setting: str, num_bytes: int, device: torch.device, num_readers: int = 1
) -> tuple[str, str]:
    """Place where so many bytes of faces are kept (gpu, host or file), and why, as a sentence.

    auto: the GPU where they fit in half of its free memory, else the host where they fit in half
    of its available memory, of which each of num_readers processes has its part, else a file. With
    a GPU the host's memory is page-locked, which takes more than the faces have.
    Raises ValueError where the place asked for has no room.
    """
    need = f"{_size(num_bytes)} of faces"
    takes = {"gpu": num_bytes, "host": num_bytes}
    if device.type == "cuda":
        takes["host"] = page_locked_bytes(num_bytes)
    # Not so the GPU's below: each process has one of its own.
    rooms = {"host": available_host_bytes() // num_readers}
    if device.type == "cuda":
        # In this order `auto` tries them: the nearest to the kernels first.
        rooms = {"gpu": torch.cuda.mem_get_info(device)[0], **rooms}
    elif setting == "gpu":
        raise ValueError(
            "data.placement is gpu, but this run has no GPU; set it to auto, host or file"
        )
    # Before the rooms are looked at: a file needs none of them.
    if setting == "file":
        return "file", f"{need} are read from a memory-mapped file, as set by data.placement"
    if setting != "auto":
        if takes[setting] > rooms[setting]:
            raise ValueError(
                f"data.placement is {setting}, but {need}, which take {_size(takes[setting])} "
                f"there, do not fit in {_PLACES[setting]} ({_size(rooms[setting])} free); set it "
                "to auto or file"
            )
        return setting, f"{need} are kept in {_PLACES[setting]}, as set by data.placement"
    passed = ""
    for place, room in rooms.items():
        if takes[place] <= ROOM_SHARE * room:
            return place, f"{need} are kept in {_PLACES[place]} ({_size(room)} free){passed}"
        passed += f"; too many for half of {_PLACES[place]} ({_size(room)} free)"
    return "file", f"{need} are read from a memory-mapped file{passed}"


def page_locked_bytes(num_bytes: int) -> int:
    """What PyTorch takes of the host for one page-locked tensor: the next power of two."""
    return 1 << max(num_bytes - 1, 0).bit_length()


def available_host_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's if less."""
    # Used only where /proc shows no MemAvailable, which counts caches as free.
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        amounts = dict(line.split(":", 1) for line in lines)
        available = int(amounts["MemAvailable"].split()[0]) * 1024
    return min([available, *_group_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _group_rooms(membership: Path, root: Path) -> list[int]:
    """Bytes left in each control group (version 2, or 1) that holds this process and has a limit.

    File pages that can be dropped count as free.
    """
    rooms = []
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, group in lines:
        # Version 2 has one group for all; of version 1 only that of memory matters.
        if controllers not in ("", "memory"):
            continue
        version_2 = controllers == ""
        base = root if version_2 else root / "memory"
        limit_name = "memory.max" if version_2 else "memory.limit_in_bytes"
        used_name = "memory.current" if version_2 else "memory.usage_in_bytes"
        # Every group above it has a limit of its own, and the smallest room counts.
        place = base / group.lstrip("/")
        while place == base or base in place.parents:
            with contextlib.suppress(OSError, ValueError):
                limit = int((place / limit_name).read_text())
                used = int((place / used_name).read_text())
                stat = dict(
                    line.split() for line in (place / "memory.stat").read_text().splitlines()
                )
                # A group may be above its limit for a moment, while pages are being dropped.
                rooms.append(max(limit - used + int(stat.get("inactive_file", 0)), 0))
            place = place.parent
    return rooms


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / 1024**2:.1f} MiB"


def _plan(folder: FaceFolder, crop: Crop, data: DataConfig) -> _Facts:
    """The facts as they are if every face is usable."""
    mask: dict[str, Any] = {"type": data.mask_type}
    if data.mask_type != "none":
        mask["dilation"] = data.mask_dilation
        # What does not act on a mask is no part of the key: changing it decodes nothing again.
        if data.mask_type not in masks.LANDMARK_MASKS:
            mask |= {"blur_kernel": data.mask_blur_kernel, "threshold": data.mask_threshold}
    # OpenCV's version, since another one may resize to other pixels.
    settings = {"crop": dataclasses.asdict(crop), "mask": mask, "opencv": cv2.__version__}
    # Of a file that is gone, zeros: decoding rejects it, and it may come back as it was.
    files = [
        [folder.name_of(face.path), *(face.size_and_time if face.file.exists() else (0, 0))]
        for face in folder.faces
    ]
    # In the order of the faces, which is that of the rows: it is part of the key.
    text = json.dumps([SCHEMA, CONTENT_VERSION, settings, files], sort_keys=True)
    return _Facts(
        # 128 bits: no two keys meet by chance, and the name stays short.
        key=hashlib.sha256(text.encode()).hexdigest()[:32],
        folder=_written(folder.folders),
        size_px=crop.size_px,
        settings=settings,
        names=[folder.name_of(face.path) for face in folder.faces],
        rejected=[],
    )


def _check_usable(facts: _Facts, folder: FaceFolder, strict: bool, minimum: int) -> None:
    if strict and facts.rejected:
        name, reason = facts.rejected[0]
        raise ValueError(f"{folder.path / name}: {reason}")
    num_usable = len(facts.names)
    if num_usable < max(minimum, 1):
        num_files = len(folder.faces) + len(folder.rejected)
        first = "".join(f"; {name}: {reason}" for name, reason in facts.rejected[:1])
        raise ValueError(
            f"{folder.title} has {num_usable} usable {plural(num_usable, 'face')} of {num_files}, "
            f"at least {max(minimum, 1)} are needed{first}"
        )


def _decode_into(
    pixels_fssc: np.ndarray,
    folder: FaceFolder,
    decoder: FaceDecoder,
    strict: bool,
    report_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Fill the rows, one for each usable face; what `_Facts` says of these and of the others."""
    names: list[str] = []
    rejected: list[list[str]] = []
    empty: list[list[str]] = []
    areas_outside = dict.fromkeys(masks.AREAS, 0)
    faces = folder.faces
    for number, (face, (crop_bgr, face_masks)) in enumerate(zip(faces, decoder, strict=True)):
        name = folder.name_of(face.path)
        if isinstance(crop_bgr, FaceFileError) or isinstance(face_masks, FaceFileError):
            error = crop_bgr if isinstance(crop_bgr, FaceFileError) else face_masks
            rejected.append([name, str(error)])
            # The caller refuses the folder by this face; the others need not be decoded.
            if strict:
                break
        else:
            row = [pixels_fssc[len(names)]]
            # One pass from two pictures into the pixels' bytes, with Python's lock let go.
            cv2.mixChannels([crop_bgr, face_masks.masks_ssc], row, _TO_PIXEL)
            names.append(name)
            if face_masks.why_empty:
                empty.append([name, face_masks.why_empty])
            for area in face_masks.areas_outside:
                areas_outside[area] += 1
        report_progress(number + 1, len(faces))
    return {"names": names, "rejected": rejected, "empty": empty, "areas_outside": areas_outside}


def _host_tensor(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Zeros in host memory, pinned where there is a GPU to read them."""
    # Zeros: two bytes of each pixel are never written, and go into the file.
    if device.type == "cuda":
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
    # NumPy's, which asks for huge pages: 262 MiB were filled in 0.06 s, PyTorch's in 0.26.
    return torch.from_numpy(np.zeros(shape, np.uint8))


def _placed(pixels_fssc: np.ndarray, placement: str, device: torch.device) -> torch.Tensor:
    """The faces in their place; for a file, the mapping itself."""
    source = torch.from_numpy(pixels_fssc)
    if placement == "file":
        return source
    if placement == "host":
        return _host_tensor(source.shape, device).copy_(source)
    target = torch.empty_like(source, device=device)
    # In pieces: CUDA stages what is not pinned, and a whole mapping would be read at once.
    step = max(1, COPY_BYTES // source[0].numel())
    for first in range(0, len(source), step):
        target[first : first + step].copy_(source[first : first + step])
    return target


class _Build:
    """Faces being decoded: the rows to fill, in a new raw file if that can be, else in memory.

    The file is kept by `end`; left without it, it is removed.
    """

    def __init__(
        self,
        plan: _Facts,
        path: Path | None,
        placement: str,
        device: torch.device,
        num_kept: int,
    ) -> None:
        self.path = path
        self.obstacle = "data.store_dir is off"
        self.warnings: list[str] = []
        self._placement = placement
        self._device = device
        self._raw: _RawFile | None = None
        self._memory: torch.Tensor | None = None
        if path:
            try:
                self._raw = _RawFile(path, plan, num_kept)
            except OSError as error:
                self._give_up(path, error)
        if self._raw and self._raw.pixels_fssc is None and placement == "file":
            self.obstacle = f"the disk of {self._raw.path.parent} maps no files"
            self._raw.close()
            self._raw = None
        if self._raw and self._raw.pixels_fssc is not None:
            self.pixels_fssc = self._raw.pixels_fssc
        elif placement == "file":
            raise ValueError(
                f"{_size(plan.num_bytes)} of decoded faces need a file, but there is none "
                f"({self.obstacle}); set data.store_dir to a folder with that much room"
            )
        else:
            pinned = self._device if placement == "host" else torch.device("cpu")
            self._memory = _host_tensor(plan.shape, pinned)
            self.pixels_fssc = self._memory.numpy()

    def _give_up(self, path: Path, error: OSError) -> None:
        self.path = None
        self.obstacle = f"{path.parent}: {error.strerror or error}"
        self.warnings.append(f"decoded faces are not kept for the next start ({self.obstacle})")

    def end(self, facts: _Facts) -> torch.Tensor:
        """The faces in their place. Meanwhile the raw file is written out."""
        pixels_fssc = self.pixels_fssc[: len(facts.names)]
        # Beside the copy to the GPU: the sync waits for the disk, not for the cores.
        with ThreadPoolExecutor(1) as background:
            writing = background.submit(self._raw.keep, facts, pixels_fssc) if self._raw else None
            if self._memory is not None and self._placement == "host":
                faces_fssc = self._memory[: len(facts.names)]
            else:
                faces_fssc = _placed(pixels_fssc, self._placement, self._device)
            try:
                if writing:
                    writing.result()
            except OSError as error:
                assert self._raw is not None
                # Kept or not, the faces are there: a mapping outlives the name of its file.
                self._give_up(self._raw.path, error)
        return faces_fssc

    def __enter__(self) -> "_Build":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._raw:
            self._raw.close()


def _disk_reserve_bytes() -> int:
    """Bytes of a disk that decoded faces leave free for saves: 256 MiB, or what the user's
    environment says.

    Raises:
        ValueError: MIEN_DISK_RESERVE_MIB is no whole number.
    """
    reserve_mib = os.environ.get("MIEN_DISK_RESERVE_MIB", "256")
    if not reserve_mib.isdecimal():
        raise ValueError(
            f"MIEN_DISK_RESERVE_MIB must be a whole number of MiB, got {reserve_mib!r}; "
            "unset it for 256"
        )
    return int(reserve_mib) * 1024**2


class _RawFile:
    """A raw file under way, at its full size and mapped, so a full disk is noticed at the start.

    pixels_fssc: (f, s, s, 8) uint8, the mapping; None where the disk offers none.
    """

    def __init__(self, path: Path, plan: _Facts, num_kept: int = 1) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # First, so that the room of what this file replaces is counted as free.
        _remove_left_behind(path.parent)
        others = _others_of(path, plan.folder)
        _remove_all(others[num_kept - 1 :])
        # The header is written last, when it is known which faces were left out, and why.
        # Twice the plan's names, which may stand again with a reason, and room for the reasons.
        self._header_bytes = _padded(2 * len(_header(plan, 0)) + 256 * len(plan.names))
        num_bytes = self._header_bytes + plan.num_bytes
        # A save that fails costs the training; faces can be decoded again.
        if not _has_room(path.parent, num_bytes + _disk_reserve_bytes(), others[: num_kept - 1]):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {num_bytes} bytes")
        self._file, self._temporary = _make_part(path)
        try:
            self.pixels_fssc = self._mapped(num_bytes, plan.shape)
        except BaseException:
            self.close()
            raise

    def _mapped(self, num_bytes: int, shape: tuple[int, ...]) -> np.ndarray | None:
        try:
            os.posix_fallocate(self._file, 0, num_bytes)  # a hole would be met as a bus error
            mapped = np.memmap(
                self._temporary, np.uint8, "r+", offset=self._header_bytes, shape=shape
            )
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
            return None
        return np.asarray(mapped)

    def keep(self, facts: _Facts, pixels_fssc: np.ndarray) -> None:
        """Write the header, cut the file to its size, sync it and give it its name.

        pixels_fssc: (f, s, s, 8) uint8, all of the faces; written here where they are not mapped.
        """
        header = _header(facts, self._header_bytes)
        # The room was set aside before it was known how many faces would be rejected.
        if len(header) > self._header_bytes:
            raise OSError(errno.EFBIG, "the list of faces that were left out is too long")
        # "wb" cuts nothing off here: a handle is opened as it is.
        with open(self._file, "wb", closefd=False) as file:
            file.write(header.ljust(self._header_bytes))
            if self.pixels_fssc is None:
                file.write(pixels_fssc.data)
        os.ftruncate(self._file, self._header_bytes + facts.num_bytes)
        # The content before the name: a name on the disk must mean a whole file.
        os.fsync(self._file)
        os.rename(self._temporary, self.path)
        self._temporary = ""
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Remove the file unless it was kept; what is mapped stays readable."""
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
        os.close(self._file)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _header(facts: _Facts, header_bytes: int) -> bytes:
    """The two lines of JSON at the start of a raw file."""
    # Sorted, and with no time in it: two starts write the same file.
    text = json.dumps(dataclasses.asdict(facts), sort_keys=True).encode()
    digest = hashlib.sha256(text).hexdigest()
    first = {"schema": SCHEMA, "header_bytes": header_bytes, "sha256": digest}
    return json.dumps(first).encode() + b"\n" + text + b"\n"


def _is_reason(value: Any) -> bool:
    """Whether it is the name of a face and why it was left out, in a line of text."""
    are_texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return are_texts and len(value) == 2 and value[1].isprintable()


def _read_header(file: BufferedReader) -> tuple[bytes, int, int] | None:
    """Second line of a raw file, bytes of its header and of all of it; None where it is none."""
    # Bounded: a stranger's file may be one line as long as the disk.
    first = json.loads(file.readline(BLOCK_BYTES))
    header_bytes = first["header_bytes"]
    is_size = type(header_bytes) is int and 0 < header_bytes <= MAX_HEADER_BYTES
    if first["schema"] != SCHEMA or not is_size or header_bytes % BLOCK_BYTES:
        return None
    text = file.readline(header_bytes).removesuffix(b"\n")
    # Over the facts only: hashing the pixels would take as long as reading them all.
    if hashlib.sha256(text).hexdigest() != first["sha256"]:
        return None
    return text, header_bytes, os.fstat(file.fileno()).st_size


def _find_raw(
    folders: list[Path | None], plan: _Facts, stack: contextlib.ExitStack
) -> tuple[BufferedReader, _Facts, int] | None:
    """The first whole raw file of the wanted facts in some folders, as `_open_raw` gives it."""
    for folder in filter(None, folders):
        raw = _open_raw(Path(folder) / f"{plan.key}.faces", stack)
        if raw and raw[1].fit(plan):
            if folder == folders[0]:  # others are left alone
                _mark_as_used(raw[0])
            return raw
    return None


def _open_raw(path: Path, stack: contextlib.ExitStack) -> tuple[BufferedReader, _Facts, int] | None:
    """A raw file, open until the stack is left, its facts and header bytes; None where it is not
    whole."""
    with contextlib.suppress(*_NOT_RAW):
        # Left open until its pixels are read: another start may remove or replace it meanwhile.
        file = stack.enter_context(open_for_reading(path))
        header = _read_header(file)
        if header:
            text, header_bytes, size = header
            facts = _Facts.from_json(text)
            return (file, facts, header_bytes) if size == header_bytes + facts.num_bytes else None
    return None


def _is_of(path: Path, folder: str) -> bool:
    """Whether a raw file says that it holds the faces of a folder; the rest of it is not parsed,
    for it may be long, and anybody's."""
    with contextlib.suppress(*_NOT_RAW), open_for_reading(path) as file:
        header = _read_header(file)
        return header is not None and f'"folder": {json.dumps(folder)}, '.encode() in header[0]
    return False


def _pixels(
    file: BufferedReader, facts: _Facts, header_bytes: int, *, is_to_stay: bool
) -> np.ndarray:
    """The pixels of a raw file, mapped copy-on-write: nothing done to them reaches the file.

    Where the disk maps no files they are read; ValueError where they are to stay in the file.
    """
    try:
        return np.asarray(np.memmap(file, np.uint8, "c", offset=header_bytes, shape=facts.shape))
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    if is_to_stay:
        raise ValueError(
            f"{_size(facts.num_bytes)} of decoded faces are to stay in their file, but the disk of "
            f"{Path(file.name).parent} maps no files; set data.placement to host, or "
            "data.store_dir to a folder on another disk"
        )
    file.seek(header_bytes)
    return np.fromfile(file, np.uint8, facts.num_bytes).reshape(facts.shape)


def _mark_as_used(file: BufferedReader) -> None:
    """Set a raw file's time: of those that share a folder, the ones used last stay."""
    with contextlib.suppress(OSError):  # another user's, or on a disk that is only read
        os.utime(file.fileno())


def _others_of(path: Path, folder: str) -> list[Path]:
    """The other raw files of a face folder beside one, those used last first."""
    # Not those of other faces: in a shared store_dir they are somebody's next start.
    others = [each for each in path.parent.glob("*.faces") if each != path and _is_of(each, folder)]
    return sorted(others, key=_used_at, reverse=True)


def _used_at(path: Path) -> float:
    """Time at which a raw file was last used; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return os.lstat(path).st_mtime
    return 0.0


def _num_bytes(path: Path) -> int:
    """Size of a raw file; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return os.lstat(path).st_size
    return 0


def _remove_all(raw_files: Sequence[Path]) -> None:
    for path in raw_files:
        with contextlib.suppress(OSError):
            # The name alone goes: a run that has the file mapped keeps what it holds.
            path.unlink()


def _has_room(folder: Path, num_bytes: int, raw_files: list[Path]) -> bool:
    """Whether a disk has so many bytes free, if need be without raw files of its, of which the last
    goes first."""
    num_removable = sum(_num_bytes(path) for path in raw_files)
    if num_bytes > shutil.disk_usage(folder).free + num_removable:
        return False  # they would go in vain
    while raw_files and num_bytes > shutil.disk_usage(folder).free:
        _remove_all([raw_files.pop()])
    return num_bytes <= shutil.disk_usage(folder).free


def _remove_left_behind(folder: Path) -> None:
    """Remove what killed processes left half done."""
    for part in folder.glob(f".*{_PART}"):
        # Open for writing: NFS locks nothing else for one alone, and no part would ever go.
        with contextlib.suppress(OSError), open(part, "r+b", opener=open_plain) as file:
            if _is_left_behind(file.fileno()):
                part.unlink()


def _make_part(path: Path) -> tuple[int, str]:
    """Handle and name of a new file beside a raw one, to become it."""
    while True:
        # A name of its own: two starts may decode the same folder at the same time.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=_PART)
        try:
            _mark_as_in_use(handle)
            # Else another start took it for one left behind, in the moment before it was locked.
            if os.path.lexists(name):
                return handle, name
        except BaseException:
            discard(Path(name))
            os.close(handle)
            raise
        os.close(handle)


def _mark_as_in_use(handle: int) -> None:
    """Lock a file under way, so that no other start takes it for one that was left behind."""
    try:
        # With a wait for another start that looks at it, which takes a moment.
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise


def _is_left_behind(handle: int) -> bool:
    """Whether nobody is writing a file; without flock, whether nobody has for a day."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        is_old = time.time() - os.fstat(handle).st_mtime > _OLD_SECONDS
        return error.errno in NO_FLOCK and is_old
    return True
