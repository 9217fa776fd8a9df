"""Every rule over many tensors: values, non-finite steps, clipping, accumulation, addresses."""

import dataclasses
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from oracle_numbers import oracle_cases

from mien.kernels import gradient_norm, norm_history, reference, scalars_update, tensor_table
from mien.kernels import optimize as optimize_module
from mien.kernels.gradient_norm import factors_op, norm_op
from mien.kernels.norm_history import in_order, load_history, new_history, record_op
from mien.kernels.optimize import LAUNCHES, _update_op, optimize
from mien.kernels.optimizer_rules import (
    BASE,
    BEGIN_AT_WEIGHTS,
    CLIPPINGS,
    EMA,
    RULES,
    Clipping,
    Rule,
)
from mien.kernels.optimizer_scalars import Scalar, new_scalars
from mien.kernels.scalars_update import scalars_op
from mien.kernels.tensor_table import TensorTable, drop_capture, finish_capture

MODULES = (optimize_module, gradient_norm, norm_history, scalars_update)
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
        self.moments = {
            kind: [each.clone() for each in self.parameters]
            if kind in BEGIN_AT_WEIGHTS
            else self._zeros()
            for kind in rule.moments
        }
        self.copies = [each.to(copies) for each in self.parameters] if copies else []
        self.accumulators = self._zeros() if accumulation > 1 else []
        self.history_c = new_history(device, history) if history else None
        lists = (self.parameters, self.moments, self.copies, self.accumulators)
        self.tables = TensorTable(*lists, **options)
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

    def step(self, gradients, scalars, **settings):
        settings = {"rule": self.rule, "history_c": self.history_c} | self.settings | settings
        optimize(gradients, self.tables, scalars, **settings)

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


def _assert_equals_reference(model, scalars, gradients, *, steps, learning_rate=0.1, **settings):
    """At every step, whose mean gradients are of a few sizes."""
    parameters, moments = model.doubles()
    times = model.settings["accumulation"]
    norms = []
    for step in range(1, steps + 1):
        sizes = [1e-2 * (1 + step % 3)] * times
        given = [model.gradients(gradients, size) for size in sizes]
        for each in given:
            model.step(each, scalars)
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
        norms.append(float(scalars[Scalar.GRADIENT_NORM]))
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
            # A base is as large as a weight: 5.6e-8.
            atol = 2e-7 if kind == BASE else 6e-9
            torch.testing.assert_close(a.double().cpu(), b, rtol=4e-6, atol=atol)


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
    scalars = new_scalars(where, learning_rate=rate)
    _assert_equals_reference(model, scalars, gradients, steps=8, learning_rate=rate)
    now = scalars.tolist()
    assert now[Scalar.STEP] == 8
    assert now[Scalar.SKIPPED_STEPS] == 0
    assert now[Scalar.BETA_1_POWER] == pytest.approx(0.9**8, rel=1e-14)
    assert now[Scalar.BETA_2_POWER] == pytest.approx(0.999**8, rel=1e-14)


@pytest.mark.parametrize("decay", [0.15, 0.9])
@pytest.mark.parametrize("name", ["adamw", "rms-prop"])
def test_the_average_follows_the_moved_weights(where, name, decay):
    """It moves by the share of the formula, and not where a step is left out or only adds up."""
    rule = Rule(name=name, ema=decay, epsilon=1e-2)
    model = Model(RAGGED, where, rule=rule, accumulation=2, copies=BF16)
    scalars = new_scalars(where, learning_rate=0.01)
    parameters, moments = model.doubles()
    for step in range(1, 5):
        given = model.gradients()
        for bad in (True, False):
            for part in range(2):
                before = [each.clone() for each in model.moments[EMA]]
                hurt = [each * math.nan if bad and part == 0 else each for each in given]
                model.step(hurt, scalars)
                assert _equal(before, model.moments[EMA]) == (bad or part == 0)
        parameters, moments = reference.optimize(
            parameters, given, moments, rule=rule, learning_rate=0.01, step=step
        )
        for average, want in zip(model.moments[EMA], moments[EMA], strict=True):
            # Weights of up to 4.5, of which each step rounds weight and average: 4.8e-7 each.
            torch.testing.assert_close(average.double().cpu(), want, rtol=0, atol=1e-6 * step)
    # The weights are what they are without an average.
    plain = Model(RAGGED, where, rule=Rule(name=name, epsilon=1e-2), copies=BF16, accumulation=2)
    scalars = new_scalars(where, learning_rate=0.01)
    for _ in range(4):
        given = plain.gradients()
        for _part in range(2):
            plain.step(given, scalars)
    assert _equal(plain.parameters, model.parameters)
    assert _equal(plain.copies, model.copies)


def test_schedule_free_averages_its_base_by_squared_rates(where):
    """The average that the weights hold is that of all bases; a rate of 0 and what is left out or
    only adds up change nothing."""
    rule = Rule(name="schedule-free", beta_1=0.8, epsilon=1e-2, weight_decay=0.1)
    model = Model(RAGGED, where, rule=rule, accumulation=2, copies=BF16)
    scalars = new_scalars(where, learning_rate=0.0)
    begun = [each.clone() for each in model.parameters]
    for _part in range(2):
        model.step(model.gradients(size=0.0), scalars)
    assert _equal(begun, model.parameters)
    scalars = new_scalars(where, learning_rate=0.0)
    parameters, moments = model.doubles()
    sums, rates = [torch.zeros_like(each) for each in parameters], []
    for step, rate in enumerate((0.01, 0.02, 0.03, 0.03), 1):
        scalars[Scalar.LEARNING_RATE] = rate
        given = model.gradients()
        for bad in (True, False):
            for part in range(2):
                before = [each.clone() for each in model.tensors()]
                model.step(
                    [each * math.nan if bad and part == 0 else each for each in given], scalars
                )
                is_kept = _equal(before[: len(begun)], model.parameters)
                assert is_kept == (bad or part == 0)
        parameters, moments = reference.optimize(
            parameters, given, moments, rule=rule, learning_rate=rate, step=step, rates=rates
        )
        rates.append(rate)
        sums = [a + rate**2 * b for a, b in zip(sums, moments[BASE], strict=True)]
        lists = (model.parameters, model.copies, model.moments[BASE], parameters, sums)
        for weight, copy, base, want, total in zip(*lists, strict=True):
            # Weights of up to 4.5, which each step rounds by 4.8e-7 at most.
            torch.testing.assert_close(weight.double().cpu(), want, rtol=0, atol=1e-6 * step)
            # The interpreter cuts the bits off that a GPU rounds.
            torch.testing.assert_close(copy.float(), weight, rtol=2**-7, atol=0)
            average = (weight + (1 / 0.8 - 1) * (weight - base)).double().cpu()
            expected = total / sum(each**2 for each in rates)
            torch.testing.assert_close(average, expected, rtol=0, atol=2e-6 * step)
    assert float(scalars[Scalar.AVERAGE_WEIGHT]) == pytest.approx(sum(each**2 for each in rates))


@pytest.mark.parametrize("beta_2", [0.0, 0.6, 0.8, 0.9, 0.99])
def test_adabelief_begins_as_plain_descent(where, beta_2):
    """For ever, where the memory is so short that its variance is not known."""
    model = _near_zero([(40,)], where, rule=Rule(name="adabelief", beta_2=beta_2, epsilon=1e-16))
    _assert_equals_reference(model, new_scalars(where, learning_rate=0.1), FP32, steps=12)


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
        model, new_scalars(where, learning_rate=0.1), FP32, steps=5, learning_rate=0.1
    )


def test_a_norm_of_many_chunks_is_clipped_by_itself(where):
    model = Model([(300,), (40000,), (0,), (5,)], where, clipping=Clipping("norm", 0.5))
    scalars = new_scalars(where, learning_rate=0.0, scale=4.0)
    given = model.gradients(size=1e-2)
    model.step([4 * each for each in given], scalars)
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
    scalars = new_scalars(where, learning_rate=0.0)
    for norm, bound, end in zip(norms, bounds, ends, strict=True):
        model.step([torch.full((1,), float(norm), device=where)], scalars)
        if not math.isfinite(norm):
            assert scalars[Scalar.IS_APPLIED] == 0
            continue
        assert float(scalars[Scalar.GRADIENT_FACTOR]) == pytest.approx(
            min(1, bound / (norm + 1e-6)), rel=1e-6
        )
        assert float(model.moments["mean"][0]) == pytest.approx(end, rel=1e-6)


def test_autoclip_looks_at_the_newest_norms(where):
    """More than its history holds; one that is not finite is not among them."""
    model = Model([(1,)], where, clipping=Clipping("autoclip", 50), history=4)
    scalars = new_scalars(where, learning_rate=0.0)
    seen = []
    for norm in (3.0, 1.0, 8.0, math.inf, 2.0, 9.0, 4.0, math.nan, 5.0):
        model.step([torch.full((1,), norm, device=where)], scalars)
        if math.isfinite(norm):
            seen = [*seen, norm][-4:]
            factor = min(1.0, np.percentile(seen, 50) / (norm + 1e-6))
            assert float(scalars[Scalar.GRADIENT_FACTOR]) == pytest.approx(factor, rel=1e-14)
    assert in_order(model.history_c, scalars).tolist() == seen
    assert scalars[Scalar.RECORDED_NORMS] == 7
    for capacity in (2, 4, 6):
        other, its_control = new_history(where, capacity), new_scalars(where, learning_rate=0.0)
        load_history(other, its_control, in_order(model.history_c, scalars))
        kept = in_order(other, its_control).tolist()
        assert kept[-len(seen[-capacity:]) :] == seen[-capacity:]
        assert all(math.isinf(each) for each in kept[:-4])


def test_norms_of_unfinished_sums_are_not_recorded(where):
    options = {"accumulation": 2, "clipping": Clipping("autoclip", 50), "history": 2}
    model = Model([(1,)], where, **options)
    scalars = new_scalars(where, learning_rate=0.0)
    for gradient in (3.0, 5.0, 1.0, math.nan, 7.0):
        model.step([torch.full((1,), gradient, device=where)], scalars)
    assert in_order(model.history_c, scalars).tolist() == [math.inf, 4]


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_short_histories(where, capacity):
    model = Model([(1,)], where, clipping=Clipping("autoclip", 0), history=capacity)
    scalars = new_scalars(where, learning_rate=0.0)
    for norm in (3.0, 2.0, 8.0, 9.0):
        model.step([torch.full((1,), norm, device=where)], scalars)
    wanted = min((8.0, 9.0, 2.0)[i] for i in {1: [1], 2: [0, 1], 3: [0, 1, 2]}[capacity])
    assert float(scalars[Scalar.GRADIENT_FACTOR]) == pytest.approx(
        min(1, wanted / (9 + 1e-6)), rel=1e-14
    )


def test_weights_move_with_the_last_of_several_gradients(where):
    model = Model(RAGGED, where, accumulation=3, copies=BF16)
    scalars = new_scalars(where, learning_rate=1e-2)
    before = [each.clone() for each in (*model.parameters, *model.copies)]
    for count in (1, 2):
        model.step(model.gradients(BF16), scalars)
        assert _equal([*model.parameters, *model.copies], before)
        assert (
            scalars[Scalar.ACCUMULATED_GRADIENTS],
            scalars[Scalar.IS_APPLIED],
            scalars[Scalar.STEP],
        ) == (count, 0, 0)
    model.step(model.gradients(BF16), scalars)
    assert (
        scalars[Scalar.ACCUMULATED_GRADIENTS],
        scalars[Scalar.IS_APPLIED],
        scalars[Scalar.STEP],
    ) == (0, 1, 1)
    assert not _equal(model.parameters, before[: len(RAGGED)])


def test_sums_of_short_gradients_are_exact(where):
    """In bf16, 1 added to 256 would be lost."""
    model = Model([(8,)], where, accumulation=100, rule=Rule(name="lion", beta_2=0.0))
    scalars = new_scalars(where, learning_rate=0.0)
    for _ in range(99):
        model.step([torch.ones(8, dtype=BF16, device=where)], scalars)
    model.step([torch.full((8,), 256.0, dtype=BF16, device=where)], scalars)
    want = torch.full((8,), 3.55, device=where)
    torch.testing.assert_close(model.moments["mean"][0], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_one_gradient_that_is_not_finite_leaves_all_of_its_step_out(where, poisoned):
    model = Model(RAGGED, where, accumulation=3)
    scalars = new_scalars(where, learning_rate=1e-2, scale=8.0)
    before = [each.clone() for each in model.parameters]
    for number in range(3):
        given = model.gradients()
        if number == poisoned:
            given[4][7] = math.nan
        model.step(given, scalars, dynamic_scale=True)
    assert _equal(model.parameters, before)
    assert (scalars[Scalar.STEP], scalars[Scalar.SKIPPED_STEPS], scalars[Scalar.LOSS_SCALE]) == (
        0,
        1,
        4,
    )
    for _ in range(3):
        model.step(model.gradients(), scalars, dynamic_scale=True)
    assert (scalars[Scalar.STEP], scalars[Scalar.SKIPPED_STEPS], scalars[Scalar.LOSS_SCALE]) == (
        1,
        1,
        4,
    )
    assert all(torch.isfinite(each).all() for each in model.parameters)
    assert not _equal(model.parameters, before)


def test_more_gradients_than_are_asked_for_now_are_averaged(where):
    """A resume may ask for fewer than have been summed up."""
    model = Model([(5,)], where, accumulation=4, rule=Rule(name="lion", beta_2=0.0))
    scalars, given = new_scalars(where, learning_rate=0.0), model.gradients()
    for _ in range(3):
        model.step(given, scalars)
    model.step(given, scalars, accumulation=2)
    assert (scalars[Scalar.IS_APPLIED], scalars[Scalar.ACCUMULATED_GRADIENTS]) == (1, 0)
    torch.testing.assert_close(model.moments["mean"][0], given[0], rtol=1e-6, atol=0)


def test_a_small_first_step_is_exact(where):
    """beta_2 as a float32 would be off by 1e-5 of the first step."""
    model = Model([(64,)], where, rule=Rule(name="adam", epsilon=1e-12))
    for each in model.parameters:
        each.zero_()
    scalars = new_scalars(where, learning_rate=1.0)
    given = model.gradients()
    model.step(given, scalars)
    torch.testing.assert_close(model.parameters[0], -given[0].sign(), rtol=1e-6, atol=0)


@every_rule
@pytest.mark.parametrize("poison", [math.nan, -math.inf])
@pytest.mark.parametrize("gradients", [FP32, BF16])
def test_a_step_that_is_not_finite_changes_nothing(where, rule, gradients, poison):
    model = Model(RAGGED, where, rule=rule, copies=BF16)
    scalars = new_scalars(where, learning_rate=1e-2)
    model.step(model.gradients(gradients), scalars)
    before, state = [each.clone() for each in model.tensors()], scalars.tolist()
    bad = model.gradients(gradients)
    bad[4][16384] = poison  # the last element, in a chunk of its own
    model.step(bad, scalars)
    assert _equal(model.tensors(), before)
    now = scalars.tolist()
    assert not math.isfinite(now[Scalar.GRADIENT_NORM])
    assert (now[Scalar.SKIPPED_STEPS], now[Scalar.GRADIENT_FACTOR], now[Scalar.IS_APPLIED]) == (
        1,
        0,
        0,
    )
    for index in (
        Scalar.LEARNING_RATE,
        Scalar.STEP,
        Scalar.BETA_1_POWER,
        Scalar.BETA_2_POWER,
        Scalar.LOSS_SCALE,
        Scalar.FINITE_STEPS,
    ):
        assert now[index] == state[index]
    model.step(model.gradients(gradients), scalars)
    assert scalars[Scalar.STEP] == 2
    assert scalars[Scalar.IS_APPLIED] == 1
    assert not _equal(model.parameters, before[: len(RAGGED)]), "training did not go on"


def test_the_loss_scale(where):
    """Halved after a step that is not finite, doubled after 2,000 that are."""
    model = Model([(8,)], where)
    scalars = new_scalars(where, learning_rate=1e-2, scale=65536.0)
    good, bad = model.gradients(), model.gradients()
    bad[0][3] = math.inf
    scalars[Scalar.FINITE_STEPS] = 1998
    model.step(good, scalars, dynamic_scale=True)
    assert (scalars[Scalar.LOSS_SCALE], scalars[Scalar.FINITE_STEPS]) == (65536, 1999)
    model.step(good, scalars, dynamic_scale=True)
    assert (scalars[Scalar.LOSS_SCALE], scalars[Scalar.FINITE_STEPS]) == (131072, 0)
    assert scalars[Scalar.GRADIENT_FACTOR] == 1 / 65536, "the gradients had the scale of before"
    model.step(good, scalars, dynamic_scale=True)
    model.step(bad, scalars, dynamic_scale=True)
    assert (
        scalars[Scalar.LOSS_SCALE],
        scalars[Scalar.FINITE_STEPS],
        scalars[Scalar.SKIPPED_STEPS],
    ) == (65536, 0, 1)
    model.step(bad, scalars)
    assert scalars[Scalar.LOSS_SCALE] == 65536, "the scale moved though it is not dynamic"


def test_the_scale_is_undone(where):
    """A scale that is a power of two leaves no trace: the same bits as without."""
    ends = []
    for scale in (1.0, 1024.0):
        model = Model(RAGGED, where, clipping=Clipping("global_norm", 0.5))
        scalars = new_scalars(where, learning_rate=1e-2, scale=scale)
        for _ in range(3):
            model.step([scale * each for each in model.gradients()], scalars)
        ends.append([*model.tensors(), scalars[[Scalar.GRADIENT_NORM, Scalar.STEP]]])
    assert _equal(*ends)


@pytest.mark.parametrize("gradients", [FP32, BF16])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_norm_and_clip(where, gradients, max_norm):
    model = Model([*RAGGED, (40000,)], where, clipping=Clipping("global_norm", max_norm))
    scalars = new_scalars(where, learning_rate=1e-2, scale=4.0)
    given = model.gradients(gradients)
    before = [each.clone() for each in given]
    model.step(given, scalars)
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in given)) / 4
    assert float(scalars[Scalar.GRADIENT_NORM]) == pytest.approx(norm, rel=2e-7)  # measured 3e-8
    factor = min(1, max_norm / (norm + 1e-6)) / 4
    assert float(scalars[Scalar.GRADIENT_FACTOR]) == pytest.approx(factor, rel=2e-7)
    assert _equal(given, before), "the gradients were written to"
    for mean, gradient in zip(model.moments["mean"], given, strict=True):
        torch.testing.assert_close(mean, 0.1 * factor * gradient.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradients", [FP32, BF16])
def test_a_gradient_may_lie_in_another_way(where, gradients):
    """channels_last parameters move alike by gradients of either layout and by misaligned ones."""
    shapes, ends = [(4, 3, 5, 5), (6, 1, 1, 1), (2, 8, 1, 3), (9,)], []
    for layout in ("same", "contiguous", "misaligned"):
        model = Model(shapes, where, copies=BF16, channels_last=True)
        scalars = new_scalars(where, learning_rate=1e-2)
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
            model.step(given, scalars)
        assert all(
            a.stride() == b.stride()
            for a, b in zip(model.parameters, model.moments["mean"], strict=True)
        )
        ends.append([*model.tensors(), scalars])
    assert _equal(ends[0], ends[1])
    assert _equal(ends[0], ends[2])


@pytest.mark.parametrize("copies", [BF16, FP16])
def test_copies_are_the_parameters_rounded(where, copies):
    rule = Rule(name="adamw", weight_decay=0.1)
    model = Model([*RAGGED, (2000,)], where, rule=rule, copies=copies)
    scalars = new_scalars(where, learning_rate=1e-2)
    for _ in range(2):
        model.step(model.gradients(copies), scalars)
    for copy, parameter in zip(model.copies, model.parameters, strict=True):
        if where == "cpu" and copies == BF16:
            # Triton's interpreter truncates to bf16: within one unit in the last place.
            torch.testing.assert_close(copy.float(), parameter, rtol=2**-7, atol=0)
        else:
            assert torch.equal(copy, parameter.to(copies))


def test_plain_copies_are_rounded_to_nearest():
    model = Model(RAGGED, "cpu", copies=BF16)
    model.step(model.gradients(BF16), new_scalars("cpu", learning_rate=1e-2))
    assert _equal(model.copies, [each.bfloat16() for each in model.parameters])


def test_many_tensors(where):
    """70 of them, as a large model has, some empty; one of several chunks."""
    shapes = [(1 + 37 * i % 190,) for i in range(68)] + [(0,), (2 * 16384 + 24,)]
    rule = Rule(name="adamw", weight_decay=0.1)
    model = Model(shapes, where, rule=rule, copies=FP16, decays=[i % 3 == 0 for i in range(70)])
    scalars = new_scalars(where, learning_rate=1e-2)
    parameters, moments = model.doubles()
    given = model.gradients()
    model.step(given, scalars)
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
    scalars = new_scalars(where, learning_rate=1e-2)
    model.step(model.gradients(), scalars)
    assert (scalars[Scalar.STEP], scalars[Scalar.GRADIENT_NORM]) == (1, 0)


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
        scalars = new_scalars(where, learning_rate=1e-2)
        for _ in range(2):
            model.step(model.gradients(BF16), scalars)
        return [*model.tensors(), scalars]

    assert _equal(run(), run())


@every_rule
def test_both_ways_agree(triton_device, rule):
    """Kernels and plain PyTorch: a run may begin on one machine and go on on another."""
    ends = []
    for device in (triton_device, "plain"):
        where = "cpu" if device == "plain" else device
        rule = dataclasses.replace(rule, weight_decay=0.01)
        model = Model(RAGGED, where, rule=rule, clipping=Clipping("global_norm", 0.1))
        scalars = new_scalars(model.device, learning_rate=1e-2)
        with pytest.MonkeyPatch.context() as patch:
            if device == "plain":
                for module in MODULES:
                    patch.setattr(module, "uses_triton", lambda tensor: False)
            for _ in range(3):
                model.step(model.gradients(), scalars)
        ends.append([each.cpu() for each in (*model.tensors(), scalars)])
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
        patch.setattr(tensor_table, "is_capturing", lambda device: True)
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
    monkeypatch.setattr(tensor_table, "is_capturing", lambda device: True)
    for step in range(112 - len(captured)):
        rows.find((step, 0))
    with pytest.raises(RuntimeError, match="has been captured 112 times: make a new one"):
        rows.find((1, 2))


def test_a_capture_that_failed_sends_nothing_and_holds_no_table(where, monkeypatch):
    """An eager run goes on without it, and frees the memory of a table that it has done with."""
    model = Model([(8,), (4,)], where)
    rows = model.tables._gradient_rows
    with monkeypatch.context() as patch:
        patch.setattr(tensor_table, "is_capturing", lambda device: True)
        captured = rows.find((1, 2))
    drop_capture()
    finish_capture()  # of the next capture, perhaps of another table
    assert captured.tolist() == [0, 0]
    held = weakref.ref(rows)
    del model, rows
    gc.collect()
    assert held() is None


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
        scalars = new_scalars(device, learning_rate=1e-2)
        given = [model.gradients(BF16) for _ in range(2)]
        model.step(given[0], scalars)  # compiles
        graphs = []
        for each in given if captured else []:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                model.step(each, scalars)
        finish_capture()
        for step in range(60):
            for gradient, new in zip(given[step % 2], model.gradients(BF16), strict=True):
                gradient.copy_(new)
            if captured and step % 3:
                graphs[step % 2].replay()
            else:
                # New tensors, so that the addresses change, as they do in eager steps.
                model.step([each.clone() for each in given[step % 2]], scalars)
        ends.append([*model.tensors(), scalars])
    assert _equal(*ends)


TENSOR_REFUSALS = [
    ("parameters", 1, torch.Tensor.half, r"must be \(5,\) float32, got \(5,\) float16"),
    (
        "parameters",
        0,
        lambda each: each.transpose(0, 1),
        r"must be contiguous or channels_last, got strides \(1, 48, 12, 3\)",
    ),
    ("square", 2, torch.Tensor.double, r"must be \(7,\) float32, got \(7,\) float64"),
    ("mean", 0, lambda each: each[0], r"must be \(2, 3, 4, 4\) float32, got \(3, 4, 4\)"),
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
    ("low_precision", 0, torch.Tensor.float, "must be .* bfloat16 or float16, got .* float32"),
    ("low_precision", 2, torch.Tensor.half, r"must be \(7,\) bfloat16, got .* float16"),
    (
        "gradients",
        0,
        torch.Tensor.double,
        "must be .* float32 or bfloat16 or float16, got .* float64",
    ),
    ("gradients", 1, torch.Tensor.half, "must be .* float32, got .* float16"),
    ("gradients", 2, lambda each: each[None], r"must be \(7,\) float32, got \(1, 7\)"),
    ("gradients", 2, lambda each: each.to("meta"), "must be on .*, got meta"),
]
SETTING_REFUSALS = [
    (Rule, {"name": "adma"}, "rule must be one of adabelief, adam, .*, schedule-free, got 'adma'"),
    (
        Rule,
        {"name": "schedule-free", "beta_1": 0.09},
        "beta_1 of schedule-free must be 0.1 or more, got 0.09",
    ),
    *(
        (
            Rule,
            {"name": "schedule-free", name: value},
            "schedule-free has neither amsgrad nor an average beside its own",
        )
        for name, value in (("amsgrad", True), ("ema", 0.9))
    ),
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
    """What a TensorTable takes, and gradients, by name."""
    model = Model([(2, 3, 4, 4), (5,), (7,)], device, copies=BF16, channels_last=True)
    lists = {"parameters": model.parameters, **model.moments, "low_precision": model.copies}
    return lists | {"accumulators": model._zeros(), "gradients": model.gradients()}


def _tables(lists, **options):
    moments = {kind: lists[kind] for kind in ("mean", "square")}
    copies, accumulators = lists["low_precision"], options.pop("accumulators", [])
    return TensorTable(lists["parameters"], moments, copies, accumulators, **options)


@pytest.mark.parametrize(("name", "index", "change", "message"), TENSOR_REFUSALS)
def test_refusals_of_tensors(device, name, index, change, message):
    lists = _lists(device)
    lists[name][index] = change(lists[name][index])
    scalars = new_scalars(device, learning_rate=1e-2)

    def step():
        tables = _tables(lists, accumulators=lists["accumulators"])
        optimize(lists["gradients"], tables, scalars, ADAM, accumulation=2)

    with pytest.raises(ValueError, match=rf"^{name}\[{index}\] {message}"):
        step()


@pytest.mark.parametrize(("kind", "settings", "message"), SETTING_REFUSALS)
def test_refusals_of_settings(kind, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**settings)


@pytest.mark.parametrize("name", ["mean", "square", "low_precision", "gradients"])
def test_refusals_of_lengths(device, name):
    lists = _lists(device)
    lists[name] = lists[name][:2]
    with pytest.raises(ValueError, match=f"^{name} must be as many as the parameters, 3, got 2$"):
        optimize(lists["gradients"], _tables(lists), new_scalars(device, learning_rate=1e-2), ADAM)


def test_other_refusals(device):
    lists = _lists(device)
    given, tables = lists["gradients"], _tables(lists)
    scalars = new_scalars(device, learning_rate=1e-2)
    with pytest.raises(
        ValueError, match=rf"^scalars must be \({len(Scalar)},\) float64, got .*: use new_scalars$"
    ):
        optimize(given, tables, torch.zeros(10, device=device), ADAM)
    with pytest.raises(ValueError, match="^decays must be as many as the parameters, 3, got 1$"):
        _tables(lists, decays=[True])
    with pytest.raises(ValueError, match="^parameters must be at least one, got none$"):
        TensorTable([], {})
    with pytest.raises(
        ValueError, match="^lion keeps mean, but the table holds mean, square: make a new Te"
    ):
        optimize(given, tables, scalars, Rule(name="lion"))
    with pytest.raises(
        ValueError, match="^accumulation must be 1 .* with them, got 2 and 0 accumulators$"
    ):
        optimize(given, tables, scalars, ADAM, accumulation=2)
    with pytest.raises(
        ValueError, match="^history_c goes with autoclip .* autoclip and no history: use new_his"
    ):
        optimize(given, tables, scalars, ADAM, clipping=Clipping("autoclip", 10))
    autoclip = Clipping("autoclip", 10)
    history_c = new_history(device, 4)
    for wrong_c in (history_c.float(), history_c[:0], history_c.to("meta"), history_c[::2]):
        with pytest.raises(ValueError, match="^history_c must be "):
            optimize(given, tables, scalars, ADAM, clipping=autoclip, history_c=wrong_c)
    lists["parameters"][1].data = lists["parameters"][1].clone()
    with pytest.raises(ValueError, match="^a tensor has moved since its TensorTable was made"):
        optimize(given, tables, scalars, ADAM)


def test_opcheck():
    """The plain way: opcheck clones its inputs, whose addresses the kernels would not know."""
    model = Model([(5,), (3, 2)], "cpu", copies=BF16, accumulation=2)
    scalars, tables = new_scalars("cpu", learning_rate=1e-2), model.tables
    gradients, history_c = model.gradients(), new_history("cpu", 3)
    row = tables.gradient_row(gradients)
    partials_n, tensors_tc = tables.partials_n, tables.tensors_tc
    state = tables.plain_state
    calls = [
        (norm_op, (gradients, tables.accumulators, partials_n, scalars, tensors_tc, row)),
        (record_op, (partials_n, scalars, history_c, 1)),
        (scalars_op, (partials_n, history_c, scalars, "nadam", 0.9, 0.999, 1e-8)),
        (factors_op, (partials_n, scalars, tables.factors_t, tensors_tc, 0.1)),
        (
            _update_op,
            (state.parameters, gradients, *state.moments, state.low_precision),
        ),
    ]
    more = {
        norm_op: (tables.chunks_n3,),
        scalars_op: ("autoclip", 50.0, 1, True, 0.0),
        _update_op: (
            *(scalars, tables.factors_t, tensors_tc, row, tables.chunks_n3, tables.plain),
            *(False, "nadam", 0.9, 0.999, 1e-8, 0.1, 0.5, 0.0),
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
    scalars, given = new_scalars(where, learning_rate=1e-2), model.gradients()
    model.step(given, scalars)
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function).removesuffix(".default").replace(".", "::"))
            return function(*args, **(kwargs or {}))

    with Record():
        model.step(given, scalars)
    norm, record, scalars_of, factors, update, *_ = LAUNCHES
    wanted = {
        "norm": [norm, scalars_of, factors, update],
        "autoclip": [norm, record, "aten::sort", scalars_of, update],
    }
    # Looking up the row of addresses is a view, which launches nothing.
    names.remove("aten::select::int")
    assert names == wanted.get(kind, [norm, scalars_of, update])
