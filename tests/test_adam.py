"""Adam over many tensors: values, non-finite steps, clipping, the loss scale, addresses."""

import ast
import importlib
import math

import numpy as np
import pytest
import torch

from mien.kernels import adam, reference
from mien.kernels import tables as tables_module
from mien.kernels.adam import (
    BETA_1_POWER,
    BETA_2_POWER,
    FACTOR,
    FINITE,
    GOOD_STEPS,
    LAUNCHES,
    LEARNING_RATE,
    NORM,
    SCALE,
    SKIPPED,
    STEP,
    _control_op,
    _update_op,
    new_control,
    prepare,
    update,
)
from mien.kernels.tables import Tables

adam_module = importlib.import_module("mien.kernels.adam")  # the package has the function
SETTINGS = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
RAGGED = [(1,), (7,), (0,), (1024,), (16385,), (3, 5, 3, 3)]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=["kernel", "plain"])
def where(request, device):
    """Both ways: the kernels, on a GPU or interpreted, and plain PyTorch on the CPU."""
    return request.getfixturevalue("triton_device") if request.param == "kernel" else "cpu"


class Model:
    """Parameters, moments and copies of the given shapes, and gradients for any step."""

    def __init__(self, shapes, device, *, copies=None, channels_last=False, seed=0, **options):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.parameters = [self._random(shape) for shape in shapes]
        if channels_last:
            self.parameters = [
                each.to(memory_format=torch.channels_last) if each.ndim == 4 else each
                for each in self.parameters
            ]
        self.means = [torch.zeros_like(each) for each in self.parameters]
        self.squares = [torch.zeros_like(each) for each in self.parameters]
        self.copies = [each.to(copies) for each in self.parameters] if copies else []
        self.tables = Tables(self.parameters, self.means, self.squares, self.copies, **options)

    def _random(self, shape):
        return torch.randn(shape, generator=self.generator).to(self.device)

    def gradients(self, dtype=FP32, size=1e-2):
        return [
            (size * self._random(each.shape)).to(dtype).requires_grad_(False)
            for each in self.parameters
        ]

    def step(self, gradients, control, **settings):
        adam(
            self.parameters,
            gradients,
            self.means,
            self.squares,
            self.copies,
            control,
            tables=self.tables,
            **SETTINGS | settings,
        )

    def tensors(self):
        return [*self.parameters, *self.means, *self.squares, *self.copies]

    def doubles(self):
        """Parameters, means and squares in float64 on the CPU, for the reference."""
        lists = (self.parameters, self.means, self.squares)
        return [[each.double().cpu() for each in tensors] for tensors in lists]


def _steps_apart(parameters, expected, learning_rate):
    """The largest difference, in steps of Adam (a weight moves by about the learning rate)."""
    pairs = zip(parameters, expected, strict=True)
    apart = [(a.double().cpu() - b).abs().max() for a, b in pairs if a.numel()]
    return float(max(apart)) / learning_rate


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("gradients", [FP32, BF16, FP16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_twenty_steps_equal_the_reference(where, gradients, weight_decay):
    """Weights near zero and a large rate, so that fp32 weights do not hide what the step is."""
    learning_rate = 0.1
    model = Model(RAGGED, where)
    for each in model.parameters:
        each.mul_(1e-3)
    control = new_control(where, learning_rate=learning_rate)
    parameters, means, squares = model.doubles()
    for step in range(1, 21):
        given = model.gradients(gradients)
        model.step(given, control, weight_decay=weight_decay)
        parameters, means, squares = reference.adam(
            parameters,
            [each.double().cpu() for each in given],
            means,
            squares,
            learning_rate=learning_rate,
            step=step,
            weight_decay=weight_decay,
            **SETTINGS,
        )
        # fp32 rounds a weight by up to 2^-24 of it, and of the largest, 2, that is 1.2e-6 steps.
        apart = _steps_apart(model.parameters, parameters, learning_rate)
        assert apart < 1e-6 * step + 1.2e-6, f"step {step}: {apart}"
    for ours, want in ((model.means, means), (model.squares, squares)):
        for a, b in zip(ours, want, strict=True):
            # Rounded 20 times; a mean is 0.04 at most and may have cancelled: measured 1.3e-9.
            torch.testing.assert_close(a.double().cpu(), b, rtol=2e-6, atol=3e-9)
    now = control.tolist()
    assert now[STEP] == 20
    assert now[SKIPPED] == 0
    assert now[BETA_1_POWER] == pytest.approx(0.9**20, rel=1e-14)
    assert now[BETA_2_POWER] == pytest.approx(0.999**20, rel=1e-14)


def test_a_small_first_step_is_exact(where):
    """beta_2 as a float32 would be off by 1e-5 of the first step."""
    model = Model([(64,)], where)
    for each in model.parameters:
        each.zero_()
    control = new_control(where, learning_rate=1.0)
    given = model.gradients()
    model.step(given, control, epsilon=1e-12)
    torch.testing.assert_close(model.parameters[0], -given[0].sign(), rtol=1e-6, atol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["adam", "adamw", "adamw_wd", "adam_global_norm"])
def test_the_oracle(where, oracle, name):
    data = oracle(f"optim/{name}.npz")
    config = ast.literal_eval(str(data["config"]))
    assert config["gradient_accumulation"] == 1
    assert data["warmup"] <= 0
    settings = {
        "beta_1": config["ada_beta_1"],
        "beta_2": config["ada_beta_2"],
        "epsilon": 10.0 ** config["epsilon_exponent"],
        "weight_decay": config["weight_decay"],
    }
    if config["gradient_clipping"] == "global_norm":
        settings["max_norm"] = config["clipping_value"]
    model = Model([data["k0"].shape, data["b0"].shape], where, decays=[True, False])
    for parameter, start in zip(model.parameters, ("k0", "b0"), strict=True):
        parameter.copy_(torch.from_numpy(data[start]))
    control = new_control(where, learning_rate=0.0)
    for step, rate in enumerate(data["lr_used"]):
        control[LEARNING_RATE] = rate
        gradients = [torch.from_numpy(data[key][step]).to(where) for key in ("grad_k", "grad_b")]
        model.step(gradients, control, **settings)
        for parameter, key in zip(model.parameters, "kb", strict=True):
            message = f"step {step} {key}"
            ours = parameter.cpu().numpy()
            np.testing.assert_allclose(ours, data[key][step], rtol=0, atol=2e-6, err_msg=message)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gradients", [FP32, BF16, FP16])
def test_a_step_that_is_not_finite_changes_nothing(where, gradients, poison):
    model = Model(RAGGED, where, copies=BF16)
    control = new_control(where, learning_rate=1e-2)
    model.step(model.gradients(gradients), control)
    before, state = [each.clone() for each in model.tensors()], control.tolist()
    bad = model.gradients(gradients)
    bad[4][16384] = poison  # the last element, in a chunk of its own
    model.step(bad, control)
    assert _equal(model.tensors(), before)
    now = control.tolist()
    assert not math.isfinite(now[NORM])
    assert (now[SKIPPED], now[FACTOR], now[FINITE]) == (1, 0, 0)
    for index in (LEARNING_RATE, STEP, BETA_1_POWER, BETA_2_POWER, SCALE, GOOD_STEPS):
        assert now[index] == state[index]
    model.step(model.gradients(gradients), control)
    assert control[STEP] == 2
    assert control[FINITE] == 1
    assert not _equal(model.parameters, before[: len(RAGGED)]), "training did not go on"


def test_the_loss_scale(where):
    """Halved after a step that is not finite, doubled after 2,000 that are."""
    model = Model([(8,)], where)
    control = new_control(where, learning_rate=1e-2, scale=65536.0)
    good, bad = model.gradients(), model.gradients()
    bad[0][3] = math.inf
    control[GOOD_STEPS] = 1998
    model.step(good, control, dynamic_scale=True)
    assert (control[SCALE], control[GOOD_STEPS]) == (65536, 1999)
    model.step(good, control, dynamic_scale=True)
    assert (control[SCALE], control[GOOD_STEPS]) == (131072, 0)
    assert control[FACTOR] == 1 / 65536, "the gradients had the scale of before"
    model.step(good, control, dynamic_scale=True)
    model.step(bad, control, dynamic_scale=True)
    assert (control[SCALE], control[GOOD_STEPS], control[SKIPPED]) == (65536, 0, 1)
    model.step(bad, control)
    assert control[SCALE] == 65536, "the scale moved though it is not dynamic"


def test_the_scale_is_undone(where):
    """A scale that is a power of two leaves no trace: the same bits as without."""
    ends = []
    for scale in (1.0, 1024.0):
        model = Model(RAGGED, where)
        control = new_control(where, learning_rate=1e-2, scale=scale)
        for _ in range(3):
            model.step([scale * each for each in model.gradients()], control, max_norm=0.5)
        ends.append([*model.tensors(), control[[NORM, STEP]]])
    assert _equal(*ends)


@pytest.mark.parametrize("gradients", [FP32, BF16])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_norm_and_clip(where, gradients, max_norm):
    model = Model([*RAGGED, (40000,)], where)
    control = new_control(where, learning_rate=1e-2, scale=4.0)
    given = model.gradients(gradients)
    before = [each.clone() for each in given]
    model.step(given, control, max_norm=max_norm)
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in given)) / 4
    assert float(control[NORM]) == pytest.approx(norm, rel=2e-7)  # measured 3e-8
    factor = min(1, max_norm / (norm + 1e-6)) / 4
    assert float(control[FACTOR]) == pytest.approx(factor, rel=2e-7)
    assert _equal(given, before), "the gradients were written to"
    for mean, gradient in zip(model.means, given, strict=True):
        torch.testing.assert_close(mean, 0.1 * factor * gradient.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradients", [FP32, BF16])
def test_a_gradient_may_lie_in_another_way(where, gradients):
    """channels_last parameters move alike by gradients of either layout and by misaligned ones."""
    shapes, ends = [(4, 3, 5, 5), (6, 1, 1, 1), (2, 8, 1, 3), (9,)], []
    for layout in ("same", "contiguous", "misaligned"):
        model = Model(shapes, where, copies=BF16, channels_last=True)
        control = new_control(where, learning_rate=1e-2)
        for _ in range(2):
            given = model.gradients(gradients)
            if layout == "same":
                given = [
                    torch.empty_like(parameter, dtype=gradients).copy_(each)
                    for each, parameter in zip(given, model.parameters, strict=True)
                ]
            elif layout == "misaligned":
                given = [
                    torch.cat([each.new_zeros(1), each.flatten()])[1:].view(each.shape)
                    for each in given
                ]
            model.step(given, control)
        assert all(
            a.stride() == b.stride() for a, b in zip(model.parameters, model.means, strict=True)
        )
        ends.append([*model.tensors(), control])
    assert _equal(ends[0], ends[1])
    assert _equal(ends[0], ends[2])


@pytest.mark.parametrize("copies", [BF16, FP16])
def test_copies_are_the_parameters_rounded(where, copies):
    model = Model([*RAGGED, (2000,)], where, copies=copies)
    control = new_control(where, learning_rate=1e-2)
    for _ in range(2):
        model.step(model.gradients(copies), control, weight_decay=0.1)
    for copy, parameter in zip(model.copies, model.parameters, strict=True):
        if where == "cpu" and copies == BF16:
            # Triton's interpreter truncates to bf16: within one unit in the last place.
            torch.testing.assert_close(copy.float(), parameter, rtol=2**-7, atol=0)
        else:
            assert torch.equal(copy, parameter.to(copies))


def test_plain_copies_are_rounded_to_nearest():
    model = Model(RAGGED, "cpu", copies=BF16)
    model.step(model.gradients(BF16), new_control("cpu", learning_rate=1e-2))
    assert _equal(model.copies, [each.bfloat16() for each in model.parameters])


def test_many_tensors(where):
    """70 of them, as a large model has, some empty; one of several chunks."""
    shapes = [(1 + 37 * i % 190,) for i in range(68)] + [(0,), (2 * 16384 + 24,)]
    model = Model(shapes, where, copies=FP16, decays=[i % 3 == 0 for i in range(70)])
    control = new_control(where, learning_rate=1e-2)
    parameters, means, squares = model.doubles()
    given = model.gradients()
    model.step(given, control, weight_decay=0.1)
    parameters, _, _ = reference.adam(
        parameters,
        [each.double().cpu() for each in given],
        means,
        squares,
        learning_rate=1e-2,
        step=1,
        weight_decay=0.1,
        decays=model.tables.decays,
        **SETTINGS,
    )
    for ours, want in zip(model.parameters, parameters, strict=True):
        torch.testing.assert_close(ours.double().cpu(), want, rtol=2**-23, atol=1e-8)
    assert model.tables.chunks_n3.tolist()[-3:] == [
        [69, 0, 16384],
        [69, 16384, 16384],
        [69, 32768, 24],
    ]


def test_nothing_but_empty_tensors(where):
    model = Model([(0,), (3, 0)], where)
    control = new_control(where, learning_rate=1e-2)
    model.step(model.gradients(), control)
    assert (control[STEP], control[NORM]) == (1, 0)


def test_the_same_bits_twice(where):
    def run():
        model = Model([*RAGGED, (50000,)], where, copies=BF16)
        control = new_control(where, learning_rate=1e-2)
        for _ in range(3):
            model.step(model.gradients(BF16), control, max_norm=0.5, weight_decay=0.01)
        return [*model.tensors(), control]

    assert _equal(run(), run())


def test_a_resumed_run_continues_bit_for_bit(where):
    def run(resumed_at=None):
        model = Model(RAGGED, where)
        control = new_control(where, learning_rate=1e-2, scale=8.0)
        for step in range(6):
            if step == resumed_at:
                saved, control = model, control.clone()
                model = Model(RAGGED, where)
                model.generator = saved.generator
                for new, old in zip(model.tensors(), saved.tensors(), strict=True):
                    new.copy_(old)
            model.step(model.gradients(), control, max_norm=0.5, dynamic_scale=True)
        return [*model.tensors(), control]

    assert _equal(run(), run(resumed_at=3))


def test_prepare_and_update_are_the_two_halves(where):
    ends = []
    for apart in (False, True):
        model = Model(RAGGED, where, copies=FP16)
        control = new_control(where, learning_rate=1e-2)
        for _ in range(2):
            given = model.gradients(FP16)
            if apart:
                betas = {"beta_1": 0.9, "beta_2": 0.999}
                prepare(given, control, model.tables, max_norm=0.1, **betas)
                update(given, control, model.tables, epsilon=1e-8, weight_decay=0.1, **betas)
            else:
                model.step(given, control, max_norm=0.1, weight_decay=0.1)
        ends.append([*model.tensors(), control])
    assert _equal(*ends)


def test_without_tables(where):
    """They are made for the call; parameters that want a gradient are moved as well."""
    parameter = torch.ones(3, 3, device=where, requires_grad=True)
    mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
    control = new_control(where, learning_rate=0.25)
    gradient = torch.full_like(parameter, -1.0)
    adam([parameter], [gradient], [mean], [square], [], control, **SETTINGS)
    torch.testing.assert_close(parameter.detach(), torch.full_like(mean, 1.25))
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_both_ways_agree(triton_device):
    """Kernels and plain PyTorch: a run may begin on one machine and go on on another."""
    ends = []
    for device in (triton_device, "plain"):
        model = Model(RAGGED, "cpu" if device == "plain" else device)
        control = new_control(model.device, learning_rate=1e-2)
        with pytest.MonkeyPatch.context() as patch:
            if device == "plain":
                patch.setattr(adam_module, "uses_triton", lambda tensor: False)
            for _ in range(3):
                model.step(model.gradients(), control, max_norm=0.1)
        ends.append([each.cpu() for each in (*model.tensors(), control)])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_each_gradient_set_is_sent_once(where):
    """Addresses that were seen before cost no copy; older ones give way in turn."""
    model = Model([(8,), (4,)], where)
    rows = model.tables._gradient_rows
    sent = []
    rows._send = lambda slot, addresses: sent.append(slot)
    for step in range(40):
        rows.find((step % 2, 0), again=False)
    assert sent == [0, 1]
    for step in range(2, 18):
        rows.find((step, 0), again=False)
    assert sent == [*range(16), 0, 1]
    rows.find((1, 0), again=False)  # whose slot has been taken
    assert sent[-1] == 2
    assert len(rows.slots) == 16


def test_a_captured_slot_is_never_used_again(where, monkeypatch):
    model = Model([(8,), (4,)], where)
    rows = model.tables._gradient_rows
    eager = rows.find((1, 2), again=False).clone()
    captured = []
    with monkeypatch.context() as patch:
        patch.setattr(tables_module, "is_capturing", lambda device: True)
        for _ in range(2):  # two graphs with gradients at the same place
            captured.append(rows.find((1, 2), again=False))
            assert rows.find((1, 2), again=True).data_ptr() == captured[-1].data_ptr()
        captured.append(rows.find((3, 4), again=True))
    for step in range(100):
        rows.find((step, 7), again=False)
    assert eager.tolist() == [1, 2]
    assert [each.tolist() for each in captured] == [[1, 2], [1, 2], [3, 4]]
    assert len({each.data_ptr() for each in captured}) == 3
    monkeypatch.setattr(tables_module, "is_capturing", lambda device: True)
    for step in range(112 - len(captured)):
        rows.find((step, 0), again=False)
    with pytest.raises(RuntimeError, match="have been captured 112 times: make new ones"):
        rows.find((1, 2), again=False)


@pytest.mark.gpu
def test_a_captured_step_equals_an_eager_one(device):
    """Several graphs and eager steps by turns, gradients written in place between replays."""
    ends = []
    for captured in (False, True):
        model = Model(RAGGED, device, copies=BF16)
        control = new_control(device, learning_rate=1e-2)
        given = [model.gradients(BF16) for _ in range(2)]
        model.step(given[0], control, max_norm=0.1)  # compiles
        graphs = []
        for each in given if captured else []:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                model.step(each, control, max_norm=0.1)
        for step in range(60):
            for gradient, new in zip(given[step % 2], model.gradients(BF16), strict=True):
                gradient.copy_(new)
            if captured and step % 3:
                graphs[step % 2].replay()
            else:
                # New tensors, so that the addresses change, as they do in eager steps.
                model.step([each.clone() for each in given[step % 2]], control, max_norm=0.1)
        ends.append([*model.tensors(), control])
    assert _equal(*ends)


TENSOR_REFUSALS = [
    ("parameters", 1, torch.Tensor.half, "must be float32, got float16"),
    (
        "parameters",
        0,
        lambda each: each.transpose(0, 1),
        r"must be contiguous or channels_last, got strides \(1, 48, 12, 3\)",
    ),
    ("squares", 2, torch.Tensor.double, "must be float32, got float64"),
    ("means", 0, lambda each: each[0], r"must be \(2, 3, 4, 4\) as its parameter, got \(3, 4, 4\)"),
    (
        "means",
        0,
        torch.Tensor.contiguous,
        r"must have the strides \(48, 1, 12, 3\) of its parameter, got \(48, 16, 4, 1\)",
    ),
    ("means", 1, lambda each: each.to("meta"), "must be on .*, got meta"),
    (
        "squares",
        1,
        lambda each: torch.zeros(6, device=each.device)[1:],
        "must start at a multiple of 16 bytes, got one that starts 4 after: clone it",
    ),
    ("copies", 0, torch.Tensor.float, "must be bfloat16 or float16, got float32"),
    ("copies", 2, torch.Tensor.half, "must be bfloat16, got float16"),
    ("gradients", 0, torch.Tensor.double, "must be float32 or bfloat16 or float16, got float64"),
    ("gradients", 1, torch.Tensor.half, "must be float32, got float16"),
    ("gradients", 2, lambda each: each[None], r"must be \(7,\) as its parameter, got \(1, 7\)"),
    ("gradients", 2, lambda each: each.to("meta"), "must be on .*, got meta"),
]
SETTING_REFUSALS = [
    ({"beta_1": 1.0}, "beta_1 must be 0 to below 1, got 1.0"),
    ({"beta_2": math.nan}, "beta_2 must be 0 to below 1, got nan"),
    ({"epsilon": -1e-8}, "epsilon must be a finite number from 0 on, got -1e-08"),
    ({"max_norm": math.inf}, "max_norm must be a finite number from 0 on, got inf"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number from 0 on, got -0.1"),
]


def _arguments(device):
    model = Model([(2, 3, 4, 4), (5,), (7,)], device, copies=BF16, channels_last=True)
    names = ("parameters", "means", "squares", "copies")
    arguments = {name: getattr(model, name) for name in names}
    control = new_control(device, learning_rate=1e-2)
    return {**arguments, "gradients": model.gradients(), "control": control, **SETTINGS}


@pytest.mark.parametrize(("name", "index", "change", "message"), TENSOR_REFUSALS)
def test_refusals_of_tensors(device, name, index, change, message):
    arguments = _arguments(device)
    arguments[name][index] = change(arguments[name][index])
    with pytest.raises(ValueError, match=rf"^{name}\[{index}\] {message}"):
        adam(**arguments)


@pytest.mark.parametrize(("settings", "message"), SETTING_REFUSALS)
def test_refusals_of_settings(device, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        adam(**_arguments(device) | settings)


@pytest.mark.parametrize("name", ["means", "squares", "copies", "gradients"])
def test_refusals_of_lengths(device, name):
    arguments = _arguments(device)
    arguments[name] = arguments[name][:2]
    with pytest.raises(ValueError, match=f"^{name} must be as many as the parameters, 3, got 2$"):
        adam(**arguments)


def test_other_refusals(device, monkeypatch):
    arguments = _arguments(device)
    lists = {name: arguments[name] for name in ("parameters", "means", "squares", "copies")}
    with pytest.raises(
        ValueError, match=r"^control must be float64 \(10,\) on .*: use new_control$"
    ):
        adam(**arguments | {"control": torch.zeros(10, device=device)})
    with pytest.raises(ValueError, match="^decays must be as many as the parameters, 3, got 1$"):
        Tables(**lists, decays=[True])
    with pytest.raises(ValueError, match="^parameters must be at least one, got none$"):
        Tables([], [], [])
    tables = Tables(**lists)
    with pytest.raises(ValueError, match="^tables were made for other means: make new Tables$"):
        adam(**arguments | {"means": lists["squares"]}, tables=tables)
    lists["parameters"][1].data = lists["parameters"][1].clone()
    with pytest.raises(ValueError, match="^a tensor has moved since its Tables were made: make"):
        adam(**arguments, tables=tables)
    monkeypatch.setattr(adam_module, "is_capturing", lambda device: True)
    with pytest.raises(ValueError, match="^adam needs tables in a CUDA graph: make Tables before"):
        adam(**arguments)


def test_opcheck():
    """The plain way: opcheck clones its inputs, whose addresses the kernels would not know."""
    model = Model([(5,), (3, 2)], "cpu", copies=BF16)
    control, tables = new_control("cpu", learning_rate=1e-2), model.tables
    gradients = model.gradients()
    row = tables.gradient_row(gradients, again=False)
    control_arguments = (gradients, control, row, tables.chunks_n3, 0.9, 0.999, 1.0, True)
    torch.library.opcheck(_control_op, control_arguments)
    _control_op(*control_arguments)
    torch.library.opcheck(
        _update_op,
        (
            *(tables.parameters, gradients, tables.means, tables.squares, tables.copies, control),
            *(tables.addresses_t5, row, tables.chunks_n3, tables.decays, 0.9, 0.999, 1e-8, 0.1),
        ),
    )


def test_a_step_is_two_operations(where):
    """What LAUNCHES counts, and nothing beside them once the gradients have been seen."""
    model = Model(RAGGED, where, copies=BF16)
    control, given = new_control(where, learning_rate=1e-2), model.gradients()
    model.step(given, control)
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function).removesuffix(".default").replace(".", "::"))
            return function(*args, **(kwargs or {}))

    with Record():
        model.step(given, control)
    # Looking up the row of addresses is a view, which launches nothing.
    assert [name for name in names if name != "aten::select.int".replace(".", "::")] == list(
        LAUNCHES
    )
