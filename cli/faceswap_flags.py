"""Flags of faceswap's `train` that stand for settings of another name here."""

import argparse
from typing import Any

from .completion import complete_with

_ALL_GPUS = {"distribute": {"gpus": "all"}}
_STRATEGIES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "default": ({}, "left out; without --gpus one GPU trains"),
    "central-storage": (
        {"optimizer": {"placement": "host"}},
        "optimizer.placement is host; the GPU reads the fp32 weights from there, and moves them",
    ),
    "mirrored": (
        _ALL_GPUS,
        "distribute.gpus is all; the batch is that of all GPUs together, as it was",
    ),
}
"""Settings that each strategy stands for, and what there is to tell of it."""


def add_faceswap_flags(group: argparse._ArgumentGroup) -> None:
    """Declare the flags."""
    strategy = group.add_argument(
        "-D",
        "--distribution-strategy",
        choices=_STRATEGIES,
        metavar="STRATEGY",
        default=argparse.SUPPRESS,
        help="Distribute as faceswap did: default, central-storage (--set "
        "optimizer.placement=host) or mirrored (--gpus all).",
    )
    complete_with(strategy, _STRATEGIES)
    group.add_argument(
        "-d",
        "--distributed",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Train on all GPUs, as --gpus all does.",
    )


def translated_flags(args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The settings that these flags stand for, and a line about each that was given."""
    values: dict[str, dict[str, Any]] = {}
    report = []
    if "distributed" in args:
        values = _ALL_GPUS
        report.append("--distributed: distribute.gpus is all; the batch is that of all GPUs")
    if "distribution_strategy" in args:
        meant, told = _STRATEGIES[args.distribution_strategy]
        values = values | meant
        report.append(f"--distribution-strategy {args.distribution_strategy}: {told}")
    return {section: dict(table) for section, table in values.items()}, report
