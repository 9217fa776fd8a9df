"""Dense weights moved by the factors of their gradients: values, norms, refusals, both ways."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import triton
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

from mien.kernels import dense_norm, dense_update, gradient_norm, reference, scalars_update
from mien.kernels import optimize as optimize_module
from mien.kernels.dense import dense
from mien.kernels.dense_norm import dense_norm_op
from mien.kernels.dense_update import dense_update_op
from mien.kernels.gradient_norm import factors_op
from mien.kernels.norm_history import new_history
from mien.kernels.optimize import optimize
from mien.kernels.optimizer_rules import BASE, BEGIN_AT_WEIGHTS, RULES, Clipping, Rule
from mien.kernels.optimizer_scalars import Scalar, new_scalars
from mien.kernels.tensor_table import TensorTable, finish_capture

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERY_RULE = [Rule(name=name) for name in RULES] + [Rule(name="adam", amsgrad=True)]
SHAPES = [(80, 48), (80,), (16, 528), (3, 5, 3, 3), (0,)]
"""Ragged tiles, and a factor of two spans; between them what has gradients in memory."""

LOW_RANK = [shape in ((80, 48), (16, 528)) for shape in SHAPES]
FACES = 37
EVERY_CLIPPING = [
    Clipping(),
    Clipping("value", 0.02),
    Clipping("norm", 0.1),
    Clipping("global_norm", 0.5),
    Clipping("autoclip", 30),
]


def _name(value):
    return f"{value.name}{'-amsgrad' * value.amsgrad}" if isinstance(value, Rule) else str(value)


every_rule = pytest.mark.parametrize("rule", EVERY_RULE, ids=_name)


@pytest.fixture(autouse=True)
def _products_of_bf16(monkeypatch):
    """Triton's interpreter multiplies the bits of bf16 numbers: here it widens them first."""
    create = InterpreterBuilder.create_dot

    def widened(builder, a, b, d, *more):
        if a.dtype.scalar == triton.language.bfloat16:
            a, b = (
                TensorHandle(
                    _convert_float(
                        each.data, triton.language.bfloat16, triton.language.float32, None
                    ).view("float32"),
                    triton.language.float32,
                )
                for each in (a, b)
            )
        return create(builder, a, b, d, *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


@pytest.fixture(params=["kernel", "plain"])
def where(request, device):
    """Both ways: the kernels, on a GPU or interpreted, and plain PyTorch on the CPU."""
    return request.getfixturevalue("triton_device") if request.param == "kernel" else "cpu"


class Model:
    """Parameters of both kinds, what belongs to them, and gradients for any step."""

    def __init__(self, device, *, rule, copies=None, clipping=EVERY_CLIPPING[0], **options):
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.rule, self.clipping = device, rule, clipping
        # Near zero, so that fp32 weights do not hide what the step is at a large rate.
        self.parameters = [1e-3 * self.random(shape) for shape in SHAPES]
        self.moments = {
            kind: [
                each.clone() if kind in BEGIN_AT_WEIGHTS else torch.zeros_like(each)
                for each in self.parameters
            ]
            for kind in rule.moments
        }
        self.copies = [each.to(copies) for each in self.parameters] if copies else []
        self.history_c = new_history(device, 10) if clipping.kind == "autoclip" else None
        self.tables = TensorTable(
            self.parameters, self.moments, self.copies, low_rank=LOW_RANK, **options
        )

    def random(self, shape):
        return torch.randn(shape, generator=self.generator).to(self.device)

    def gradients(self, dtype=FP32, faces=FACES, size=1e-2):
        """Gradients of each parameter, in memory or a stand-in."""
        return [
            stand_in(
                self.random((faces, shape[1])).to(dtype),
                (size * self.random((faces, shape[0]))).to(dtype),
            )
            if low
            else (size * self.random(shape)).to(dtype)
            for shape, low in zip(SHAPES, LOW_RANK, strict=True)
        ]

    def step(self, gradients, scalars, **settings):
        optimize(
            gradients, self.tables, scalars, self.rule,
            clipping=self.clipping, history_c=self.history_c, **settings,
        )  # fmt: skip

    def tensors(self):
        moments = [tensor for tensors in self.moments.values() for tensor in tensors]
        history = [] if self.history_c is None else [self.history_c]
        return [*self.parameters, *moments, *self.copies, *history]


def stand_in(input_ni, grad_output_no):
    """The gradient that autograd is given of a weight with these factors."""
    weight_oi = input_ni.new_zeros(grad_output_no.shape[1], input_ni.shape[1]).requires_grad_()
    (gradient,) = torch.autograd.grad(dense(input_ni, weight_oi, None), weight_oi, grad_output_no)
    return gradient


def in_memory(gradients):
    """The same in float64 on the CPU, formed where they are of low rank."""
    formed = []
    for gradient in gradients:
        factors = getattr(gradient, "low_rank", None)
        if factors is None:
            formed.append(gradient.double().cpu())
        else:
            pair = (factors.input_ni, factors.grad_output_no)
            formed.append(reference.dense_gradient(*(each.double().cpu() for each in pair)))
    return formed


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_equals_reference(model, scalars, dtype, *, steps, rate):
    """Compare every step with one in float64 with gradients that were formed."""
    parameters = [each.double().cpu() for each in model.parameters]
    moments = {k: [each.double().cpu() for each in v] for k, v in model.moments.items()}
    norms = []
    for step in range(1, steps + 1):
        given = model.gradients(dtype, size=1e-2 * (1 + step % 3))
        model.step(given, scalars)
        formed = in_memory(given)
        parameters, moments = reference.optimize(
            parameters, formed, moments, rule=model.rule, learning_rate=rate, step=step,
            clipping=model.clipping, norms=norms, decays=model.tables.decays,
        )  # fmt: skip
        norms.append(float(scalars[Scalar.GRADIENT_NORM]))
        norm = math.sqrt(sum(float(each.square().sum()) for each in formed))
        assert norms[-1] == pytest.approx(norm, rel=3e-7)
        for ours, want in zip(model.parameters, parameters, strict=True):
            # A sum over faces is rounded by some 6e-9, which an epsilon of 1e-4 makes 6e-5 steps;
            # rms-prop's are up to ten times the rate.
            wide = 4e-4 if model.rule.name == "rms-prop" else 1e-4
            torch.testing.assert_close(ours.double().cpu(), want, rtol=1e-6, atol=wide * rate)
    for kind, want in moments.items():
        for ours, each in zip(model.moments[kind], want, strict=True):
            # A base moves as a weight.
            atol = 1e-4 * rate if kind == BASE else 1e-7
            torch.testing.assert_close(ours.double().cpu(), each, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_layer_is_linear_but_for_its_weights_gradient(dtype):
    torch.manual_seed(1)
    tensors = [torch.randn(shape, dtype=dtype) for shape in ((5, 48), (16, 48), (16,))]
    grad_output_no, found = torch.randn(5, 16, dtype=dtype), []
    for layer in (F.linear, dense):
        inputs = [each.clone().requires_grad_() for each in tensors]
        output = layer(*inputs)
        found.append((output, *torch.autograd.grad(output, inputs, grad_output_no)))
    (output, of_input, of_weight, of_bias), ours = found
    assert torch.equal(ours[0], output)
    assert torch.equal(ours[1], of_input)
    assert torch.equal(ours[3], of_bias)
    assert ours[2].shape == of_weight.shape
    assert ours[2].untyped_storage().nbytes() < 100, "the gradient takes memory"
    torch.testing.assert_close(in_memory([ours[2]])[0].to(dtype), of_weight)


def test_a_hook_and_autograd_are_given_the_same_stand_in():
    weight_oi, seen = torch.randn(16, 16, requires_grad=True), []
    weight_oi.register_hook(seen.append)
    output = dense(torch.randn(3, 16), weight_oi, None)
    (gradient,) = torch.autograd.grad(output.sum(), weight_oi)
    assert gradient.low_rank is seen[0].low_rank


def test_nothing_is_kept_of_a_weight_that_is_not_trained():
    weight_oi, input_ni = torch.randn(16, 16), torch.randn(3, 16, requires_grad=True)
    output = dense(input_ni, weight_oi, None)
    (gradient,) = torch.autograd.grad(output.sum(), input_ni)
    torch.testing.assert_close(gradient, weight_oi.sum(0).expand(3, -1))


SIXTEEN_BITS = [(Rule(name="adam"), BF16, 0.0), (Rule(name="adamw"), FP16, 0.01)]


@pytest.mark.parametrize(
    ("rule", "dtype", "weight_decay"),
    [*((rule, FP32, 0.01) for rule in EVERY_RULE), *SIXTEEN_BITS],
    ids=_name,
)
def test_steps_equal_the_reference(where, rule, dtype, weight_decay):
    # Large, for a rule divides what is rounded by what may have cancelled.
    rule = dataclasses.replace(rule, weight_decay=weight_decay, epsilon=1e-4)
    model = Model(where, rule=rule, decays=[i % 3 == 0 for i in range(len(SHAPES))])
    # The first steps of rms-prop are ten times the rate.
    rate = 0.01 if rule.name == "rms-prop" else 0.1
    scalars = new_scalars(where, learning_rate=rate)
    assert_equals_reference(model, scalars, dtype, steps=2, rate=rate)
    assert scalars[Scalar.STEP] == 2


@pytest.mark.parametrize("clipping", EVERY_CLIPPING, ids=lambda clipping: clipping.kind)
def test_clipped_steps_equal_the_reference(where, clipping):
    """Clip by the gradient itself, so that clipping is not divided out."""
    rule = Rule(name="adabelief", beta_2=0.5, epsilon=1e-4)
    model = Model(where, rule=rule, clipping=clipping)
    scalars = new_scalars(where, learning_rate=0.1)
    assert_equals_reference(model, scalars, FP32, steps=4, rate=0.1)


@pytest.mark.parametrize("faces", [1, 16, 65])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_norm_of_any_number_of_faces(where, faces, dtype):
    model = Model(where, rule=Rule(name="lion"))
    scalars = new_scalars(where, learning_rate=0.0, scale=4.0)
    given = model.gradients(dtype, faces)
    model.step(given, scalars)
    norm = math.sqrt(sum(float(each.square().sum()) for each in in_memory(given))) / 4
    assert float(scalars[Scalar.GRADIENT_NORM]) == pytest.approx(norm, rel=3e-7)


def test_faces_whose_gradients_cancel_leave_no_norm(where):
    """Rounding may leave the sum of squares below zero: no root is taken of that."""
    model = Model(where, rule=Rule(name="lion"), clipping=Clipping("norm", 0.1))
    scalars = new_scalars(where, learning_rate=0.1)
    given = [torch.zeros_like(each) for each in model.parameters]
    for number, shape in enumerate(SHAPES):
        if LOW_RANK[number]:
            input_ni, grad_output_no = model.random((20, shape[1])), model.random((20, shape[0]))
            given[number] = stand_in(
                input_ni.repeat(2, 1), torch.cat((grad_output_no, -grad_output_no))
            )
    model.step(given, scalars)
    assert scalars[Scalar.IS_APPLIED] == 1
    assert float(scalars[Scalar.GRADIENT_NORM]) < 0.1  # of some 240 for a half of the faces
    # Any sums of squares that are below zero.
    model.tables.partials_n.fill_(-1e-3)
    factors_op(
        model.tables.partials_n, scalars, model.tables.factors_t, model.tables.tensors_tc, 0.1
    )
    assert model.tables.factors_t.tolist() == [1.0] * len(SHAPES)


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
@pytest.mark.parametrize("factor", ["input_ni", "grad_output_no"])
@pytest.mark.parametrize("is_alone", [False, True])
def test_a_factor_that_is_not_finite_changes_nothing(where, poison, factor, is_alone):
    """Also where the face's other factor is zero."""
    model = Model(where, rule=Rule(name="adam"), copies=BF16)
    scalars = new_scalars(where, learning_rate=1e-2)
    model.step(model.gradients(), scalars)
    before = [each.clone() for each in model.tensors()]
    bad = model.gradients()
    factors = bad[2].low_rank
    if is_alone:
        for each in (factors.input_ni, factors.grad_output_no):
            each[-1] = 0
    getattr(factors, factor)[-1, -1] = poison
    model.step(bad, scalars)
    assert equal(model.tensors(), before)
    assert not math.isfinite(scalars[Scalar.GRADIENT_NORM])
    assert (
        scalars[Scalar.SKIPPED_STEPS],
        scalars[Scalar.GRADIENT_FACTOR],
        scalars[Scalar.IS_APPLIED],
    ) == (1, 0, 0)
    model.step(model.gradients(), scalars)
    assert scalars[Scalar.STEP] == 2
    assert not equal(model.parameters, before[: len(SHAPES)]), "training did not go on"


def test_a_gradient_too_large_for_fp16_is_none_here(where):
    """300 * 300 * 37 has no fp16 number; its factors have, and the sum is in fp32."""
    model = Model(where, rule=Rule(name="lion", beta_2=0.0))
    scalars = new_scalars(where, learning_rate=1e-2, scale=1024.0)
    given = model.gradients(FP16)
    given[0] = stand_in(*(300 * torch.ones(FACES, n, device=where).half() for n in (48, 80)))
    model.step(given, scalars, dynamic_scale=True)
    assert (scalars[Scalar.IS_APPLIED], scalars[Scalar.LOSS_SCALE]) == (1, 1024)
    want = torch.full((80, 48), 300 * 300 * FACES / 1024, device=where)
    torch.testing.assert_close(model.moments["mean"][0], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("copies", [BF16, FP16])
def test_copies_are_the_parameters_rounded(where, copies):
    model = Model(where, rule=Rule(name="adamw", weight_decay=0.1), copies=copies)
    scalars = new_scalars(where, learning_rate=1e-2)
    for _ in range(2):
        model.step(model.gradients(copies), scalars)
    for copy, parameter in zip(model.copies, model.parameters, strict=True):
        # Triton's interpreter truncates to bf16: within one unit in the last place.
        loose = copies == BF16 and where == "cpu"
        torch.testing.assert_close(
            copy.float(), parameter.to(copies).float(), rtol=2**-7 if loose else 0, atol=0
        )


@pytest.mark.parametrize("rule", [Rule(name="adam"), Rule(name="rms-prop")], ids=_name)
def test_both_ways_agree(triton_device, rule):
    """Kernels and plain PyTorch: a run may begin on one machine and go on on another."""
    modules = [optimize_module, gradient_norm, scalars_update, dense_norm, dense_update]
    ends = []
    for is_plain in (False, True):
        rule = dataclasses.replace(rule, weight_decay=0.01, epsilon=1e-4)
        where = "cpu" if is_plain else triton_device
        model = Model(where, rule=rule, clipping=Clipping("global_norm", 0.1))
        scalars = new_scalars(where, learning_rate=1e-2)
        with pytest.MonkeyPatch.context() as patch:
            if is_plain:
                for module in modules:
                    patch.setattr(module, "uses_triton", lambda tensor: False)
            for _ in range(2):
                model.step(model.gradients(), scalars)
        ends.append([each.cpu() for each in (*model.tensors(), scalars)])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6)


def test_the_same_bits_twice(where):
    def run():
        model = Model(
            where, rule=Rule(name="nadam"), copies=BF16, clipping=Clipping("autoclip", 40)
        )
        scalars = new_scalars(where, learning_rate=1e-2)
        for _ in range(2):
            model.step(model.gradients(BF16), scalars)
        return [*model.tensors(), scalars]

    assert equal(run(), run())


def test_a_misaligned_factor_is_copied(where):
    ends = []
    for is_misaligned in (False, True):
        model = Model(where, rule=Rule(name="adam"))
        given = model.gradients()
        factors = given[0].low_rank
        if is_misaligned:
            moved = torch.cat([factors.input_ni.new_zeros(1), factors.input_ni.flatten()])[1:]
            given[0].low_rank = dataclasses.replace(
                factors, input_ni=moved.view(factors.input_ni.shape)
            )
        model.step(given, new_scalars(where, learning_rate=1e-2))
        ends.append(model.tensors())
    assert equal(*ends)


def test_nothing_but_gradients_of_low_rank(where):
    """As a part of an overlapped update may be."""
    weight_oi = torch.randn(32, 16, device=where)
    moments = {kind: [torch.zeros_like(weight_oi)] for kind in ("mean", "square")}
    tables, scalars = (
        TensorTable([weight_oi], moments, low_rank=[True]),
        new_scalars(where, learning_rate=0.1),
    )
    before = weight_oi.clone()
    given = stand_in(torch.ones(3, 16, device=where), torch.ones(3, 32, device=where))
    optimize([given], tables, scalars, Rule(name="adam"))
    torch.testing.assert_close(weight_oi, before - 0.1)
    assert float(scalars[Scalar.GRADIENT_NORM]) == pytest.approx(3 * math.sqrt(512))


def test_the_operations_of_a_step(where):
    """Three launches more than those of a step without such gradients."""
    model = Model(where, rule=Rule(name="adam"), copies=BF16)
    scalars, given = new_scalars(where, learning_rate=1e-2), model.gradients(BF16)
    model.step(given, scalars)
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function).removesuffix(".default").replace(".", "::"))
            return function(*args, **(kwargs or {}))

    with Record():
        model.step(given, scalars)
    # Looking up rows of addresses are views, which launch nothing.
    assert [name for name in names if name != "aten::select::int"] == [
        "mien::optimize_norm",
        "mien::dense_norm",
        "mien::optimize_scalars",
        "mien::optimize_update",
        "mien::dense_update",
    ]
    assert dense_norm.LAUNCHES | dense_update.LAUNCHES == {
        "mien::dense_norm": 2,
        "mien::dense_update": 1,
    }


@pytest.mark.gpu
@every_rule
def test_a_captured_step_equals_an_eager_one(device, rule):
    """Two graphs by turns, factors written in place between replays."""
    ends = []
    for captured in (False, True):
        model = Model(device, rule=rule, copies=BF16, clipping=Clipping("norm", 0.1))
        scalars = new_scalars(device, learning_rate=1e-2)
        given = [model.gradients(BF16) for _ in range(2)]
        model.step(given[0], scalars)  # compiles
        graphs = []
        for each in given if captured else []:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                model.step(each, scalars)
        finish_capture()
        for step in range(20):
            for old, new in zip(given[step % 2], model.gradients(BF16), strict=True):
                if hasattr(old, "low_rank"):
                    old.low_rank.input_ni.copy_(new.low_rank.input_ni)
                    old.low_rank.grad_output_no.copy_(new.low_rank.grad_output_no)
                else:
                    old.copy_(new)
            if captured:
                graphs[step % 2].replay()
            else:
                model.step(given[step % 2], scalars)
        ends.append([*model.tensors(), scalars])
    assert equal(*ends)


def test_refusals(device):
    model = Model(device, rule=Rule(name="adam"))
    scalars, given = new_scalars(device, learning_rate=1e-2), model.gradients()

    def refused(number, gradient, message):
        changed = [*given]
        changed[number] = gradient
        with pytest.raises(ValueError, match=message):
            model.step(changed, scalars)

    def factors(**changes):
        gradient = model.gradients()[2]
        gradient.low_rank = dataclasses.replace(gradient.low_rank, **changes)
        return gradient

    zeros = torch.zeros(80, 48, device=device)
    refused(0, zeros, r"^gradients\[0\] must be a stand-in that `dense` leaves, got a tensor: is")
    refused(1, given[0], r"^gradients\[1\] must lie in memory, got one of low rank$")
    refused(2, factors(input_ni=zeros), r"^gradients\[2\], its input, must be \(80, 528\) float32")
    grad_output_no = torch.zeros(FACES, 16, device=device)
    refused(
        2,
        factors(grad_output_no=grad_output_no[:5]),
        r"its grad_output, must be \(37, 16\) float32, got \(5",
    )
    refused(
        2,
        factors(grad_output_no=grad_output_no.half()),
        r"its grad_output, must be \(37, 16\) float32, got",
    )


@pytest.mark.parametrize(
    ("shapes", "accumulates", "message"),
    [
        ([(17, 16)], False, r"must be a matrix with sizes that are multiples of 16 .* \(17, 16\)$"),
        ([(16,)], False, r"must be a matrix with sizes that are multiples of 16 .* got \(16,\)$"),
        ([(16, 16)], True, "gradients of low rank cannot be accumulated: make each one a step$"),
    ],
)
def test_refusals_of_tables(device, shapes, accumulates, message):
    tensors = [torch.zeros(shape, device=device) for shape in shapes]
    accumulators = [torch.zeros_like(each) for each in tensors] if accumulates else []
    with pytest.raises(ValueError, match=message):
        TensorTable(tensors, {"mean": tensors}, [], accumulators, low_rank=[True] * len(shapes))


def test_opcheck():
    """The plain way: opcheck clones its inputs, whose addresses the kernels would not know."""
    model = Model("cpu", rule=Rule(name="nadam"), copies=BF16)
    scalars, tables = new_scalars("cpu", learning_rate=1e-2), model.tables
    table = tables.dense
    low_rank = table.find(model.gradients())
    state = tables.dense_state
    norm = (
        low_rank.inputs,
        low_rank.grad_outputs,
        tables.partials_n,
        table.layers_lc,
        table.spans_p3,
    )
    update = (
        *(
            state.parameters,
            low_rank.inputs,
            low_rank.grad_outputs,
            *state.moments,
            state.low_precision,
        ),
        *(scalars, tables.factors_t, tables.tensors_tc, table.layers_lc, table.tiles_m3),
        *(low_rank.row_t, "nadam", 0.9, 0.999, 1e-8, 0.1, 0.5, 0.0),
    )
    for operation, arguments in (
        (dense_norm_op, (*norm, low_rank.row_t)),
        (dense_update_op, update),
    ):
        torch.library.opcheck(operation, arguments)
