"""Every rule over many tensors: values, non-finite steps, clipping, accumulation, addresses."""

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from conftest import oracle_cases

from mien.kernels import control as control_module
from mien.kernels import optimize, reference
from mien.kernels import tables as tables_module
from mien.kernels.control import (
    ACCUMULATED,
    BETA_1_POWER,
    BETA_2_POWER,
    FACTOR,
    GOOD_STEPS,
    LEARNING_RATE,
    MOVES,
    NORM,
    NUM_CONTROLS,
    RECORDED,
    SCALE,
    SKIPPED,
    STEP,
    control_op,
    factors_op,
    in_order,
    load_history,
    new_control,
    new_history,
    norm_op,
    record_op,
)
from mien.kernels.optimize import LAUNCHES, _update_op
from mien.kernels.rules import CLIPPINGS, RULES, Clipping, Rule
from mien.kernels.tables import Tables, finish_capture

optimize_module = importlib.import_module("mien.kernels.optimize")  # the package has the function
ADAM, NO_CLIPPING = Rule(name="adamw"), Clipping()
EVERY_RULE = [Rule(name=name) for name in RULES] + [Rule(name="adam", amsgrad=True)]
RAGGED = [(1,), (7,), (0,), (1024,), (16385,), (3, 5, 3, 3)]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _name(rule):
    return f"{rule.name}-amsgrad" if rule.amsgrad else rule.name


every_rule = pytest.mark.parametrize("rule", EVERY_RULE, ids=_name)


@pytest.fixture(params=["kernel", "plain"])
def where(request, device):
    """Both ways: the kernels, on a GPU or interpreted, and plain PyTorch on the CPU."""
    return request.getfixturevalue("triton_device") if request.param == "kernel" else "cpu"


class Model:
    """Parameters, moments and copies of the given shapes, and gradients for any step."""

    def __init__(
        self,
        shapes,
        device,
        *,
        rule=ADAM,
        copies=None,
        channels_last=False,
        accumulation=1,
        clipping=NO_CLIPPING,
        history=0,
        seed=0,
        **options,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.rule = device, rule
        self.parameters = [self._random(shape) for shape in shapes]
        if channels_last:
            self.parameters = [
                each.to(memory_format=torch.channels_last) if each.ndim == 4 else each
                for each in self.parameters
            ]
        self.moments = {kind: self._zeros() for kind in rule.moments}
        self.copies = [each.to(copies) for each in self.parameters] if copies else []
        self.accumulators = self._zeros() if accumulation > 1 else []
        self.history_c = new_history(device, history) if history else None
        lists = (self.parameters, self.moments, self.copies, self.accumulators)
        self.tables = Tables(*lists, **options)
        self.settings = {"accumulation": accumulation, "clipping": clipping}

    def _random(self, shape):
        return torch.randn(shape, generator=self.generator).to(self.device)

    def _zeros(self):
        return [torch.zeros_like(each) for each in self.parameters]

    def gradients(self, dtype=FP32, size=1e-2):
        return [
            (size * self._random(each.shape)).to(dtype).requires_grad_(False)
            for each in self.parameters
        ]

    def step(self, gradients, control, **settings):
        settings = {"rule": self.rule, "history_c": self.history_c} | self.settings | settings
        optimize(gradients, self.tables, control, **settings)

    def tensors(self):
        moments = [tensor for tensors in self.moments.values() for tensor in tensors]
        history = [] if self.history_c is None else [self.history_c]
        return [*self.parameters, *moments, *self.copies, *self.accumulators, *history]

    def doubles(self):
        """Parameters and moments in float64 on the CPU, for the reference."""
        moments = {kind: _doubles(tensors) for kind, tensors in self.moments.items()}
        return _doubles(self.parameters), moments


def _doubles(tensors):
    return [each.double().cpu() for each in tensors]


def _steps_apart(parameters, expected, learning_rate):
    """The largest difference, in steps of Adam (a weight moves by about the learning rate)."""
    pairs = zip(parameters, expected, strict=True)
    apart = [(a.double().cpu() - b).abs().max() for a, b in pairs if a.numel()]
    return float(max(apart)) / learning_rate


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _assert_equals_reference(model, control, gradients, *, steps, learning_rate=0.1, **settings):
    """At every step, whose mean gradients are of a few sizes."""
    parameters, moments = model.doubles()
    times = model.settings["accumulation"]
    norms = []
    for step in range(1, steps + 1):
        sizes = [1e-2 * (1 + step % 3)] * times
        given = [model.gradients(gradients, size) for size in sizes]
        for each in given:
            model.step(each, control)
        mean = [sum(_doubles(each)) / times for each in zip(*given, strict=True)]
        parameters, moments = reference.optimize(
            parameters,
            mean,
            moments,
            rule=model.rule,
            learning_rate=learning_rate,
            step=step,
            clipping=model.settings["clipping"],
            norms=norms,
            decays=model.tables.decays,
            **settings,
        )
        norms.append(float(control[NORM]))
        norm = math.sqrt(sum(float(each.square().sum()) for each in mean))
        assert norms[-1] == pytest.approx(norm, rel=2e-7)  # measured 3e-8
        # fp32 rounds a weight by up to 2^-24 of it, and of the largest, 2, that is 1.2e-6 steps.
        # Where the decay nearly cancels a gradient, rms-prop divides by the rest: 2e-5 measured.
        wide = 10 if model.rule.name == "rms-prop" else 1
        apart = _steps_apart(model.parameters, parameters, max(learning_rate, 0.1))
        assert apart < wide * (2e-6 * step + 1.2e-6), f"step {step}: {apart}"
    for kind, want in moments.items():
        for a, b in zip(model.moments[kind], want, strict=True):
            # Rounded at each step; a mean is 0.04 at most and may have cancelled: measured 1.3e-9.
            torch.testing.assert_close(a.double().cpu(), b, rtol=4e-6, atol=6e-9)


def _near_zero(shapes, where, **options):
    """Weights near zero, so that fp32 weights do not hide what the step is at a large rate."""
    model = Model(shapes, where, **options)
    for each in model.parameters:
        each.mul_(1e-3)
    return model


@every_rule
@pytest.mark.parametrize(("gradients", "weight_decay"), [(FP32, 0.01), (BF16, 0.0)])
def test_steps_equal_the_reference(where, rule, gradients, weight_decay):
    rule = dataclasses.replace(rule, weight_decay=weight_decay)
    decays = [i % 2 == 0 for i in range(len(RAGGED))]
    model = _near_zero(RAGGED, where, rule=rule, decays=decays)
    # The first steps of rms-prop are ten times the rate.
    rate = 0.01 if rule.name == "rms-prop" else 0.1
    control = new_control(where, learning_rate=rate)
    _assert_equals_reference(model, control, gradients, steps=8, learning_rate=rate)
    now = control.tolist()
    assert now[STEP] == 8
    assert now[SKIPPED] == 0
    assert now[BETA_1_POWER] == pytest.approx(0.9**8, rel=1e-14)
    assert now[BETA_2_POWER] == pytest.approx(0.999**8, rel=1e-14)


@pytest.mark.parametrize("beta_2", [0.0, 0.6, 0.8, 0.9, 0.99])
def test_adabelief_begins_as_plain_descent(where, beta_2):
    """For ever, where the memory is so short that its variance is not known."""
    model = _near_zero([(40,)], where, rule=Rule(name="adabelief", beta_2=beta_2, epsilon=1e-16))
    _assert_equals_reference(model, new_control(where, learning_rate=0.1), FP32, steps=12)


@pytest.mark.parametrize(
    "clipping",
    [
        Clipping("value", 0.01),
        Clipping("norm", 0.1),
        Clipping("global_norm", 0.5),
        Clipping("autoclip", 30),
    ],
    ids=lambda clipping: clipping.kind,
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_clipped_and_summed_steps_equal_the_reference(where, clipping, accumulation):
    """By the gradient itself, so that clipping is not divided out; 1024 of the scale is undone."""
    rule = Rule(name="adabelief", beta_2=0.5)
    history = 100 if clipping.kind == "autoclip" else 0
    options = {"clipping": clipping, "accumulation": accumulation, "history": history}
    model = _near_zero(RAGGED, where, rule=rule, **options)
    _assert_equals_reference(
        model, new_control(where, learning_rate=0.1), FP32, steps=5, learning_rate=0.1
    )


def test_a_norm_of_many_chunks_is_clipped_by_itself(where):
    model = Model([(300,), (40000,), (0,), (5,)], where, clipping=Clipping("norm", 0.5))
    control = new_control(where, learning_rate=0.0, scale=4.0)
    given = model.gradients(size=1e-2)
    model.step([4 * each for each in given], control)
    for mean, gradient in zip(model.moments["mean"], given, strict=True):
        want = reference.clipped([gradient.double()], Clipping("norm", 0.5))[0]
        torch.testing.assert_close(mean.double(), 0.1 * want, rtol=1e-6, atol=0)
    assert float(given[1].norm()) > 1
    assert float(given[0].norm()) < 0.5


@pytest.mark.oracle
@pytest.mark.parametrize("case", oracle_cases("optim/autoclip.npz"))
def test_autoclip_equals_the_oracle(where, oracle, case):
    data = oracle("optim/autoclip.npz")
    norms, bounds, ends = (data[f"{case}:{k}"] for k in ("norm_in", "clip_value", "norm_out"))
    clipping = Clipping("autoclip", int(data[f"{case}:percentile"]))
    rule = Rule(name="lion", beta_2=0.0)  # its mean is the gradient
    model = Model([(1,)], where, rule=rule, clipping=clipping, history=int(data[f"{case}:history"]))
    control = new_control(where, learning_rate=0.0)
    for norm, bound, end in zip(norms, bounds, ends, strict=True):
        model.step([torch.full((1,), float(norm), device=where)], control)
        if not math.isfinite(norm):
            assert control[MOVES] == 0
            continue
        assert float(control[FACTOR]) == pytest.approx(min(1, bound / (norm + 1e-6)), rel=1e-6)
        assert float(model.moments["mean"][0]) == pytest.approx(end, rel=1e-6)


def test_autoclip_looks_at_the_newest_norms(where):
    """More than its history holds; one that is not finite is not among them."""
    model = Model([(1,)], where, clipping=Clipping("autoclip", 50), history=4)
    control = new_control(where, learning_rate=0.0)
    seen = []
    for norm in (3.0, 1.0, 8.0, math.inf, 2.0, 9.0, 4.0, math.nan, 5.0):
        model.step([torch.full((1,), norm, device=where)], control)
        if math.isfinite(norm):
            seen = [*seen, norm][-4:]
            factor = min(1.0, np.percentile(seen, 50) / (norm + 1e-6))
            assert float(control[FACTOR]) == pytest.approx(factor, rel=1e-14)
    assert in_order(model.history_c, control).tolist() == seen
    assert control[RECORDED] == 7
    for capacity in (2, 4, 6):
        other, its_control = new_history(where, capacity), new_control(where, learning_rate=0.0)
        load_history(other, its_control, in_order(model.history_c, control))
        kept = in_order(other, its_control).tolist()
        assert kept[-len(seen[-capacity:]) :] == seen[-capacity:]
        assert all(math.isinf(each) for each in kept[:-4])


def test_norms_of_unfinished_sums_are_not_recorded(where):
    options = {"accumulation": 2, "clipping": Clipping("autoclip", 50), "history": 2}
    model = Model([(1,)], where, **options)
    control = new_control(where, learning_rate=0.0)
    for gradient in (3.0, 5.0, 1.0, math.nan, 7.0):
        model.step([torch.full((1,), gradient, device=where)], control)
    assert in_order(model.history_c, control).tolist() == [math.inf, 4]


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_short_histories(where, capacity):
    model = Model([(1,)], where, clipping=Clipping("autoclip", 0), history=capacity)
    control = new_control(where, learning_rate=0.0)
    for norm in (3.0, 2.0, 8.0, 9.0):
        model.step([torch.full((1,), norm, device=where)], control)
    wanted = min((8.0, 9.0, 2.0)[i] for i in {1: [1], 2: [0, 1], 3: [0, 1, 2]}[capacity])
    assert float(control[FACTOR]) == pytest.approx(min(1, wanted / (9 + 1e-6)), rel=1e-14)


def test_weights_move_with_the_last_of_several_gradients(where):
    model = Model(RAGGED, where, accumulation=3, copies=BF16)
    control = new_control(where, learning_rate=1e-2)
    before = [each.clone() for each in (*model.parameters, *model.copies)]
    for count in (1, 2):
        model.step(model.gradients(BF16), control)
        assert _equal([*model.parameters, *model.copies], before)
        assert (control[ACCUMULATED], control[MOVES], control[STEP]) == (count, 0, 0)
    model.step(model.gradients(BF16), control)
    assert (control[ACCUMULATED], control[MOVES], control[STEP]) == (0, 1, 1)
    assert not _equal(model.parameters, before[: len(RAGGED)])


def test_sums_of_short_gradients_are_exact(where):
    """In bf16, 1 added to 256 would be lost."""
    model = Model([(8,)], where, accumulation=100, rule=Rule(name="lion", beta_2=0.0))
    control = new_control(where, learning_rate=0.0)
    for _ in range(99):
        model.step([torch.ones(8, dtype=BF16, device=where)], control)
    model.step([torch.full((8,), 256.0, dtype=BF16, device=where)], control)
    want = torch.full((8,), 3.55, device=where)
    torch.testing.assert_close(model.moments["mean"][0], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_one_gradient_that_is_not_finite_leaves_all_of_its_step_out(where, poisoned):
    model = Model(RAGGED, where, accumulation=3)
    control = new_control(where, learning_rate=1e-2, scale=8.0)
    before = [each.clone() for each in model.parameters]
    for number in range(3):
        given = model.gradients()
        if number == poisoned:
            given[4][7] = math.nan
        model.step(given, control, dynamic_scale=True)
    assert _equal(model.parameters, before)
    assert (control[STEP], control[SKIPPED], control[SCALE]) == (0, 1, 4)
    for _ in range(3):
        model.step(model.gradients(), control, dynamic_scale=True)
    assert (control[STEP], control[SKIPPED], control[SCALE]) == (1, 1, 4)
    assert all(torch.isfinite(each).all() for each in model.parameters)
    assert not _equal(model.parameters, before)


def test_more_gradients_than_are_asked_for_now_are_averaged(where):
    """A resume may ask for fewer than have been summed up."""
    model = Model([(5,)], where, accumulation=4, rule=Rule(name="lion", beta_2=0.0))
    control, given = new_control(where, learning_rate=0.0), model.gradients()
    for _ in range(3):
        model.step(given, control)
    model.step(given, control, accumulation=2)
    assert (control[MOVES], control[ACCUMULATED]) == (1, 0)
    torch.testing.assert_close(model.moments["mean"][0], given[0], rtol=1e-6, atol=0)


def test_a_small_first_step_is_exact(where):
    """beta_2 as a float32 would be off by 1e-5 of the first step."""
    model = Model([(64,)], where, rule=Rule(name="adam", epsilon=1e-12))
    for each in model.parameters:
        each.zero_()
    control = new_control(where, learning_rate=1.0)
    given = model.gradients()
    model.step(given, control)
    torch.testing.assert_close(model.parameters[0], -given[0].sign(), rtol=1e-6, atol=0)


@every_rule
@pytest.mark.parametrize("poison", [math.nan, -math.inf])
@pytest.mark.parametrize("gradients", [FP32, BF16])
def test_a_step_that_is_not_finite_changes_nothing(where, rule, gradients, poison):
    model = Model(RAGGED, where, rule=rule, copies=BF16)
    control = new_control(where, learning_rate=1e-2)
    model.step(model.gradients(gradients), control)
    before, state = [each.clone() for each in model.tensors()], control.tolist()
    bad = model.gradients(gradients)
    bad[4][16384] = poison  # the last element, in a chunk of its own
    model.step(bad, control)
    assert _equal(model.tensors(), before)
    now = control.tolist()
    assert not math.isfinite(now[NORM])
    assert (now[SKIPPED], now[FACTOR], now[MOVES]) == (1, 0, 0)
    for index in (LEARNING_RATE, STEP, BETA_1_POWER, BETA_2_POWER, SCALE, GOOD_STEPS):
        assert now[index] == state[index]
    model.step(model.gradients(gradients), control)
    assert control[STEP] == 2
    assert control[MOVES] == 1
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
        model = Model(RAGGED, where, clipping=Clipping("global_norm", 0.5))
        control = new_control(where, learning_rate=1e-2, scale=scale)
        for _ in range(3):
            model.step([scale * each for each in model.gradients()], control)
        ends.append([*model.tensors(), control[[NORM, STEP]]])
    assert _equal(*ends)


@pytest.mark.parametrize("gradients", [FP32, BF16])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_norm_and_clip(where, gradients, max_norm):
    model = Model([*RAGGED, (40000,)], where, clipping=Clipping("global_norm", max_norm))
    control = new_control(where, learning_rate=1e-2, scale=4.0)
    given = model.gradients(gradients)
    before = [each.clone() for each in given]
    model.step(given, control)
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in given)) / 4
    assert float(control[NORM]) == pytest.approx(norm, rel=2e-7)  # measured 3e-8
    factor = min(1, max_norm / (norm + 1e-6)) / 4
    assert float(control[FACTOR]) == pytest.approx(factor, rel=2e-7)
    assert _equal(given, before), "the gradients were written to"
    for mean, gradient in zip(model.moments["mean"], given, strict=True):
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
            a.stride() == b.stride()
            for a, b in zip(model.parameters, model.moments["mean"], strict=True)
        )
        ends.append([*model.tensors(), control])
    assert _equal(ends[0], ends[1])
    assert _equal(ends[0], ends[2])


@pytest.mark.parametrize("copies", [BF16, FP16])
def test_copies_are_the_parameters_rounded(where, copies):
    rule = Rule(name="adamw", weight_decay=0.1)
    model = Model([*RAGGED, (2000,)], where, rule=rule, copies=copies)
    control = new_control(where, learning_rate=1e-2)
    for _ in range(2):
        model.step(model.gradients(copies), control)
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
    rule = Rule(name="adamw", weight_decay=0.1)
    model = Model(shapes, where, rule=rule, copies=FP16, decays=[i % 3 == 0 for i in range(70)])
    control = new_control(where, learning_rate=1e-2)
    parameters, moments = model.doubles()
    given = model.gradients()
    model.step(given, control)
    parameters, _ = reference.optimize(
        parameters,
        _doubles(given),
        moments,
        rule=rule,
        learning_rate=1e-2,
        step=1,
        decays=model.tables.decays,
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


@every_rule
def test_the_same_bits_twice(where, rule):
    def run():
        model = Model(
            [*RAGGED, (50000,)],
            where,
            rule=dataclasses.replace(rule, weight_decay=0.01),
            copies=BF16,
            clipping=Clipping("autoclip", 40),
            history=10,
        )
        control = new_control(where, learning_rate=1e-2)
        for _ in range(2):
            model.step(model.gradients(BF16), control)
        return [*model.tensors(), control]

    assert _equal(run(), run())


@every_rule
def test_both_ways_agree(triton_device, rule):
    """Kernels and plain PyTorch: a run may begin on one machine and go on on another."""
    ends = []
    for device in (triton_device, "plain"):
        where = "cpu" if device == "plain" else device
        rule = dataclasses.replace(rule, weight_decay=0.01)
        model = Model(RAGGED, where, rule=rule, clipping=Clipping("global_norm", 0.1))
        control = new_control(model.device, learning_rate=1e-2)
        with pytest.MonkeyPatch.context() as patch:
            if device == "plain":
                for module in (optimize_module, control_module):
                    patch.setattr(module, "uses_triton", lambda tensor: False)
            for _ in range(3):
                model.step(model.gradients(), control)
        ends.append([each.cpu() for each in (*model.tensors(), control)])
    for a, b in zip(*ends, strict=True):
        # Steps of rms-prop are ten times as long; the decay nearly cancels some of its gradients.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-6 if rule.name == "rms-prop" else 1e-8)


def test_each_gradient_set_is_sent_once(where):
    """Addresses that were seen before cost no copy; older ones give way in turn."""
    model = Model([(8,), (4,)], where)
    rows = model.tables._gradient_rows
    sent = []
    rows._send = lambda slot, addresses: sent.append(slot)
    for step in range(40):
        rows.find((step % 2, 0))
    assert sent == [0, 1]
    for step in range(2, 18):
        rows.find((step, 0))
    assert sent == [*range(16), 0, 1]
    rows.find((1, 0))  # whose slot has been taken
    assert sent[-1] == 2
    assert len(rows.slots) == 16


def test_a_captured_slot_is_never_used_again(where, monkeypatch):
    model = Model([(8,), (4,)], where)
    rows = model.tables._gradient_rows
    eager = rows.find((1, 2)).clone()
    captured = []
    with monkeypatch.context() as patch:
        patch.setattr(tables_module, "is_capturing", lambda device: True)
        for _ in range(2):  # two graphs with gradients at the same place
            captured.append(rows.find((1, 2)))
        captured.append(rows.find((3, 4)))
    assert [each.tolist() for each in captured] == 3 * [[0, 0]], "sent within the capture"
    finish_capture()
    for step in range(100):
        rows.find((step, 7))
    assert eager.tolist() == [1, 2]
    assert [each.tolist() for each in captured] == [[1, 2], [1, 2], [3, 4]]
    assert len({each.data_ptr() for each in captured}) == 3
    monkeypatch.setattr(tables_module, "is_capturing", lambda device: True)
    for step in range(112 - len(captured)):
        rows.find((step, 0))
    with pytest.raises(RuntimeError, match="have been captured 112 times: make new ones"):
        rows.find((1, 2))


CAPTURED = [
    {"clipping": Clipping("global_norm", 0.1)},
    {"clipping": Clipping("norm", 0.1), "accumulation": 3},
    {"clipping": Clipping("autoclip", 40), "history": 5000, "accumulation": 2},
]


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("settings", CAPTURED, ids=lambda settings: settings["clipping"].kind)
def test_a_captured_step_equals_an_eager_one(device, rule, settings):
    """Several graphs and eager steps by turns, gradients written in place between replays."""
    ends = []
    for captured in (False, True):
        model = Model(RAGGED, device, rule=rule, copies=BF16, **settings)
        control = new_control(device, learning_rate=1e-2)
        given = [model.gradients(BF16) for _ in range(2)]
        model.step(given[0], control)  # compiles
        graphs = []
        for each in given if captured else []:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                model.step(each, control)
        finish_capture()
        for step in range(60):
            for gradient, new in zip(given[step % 2], model.gradients(BF16), strict=True):
                gradient.copy_(new)
            if captured and step % 3:
                graphs[step % 2].replay()
            else:
                # New tensors, so that the addresses change, as they do in eager steps.
                model.step([each.clone() for each in given[step % 2]], control)
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
    ("square", 2, torch.Tensor.double, "must be float32, got float64"),
    ("mean", 0, lambda each: each[0], r"must be \(2, 3, 4, 4\) as its parameter, got \(3, 4, 4\)"),
    (
        "mean",
        0,
        torch.Tensor.contiguous,
        r"must have the strides \(48, 1, 12, 3\) of its parameter, got \(48, 16, 4, 1\)",
    ),
    ("mean", 1, lambda each: each.to("meta"), "must be on .*, got meta"),
    (
        "square",
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
    (Rule, {"name": "adma"}, "rule must be one of adabelief, adam, .*, rms-prop, got 'adma'"),
    (Rule, {"name": "adam", "beta_1": 1.0}, "beta_1 must be 0 to below 1, got 1.0"),
    (Rule, {"name": "adam", "beta_2": math.nan}, "beta_2 must be 0 to below 1, got nan"),
    (
        Rule,
        {"name": "adam", "epsilon": -1e-8},
        "epsilon must be a finite number from 0 on, got -1e-08",
    ),
    (
        Rule,
        {"name": "adam", "weight_decay": math.inf},
        "weight_decay must be a finite number from 0 on, got inf",
    ),
    (
        Clipping,
        {"kind": "all"},
        "clipping must be one of none, value, norm, global_norm, autoclip, got 'all'",
    ),
    (
        Clipping,
        {"kind": "norm", "bound": 0.0},
        "the bound of clipping by norm must be a finite number above 0, got 0.0",
    ),
    (
        Clipping,
        {"kind": "autoclip", "bound": 101},
        "the percentile of autoclip must be 0 to 100, got 101",
    ),
]


def _lists(device):
    """What Tables take, and gradients, by name."""
    model = Model([(2, 3, 4, 4), (5,), (7,)], device, copies=BF16, channels_last=True)
    lists = {"parameters": model.parameters, **model.moments, "copies": model.copies}
    return lists | {"accumulators": model._zeros(), "gradients": model.gradients()}


def _tables(lists, **options):
    moments = {kind: lists[kind] for kind in ("mean", "square")}
    copies, accumulators = lists["copies"], options.pop("accumulators", [])
    return Tables(lists["parameters"], moments, copies, accumulators, **options)


@pytest.mark.parametrize(("name", "index", "change", "message"), TENSOR_REFUSALS)
def test_refusals_of_tensors(device, name, index, change, message):
    lists = _lists(device)
    lists[name][index] = change(lists[name][index])
    control = new_control(device, learning_rate=1e-2)

    def step():
        tables = _tables(lists, accumulators=lists["accumulators"])
        optimize(lists["gradients"], tables, control, ADAM, accumulation=2)

    with pytest.raises(ValueError, match=rf"^{name}\[{index}\] {message}"):
        step()


@pytest.mark.parametrize(("kind", "settings", "message"), SETTING_REFUSALS)
def test_refusals_of_settings(kind, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**settings)


@pytest.mark.parametrize("name", ["mean", "square", "copies", "gradients"])
def test_refusals_of_lengths(device, name):
    lists = _lists(device)
    lists[name] = lists[name][:2]
    with pytest.raises(ValueError, match=f"^{name} must be as many as the parameters, 3, got 2$"):
        optimize(lists["gradients"], _tables(lists), new_control(device, learning_rate=1e-2), ADAM)


def test_other_refusals(device):
    lists = _lists(device)
    given, tables = lists["gradients"], _tables(lists)
    control = new_control(device, learning_rate=1e-2)
    with pytest.raises(
        ValueError, match=rf"^control must be float64 \({NUM_CONTROLS},\) on .*: use new_control$"
    ):
        optimize(given, tables, torch.zeros(10, device=device), ADAM)
    with pytest.raises(ValueError, match="^decays must be as many as the parameters, 3, got 1$"):
        _tables(lists, decays=[True])
    with pytest.raises(ValueError, match="^parameters must be at least one, got none$"):
        Tables([], {})
    with pytest.raises(
        ValueError, match="^lion keeps mean, but the tables hold mean, square: make new Tables$"
    ):
        optimize(given, tables, control, Rule(name="lion"))
    with pytest.raises(
        ValueError, match="^accumulation must be 1 .* with them, got 2 and 0 accumulators$"
    ):
        optimize(given, tables, control, ADAM, accumulation=2)
    with pytest.raises(
        ValueError, match="^history_c goes with autoclip .* autoclip and no history: use new_his"
    ):
        optimize(given, tables, control, ADAM, clipping=Clipping("autoclip", 10))
    autoclip = Clipping("autoclip", 10)
    history_c = new_history(device, 4)
    for wrong_c in (history_c.float(), history_c[:0], history_c.to("meta"), history_c[::2]):
        with pytest.raises(ValueError, match="^history_c must be "):
            optimize(given, tables, control, ADAM, clipping=autoclip, history_c=wrong_c)
    lists["parameters"][1].data = lists["parameters"][1].clone()
    with pytest.raises(ValueError, match="^a tensor has moved since its Tables were made: make"):
        optimize(given, tables, control, ADAM)


def test_opcheck():
    """The plain way: opcheck clones its inputs, whose addresses the kernels would not know."""
    model = Model([(5,), (3, 2)], "cpu", copies=BF16, accumulation=2)
    control, tables = new_control("cpu", learning_rate=1e-2), model.tables
    gradients, history_c = model.gradients(), new_history("cpu", 3)
    row = tables.gradient_row(gradients)
    partials_n, tensors_tc = tables.partials_n, tables.tensors_tc
    calls = [
        (norm_op, (gradients, tables.accumulators, partials_n, control, tensors_tc, row)),
        (record_op, (partials_n, control, history_c, 1)),
        (control_op, (partials_n, history_c, control, "nadam", 0.9, 0.999, 1e-8)),
        (factors_op, (partials_n, control, tables.factors_t, tensors_tc, 0.1)),
        (_update_op, (tables.parameters, gradients, *tables.moments.values(), [], tables.copies)),
    ]
    more = {
        norm_op: (tables.chunks_n3,),
        control_op: ("autoclip", 50.0, 1, True),
        _update_op: (
            *(control, tables.factors_t, tensors_tc, row, tables.chunks_n3, tables.plain),
            *(False, "nadam", 0.9, 0.999, 1e-8, 0.1, 0.5),
        ),
    }
    for operation, arguments in calls:
        arguments = (*arguments, *more.get(operation, ()))
        torch.library.opcheck(operation, arguments)
        operation(*arguments)


@pytest.mark.parametrize("kind", CLIPPINGS)
def test_the_operations_of_a_step(where, kind):
    """What LAUNCHES counts, and nothing beside them once the gradients have been seen."""
    clipping, history = Clipping(kind, 1.0), 10 if kind == "autoclip" else 0
    model = Model(RAGGED, where, copies=BF16, clipping=clipping, history=history)
    control, given = new_control(where, learning_rate=1e-2), model.gradients()
    model.step(given, control)
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function).removesuffix(".default").replace(".", "::"))
            return function(*args, **(kwargs or {}))

    with Record():
        model.step(given, control)
    norm, record, control_of, factors, update, *_ = LAUNCHES
    wanted = {
        "norm": [norm, control_of, factors, update],
        "autoclip": [norm, record, "aten::sort", control_of, update],
    }
    # Looking up the row of addresses is a view, which launches nothing.
    names.remove("aten::select::int")
    assert names == wanted.get(kind, [norm, control_of, update])
