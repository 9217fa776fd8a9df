"""Every form of the Triton kernels that training on a GPU asks for; needs no GPU and no weights.

    python tests/aot/walk.py [FILE]      writes the list that is compiled ahead of time

Steps of training run on the meta device, as a run's settings make them. Triton is told of a driver
without a GPU, and its hook before a compilation notes the form and has it left out, so the same
code as in a run decides what is compiled. A process of its own: kernels that were imported for
Triton's interpreter have no forms.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from forms import ALIGNED, FILE, Form
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget

from mien import models
from mien.benchmarks import variants
from mien.benchmarks.launches import launches_of_mien
from mien.core import precision as precisions
from mien.core.config import Config, from_dict, merge
from mien.core.data.feed import Batch
from mien.core.distribute.group import Group
from mien.core.distribute.ranks import Ranks
from mien.core.estimate.flops import meta_model
from mien.core.optim import fused_dense, overlap
from mien.core.training.build import build_step, has_aligned_channels
from mien.kernels import dispatch
from mien.kernels.augment import empty
from mien.kernels.face_loss import LAUNCHES as OF_CUDA
from mien.kernels.optimizer_rules import CLIPPINGS, RULES, SCHEDULE_FREE
from mien.models.alignment import MULTIPLE

Settings = dict[str, Any]

META = torch.device("meta")


class _Driver:
    """What Triton asks of a GPU before it compiles; the forms are the same for every target."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _SilentGroup(Group):
    """Two ranks that send nothing: what is launched does not hang on the sums."""

    def __init__(self) -> None:
        self.ranks = Ranks(0, 2)

    def all_reduce(self, tensor: torch.Tensor, *_: object) -> None: ...

    def reduce_scatter(self, tensor: torch.Tensor) -> None: ...

    def all_gather(self, tensor: torch.Tensor) -> None: ...


class _Launching(TorchDispatchMode):
    """Operations launch their Triton kernels inside, though their tensors have no memory."""

    names = launches_of_mien().keys() - OF_CUDA.keys()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func._schema.name in self.names:  # what runs on a device, not what describes its result
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _noted() -> Iterator[set[Form]]:
    """The forms that launches inside ask for; nothing is compiled."""
    forms: set[Form] = set()

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        forms.add(_form_of(fn, compile))
        return True

    triton.runtime.driver.set_active(_Driver())
    knobs.runtime.jit_cache_hook = note
    yield forms
    knobs.runtime.jit_cache_hook = None


def _form_of(function: Any, asked: dict[str, Any]) -> Form:
    """The form, as Triton describes it to its hook."""
    (attributes,) = asked["configs"]
    arguments = []
    for index, type_ in enumerate(asked["signature"].values()):
        known = attributes.get((index,), [])
        assert known in ([], [["tt.divisibility", 16]]), f"{function.name}: {known}"
        aligned = type_ + ALIGNED if known else type_
        arguments.append(asked["constants"][index,] if type_ == "constexpr" else aligned)
    kernel = f"{function.module.rpartition('.')[2]}.{function.name}"
    return Form(kernel, asked["num_warps"], asked["num_stages"], tuple(arguments))


def cases() -> Iterator[Settings]:
    """Settings of runs: every model as it comes and, of tiny ones, all that changes a kernel."""
    for name in variants.names():
        model = variants.variant(name)
        yield from _changed(_of_model(model.trainer, model.options), MASK)
    for name in models.available():
        tiny = _of_model(name, dataclasses.asdict(models.family(name).tiny), batch_size=4)
        yield from _changed(tiny, [*MASK, *NETWORK_CHANGES])
        if name == "original":
            yield from _changed(tiny, list(_optimizer_changes()))


def fused_cases() -> Iterator[Settings]:
    """Settings of runs whose dense layers leave the factors of their gradients."""
    fused: Settings = {"optimizer": {"fused_dense": True}}
    tiny = dataclasses.asdict(models.family("original").tiny)
    changes = [
        {"precision": {"mode": mode}, "optimizer": rule}
        for mode in ("bf16", "fp16", "fp32")
        for rule in [*_rules(), {"gradient_clipping": "value"}, {"gradient_clipping": "norm"}]
    ]
    changes += _averaging()
    for settings in _changed(_of_model("original", tiny, batch_size=4), changes):
        yield merge(settings, fused)
    for batch_size in (16, 64):
        yield merge(_of_model("original", tiny, batch_size), fused)


def shared_cases() -> Iterator[Settings]:
    """Settings of runs on several ranks, whose gradients may have other types than the weights."""
    tiny = dataclasses.asdict(models.family("original").tiny)
    rules = [*_rules(), *({"gradient_clipping": clipping} for clipping in CLIPPINGS)]
    changes: list[Settings] = [
        {
            "precision": {"mode": mode},
            "optimizer": {**rule, "reduce": reduce},
            "train": {"distribution": distribution},
        }
        for mode in ("bf16", "fp16", "fp32")
        for reduce in ("same", "fp32")
        for distribution in ("mirrored", "sharded")
        for rule in rules
    ]
    yield from _changed(_of_model("original", tiny, batch_size=4), changes)


def _of_model(trainer: str, options: Settings, batch_size: int = 16) -> Settings:
    return {
        "model": {"trainer": trainer, "options": options},
        "train": {"batch_size": batch_size},
        # What auto leads to on a GPU.
        "precision": {"mode": "bf16", "align_channels": "on"},
    }


def _changed(settings: Settings, changes: list[Settings]) -> Iterator[Settings]:
    return (merge(settings, change) for change in changes)


MASK: list[Settings] = [{}, {"loss": {"learn_mask": True}}]

EMA: Settings = {"train": {"ema": 0.999}}

NETWORK_CHANGES: list[Settings] = [
    {"model": {"reflect_padding": True}},
    {"precision": {"mode": "fp16"}},
    {"precision": {"mode": "fp32"}},
    {"precision": {"align_channels": "off"}},
]


def _rules() -> list[Settings]:
    rules: list[Settings] = [{"optimizer": name} for name in RULES]
    return rules + [{"optimizer": name, "ada_amsgrad": True} for name in ("adam", "adamw")]


def _optimizer_changes() -> Iterator[Settings]:
    """What changes the kernels of the optimizer."""
    rules = _rules()
    rules += [
        {"gradient_clipping": clipping, "gradient_accumulation": accumulation}
        for clipping in CLIPPINGS
        for accumulation in (1, 4)
    ]
    for mode in ("bf16", "fp16", "fp32"):
        for rule in rules:
            yield {"precision": {"mode": mode}, "optimizer": rule}
    yield from _averaging()
    yield {**EMA, "optimizer": {"gradient_accumulation": 4}}


def _averaging() -> Iterator[Settings]:
    """What changes the kernels that keep an average of the weights."""
    for rule in _rules():
        if rule["optimizer"] == SCHEDULE_FREE:
            continue  # which has one by itself
        yield {**EMA, "precision": {"mode": "bf16"}, "optimizer": rule}
    for mode in ("fp16", "fp32"):
        yield {**EMA, "precision": {"mode": mode}}


def _run(config: Config, group: Group | None = None) -> None:
    """The steps of a run that differ, and what its previews show; of ranks, those of the first."""
    model, precision = meta_model(config), precisions.resolve(config.precision.mode, META)
    if has_aligned_channels(config, META):
        model.align(MULTIPLE)
    model.to_channels_last()
    # Where it may run beside the backward pass: then its first step is as one without that, and the
    # later ones have parts.
    kind_of_update = overlap.choose(config.optimizer, precision, is_worth=True)
    step = build_step(config, model, META, kind_of_update=kind_of_update, group=group)
    made = empty(
        2 * config.train.batch_size,
        input_px=model.input_px,
        output_px=model.output_px,
        input_channels=MULTIPLE if has_aligned_channels(config, META) else 3,
        learn_mask=config.loss.learn_mask,
        input_dtype=precision.compute,
        device=META,
    )
    batch = Batch(made.input_bchw, made.targets_bchw, made.weights_b1hw, made.mask_b1hw)
    shape = (config.preview.preview_images, *made.input_bchw.shape[1:])
    shown_nchw = torch.empty(shape, dtype=precision.compute, device=META)
    with dispatch.interpreted(), _Launching():
        step(batch)
        if not step.update.is_whole:
            step(batch)
        model.eval()
        with torch.no_grad():
            model.swap(shown_nchw, "a")


def walk() -> set[Form]:
    """Every form."""
    with _noted() as forms:
        for settings in cases():
            _run(from_dict(settings))
        for settings in shared_cases():
            _run(from_dict(settings), _SilentGroup())
        with mock.patch.object(fused_dense, "LEAST", 1):  # the layers of a tiny model are small
            for settings in fused_cases():
                _run(from_dict(settings))
    return forms


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "unset TRITON_INTERPRET"
    file = Path(sys.argv[1]) if sys.argv[1:] else FILE
    file.write_text("".join(f"{line}\n" for line in sorted(map(str, walk()))))
