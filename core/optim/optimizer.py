"""How the weights are moved: sum up, unscale, check, clip and the optimizer's rule, on the device.

The optimizer keeps the fp32 weights; where the network computes in 16 bits, its parameters are the
low-precision weights that each update writes. A step whose gradient is not finite changes nothing
but the count of such steps; with fp16 it also halves the loss scale. With gradient accumulation
every n-th iteration makes a step, by the mean of n gradients; one that is not finite leaves the
other n - 1 out as well. With `optimizer.fused_dense` the gradients of large dense layers stay
factors until the update multiplies them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.norm_history import in_order, load_history, new_history
from ...kernels.optimize import optimize
from ...kernels.optimizer_rules import BASE, BEGIN_AT_WEIGHTS, EMA, Clipping, Rule
from ...kernels.optimizer_scalars import Scalar, new_scalars
from ...kernels.tensor_table import TensorTable
from ...models.alignment import axes_of, crop, pad
from ..config import OptimizerConfig
from ..precision import Precision
from . import fused_dense, optimizer_state, placement
from .frozen import Frozen

_FIRST_SCALE = 65536.0
"""Loss scale that fp16 begins with: 2**16, as PyTorch's GradScaler does. Not measured by mien."""

_SAVED: dict[str, int] = {  # what a resume needs of the scalars, by name
    "step": Scalar.STEP,
    "beta_1_power": Scalar.BETA_1_POWER,
    "beta_2_power": Scalar.BETA_2_POWER,
    "scale": Scalar.LOSS_SCALE,
    "good_steps": Scalar.FINITE_STEPS,
}
_COUNTS = ("step", "beta_1_power", "beta_2_power")
_LONGEST_HISTORY = 100_000
"""Norms that autoclip keeps where no length is set: the most that can be. Chosen, unmeasured."""

# As PyTorch's and newer faceswap; ada_beta_2 is of Adam's kin.
_RMS_MEMORY = 0.99
"""Decay rate of RMSprop's mean square."""


def rule_of(config: OptimizerConfig, ema: float = 0.0) -> Rule:
    """The rule that the settings describe, with `train.ema` as the decay of the average."""
    return Rule(
        name=config.optimizer,
        beta_1=config.ada_beta_1,
        beta_2=_RMS_MEMORY if config.optimizer == "rms-prop" else config.ada_beta_2,
        epsilon=10.0**config.epsilon_exponent,
        weight_decay=config.weight_decay,
        amsgrad=config.ada_amsgrad,
        ema=ema,
    )


def clipping_of(config: OptimizerConfig) -> Clipping:
    """The clipping that the settings describe."""
    if config.gradient_clipping == "autoclip":
        # A percentile, as in faceswap: 1.0 is the 10th.
        return Clipping("autoclip", int(10 * config.clipping_value))
    return Clipping(config.gradient_clipping, config.clipping_value)


def check_weights(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of a model.

    Args:
        tensors: Tensors by name, as they were saved.
        own: The model's, of which the numbers do not matter.

    Raises:
        ValueError: A tensor is missing, unknown, or of another shape or number format.
    """
    if tensors.keys() != own.keys():
        raise ValueError(f"{min(tensors.keys() ^ own.keys())} is in only one of them")
    for name, like in own.items():
        if tensors[name].shape != like.shape:
            raise ValueError(f"{name} has another shape")
        if tensors[name].dtype != like.dtype:
            raise ValueError(f"{name} has another number format, {tensors[name].dtype}")


def _zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in fp32 of the shapes and strides of these, on their device."""
    return [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]


def _zeros_like(expected: Tensor) -> Tensor:
    """Zeros of the shape and format of a tensor, which need not have memory."""
    return torch.zeros(expected.shape, dtype=expected.dtype)


def _lowered(parameters: Sequence[nn.Parameter], compute: torch.dtype) -> list[Tensor]:
    """The weights of the parameters, which are of this type from now on."""
    for parameter in parameters:
        parameter.data = parameter.data.to(compute)
    return [parameter.detach() for parameter in parameters]


def _without_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in fp32 of the shapes and strides of these, which hold nothing."""
    return [torch.empty_like(each, dtype=torch.float32, device="meta") for each in tensors]


def _history_of(config: OptimizerConfig, device: torch.device) -> Tensor | None:
    """Room for the norms that autoclip looks at; None: there is no autoclip."""
    if config.gradient_clipping != "autoclip":
        return None
    return new_history(device, config.autoclip_history or _LONGEST_HISTORY)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay moves a parameter: biases and norms, which it leaves alone, have one
    dimension, or a name that says so."""
    return parameter.ndim > 1 and not name.endswith("bias")


def _saved_scalars(rule: Rule, accumulation: int) -> dict[str, int]:
    """Places of the scalars that a resume needs, by name."""
    saved = dict(_SAVED)
    if rule.name == "nadam":
        saved["momentum_product"] = Scalar.MOMENTUM_PRODUCT
    if rule.is_schedule_free:
        saved["average_weight"] = Scalar.AVERAGE_WEIGHT
    if accumulation > 1:
        saved["accumulated"] = Scalar.ACCUMULATED_GRADIENTS
    return saved


def _thawed(
    tensors: Mapping[str, Tensor], names: Iterable[str], kinds: Collection[str]
) -> list[str]:
    """Parameters among these of which a checkpoint's optimizer has no moment of any kind."""
    return [name for name in names if not any(f"{name}.{kind}" in tensors for kind in kinds)]


def _completed(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    names: Collection[str],
    kinds: Collection[str],
) -> dict[str, Tensor]:
    """A checkpoint's tensors of an optimizer, with zeros for what has not begun.

    A parameter of which there is nothing was frozen until now, and begins at zero. Then the count
    of steps begins anew for all, for Adam's correction of young means needs it: with the old count
    the first steps of such a parameter would be several times the rate. The others take shorter
    steps for some hundred iterations. The average of schedule-free begins anew for all, too, or the
    past would bind such a parameter to where it was.

    What was accumulated goes on, if all of it is there and there is still accumulation.

    Args:
        tensors: Tensors of the checkpoint.
        own: Tensors as the optimizer has them now.
        names: Parameters that are trained.
        kinds: Kinds of tensors that the checkpoint should hold of each.
    """
    moments = [kind for kind in kinds if kind != "accumulator"]
    thawed = {
        f"{name}.{kind}": _zeros_like(own[f"{name}.{kind}"])
        for name in _thawed(tensors, names, moments)
        for kind in moments
    }
    begun_anew = (*_COUNTS, "momentum_product", "average_weight")
    fresh = {name: own[name] for name in begun_anew if name in own and thawed}
    completed = thawed | dict(tensors) | fresh
    if any(f"{name}.accumulator" not in completed for name in names):
        begun = {f"{name}.accumulator" for name in names} | {"accumulated"}
        completed |= {name: _zeros_like(own[name]) for name in begun & own.keys()}
    return completed


@dataclass(frozen=True)
class Part:
    """Parameters that are moved together, with a finite check and a count of steps of their own."""

    numbers: list[int]
    """Indices of them among the model's parameters."""

    table: TensorTable
    scalars: Tensor


def _furthest_scalars(parts: Sequence[Part]) -> Tensor:
    """Scalars of the part that has moved most often: parts count by themselves, and of those that
    differ the furthest holds after a resume."""
    scalars_pc = torch.stack([part.scalars for part in parts])
    furthest = scalars_pc[:, Scalar.STEP].argmax(0, keepdim=True)
    return scalars_pc.index_select(0, furthest)[0]


def _load_scalars(
    scalars: Tensor,
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, int],
    rule: Rule,
    precision: Precision,
) -> None:
    """Take the scalars up that a checkpoint's optimizer holds; ``saved``: their places by name."""
    for name, index in saved.items():
        # A scale of 1 was saved by a run that scaled nothing: fp16 begins with its own.
        is_scale = name in ("scale", "good_steps")
        if not is_scale or (precision.scales_loss and float(tensors["scale"]) > 1):
            scalars[index] = tensors[name].to(scalars)
    if rule.ema:
        # This average has one update a step, so the count of steps tells its weight.
        scalars[Scalar.AVERAGE_WEIGHT] = tensors["step"].to(scalars)


def _averages(weights: list[Tensor], bases: list[Tensor], rule: Rule) -> list[Tensor]:
    """Averages that the weights of schedule-free hold, on the host."""
    ahead = 1 / rule.beta_1 - 1
    # One after the other: the GPU may have no room for the weights a second time.
    pairs = ((weight.cpu(), base.cpu()) for weight, base in zip(weights, bases, strict=True))
    return [weight + ahead * (weight - base) for weight, base in pairs]


class Update:
    """The optimizer of one model and, with fp16, the loss scale.

    Takes over the model's weights: where the precision is of 16 bits, the model's parameters become
    low-precision weights, and the fp32 ones its master weights. Parameters that require no gradient
    are left as they are.
    """

    is_whole = True
    """Whether a step that is not finite moves nothing at all."""

    adds_up = True
    """Whether the tables add up the gradients of an accumulation; else they get the sums."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        precision: Precision,
        ema: float = 0.0,
    ):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Frozen parameters get no moments and no place in the table, so they cost no launch.
        others = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.model, self.precision = model, precision
        self.frozen = Frozen(others, precision.compute)
        self.names, self.parameters = list(named), list(named.values())
        self.low_rank = fused_dense.switch(model, is_on=config.fused_dense)
        """Names of the dense weights whose gradients are never in memory."""

        device = self.parameters[0].device
        self.is_on_host = placement.is_on_host(config, device)
        """Whether a GPU moves master weights and moments that lie in host memory."""

        self.master_weights = [parameter.detach() for parameter in self.parameters]
        self.low_precision_weights: list[Tensor] = []
        if precision.compute is not torch.float32:
            # The master weights above keep the fp32 numbers; the parameters now are the copies.
            self.low_precision_weights = _lowered(self.parameters, precision.compute)
        self.rule, self.clipping = rule_of(config, ema), clipping_of(config)
        self.accumulation = config.gradient_accumulation
        self._saved = _saved_scalars(self.rule, self.accumulation)
        self.moments: dict[str, list[Tensor]] = {}
        self.accumulators: list[Tensor] = []
        """Sums of gradients, in fp32, of parameters whose update is not due."""

        self._allocate()
        self._begin_averages()
        self.history_c = _history_of(config, device)
        """Norms of past gradients, for autoclip."""

        scale = _FIRST_SCALE if precision.scales_loss else 1.0
        scalars = new_scalars(device, learning_rate=config.learning_rate, scale=scale)
        self.parts = [self._part(list(range(len(self.parameters))), scalars)]
        self.rate = config.learning_rate

    def _allocate(self) -> None:
        """Make what is kept of every parameter from step to step, in the memory where it lies."""
        if self.is_on_host and self.low_precision_weights:  # not before: a rank keeps a slice
            self.master_weights = placement.page_locked(self.master_weights)
        zeros = placement.page_locked_zeros if self.is_on_host else _zeros
        self.moments = {kind: zeros(self.parameters) for kind in self.rule.moments}
        # On the GPU in any case: every iteration adds to them.
        self.accumulators = _zeros(self.parameters) if self.accumulation > 1 else []

    def _begin_averages(self) -> None:
        """Have what is averaged of the weights begin at the weights as they are now."""
        for kind in self.moments.keys() & BEGIN_AT_WEIGHTS:
            torch._foreach_copy_(self.moments[kind], self.master_weights)

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Move the weights by the gradients of the (scaled) loss, one of each parameter; or keep
        their sum until as many are there as `optimizer.gradient_accumulation` says."""
        self._move(self.parts[0], gradients)

    def overlap_backward(self) -> AbstractContextManager[None]:
        """Context manager for the backward pass; here nothing is done beside it."""
        return nullcontext()

    def gather(self) -> None:
        """Bring together what `weights` and `tensors` give, where ranks hold it; none do."""

    @property
    def phase(self) -> int:
        """Number of the kind of iteration that comes next; each needs a graph of its own."""
        return 0

    def end_iteration(self) -> None:
        """Count an iteration, also one that was the replay of a graph."""

    @property
    def scale(self) -> Tensor | None:
        """What the loss's gradient is multiplied with, on the device; None: nothing."""
        scales = self.precision.scales_loss
        return self.parts[0].scalars[Scalar.LOSS_SCALE].float() if scales else None

    def set_rate(self, rate: float) -> None:
        """Have the next update take this rate; nothing is read from the device."""
        # A fill is a launch; a constant rate needs none.
        if rate != self.rate:
            self.rate = rate
            for part in self.parts:
                part.scalars[Scalar.LEARNING_RATE].fill_(rate)

    @property
    def skipped(self) -> Tensor:
        """Steps of this session that were not finite, of the part with the most; on the device."""
        return torch.stack([part.scalars[Scalar.SKIPPED_STEPS] for part in self.parts]).amax()

    def changing_tensors(self) -> list[Tensor]:
        """Tensors of this process that steps change in place, but for the scalars of parts."""
        self._settle()
        state = [tensor.detach() for tensor in self.model.state_dict().values()]
        history = [] if self.history_c is None else [self.history_c]
        moments = [tensor for tensors in self.moments.values() for tensor in tensors]
        return [*state, *self.master_weights, *moments, *self.accumulators, *history]

    @property
    def num_parameters(self) -> int:
        """Numbers in `weights`."""
        return sum(tensor.numel() for tensor in self._expected_weights().values())

    def weights(self) -> dict[str, Tensor]:
        """The model's state in fp32, as a checkpoint holds it."""
        self._settle()
        state = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        return state | self._cropped(self._whole("weight")) | self.frozen.weights

    @property
    def averages(self) -> dict[str, Tensor]:
        """Averages of the weights that are trained, as a checkpoint holds them; empty: none."""
        self._settle()
        if self.rule.is_schedule_free:
            return self._cropped(_averages(self._whole("weight"), self._whole(BASE), self.rule))
        return self._cropped(self._whole(EMA)) if self.rule.ema else {}

    def load_averages(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `averages` gave, where they are kept; one that is missing stays as it is.

        Raises:
            ValueError: A tensor has another shape or number format, or holds NaN or infinity.
        """
        expected = self._whole_shapes()
        for number, name in enumerate(self.names):
            if self.rule.ema and name in tensors:
                optimizer_state.check(f"{name}.{EMA}", tensors[name], expected[name])
                self._take(EMA, number, self._padded(name, tensors[name]))

    def _expected_weights(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and formats that `weights` gives; not all have memory."""
        state = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        return state | self._whole_shapes() | self.frozen.weights

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `weights` gave; averages, and the base of schedule-free, begin there.

        Raises:
            ValueError: A tensor is missing, unknown, or of another shape or number format.
        """
        check_weights(tensors, self._expected_weights())
        self._settle()
        numbers = {name: number for number, name in enumerate(self.names)}
        state = self.model.state_dict()
        for name, tensor in tensors.items():
            if name in numbers:
                self._take("weight", numbers[name], self._padded(name, tensor))
            elif name in self.frozen.weights:
                self.frozen.load_weight(name, tensor)
            else:
                state[name].copy_(tensor)
        self._begin_averages()

    def tensors(self) -> dict[str, Tensor]:
        """What a resume needs besides, by name: `<parameter>.mean`, `.square`, `.largest` as the
        rule has them, `step`, `scale`.., of an accumulation `accumulated` and
        `<parameter>.accumulator`, of autoclip `history`, its newest norm last."""
        self._settle()
        scalars = _furthest_scalars(self.parts)
        state = {name: scalars[index] for name, index in self._saved.items()}
        for kind in self._kinds:
            state |= {f"{k}.{kind}": v for k, v in self._cropped(self._whole(kind)).items()}
        if self.history_c is not None:
            state["history"] = in_order(self.history_c, scalars)
        return state | self.frozen.state

    def _expected(self, kinds: Collection[str]) -> dict[str, Tensor]:
        """Names, shapes and formats of what `tensors` gives of these kinds; not all have memory."""
        scalars = _furthest_scalars(self.parts)
        state = {name: scalars[index] for name, index in self._saved.items()}
        for kind in kinds:
            state |= {f"{name}.{kind}": like for name, like in self._whole_shapes().items()}
        return state if self.history_c is None else state | {"history": self.history_c}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave, as `_completed` says; the settings stay as configured now.

        Raises:
            ValueError: A tensor is missing, has another shape or number format, or holds a number
                that no optimizer does.
        """
        # A base that is not there is that of the weights.
        kinds = [kind for kind in self._kinds if kind != BASE or not begins_anew(self, tensors)]
        # What was saved may be a stranger's.
        own = self._expected(kinds)
        tensors = _completed(tensors, own, self.names, kinds)
        history = tensors.get("history")
        for name, tensor in own.items():
            # Without a history autoclip begins with an empty one, as where the clipping is new. Of
            # one that is there it takes as many of the newest norms as it has room for.
            if name != "history" or history is not None:
                optimizer_state.check(name, tensors.get(name), tensor)
        for part in self.parts:
            _load_scalars(part.scalars, tensors, self._saved, self.rule, self.precision)
        self._settle()
        for kind in kinds:
            for number, name in enumerate(self.names):
                self._take(kind, number, self._padded(name, tensors[f"{name}.{kind}"]))
        if self.history_c is not None and history is not None:
            load_history(self.history_c, self.parts[0].scalars, history)
        self.frozen.load_state(tensors)

    @property
    def _kinds(self) -> list[str]:
        """Moments and accumulators, by the last part of their names among `tensors`."""
        return [k for k in self.moments if k != EMA] + ["accumulator"] * bool(self.accumulators)

    def _own(self, kind: str) -> list[Tensor]:
        """Tensors of one kind: `weight`, or one of `_kinds`."""
        others = {"weight": self.master_weights, "accumulator": self.accumulators}
        return others[kind] if kind in others else self.moments[kind]

    def _whole(self, kind: str) -> list[Tensor]:
        """Tensors of one kind as a checkpoint holds them, one for every parameter."""
        return self._own(kind)

    def _take(self, kind: str, number: int, tensor: Tensor) -> None:
        """Take up one of the tensors that `_whole` gives."""
        self._own(kind)[number].copy_(tensor)
        if kind == "weight" and self.low_precision_weights:
            # The network computes with them before the first update writes them.
            self.low_precision_weights[number].copy_(tensor)

    def _whole_shapes(self) -> dict[str, Tensor]:
        """Tensors without memory, of the names, shapes and formats of a kind in a checkpoint."""
        return self._cropped(_without_memory(self.parameters))

    def _settle(self) -> None:
        """Wait for the GPU where the host is to read or write what it moves."""
        if self.is_on_host:
            torch.cuda.synchronize(self.parameters[0].device)

    def _part(self, numbers: list[int], scalars: Tensor) -> Part:
        return Part(numbers, self._table(numbers), scalars)

    def _table(self, numbers: list[int]) -> TensorTable:
        def own(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[number] for number in numbers] if tensors else []

        return TensorTable(
            own(self.master_weights),
            {kind: own(tensors) for kind, tensors in self.moments.items()},
            own(self.low_precision_weights),
            own(self.accumulators) if self.adds_up else [],
            decays=[decays(self.names[n], self.parameters[n]) for n in numbers],
            low_rank=[self.names[number] in self.low_rank for number in numbers],
        )

    def _split(self, groups: list[list[int]]) -> None:
        """Have each group of parameters be a part, where there was one for all."""
        scalars = self.parts[0].scalars
        self.parts = [self._part(numbers, scalars.clone()) for numbers in groups]

    def _move(
        self,
        part: Part,
        gradients: Sequence[Tensor],
        whole_squares: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        optimize(
            gradients,
            part.table,
            part.scalars,
            self.rule,
            clipping=self.clipping,
            history_c=self.history_c,
            # Where the table has none, the gradients are the sums already.
            accumulation=self.accumulation if part.table.accumulators else 1,
            dynamic_scale=self.precision.scales_loss,
            whole_squares=whole_squares,
        )

    def _cropped(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors by parameter, without the channels that alignment added."""
        return {
            name: crop(tensor, axes_of(parameter)) if axes_of(parameter) else tensor
            for name, parameter, tensor in zip(self.names, self.parameters, tensors, strict=True)
        }

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        return pad(tensor, axes_of(self.parameters[self.names.index(name)]))


def begins_anew(update: Update, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the count of updates, and with it the base of schedule-free, begins anew: of a
    parameter nothing is among what `Update.tensors` gave, since it was frozen until now or no
    tensors were saved."""
    return bool(_thawed(tensors, update.names, update.rule.moments))


def average_weight(update: Update) -> float:
    """Weight of what the averages hold, see `Scalar`; read from the device."""
    return float(_furthest_scalars(update.parts)[Scalar.AVERAGE_WEIGHT])
