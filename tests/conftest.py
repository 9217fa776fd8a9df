"""Shared by all tests. No tests/__init__.py: see CONTRIBUTING, 'one copy of the package'."""

import contextlib
import ctypes
import dataclasses
import gc
import json
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

if not torch.cuda.is_available():
    # Before mien.kernels is imported: without a GPU, tests interpret the Triton kernels.
    os.environ["TRITON_INTERPRET"] = "1"

from emulator import ORDERS, Emulator, build
from oracle_numbers import ORACLE, ROOT, lpips_linear_weights, lpips_trunk_weights, named_folder

from mien import models
from mien.benchmarks.bench_step import OneBatch, make_batch
from mien.core.config import Config, from_dict, merge
from mien.core.faces.synthetic import draw_folder
from mien.core.losses import lpips
from mien.core.training.build import build_model, build_step
from mien.core.training.step import TrainStep
from mien.kernels import dispatch
from mien.models.autoencoder import Autoencoder

EMULATES_ALL = os.environ.get("MIEN_EMULATE") == "all"
FACES = named_folder("MIEN_FACES", ROOT.parent / "shared/faces")
FACE_SETS = sorted(
    path.name for path in (FACES.iterdir() if FACES else ()) if path.is_dir() and path.name != "bad"
)
"""Folders of real faces; `bad`, where it is, holds what is broken, and good faces of all sizes."""

CPU = torch.device("cpu")


def tiny_options(name: str) -> dict[str, Any]:
    """Options of the smallest model of a family."""
    options = dataclasses.asdict(models.family(name).tiny)
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
    }


def tiny_config(settings: dict[str, dict[str, Any]]) -> Config:
    """Settings of a short training of `original`, 8 wide, but for those that are given."""
    tiny: dict[str, dict[str, Any]] = {
        "train": {"batch_size": 2, "seed": 1},
        "optimizer": {"learning_rate": 1e-3, "overlap": "off"},
    }
    if "model" not in settings:
        tiny["model"] = {"trainer": "original", "options": {"width": 8}}
    return from_dict(merge(tiny, settings))


def tiny_step(
    settings: dict[str, dict[str, Any]],
    device: torch.device = CPU,
    *,
    model: Autoencoder | None = None,
    streams: bool = False,
) -> tuple[TrainStep, OneBatch]:
    """A step as training builds it, and a source of one batch for it.

    Args:
        settings: Those that are not `tiny_config`'s, by section.
        device: Device on which it trains.
        model: Trained in place; None: a new one by the settings.
        streams: Whether a GPU runs both decoders at the same time.
    """
    streams_settings = {"train": {"decoder_streams": "two" if streams else "one"}}
    config = tiny_config(merge(settings, streams_settings))
    if model is None:
        model, _ = build_model(config, device)
    step = build_step(config, model, device)
    compute = step.update.precision.compute
    return step, OneBatch(make_batch(model, config.train.batch_size, device, compute))


def train_words(sides: Sequence[Path], model_dir: Path, *more: str) -> list[str]:
    """Command line that trains a narrow `lightweight` on the CPU; words that follow weigh more.

    Previews of 14 faces a side would take longer than the iterations between them.
    """
    # Given twice, a flag of faces would add a folder to the first one.
    faces = [
        (flag, side) for flag, side in zip(("-A", "-B"), sides, strict=True) if flag not in more
    ]
    return [
        *("train", *(str(word) for pair in faces for word in pair), "-m", str(model_dir)),
        *("-t", "lightweight", "--set", "model.options.width=8", "--device", "cpu"),
        *("--set", "preview.preview_images=2", *more),
    ]


def json_events(text: str) -> list[dict[str, Any]]:
    """Events that a command printed as JSON, one a line."""
    return [json.loads(line) for line in text.splitlines()]


def saved_tensors(model_dir: Path, name: str = "model") -> dict[str, torch.Tensor]:
    """Of the save in use: its `model` or its `optimizer`."""
    generation = json.loads((model_dir / "state.json").read_text())["generation"]
    return load_file(model_dir / "generations" / generation / f"{name}.safetensors")


def assert_same_bits(one: Path, two: Path) -> None:
    """Two model folders whose weights and optimizer are the same, bit for bit."""
    for name in ("model", "optimizer"):
        ours, theirs = saved_tensors(one, name), saved_tensors(two, name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{name} {key}"


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory):
    """All files of the lpips losses, named as they are published."""
    folder = tmp_path_factory.mktemp("lpips")
    for trunk in lpips.TRUNKS.values():
        rest = {"classifier.1.weight": torch.zeros(2, 2)}
        torch.save(lpips_trunk_weights(trunk) | rest, folder / f"{trunk.file}-0123abcd.pth")
        torch.save(lpips_linear_weights(trunk), folder / f"{trunk.linear_file}.pth")
    torch.save({}, folder / "vgg16_bn-0123abcd.pth")  # of another network
    return str(folder)


@pytest.fixture
def oracle_dir() -> Path:
    if ORACLE is None:
        pytest.skip("no oracle: set MIEN_ORACLE")
    return ORACLE


@pytest.fixture
def oracle(oracle_dir):
    """Load one file of the oracle, or skip the test where the folder lacks it."""

    def load(name: str):
        path = oracle_dir / name
        if not path.exists():
            pytest.skip(f"the oracle {oracle_dir} has no {name}")
        return np.load(path, allow_pickle=False)

    return load


@pytest.fixture
def oracle_paths(oracle_dir):
    """List the files of the oracle that match a pattern, or skip the test where none does."""

    def listed(pattern: str) -> list[Path]:
        paths = sorted(oracle_dir.glob(pattern))
        if not paths:
            pytest.skip(f"the oracle {oracle_dir} has no {pattern}")
        return paths

    return listed


@pytest.fixture
def faces_dir() -> Path:
    if FACES is None:
        pytest.skip("no real faces: set MIEN_FACES")
    return FACES


@pytest.fixture
def specimens(faces_dir) -> dict[str, Path]:
    """Files of the broken specimens by their names, or skip the test where there are none."""
    paths = {path.name: path for path in sorted((faces_dir / "bad").glob("*")) if path.is_file()}
    if not paths:
        pytest.skip(f"{faces_dir} has no bad specimens")
    return paths


@pytest.fixture
def at_end_of_memory() -> Iterator[Callable[[bytes], int]]:
    """Address of a copy of up to 4096 bytes, behind which there is a page nobody may touch."""
    libc = ctypes.CDLL(None)
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory:
        behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE
        page = (ctypes.c_void_p(behind), mmap.PAGESIZE)
        assert libc.mprotect(*page, 0) == 0

        def put(content: bytes) -> int:
            memory[mmap.PAGESIZE - len(content) : mmap.PAGESIZE] = content
            return behind - len(content)

        yield put
        libc.mprotect(*page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.fixture(scope="session")
def sides(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of 26 drawn faces of A and of B, drawn once for all tests: not to be changed."""
    root = tmp_path_factory.mktemp("drawn")
    for side in "ab":
        draw_folder(root / side, identity=side, count=26, size_px=96)
    return root / "a", root / "b"


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Spare collections the objects of what is imported by now: training collects at each end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _environment(tmp_path_factory):
    """Give mien a state of its user that is this session's, and let it keep faces on full disks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("MIEN_DISK_RESERVE_MIB", "0")
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """torch.empty gives NaN, so a kernel that leaves part of its output unwritten fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_device(device):
    """Where Triton kernels run in this test: on the GPU, else in Triton's interpreter."""
    if device == "cuda":
        yield device
        return
    with dispatch.interpreted():
        yield device


@pytest.fixture(scope="session")
def emulator(pytestconfig) -> Emulator:
    """mien's CUDA kernels on the CPU; built at the first use, and again when a source changes."""
    return Emulator(build(pytestconfig.cache.mkdir("cuda_on_cpu")))


@pytest.fixture
def emulated(request):
    """A context in which libmien's operations on tensors of the CPU run the emulated kernels.

    The order of their threads is another from test to test.
    """

    @contextlib.contextmanager
    def running():
        emulator = request.getfixturevalue("emulator")
        seed = zlib.crc32(request.node.nodeid.encode())
        emulator.set_order(ORDERS[seed % len(ORDERS)], seed)
        with emulator.running():
            yield

    return running


@pytest.fixture(params=["threads", "emulated"])
def processor(request, emulated):
    """What runs libmien's operations on tensors of the CPU: its threads or the emulated kernels."""
    with emulated() if request.param == "emulated" else contextlib.nullcontext():
        yield


@pytest.fixture(params=["threads", "emulated"] if EMULATES_ALL else ["threads"])
def processor_on_request(request, emulated):
    """As `processor`, for tests that take the emulated kernels long: with MIEN_EMULATE=all."""
    with emulated() if request.param == "emulated" else contextlib.nullcontext():
        yield


@pytest.fixture
def same_algorithms():
    """cuDNN chooses by rule, not by time, so that two runs can be compared bit by bit."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.deterministic = False


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process waits for the last of them."""
    slow = {item.path for item in items if "slow" in item.keywords}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
