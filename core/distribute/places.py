"""Places of ranks: which GPUs of this machine, or how many processes on its CPU."""

import os
from collections.abc import Mapping

from ..config import DistributeConfig
from .launcher import Place


def places_on_gpus(
    config: DistributeConfig, num_gpus: int, environment: Mapping[str, str] = os.environ
) -> list[Place]:
    """The GPUs that a run is to be spread over; where only some are excluded, the first other one.

    Args:
        config: Choice of GPUs.
        num_gpus: Number of GPUs that this process sees.
        environment: Variables of this process; CUDA_VISIBLE_DEVICES names its GPUs.

    Raises:
        ValueError: A GPU is not there, or too few are.
    """
    excluded = [_known(number, "exclude_gpus", num_gpus) for number in config.exclude_gpus]
    left = [number for number in range(num_gpus) if number not in excluded]
    # `3,` names one GPU, and leaves an empty word behind its comma.
    if "," in config.gpus:
        listed = [_known(number, "gpus", num_gpus) for number in config.gpus.split(",") if number]
        # Each once, in the user's order: the first of them is the first rank's.
        chosen = [number for number in dict.fromkeys(listed) if number not in excluded]
    else:
        chosen = left if config.gpus == "all" else left[: int(config.gpus or 1)]
    if not chosen:
        raise ValueError(
            f"distribute.exclude_gpus leaves none of {_range(num_gpus)}; leave one of them, or "
            "train on the CPU with --device cpu"
        )
    if config.gpus.isdecimal() and len(chosen) < int(config.gpus):
        raise ValueError(
            f"distribute.gpus is {config.gpus}, but there are only {len(chosen)}: "
            f"{', '.join(map(str, chosen))}; use --gpus all"
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    # By the names that are there, which may be UUIDs: numbers count among what is visible.
    names = list(map(str, range(num_gpus))) if visible is None else visible.split(",")
    return [Place(f"GPU {number}", names[number].strip()) for number in chosen]


def places_on_cpu(config: DistributeConfig) -> list[Place]:
    """Processes on the CPU, as many as are set.

    Raises:
        ValueError: Not a number of processes is set, but GPUs.
    """
    if not config.gpus.isdecimal():
        raise ValueError(
            f"distribute.gpus is {config.gpus}, but train.device is cpu; say how many processes, "
            "such as --gpus 2, or leave one of them out"
        )
    return [Place(f"CPU process {number}") for number in range(int(config.gpus))]


def num_planned(config: DistributeConfig, num_gpus: int) -> int:
    """Ranks that a run would have, also where this machine has fewer GPUs than it asks for.

    Args:
        config: Choice of GPUs.
        num_gpus: Number of GPUs that this process sees.
    """
    if "," in config.gpus:
        chosen = {*filter(None, config.gpus.split(","))}
    elif config.gpus == "all":
        chosen = {str(number) for number in range(num_gpus)}
    else:
        return int(config.gpus or 1)
    return max(len(chosen.difference(config.exclude_gpus)), 1)


def _known(number: str, setting: str, num_gpus: int) -> int:
    if int(number) < num_gpus:
        return int(number)
    raise ValueError(
        f"distribute.{setting} names GPU {number}, but there is {_range(num_gpus)}; see nvidia-smi"
    )


def _range(num_gpus: int) -> str:
    return "only GPU 0" if num_gpus == 1 else f"GPU 0 to {num_gpus - 1}"
