"""First start-up against bare decoding: what it costs to have both sides' faces ready.

The start-up is everything from the folders' names to the tensors: headers, alignment, decoding,
crop, resize, masks, and the raw files synced to disk. Bare decoding is what no start-up can do
without: the same files read, decoded to full pictures and thrown away, by DALI and by OpenCV, on
as many threads; the ratio is taken to the faster of the two.
"""

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ..core.config import DataConfig, EvaluateConfig
from ..core.data.decode import BATCH_SIZE, choose_backend
from ..core.data.sides import SIDES, open_sides
from ..core.faces.folder import read_folder
from ..core.faces.synthetic import draw_folder
from ..core.system.threads import thread_count

NUM_DRAWN = 64


def first_start(
    num_faces: int,
    png_px: int,
    size_px: int,
    *,
    source: Path | None = None,
    repeats: int = 3,
    num_threads: int = 0,
) -> dict[str, Any]:
    """Seconds and CPU seconds of a first start-up, of the next one, and of bare decoding.

    source: folder of face PNGs to use, repeated up to num_faces in all, in place of drawn faces.
    Each figure is the best of `repeats` rounds; a round runs every variant once, so that a busy
    moment of the machine does not fall on one of them alone. Imports are made before.
    """
    threads = thread_count(num_threads)
    has_dali = choose_backend("auto", "cuda")[0] == "dali"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "faces"
        files = _repeat(source or _draw(Path(scratch), png_px, num_faces), folder, num_faces)
        variants: dict[str, Callable[[], Any]] = {"opencv": lambda: _bare_opencv(files, threads)}
        if has_dali:
            variants["dali"] = lambda: _bare_dali(files, threads)
        times: dict[str, list[tuple[float, float]]] = {}
        for turn in range(repeats):
            for name, run in variants.items():
                times.setdefault(f"bare_{name}", []).append(_timed(run)[1:])
            store_dir = Path(scratch) / f"store_{turn}"
            start = _starter(folder, size_px, store_dir, threads)
            opened, *first = _timed(start)
            del opened
            again, *second = _timed(start)
            stores = [side.store for side in again.values()]
            if not all(store.reused for store in stores):
                raise RuntimeError(f"the raw files were not reused: {stores[0].why}")
            headers = _timed(lambda: [read_folder(folder / side) for side in SIDES])[1:]
            times.setdefault("first", []).append((first[0], first[1]))
            times.setdefault("second", []).append((second[0], second[1]))
            times.setdefault("headers", []).append(headers)
            facts = {
                "nbytes": sum(store.nbytes for store in stores),
                "placement": stores[0].placement,
            }
            del again, stores
            for file in store_dir.iterdir():
                file.unlink()
    result: dict[str, Any] = {
        "kind": "data",
        "name": "first_start",
        "num_faces": num_faces,
        "png_px": png_px,
        "size_px": size_px,
        "threads": threads,
        "faces": source.name if source else "drawn",
        **facts,
    }
    for name, pairs in times.items():
        result[f"{name}_s"] = min(wall for wall, _ in pairs)
        result[f"{name}_cpu_s"] = min(cpu for _, cpu in pairs)
    bare = [f"bare_{name}" for name in variants]
    result["ratio"] = result["first_s"] / min(result[f"{name}_s"] for name in bare)
    result["cpu_ratio"] = result["first_cpu_s"] / min(result[f"{name}_cpu_s"] for name in bare)
    return result


def _draw(scratch: Path, png_px: int, num_faces: int) -> Path:
    folder = scratch / "drawn"
    draw_folder(folder, identity="a", count=min(NUM_DRAWN, num_faces), size_px=png_px)
    return folder


def _repeat(source: Path, folder: Path, num_faces: int) -> list[Path]:
    """Links to the pictures of a folder, repeated in turn, half of them for each side."""
    pictures = sorted(source.resolve().glob("*.png"))
    if len(pictures) < 2:
        raise ValueError(f"{source} holds fewer than 2 PNGs")
    files = []
    for number, side in enumerate(SIDES):
        (folder / side).mkdir(parents=True)
        own = pictures[number :: len(SIDES)]  # the sides may not share a file
        for i in range(num_faces // len(SIDES)):
            file = folder / side / f"{i:06d}.png"
            file.symlink_to(own[i % len(own)])
            files.append(file)
    return files


def _timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its seconds, and its CPU seconds over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def _starter(folder: Path, size_px: int, store_dir: Path, threads: int) -> Callable[[], Any]:
    a, b = (str(folder / side) for side in SIDES)
    data = DataConfig(input_a=(a,), input_b=(b,), num_threads=threads)

    def start() -> Any:
        return open_sides(
            data, EvaluateConfig(), size_px, store_dir=store_dir, device=torch.device("cpu")
        )

    return start


def _bare_opencv(files: list[Path], threads: int) -> None:
    def decode(file: Path) -> None:
        cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(decode, files):
            pass


def _bare_dali(files: list[Path], threads: int) -> None:
    dali = importlib.import_module("nvidia.dali")
    batches = [files[first : first + BATCH_SIZE] for first in range(0, len(files), BATCH_SIZE)]

    def source() -> Iterator[list[np.ndarray]]:
        for batch in batches:
            yield [np.frombuffer(os.fsencode(file), np.uint8) for file in batch]

    pipeline = dali.Pipeline(
        batch_size=BATCH_SIZE, num_threads=threads, device_id=None, prefetch_queue_depth=2
    )
    with pipeline:
        encoded = dali.fn.io.file.read(dali.fn.external_source(source=source()))
        # In RGB, which is DALI's own order: BGR would cost it a third of its speed.
        pipeline.set_outputs(dali.fn.decoders.image(encoded, output_type=dali.types.RGB))
    pipeline.build()
    for _ in batches:
        pipeline.schedule_run()
        pipeline.share_outputs()
        pipeline.release_outputs()
