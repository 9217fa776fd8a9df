"""Batches: which faces come next, varied at random, as tensors that a training step takes.

A batch is a pure function of the seed and of how many faces each side has shown before it, so it
does not matter when, or on how many threads, it is made.

Shape letters: N faces, first those of A, then as many of B; H rows, W columns.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.augment import Ranges, augment, draw, empty
from ..config import Config, to_dict
from .sides import SIDES
from .store import FaceStore


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    input_nchw: Tensor
    """Warped faces, 0..1, channels_last, in the precision of the network."""

    targets: tuple[Tensor, ...]
    """Faces to be re-created (N, 3, S, S), 0..1, one for every output size, small to large."""

    weights: tuple[Tensor, ...]
    """Weight of each pixel (N, 1, S, S) fp32, one for every output size."""

    mask_n1hw: Tensor | None
    """The face mask of the largest output, where the model learns it."""


class Feed:
    """Makes batches from two stores; the next one while the present one is trained on."""

    def __init__(
        self,
        stores: dict[str, FaceStore],
        config: Config,
        *,
        input_px: int,
        output_px: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        num_threads: int,
    ):
        self.stores, self.config, self.device, self.dtype = stores, config, device, dtype
        self.input_px, self.output_px, self.num_threads = input_px, output_px, num_threads
        self.ranges = Ranges(**to_dict(config)["augment"])
        self.waited_s = 0.0
        """Seconds for which `next` kept its caller waiting, so far."""

        self._ahead: tuple[dict[str, int], Future[Batch]] | None = None
        # On a GPU the kernels queue up behind the step; on the CPU a thread works ahead.
        self._worker = ThreadPoolExecutor(1, "mien-feed") if device.type == "cpu" else None

    def next(self, faces_seen: dict[str, int]) -> Batch:
        """The batch after ``faces_seen`` faces of each side."""
        if self._worker is None:
            return self.batch(faces_seen)
        started = time.perf_counter()
        if self._ahead is None or self._ahead[0] != faces_seen:
            batch = self.batch(faces_seen)
        else:
            batch = self._ahead[1].result()
        size = self.config.train.batch_size
        following = {side: seen + size for side, seen in faces_seen.items()}
        self._ahead = following, self._worker.submit(self.batch, following)
        self.waited_s += time.perf_counter() - started
        return batch

    def batch(self, faces_seen: dict[str, int]) -> Batch:
        """The same, made now."""
        config, size = self.config, self.config.train.batch_size
        learn_mask = config.loss.learn_mask
        out = empty(
            len(SIDES) * size,
            input_px=self.input_px,
            output_px=self.output_px,
            learn_mask=learn_mask,
            input_dtype=self.dtype,
            device=self.device,
        )
        for number, side in enumerate(SIDES):
            store = self.stores[side]
            params = draw(
                self.ranges,
                seed=config.train.seed,
                side=number,
                first=faces_seen[side],
                count=size,
                num_faces=store.num_faces,
                size_px=store.size_px,
                device=self.device,
            )
            augment(
                store.faces_fssc,
                params,
                input_px=self.input_px,
                output_px=self.output_px,
                penalize_mask=config.loss.penalized_mask_loss,
                eye_multiplier=config.loss.eye_multiplier,
                mouth_multiplier=config.loss.mouth_multiplier,
                learn_mask=learn_mask,
                out=out.part(number * size, (number + 1) * size),
                num_threads=self.num_threads,
            )
        return Batch(
            out.input_bchw, tuple(out.targets_bchw), tuple(out.weights_b1hw), out.mask_b1hw
        )

    def close(self) -> None:
        """End the thread that works ahead."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
