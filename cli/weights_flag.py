"""The flag that says which weights of a save are used."""

import argparse


def add_weights(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Give a command that reads a save the choice of its weights."""
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="the average that train.ema or schedule-free keeps, the weights of the training "
        "themselves, or the average where there is one (default: auto)",
    )
