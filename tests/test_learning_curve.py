"""200 steps by the kernels, in every precision, against a plain fp32 reference of the same seed.

The reference is PyTorch alone: separate operations, a loss by autograd, `torch.optim.Adam`. Ours
must stay nearer to it, window by window, than two seeds of the reference are to one another.
"""

import functools

import numpy as np
import pytest
import torch

from mien import models
from mien.benchmarks.bench_step import plain_blocks
from mien.core.config import from_dict
from mien.core.data.feed import Feed
from mien.core.data.store import FaceStore
from mien.core.precision import round_products
from mien.core.training import engine as engines
from mien.core.training.build import build_model, build_step
from mien.kernels import reference

STEPS, WINDOW, BATCH_SIZE = 200, 40, 4
SEEDS = (0, 1, 2)


def _faces(side):
    """Smooth pictures of one colour scheme a side, that a small model can learn; no masks."""
    generator = np.random.default_rng(side)
    places = np.linspace(-1, 1, 64, dtype=np.float32)
    radius = np.hypot(places, places[:, None])
    faces = np.full((30, 64, 64, 8), 255, np.uint8)
    for face in faces:
        for channel in range(3):
            level, tilt, ring = generator.uniform((80, -40, 20), (160, 40, 60))
            wave = ring * np.cos((4 + 2 * side) * radius + channel)
            face[..., channel] = np.clip(level + tilt * places + wave, 0, 255)
    return torch.from_numpy(faces)


def _config(seed, mode):
    return from_dict(
        {
            "model": {"trainer": "lightweight", "options": {"width": 8}},
            "precision": {"mode": mode},
            "train": {"batch_size": BATCH_SIZE, "seed": seed},
            "loss": {"eye_multiplier": 1, "mouth_multiplier": 1},
            "optimizer": {"learning_rate": 5e-4},
        }
    )


def _feed(config, dtype, device):
    stores = {}
    for number, side in enumerate("ab"):
        faces = _faces(number)
        names = [f"{i}.png" for i in range(len(faces))]
        stores[side] = FaceStore(
            faces.to(device), "host", names, [], "", "", reused=False, seconds=0.0
        )
    return Feed(
        stores,
        config,
        input_px=64,
        output_px=(64,),
        device=device,
        dtype=dtype,
        num_threads=1,
        input_channels=8 if device.type == "cuda" else 3,
    )


def _windows(losses):
    """Mean loss of A and B together of each window but the first."""
    return np.asarray(losses).reshape(-1, WINDOW).mean(axis=1)[1:]


@functools.cache
def _reference(seed, device_type):
    device = torch.device(device_type)
    round_products(False)
    config = _config(seed, "fp32")
    model = models.build("lightweight", seed=seed, width=8).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, eps=1e-7)
    feed, losses = _feed(config, torch.float32, device), []
    for step in range(STEPS):
        batch = feed.next(dict.fromkeys("ab", step * BATCH_SIZE))
        with plain_blocks():
            (of_a,), (of_b,) = model(batch.input_nchw[:, :3])
        means, *gradients = reference.face_loss(
            of_a, of_b, batch.targets[0], batch.weights[0], losses=[("ssim", 1.0), ("mse", 1.0)]
        )
        torch.autograd.backward((of_a, of_b), gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(means.sum()))
    feed.close()
    return _windows(losses)


def _ours(seed, mode, device):
    config = _config(seed, mode)
    model, _ = build_model(config, device)
    step = build_step(config, model, device)
    feed = _feed(config, step.update.precision.compute, device)
    engine = engines.make(engines.choose("auto", device)[0], step, feed, pytest.fail)
    for iteration in range(STEPS):
        engine(dict.fromkeys("ab", iteration * BATCH_SIZE))
    feed.close()
    return _windows(step.loss.named(step.loss_buffer.fetch(STEPS)())["batch_total"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_the_curve_stays_inside_the_spread_of_seeds(mode, device):
    device = torch.device(device)
    references = np.stack([_reference(seed, device.type) for seed in SEEDS])
    assert (references[:, -1] < 0.7 * references[:, 0]).all(), "the reference does not learn"
    spread = references.max(axis=0) - references.min(axis=0)
    ours = _ours(SEEDS[0], mode, device)
    apart = np.abs(ours - references[0])
    assert (apart <= spread).all(), f"apart {apart}, spread {spread}"
