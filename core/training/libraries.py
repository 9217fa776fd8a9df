"""What a session sets for the whole process: how PyTorch and CUDA's libraries compute."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ..distribute.ranks import Ranks
from ..precision import restoring_products
from ..system.memory import kept_memory
from ..system.threads import thread_count

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def library_settings(device: torch.device, ranks: Ranks, *, deterministic: bool) -> Iterator[None]:
    """Have the libraries compute as the session needs it; afterwards as the program had them.

    Random numbers, too: a program that trains from Python goes on with its own.

    Args:
        device: Device of the session.
        ranks: Ranks that train together; those of one machine divide its cores.
        deterministic: Whether equal runs are to have equal bits.
    """
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic
    filled = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    num_threads, workspace = torch.get_num_threads(), os.environ.get(_WORKSPACE)
    # A seed is one of all GPUs.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    memory_here = kept_memory if device.type == "cpu" else nullcontext()
    with restoring_products(), torch.random.fork_rng(gpus), memory_here:
        try:
            _set(device, ranks, deterministic=deterministic)
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before
            memory.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
            # Not in every run: it loads the compiler of PyTorch.
            if deterministic:
                torch.use_deterministic_algorithms(mode, warn_only=only_warns)
            torch.set_num_threads(num_threads)
            if workspace is None:
                os.environ.pop(_WORKSPACE, None)


def _set(device: torch.device, ranks: Ranks, *, deterministic: bool) -> None:
    """Set threads of PyTorch, how CUDA's libraries work, and from when memory is measured."""
    if ranks.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Else each rank would compute with as many threads as there are cores.
        torch.set_num_threads(max(1, thread_count(0) // ranks.local_size))
    if device.type == "cuda":
        # Else the peak would be that of an earlier session in this process.
        torch.cuda.reset_peak_memory_stats(device)
    # Benchmarks choose by time, and another choice adds in another order.
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling memory that is written anyway costs time and makes no result more certain.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
