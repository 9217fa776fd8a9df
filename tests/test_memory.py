"""Memory estimated from the graph is what a real step keeps; the advice names what fits."""

import dataclasses

import pytest
import torch
from conftest import tiny_options

from mien import models
from mien.core.config import from_dict
from mien.core.precision import Precision
from mien.core.training import memory

BF16 = Precision("bf16", torch.bfloat16, "as set")
FP32 = Precision("fp32", torch.float32, "as set")
MIB = 2**20


def settings(**given):
    return from_dict({"model": {"trainer": "original"}} | given)


def bytes_kept(model, faces_nchw):
    """What autograd saves in a real forward pass, by the address of the memory."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), faces_nchw)}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(faces_nchw)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("precision", [BF16, FP32], ids=lambda p: p.name)
@pytest.mark.parametrize("align", ["on", "off"])
@pytest.mark.parametrize("name", models.available())
@pytest.mark.parametrize("learn_mask", [False, True])
def test_what_is_kept_for_backward_is_what_a_real_step_keeps(name, align, precision, learn_mask):
    """To the byte (but for dropout), at batch sizes that were not probed."""
    config = from_dict(
        {
            "model": {"trainer": name, "options": tiny_options(name)},
            "loss": {"learn_mask": learn_mask},
            "precision": {"align_channels": align},
        }
    )
    model = models.build(name, learn_mask=learn_mask, **tiny_options(name))
    channels = 3
    if align == "on":
        model.align(8)
        channels = 8
    model.to(precision.compute)
    need = memory.footprint(config, precision)
    for batch_size in (1, 3):
        shape = (2 * batch_size, channels, model.input_px, model.input_px)
        faces = torch.rand(shape).to(precision.compute)
        faces = faces.contiguous(memory_format=torch.channels_last)
        found = need.at(batch_size).parts["kept for backward"]
        # A CPU's dropout keeps another mask than that of a device.
        assert found == pytest.approx(bytes_kept(model, faces), rel=2e-2 if model.is_noisy else 0)


def test_parameters_and_batches_are_counted_as_they_are_kept():
    num_parameters = sum(p.numel() for p in models.build("original").parameters())
    parts = memory.footprint(settings(), BF16, store_bytes=5 * MIB).at(16).parts
    aligned = parts["weights"] / 4
    assert num_parameters <= aligned <= 1.001 * num_parameters, "3 channels became 8"
    assert parts["lowered weights"] == parts["gradients"] == parts["weights"] / 2
    assert parts["optimizer state"] == 2 * parts["weights"]
    assert parts["decoded faces"] == 5 * MIB
    # Of each face: 8 channels of input in bf16, 3 of target and 1 of weight in fp32.
    assert parts["batches"] == 2 * 32 * 64 * 64 * (8 * 2 + 3 * 4 + 4)
    assert parts["accumulated gradients"] == 0
    in_fp32 = memory.footprint(settings(), FP32).at(16).parts
    assert in_fp32["lowered weights"] == 0
    assert in_fp32["gradients"] == in_fp32["weights"]


@pytest.mark.parametrize(
    ("optimizer", "amsgrad", "moments"),
    [
        ("lion", False, 1),
        ("rms-prop", False, 1),
        ("adamax", True, 2),
        ("adabelief", True, 2),
        ("schedule-free", False, 2),
        ("adamw", True, 3),
    ],
)
def test_the_state_of_each_optimizer_is_counted(optimizer, amsgrad, moments):
    chosen = {"optimizer": optimizer, "ada_amsgrad": amsgrad, "gradient_accumulation": 2}
    config = from_dict({"model": {"trainer": "original"}, "optimizer": chosen})
    parts = memory.footprint(config, BF16).at(16).parts
    assert parts["optimizer state"] == moments * parts["weights"]
    assert parts["accumulated gradients"] == parts["weights"]


@pytest.mark.parametrize(("settings_of_it", "sent"), [({}, 2), ({"reduce": "fp32"}, 4)])
def test_what_ranks_send_and_divide_is_counted(settings_of_it, sent):
    divided = settings(train={"distribution": "sharded"}, optimizer=settings_of_it)
    alone = memory.footprint(divided, BF16).at(16).parts
    on_four = memory.footprint(divided, BF16, num_ranks=4).at(16).parts
    assert "gradients to send" not in alone
    assert on_four["gradients to send"] == sent * alone["gradients"] / 2
    for name in ("weights", "optimizer state"):
        assert on_four[name] == pytest.approx(alone[name] / 4, rel=1e-6)
    mirrored = settings(optimizer={**settings_of_it, "gradient_accumulation": 2})
    on_four = memory.footprint(mirrored, BF16, num_ranks=4).at(16).parts
    assert on_four["optimizer state"] == alone["optimizer state"]
    assert on_four["gradients to send"] == 2 * alone["gradients"]


def test_the_total_is_that_of_its_parts_and_grows_by_the_face():
    need = memory.footprint(settings(), BF16)
    small, large = need.at(16), need.at(64)
    assert small.total_bytes == sum(small.parts.values())
    assert small.total_mib == pytest.approx(small.total_bytes / MIB)
    grown = large.total_bytes - small.total_bytes
    assert grown == pytest.approx(48 * sum(need.per_face.values()), rel=1e-6)
    assert str(small).startswith(f"{small.total_mib:,.0f} MiB at batch size 16: optimizer state 6")
    assert memory.describe(small, 24 * 2**30).endswith("; fits in 90 % of 24,576 MiB free")
    assert "does not fit" in memory.describe(small, small.total_bytes)


def test_the_largest_layer_counts_its_input_and_output():
    """Of `lightweight`: the last convolution of a decoder, 512 x 32 x 32, and what shuffles it."""
    need = memory.footprint(from_dict({"model": {"trainer": "lightweight"}}), BF16)
    assert need.per_face["largest layer"] == 2 * 2 * 512 * 32 * 32


def test_the_largest_batch_fits_and_the_next_does_not():
    need = memory.footprint(settings(), BF16)
    sizes = memory.batch_sizes()
    assert sizes[:3] == (4, 8, 12)
    assert all(size % 16 == 0 for size in sizes if size > 64)
    assert sizes[-1] == 4096
    for gib in (2.5, 3, 6, 24):
        free = int(gib * 2**30)
        batch_size = need.largest_batch(free)
        following = sizes[sizes.index(batch_size) + 1]
        assert need.at(batch_size).total_bytes <= 0.9 * free < need.at(following).total_bytes
    assert need.largest_batch(2**30) == 0
    assert need.largest_batch(2**40) == 4096


def test_the_advice_names_the_nearest_setting_that_fits():
    config = settings(train={"batch_size": 64})
    many = memory.footprint(config, FP32)
    free = round(many.at(40).total_bytes / 0.9)
    text = memory.advice(config, FP32, free)
    assert text.endswith(f"and {free / MIB:,.0f} MiB were free; use --batch-size 40")
    assert text.startswith("out of GPU memory: original in fp32 needs about ")
    # It failed although it should have fitted: something else has the memory, so less of it.
    assert memory.advice(config, FP32, 80 * 2**30).endswith("; use --batch-size 60")

    tight = settings(train={"batch_size": 4})
    small, lower = memory.footprint(tight, FP32), memory.footprint(tight, BF16)
    assert lower.at(4).total_bytes < small.at(4).total_bytes
    between = round((lower.at(4).total_bytes + small.at(4).total_bytes) / 2 / 0.9)
    assert memory.advice(tight, FP32, between).endswith("; use --precision bf16 --batch-size 4")
    crowded = round(small.at(4).total_bytes / 0.9) + MIB
    text = memory.advice(tight, FP32, crowded, store_bytes=500 * MIB)
    assert text.endswith("; use --set data.placement=host --batch-size 4")

    tight = settings(train={"batch_size": 4}, optimizer={"placement": "host"})
    below = round(memory.footprint(tight, BF16).at(4).total_bytes / 0.9) - MIB
    words = "a new model with --set model.options.lowmem=true --precision bf16"
    assert f"; use {words} --batch-size 4" in memory.advice(tight, FP32, below)
    words = "a new model with --set model.options.lowmem=true --batch-size 4"
    assert memory.advice(tight, BF16, below).endswith(words)
    text = memory.advice(config, BF16, 100 * MIB)
    assert text.endswith("; no setting of this model fits; use a GPU with more memory")
    assert "\n" not in text


def test_the_advice_counts_what_each_rank_trains_on():
    config = settings(train={"batch_size": 64})
    need = memory.footprint(config, BF16, num_ranks=4)
    # Of a rank's 16 faces 12 fit, which is more than enough for all 64 of one process at once.
    free = round(need.at(12).total_bytes / 0.9) + MIB
    text = memory.advice(config, BF16, free, num_ranks=4)
    total = f"{need.at(16).total_mib:,.0f} MiB at batch size 64 (16 on each of 4 GPUs), and "
    assert total in text
    assert text.endswith("; use --batch-size 48")
    # Divided unevenly, the rank that has most counts: 6 of 16 faces.
    assert "(6 on each of 3 GPUs)" in memory.advice(
        settings(train={"batch_size": 16}), BF16, free, num_ranks=3
    )
    tight = round(need.at(4).total_bytes / 0.9) - MIB
    text = memory.advice(settings(train={"batch_size": 16}), BF16, tight, num_ranks=4)
    assert text.endswith("; use --set train.distribution=sharded --batch-size 16")
    automatic = settings(train={"batch_size": "auto"})
    assert "use --batch-size 0" not in memory.advice(automatic, BF16, free, num_ranks=4)
    assert "at batch size 48 (12 on each" in memory.advice(automatic, BF16, free, num_ranks=4)


def test_what_is_advised_is_taken_by_the_settings():
    """The words are flags and settings that exist."""
    changes = memory._changes(settings(), FP32, 1, 2)
    texts = [words for words, *_ in changes]
    words = (
        "--set data.placement=host --set train.distribution=sharded --precision bf16 "
        "--set optimizer.placement=host"
    )
    assert texts[-1].endswith(words)
    from_dict(
        {
            "data": {"placement": "host"},
            "train": {"distribution": "sharded"},
            "model": {"options": {"lowmem": True}},
        }
    )
    assert models.options_of("original", {"lowmem": True}).lowmem
    lightweight = dataclasses.replace(
        settings(), model=dataclasses.replace(settings().model, trainer="lightweight")
    )
    texts = [words for words, *_ in memory._changes(lightweight, BF16, 0, 1)]
    assert texts == ["--set optimizer.placement=host"], "it has no lowmem"
