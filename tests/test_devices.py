"""Work runs on the device of its tensors, and of the session, whichever device is current."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mien.core.config import Config, TrainConfig
from mien.core.training import devices, prepare
from mien.core.training.resolve import Overrides
from mien.kernels import (
    bias_act,
    dense_norm,
    dense_update,
    enlarge,
    gradient_norm,
    native,
    norm_history,
    optimize,
    scalars_update,
    to_image,
)
from mien.kernels.dense import dense
from mien.kernels.draw import Ranges, draw
from mien.kernels.norm_history import new_history
from mien.kernels.optimizer_rules import CLIPPINGS, RULES, Clipping, Rule
from mien.kernels.optimizer_scalars import new_scalars
from mien.kernels.tensor_table import TensorTable

TRITON = [
    *(bias_act, to_image, enlarge),
    *(gradient_norm, norm_history, scalars_update, optimize, dense_norm, dense_update),
]


class Current:
    """A current device, as torch.cuda has it, of as many GPUs as there are to be."""

    def __init__(self, monkeypatch, num_gpus=2):
        self.index = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)
        monkeypatch.setattr(torch.cuda, "device", self.change)
        monkeypatch.setattr(torch.cuda, "current_stream", self.stream)

    @contextlib.contextmanager
    def change(self, device):
        before, self.index = self.index, torch.device(device).index
        try:
            yield
        finally:
            self.index = before

    def stream(self, device=None):
        index = self.index if device is None else torch.device(device).index
        return SimpleNamespace(cuda_stream=1000 + index)


def test_a_native_launch_runs_on_the_current_stream_of_its_device(monkeypatch):
    current, calls = Current(monkeypatch), []
    ffi, _ = native.library()

    def record(*args):
        calls.append((current.index, *args[:-1], int(ffi.cast("intptr_t", args[-1]))))
        return 0

    lib = SimpleNamespace(MIEN_OK=0, mien_draw_cuda=record)
    monkeypatch.setattr(native, "library", lambda: (ffi, lib))
    native.launch("draw", torch.device("cuda:1"), "ranges", "job")
    assert calls == [(1, "ranges", "job", 1001)]
    assert current.index == 0


def kernels(module):
    """Names of the Triton kernels of a module."""
    return [name for name in vars(module) if name.endswith("_kernel")]


@pytest.fixture
def guarded(monkeypatch):
    """Kernels launched so far; a launch outside of `torch.cuda.device_of` fails."""
    launched, guards = set(), []

    @contextlib.contextmanager
    def device_of(tensor):
        guards.append(tensor)
        yield
        guards.pop()

    class Guarded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            assert guards, f"{self.name} is launched on whichever device is current"
            launched.add(self.name)
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in TRITON:
        for name in kernels(module):
            guard = Guarded(f"{module.__name__}.{name}", getattr(module, name))
            monkeypatch.setattr(module, name, guard)
    return launched


def test_every_triton_launch_runs_on_the_device_of_its_tensors(triton_device, guarded):
    x = torch.randn(1, 8, 2, 2, device=triton_device, requires_grad=True)
    bias = torch.randn(8, device=triton_device, requires_grad=True)
    bias_act.bias_act(x, bias, negative_slope=0.1).sum().backward()
    bias_act.bias_act_depth_to_space(x, bias, negative_slope=0.1).sum().backward()
    to_image.to_image(x, bias, channels=3).sum().backward()
    enlarge.enlarge(x).sum().backward()
    for kind in CLIPPINGS:
        parameters = [torch.zeros(8, device=triton_device)]
        rule = Rule(name=RULES[0])
        moments = {kind: [torch.zeros_like(parameters[0])] for kind in rule.moments}
        optimize.optimize(
            [torch.ones(8, device=triton_device)],
            TensorTable(parameters, moments),
            new_scalars(triton_device, learning_rate=0.1),
            rule,
            clipping=Clipping(kind, 0.0 if kind == "none" else 1.0),
            history_c=new_history(triton_device, 4) if kind == "autoclip" else None,
        )
    faces, columns = (torch.randn(4, 16, device=triton_device) for _ in range(2))
    weight = torch.zeros(16, 16, device=triton_device, requires_grad=True)
    (stand_in,) = torch.autograd.grad(dense(faces, weight, None), weight, columns)
    moments = {kind: [torch.zeros_like(weight)] for kind in Rule(name=RULES[0]).moments}
    table = TensorTable([weight.detach()], moments, low_rank=[True])
    scalars = new_scalars(triton_device, learning_rate=0.1)
    optimize.optimize([stand_in], table, scalars, Rule(name=RULES[0]))
    assert guarded == {f"{module.__name__}.{name}" for module in TRITON for name in kernels(module)}


def test_no_other_module_launches_triton_kernels():
    files = Path(native.__file__).parent.glob("*.py")
    found = {file.stem for file in files if "_kernel[" in file.read_text()}
    assert found == {module.__name__.rpartition(".")[2] for module in TRITON}


@pytest.fixture
def fit(monkeypatch):
    """Every GPU is one that mien can train on."""
    monkeypatch.setattr(devices, "why_unfit", lambda device: None)
    monkeypatch.setattr(devices, "why_hidden", lambda: None)


@pytest.mark.usefixtures("fit")
@pytest.mark.parametrize(
    ("setting", "num_gpus", "wanted"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda:0"),
        ("cuda:0", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_the_setting_chooses_the_device(monkeypatch, setting, num_gpus, wanted):
    Current(monkeypatch, num_gpus)
    assert devices.choose_device(setting, pytest.fail) == torch.device(wanted)


@pytest.mark.usefixtures("fit")
@pytest.mark.parametrize(
    ("setting", "num_gpus", "visible", "message"),
    [
        ("cuda", 0, None, r"^train.device is cuda, but there is no Nvidia GPU, or none is shown"),
        ("cuda:1", 0, "", r"^train.device is cuda:1, but there is no Nvidia GPU, or none is shown"),
        ("cuda:2", 2, None, r"cuda:2, but the last GPU is cuda:1; use --device cuda:0 to cuda:1$"),
        ("cuda:1", 1, "3", r"the last GPU is cuda:0 with CUDA_VISIBLE_DEVICES=3; use --device "),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, setting, num_gpus, visible, message):
    Current(monkeypatch, num_gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=message):
        devices.choose_device(setting, pytest.fail)


@pytest.mark.usefixtures("fit")
def test_a_session_makes_its_device_current(monkeypatch, tmp_path, sides):
    current = Current(monkeypatch)
    monkeypatch.setattr(prepare, "_build", lambda *_: current.index)
    monkeypatch.setattr(prepare, "_remember_paths", lambda *_: None)
    data = {"input_a": str(sides[0]), "input_b": str(sides[1])}
    given = {"save": {"model_dir": str(tmp_path)}, "train": {"device": "cuda:1"}, "data": data}
    reporter = SimpleNamespace(warning=pytest.fail)
    with prepare.open_setup(Overrides(given), reporter) as index:
        assert index == 1
    assert current.index == 0


def test_draw_refuses_a_result_on_another_device():
    first, out = torch.zeros(1, dtype=torch.int64), torch.empty(1, 808, dtype=torch.uint8)
    options = {"seed": 0, "count": 1, "num_faces": [3], "size_px": 64}
    with pytest.raises(ValueError, match=r"^out must be on cpu, got meta$"):
        draw(Ranges(), first=first, out=out.to("meta"), **options)
    with pytest.raises(ValueError, match=r"^first must be on meta, got cpu$"):
        draw(Ranges(), first=first, device="meta", **options)


@pytest.mark.parametrize("setting", ["cuda:N", "cuda:", "cuda:01", "cuda:1000", "cuda:-1"])
def test_a_device_that_has_no_such_name_is_refused(setting):
    assert Config(train=TrainConfig(device="cuda:12")).train.device == "cuda:12"
    with pytest.raises(ValueError, match=r"^train.device must be one of auto, cpu, cuda, cuda:N"):
        TrainConfig(device=setting)
