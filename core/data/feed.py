"""Batches: which faces come next, varied at random, as tensors that a training step takes.

A batch is a pure function of the seed and of how many faces each side has shown before it, so it
does not matter when, or on how many threads, it is made.

Shape letters: N faces, first those of A, then as many of B; H rows, W columns.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.augment import Augmented, Landmarks, augment, empty, workspace_bytes
from ...kernels.draw import FACE_PARAMS, Ranges, draw, records_of
from ..config import Config, to_dict
from .shares import DrawTable
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
    """Makes batches from two stores.

    On the CPU the next batch is made while the present one is trained on. On a GPU a batch goes to
    one of two sets of tensors, so that one can be made while the other is trained on, and how many
    faces were seen is counted on the device, so that `batch` can be captured in a CUDA graph
    together with the step; each replay then makes the next batch. Faces in a file are no use to a
    graph: the host gathers those of each batch (`is_capturable`).

    tables: of each side whose folders have shares of its draws, the faces that are drawn.

    Where several processes train one run, a feed makes only the faces of its share: ``count`` of
    each side, behind the ``offset`` first ones of the batch. Together they make the batch.
    """

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
        input_channels: int = 3,
        landmarks: tuple[Landmarks, Landmarks] | None = None,
        offset: int = 0,
        count: int | None = None,
        tables: Mapping[str, DrawTable | None] | None = None,
    ):
        self.offset, self.batch_size = offset, config.train.batch_size
        self.count = self.batch_size if count is None else count
        """Faces of each side that are made here, of a batch of ``batch_size``."""

        self.stores, self.config, self.device, self.dtype = stores, config, device, dtype
        self.input_px, self.output_px, self.num_threads = input_px, output_px, num_threads
        self.input_channels, self.size_px = input_channels, stores["a"].size_px
        augment_settings = to_dict(config)["augment"]
        self.single_interpolation = augment_settings.pop("single_interpolation")
        self.ranges = Ranges(**augment_settings)
        self.landmarks = landmarks
        """Landmarks of both sides, where faces are warped to landmarks."""

        # 64 bits: with the largest count of iterations and batch, faces pass what 32 bits hold.
        self.seen = torch.zeros(len(SIDES), dtype=torch.int64, device=device)
        """Faces of each side before the next batch, on the device; `batch` moves it on."""

        self.waited_s = 0.0
        """Seconds for which `next` kept its caller waiting, so far."""

        self._expected: dict[str, int] | None = None
        """What `seen` will be when the replay of a graph follows the last `seek`; None: unknown."""

        # The kernels read GPU memory and pinned memory alone: a mapped file is neither.
        self.is_capturable = device.type == "cuda" and all(
            store.faces_fssc.is_cuda or store.faces_fssc.is_pinned() for store in stores.values()
        )
        """Whether `batch` leaves the host out."""

        self._gathers = device.type == "cuda" and not self.is_capturable
        self._tables = [(tables or {}).get(side) for side in SIDES]
        for table in filter(None, self._tables):
            # Where the host gathers the faces, it draws them, too.
            table.move_to(torch.device("cpu") if self._gathers else device)
        self._buffers: list[_BatchBuffers] = []
        if device.type == "cuda":
            # Made once: a captured graph writes to the same addresses at every replay.
            first = _BatchBuffers(self)
            self._buffers = [first, _BatchBuffers(self, shared_with=first)]
        self._ahead: tuple[dict[str, int], Future[Batch]] | None = None
        # On a GPU the kernels queue up behind the step; on the CPU a thread works ahead.
        self._worker = ThreadPoolExecutor(1, "mien-feed") if device.type == "cpu" else None

    def next(self, faces_seen: dict[str, int]) -> Batch:
        """The batch after ``faces_seen`` faces of each side."""
        if self._worker is None:
            self.seek(faces_seen)
            return self.batch()
        started = time.perf_counter()
        # Another batch is due than was foreseen: at the start, and where the sequence was left.
        if self._ahead is None or self._ahead[0] != faces_seen:
            batch = self._make(_numbers(faces_seen))
        else:
            batch = self._ahead[1].result()
        following = self.following(faces_seen)
        # Made while the caller trains on the batch that is returned now.
        self._ahead = following, self._worker.submit(self._make, _numbers(following))
        self.waited_s += time.perf_counter() - started
        return batch

    def seek(self, faces_seen: dict[str, int]) -> None:
        """Have the next batch be the one after ``faces_seen`` faces of each side.

        To be called before each batch, also before one that a captured graph makes: as long as its
        replays follow one another, it does nothing.
        """
        # Written only where the count jumps: a fill is a launch, and replays count by themselves.
        if faces_seen != self._expected:
            for seen, number in zip(self.seen, _numbers(faces_seen), strict=True):
                seen.fill_(number)
        self._expected = self.following(faces_seen)

    def batch(self, turn: int = 0) -> Batch:
        """The batch after `seen` faces, which then moves on; on a GPU in set ``turn``, 0 or 1."""
        self._expected = None  # a graph that is being captured makes no batch now
        if not self._gathers:
            return self._make(self.seen, turn)
        # The host must know which faces to gather, so it waits for the count here.
        batch = self._make(self.seen.tolist(), turn)
        # Drawn from the host's numbers, which leaves the count on the device as it was.
        self.seen.add_(self.batch_size)
        return batch

    def following(self, faces_seen: dict[str, int]) -> dict[str, int]:
        """The faces of each side that have been seen after the batch after ``faces_seen``."""
        return {side: faces_seen[side] + self.batch_size for side in SIDES}

    def _make(self, first: list[int] | Tensor, turn: int = 0) -> Batch:
        """The batch after so many faces of each side."""
        # On the CPU new tensors each time: the caller still trains on those of the batch before.
        buffers, config = self._buffers[turn] if self._buffers else _BatchBuffers(self), self.config
        faces = [self.stores[side].faces_fssc for side in SIDES]
        num_faces = [len(faces_fssc) for faces_fssc in faces]
        params_nx = self._draw(first, num_faces, None if self._gathers else buffers.params_nx)
        if self._gathers:
            # Only the faces of this batch cross to the GPU; the file holds all of them.
            faces = [each.to(self.device) for each in _chosen(faces, params_nx)]
            buffers.params_nx.copy_(params_nx)
        out = augment(
            faces,
            buffers.params_nx,
            # Rows number the faces of the whole store, of which only this batch's were gathered.
            num_faces=num_faces if self._gathers else None,
            input_px=self.input_px,
            output_px=self.output_px,
            landmarks=self.landmarks,
            input_channels=self.input_channels,
            penalize_mask=config.loss.penalized_mask_loss,
            eye_multiplier=config.loss.eye_multiplier,
            mouth_multiplier=config.loss.mouth_multiplier,
            learn_mask=config.loss.learn_mask,
            single_interpolation=self.single_interpolation,
            out=buffers.out,
            num_threads=self.num_threads,
            workspace=buffers.workspace,
        )
        return Batch(
            out.input_bchw, tuple(out.targets_bchw), tuple(out.weights_b1hw), out.mask_b1hw
        )

    def _draw(self, first: list[int] | Tensor, num_faces: list[int], out: Tensor | None) -> Tensor:
        """The parameters of the faces after so many of each side."""
        # As it was: drawing moves the count on.
        begin = first.clone() if isinstance(first, Tensor) and any(self._tables) else first
        params_nx = draw(
            self.ranges,
            seed=self.config.train.seed,
            first=first,
            count=self.count,
            offset=self.offset,
            advance=self.batch_size,
            num_faces=[
                table.num_slots if table else count
                for table, count in zip(self._tables, num_faces, strict=True)
            ],
            size_px=self.size_px,
            out=out,
        )
        for side, table in enumerate(self._tables):
            if table:
                rows = slice(side * self.count, (side + 1) * self.count)
                table.choose(params_nx[rows], begin[side] + self.offset)
        return params_nx

    def close(self) -> None:
        """End the thread that works ahead."""
        if self._worker is not None:
            # A batch that has not been begun is not made: nobody will train on it.
            self._worker.shutdown(wait=True, cancel_futures=True)


class _BatchBuffers:
    """The tensors that a batch is made in: its parameters, itself, and on a GPU a workspace.

    Args:
        feed: Feed whose batches they are for.
        shared_with: Buffers whose parameters and workspace are used here too: no two batches are
            made at the same moment. None: there are none.
    """

    def __init__(self, feed: Feed, shared_with: "_BatchBuffers | None" = None):
        faces, device = len(SIDES) * feed.count, feed.device
        sizes: dict[str, Any] = {"input_px": feed.input_px, "output_px": feed.output_px}
        self.out: Augmented = empty(
            faces,
            **sizes,
            input_channels=feed.input_channels,
            learn_mask=feed.config.loss.learn_mask,
            input_dtype=feed.dtype,
            device=device,
        )
        self.params_nx, self.workspace = (
            _scratch(feed) if shared_with is None else shared_with.scratch
        )

    @property
    def scratch(self) -> tuple[Tensor, Tensor | None]:
        """Parameters and workspace, of use only while a batch is made."""
        return self.params_nx, self.workspace


def _scratch(feed: Feed) -> tuple[Tensor, Tensor | None]:
    """Parameters of the faces of a batch and, on a GPU, a workspace to make it in."""
    faces, device = len(SIDES) * feed.count, feed.device
    shape = (faces, FACE_PARAMS.itemsize)
    # As bytes: a record holds numbers of several types.
    params_nx = torch.empty(shape, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        return params_nx, None
    needed = workspace_bytes(
        faces,
        size_px=feed.size_px,
        to_landmarks=feed.landmarks is not None,
        input_px=feed.input_px,
        output_px=feed.output_px,
    )
    return params_nx, torch.empty(needed, dtype=torch.uint8, device=device)


def _numbers(faces_seen: dict[str, int]) -> list[int]:
    """Faces seen, in the order of the sides."""
    return [faces_seen[side] for side in SIDES]


def _chosen(faces: list[Tensor], params_nx: Tensor) -> list[Tensor]:
    """Faces of each side that the rows name, in their order."""
    rows = torch.from_numpy(records_of(params_nx)["index"].copy()).reshape(len(SIDES), -1)
    return [
        faces_fssc.index_select(0, chosen.to(faces_fssc.device))
        for faces_fssc, chosen in zip(faces, rows, strict=True)
    ]
