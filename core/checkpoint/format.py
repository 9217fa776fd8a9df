"""One complete save of a model: its files, and its manifest that vouches for them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ... import __version__, models
from ..config import MAX_TOML_BYTES, from_dict, is_deeper, model_settings, parse_toml
from ..system.durable_files import (
    DamagedError,
    hash_regular,
    open_for_reading,
    read_regular,
    set_permissions,
    sync_file,
    write_file,
)
from ..system.printable import plural

MANIFEST_SCHEMA = 1
MODEL, OPTIMIZER, EMA, STATE, CONFIG = (
    "model.safetensors",
    "optimizer.safetensors",
    "ema.safetensors",
    "state.json",
    "config.toml",
)
MANIFEST = "manifest.json"
# Forty times the longest state that a run writes, which has 0.4 MiB (`state.Session`).
MAX_JSON_BYTES = 16 << 20
# Far from Python's limit of recursion: what was read is copied and written again by recursion.
MAX_JSON_DEPTH = 32
# Twelve digits, as the name of a generation has at most.
MAX_COUNT = 10**12 - 1

MAX_TENSOR_NAME = 256
_MAX_TENSOR_BYTES = 64 << 30
"""Largest file of tensors, in bytes, where nothing says how large the model is."""

_HEADER_BYTES = 100 << 20
"""Bytes that names and shapes take at most: the library reads no longer header."""

# The library checks header, offsets and sizes before it makes anything; of a number format that
# torch does not have, or an edge beyond its integers, it says the other two.
_NO_TENSORS = (SafetensorError, KeyError, TypeError)
_INVALID = "it is not a valid safetensors file"
_NUMBER_FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Their names in a safetensors file."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Generation:
    """One complete save, read back and verified."""

    name: str
    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] | None
    state: dict[str, Any]
    config: dict[str, Any] | None
    ema: dict[str, Tensor] | None = None
    """Averages of the weights that were trained, where they were kept."""


@dataclass(frozen=True)
class Manifest:
    name: str
    sequence: int
    iterations: int
    trainer: str
    run_id: str
    mien_version: str
    files: dict[str, tuple[int, str]]


def tensor_files(
    model: Tensors, optimizer: Tensors | None, ema: Tensors | None = None
) -> dict[str, Tensors]:
    """Tensors of a save by the name of the file that holds them."""
    parts = {MODEL: model, OPTIMIZER: optimizer, EMA: ema}
    return {name: tensors for name, tensors in parts.items() if tensors is not None}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file and flush it to the disk.

    Raises:
        ValueError: A reader would refuse a name or a number format.
        OSError: The disk refuses.
    """
    try:
        _refuse_odd(tensors)
    except DamagedError as error:
        raise ValueError(f"{path.name} could not be read again: {error}") from error
    # The library writes memory as it lies, and refuses what is strided.
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(plain, path, metadata=metadata)
    except SafetensorError as error:
        # The library tells a disk's refusal in its text alone; the number has a remedy.
        cause = re.search(r"\(os error (\d+)\)", str(error))
        if cause is None:
            raise
        number = int(cause[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    # The library lets only the owner read it.
    set_permissions(path, path.parent.stat().st_mode & 0o666)
    # The library does not flush: a power cut would leave the right size, and zeros.
    sync_file(path)


def tensor_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """Content of a safetensors file, piece by piece, its numbers where they lie in memory.

    The library copies them twice before it writes. The layout: bytes of the header as 8 of little
    endian, the header as JSON, the numbers; the widest first, so that all lie at multiples of their
    size.
    """
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    pieces: list[bytes | memoryview] = []
    end = 0
    for name, tensor in sorted(plain.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NUMBER_FORMATS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        # As bytes, since NumPy has no bf16; flat, since a tensor of no dimension has no view of
        # another width.
        pieces.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    # Spaces, as the format allows: so the numbers begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def metadata_of(state: dict[str, Any]) -> dict[str, str]:
    """What every tensor file says about itself."""
    for key in ("run_id", "trainer", "iterations"):
        if key not in state:
            raise ValueError(f"the state to save has no {key}")
    return {
        "format": "pt",
        "mien_version": __version__,
        "run_id": state["run_id"],
        "kind": "synthetic face model",
        "trainer": state["trainer"],
        "iterations": str(state["iterations"]),
    }


def write_manifest(
    folder: Path, state: dict[str, Any], file_names: frozenset[str], sequence: int
) -> None:
    """Write down the size and SHA-256 of a generation's files, and its place in the order."""
    body = {
        "schema": MANIFEST_SCHEMA,
        "mien_version": __version__,
        "sequence": sequence,
        "iterations": state["iterations"],
        "run_id": state["run_id"],
        "trainer": state["trainer"],
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in sorted(file_names)
        },
    }
    # A manifest that was cut or edited must not vouch for anything.
    content = body | {"digest": digest_of(body)}
    write_file(folder / MANIFEST, json.dumps(content, indent=1).encode())


def sha256_of(path: Path) -> str:
    with open_for_reading(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(body: dict[str, Any]) -> str:
    # Sorted, so that a manifest that somebody has put in another order still vouches.
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# Reading: everything may be damaged or made by a stranger


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a safetensors file, and the family that it names.

    Raises:
        DamagedError: It is none.
        OSError: The disk refuses.
    """
    try:
        with open_tensors(path) as stream:
            # By its keys: what the library opens is no mapping, and cannot be iterated.
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            trainer = (stream.metadata() or {}).get("trainer")
    except _NO_TENSORS as error:
        raise DamagedError(_INVALID) from error
    _refuse_odd(tensors)
    # A word or nothing: it would stand in a message.
    return tensors, trainer if _is_word(trainer) else None


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open in the library, which maps its pages: none is in memory twice.

    Raises:
        DamagedError: It is none.
        OSError: The disk refuses.
    """
    with open_for_reading(path, follows_links=True) as file, ExitStack() as stack:
        try:
            try:
                tensors = stack.enter_context(_mapped(file))
            except OSError:  # the disk maps no files, or refuses the next call too, which says why
                copy = stack.enter_context(open(os.memfd_create("tensors"), "wb"))
                shutil.copyfileobj(file, copy)
                copy.flush()
                tensors = stack.enter_context(_mapped(copy))
            yield tensors
        except SafetensorError as error:
            raise DamagedError(_INVALID) from error


def _mapped(file: BufferedIOBase) -> Any:
    # By its number: the library takes no path that is not UTF-8.
    return safetensors.safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt")


def _parse_tensors(name: str, content: bytes) -> dict[str, Tensor]:
    try:
        # Of the bytes whose hash was compared: a file that is read twice may have changed between.
        return safetensors.torch.load(content)
    except _NO_TENSORS as error:
        raise DamagedError(f"{name} is not a valid safetensors file") from error


def parse_json(name: str, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is not valid JSON") from error
    if not isinstance(values, dict):
        raise DamagedError(f"{name} is not a JSON object")
    if is_deeper(values, MAX_JSON_DEPTH):
        raise DamagedError(f"{name} is not one of mien's: it is nested too deeply")
    return values


def _parse_toml(content: bytes) -> dict[str, Any]:
    try:
        return parse_toml(content)
    except ValueError as error:
        raise DamagedError(f"{CONFIG} is not valid TOML: {error}") from error


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in a model folder, as they are written there; None where there are none.

    Raises:
        ValueError: What is there is not valid.
    """
    path = folder / CONFIG
    # A link that leads nowhere is there, too, and refused when it is read.
    if not os.path.lexists(path):
        return None
    try:
        return _parse_toml(read_regular(path, MAX_TOML_BYTES))
    except DamagedError as damage:
        raise ValueError(f"{damage}, in {folder}; mend or remove it") from damage
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; mend that first") from error


def _refuse_constant(word: str) -> None:
    # NaN and Infinity are Python's own words, and no comparison with a limit refuses a NaN.
    raise ValueError(f"{word} is no JSON")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; DamagedError where there is none."""
    return parse_json(path.name, read_regular(path, MAX_JSON_BYTES))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a generation, checked against its own digest."""
    body = read_json(folder / MANIFEST)
    if body.pop("digest", None) != digest_of(body):
        raise DamagedError(f"{MANIFEST} does not match its own SHA-256")
    schema = body.get("schema")
    # Before all other rules: a newer version may have changed them, and is no damage.
    if isinstance(schema, int) and schema > MANIFEST_SCHEMA:
        raise ValueError(
            f"{folder} was saved by a newer version of mien ({body.get('mien_version')}, this is "
            f"{__version__}); update mien"
        )
    # No other names than these, since each is joined to a path.
    files, rest = body.get("files"), (body.get("sequence"), body.get("iterations"))
    known = {MODEL, OPTIMIZER, EMA, STATE, CONFIG}
    # Whatever the digest says: anybody can compute one over what he likes.
    good = (
        schema == MANIFEST_SCHEMA
        and isinstance(files, dict)
        and {MODEL, STATE} <= files.keys() <= known
        and all(_is_file_entry(entry) for entry in files.values())
        # `type`, since true and false are whole numbers to `isinstance`.
        and all(type(number) is int and 0 <= number <= MAX_COUNT for number in rest)
        and all(_is_word(body.get(key)) for key in ("trainer", "run_id", "mien_version"))
    )
    if not good:
        raise DamagedError(f"{MANIFEST} is not one of mien's")
    return Manifest(
        name=folder.name,
        sequence=body["sequence"],
        iterations=body["iterations"],
        trainer=body["trainer"],
        run_id=body["run_id"],
        mien_version=body["mien_version"],
        files={name: (entry["size"], entry["sha256"]) for name, entry in body["files"].items()},
    )


def _is_word(value: Any, max_characters: int = 64) -> bool:
    """Whether it is a short text that can stand in a line."""
    return isinstance(value, str) and len(value) <= max_characters and value.isprintable()


def _is_file_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and entry["size"] >= 0
        and isinstance(entry.get("sha256"), str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


def _read_verified(folder: Path, name: str, manifest: Manifest, max_bytes: int) -> bytes:
    """The bytes of one file, equal in size and SHA-256 to what was written."""
    size, sha256 = manifest.files[name]
    # By the manifest's word, before memory is taken for it.
    _refuse_large(name, size, max_bytes)
    content = read_regular(folder / name, size)
    if len(content) != size:
        raise DamagedError(f"{name} has {len(content)} {plural(len(content), 'byte')} of {size}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedError(f"{name} does not match its SHA-256")
    return content


def _refuse_large(name: str, size: int, max_bytes: int) -> None:
    """Refuse a size that no save has, before anything of that size is read: a file of holes takes
    no room on a disk."""
    if size > max_bytes:
        raise DamagedError(f"{name} has {size} bytes, more than the {max_bytes} that it can need")


def read_tensors(folder: Path, name: str, manifest: Manifest, max_bytes: int) -> dict[str, Tensor]:
    """The tensors in a file of a generation.

    Args:
        folder: The generation's.
        name: `MODEL`, `OPTIMIZER` or `EMA`.
        manifest: The generation's.
        max_bytes: Bytes of the largest file that such a model has: `most_tensor_bytes`.

    Raises:
        DamagedError: The file is not what was written, or nothing that such a model has.
    """
    tensors = _parse_tensors(name, _read_verified(folder, name, manifest, max_bytes))
    _refuse_odd(tensors)
    return tensors


def most_tensor_bytes(config: dict[str, Any] | None) -> int:
    """Bytes of the largest file of tensors that a model with these settings can have.

    No optimizer keeps more than three numbers a parameter beside the sums of accumulation. Settings
    that are not valid here, of another version of mien maybe, say nothing.
    """
    try:
        if config is None:
            return _MAX_TENSOR_BYTES
        known = from_dict(config)
        model = models.meta_model(known.model.trainer, **model_settings(known))
    except ValueError:
        return _MAX_TENSOR_BYTES
    return _HEADER_BYTES + 4 * sum(tensor.nbytes for tensor in model.state_dict().values())


def _refuse_odd(tensors: dict[str, Tensor]) -> None:
    """Names stand in messages and in files; packed numbers are nothing that a model has."""
    if not all(tensor.dtype in _NUMBER_FORMATS for tensor in tensors.values()):
        raise DamagedError("it holds a tensor in a number format that no model has")
    if not all(_is_word(name, MAX_TENSOR_NAME) for name in tensors):
        raise DamagedError("it names a tensor by more than a line of text")


def read_state(folder: Path, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The state and, where it was saved, the settings of a generation."""
    state = parse_json(STATE, _read_verified(folder, STATE, manifest, MAX_JSON_BYTES))
    if CONFIG not in manifest.files:
        return state, None
    return state, _parse_toml(_read_verified(folder, CONFIG, manifest, MAX_TOML_BYTES))


def read_generation(folder: Path, manifest: Manifest) -> Generation:
    """Read a whole generation, the small files first."""
    # They say how large the tensors can be, which bounds what is read of them.
    state, config = read_state(folder, manifest)
    max_bytes = most_tensor_bytes(config)
    tensors = {
        name: read_tensors(folder, name, manifest, max_bytes)
        for name in (OPTIMIZER, EMA, MODEL)
        if name in manifest.files
    }
    return Generation(
        name=manifest.name,
        path=folder,
        model=tensors[MODEL],
        optimizer=tensors.get(OPTIMIZER),
        state=state,
        config=config,
        ema=tensors.get(EMA),
    )


def check_generation(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest, holding none of the tensors in memory.

    Raises:
        DamagedError: At the first file that is not what was written.
    """
    _, config = read_state(folder, manifest)
    limit = most_tensor_bytes(config)
    for name, (size, sha256) in manifest.files.items():
        _refuse_large(name, size, limit)
        found_size, found_sha256 = hash_regular(folder / name, size)
        if found_size != size:
            raise DamagedError(f"{name} has {found_size} {plural(found_size, 'byte')} of {size}")
        if found_sha256 != sha256:
            raise DamagedError(f"{name} does not match its SHA-256")
