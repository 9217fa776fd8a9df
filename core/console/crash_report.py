"""The report of a failure of mien itself, for whoever is to find its cause.

It holds the traceback, versions, settings and the latest events. Of the faces it names the folders
and no file.
"""

import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from ... import __version__
from ..checkpoint.model_folder import SaveError
from ..config import Config, all_settings, to_toml
from ..config.path_settings import each_path
from ..system.durable_files import replace_file
from ..system.printable import plural
from .reporter import Reporter
from .tensorboard import LogError

_PACKAGES = ("triton", "numpy", "opencv-python-headless", "nvidia-dali-cuda130", "safetensors")
_EXPECTED = (ValueError, SaveError, LogError, torch.OutOfMemoryError)
"""Errors that are reported in one line where they happen."""


@contextmanager
def reporting_crashes(
    model_dir: Path,
    config: Config,
    reporter: Reporter,
    expected: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """What fails unexpectedly inside leaves a report in the model folder, and fails on.

    Args:
        model_dir: The model folder.
        config: Settings of the run.
        reporter: Has the latest events, and reports the failure.
        expected: Further errors that are reported in one line where they are caught.
    """
    known: tuple[type[Exception], ...] = (*_EXPECTED, *expected)
    try:
        yield
    except known:
        raise
    # Not of a stop: what a signal raises is no `Exception`.
    except Exception as error:
        path = _free_path(model_dir)
        try:
            text = crash_report(error, config, list(reporter.latest))
            # The text may hold names of files that are no UTF-8.
            replace_file(path, text.encode(errors="backslashreplace"))
        except OSError:
            raise error from None  # what failed first is what there is to be mended
        reporter.crash(error=f"{type(error).__name__}", path=path)
        if isinstance(error, OSError):  # else it would be taken for a mistake in the input
            raise RuntimeError(str(error)) from error
        raise


def crash_report(error: Exception, config: Config, events: list[str]) -> str:
    """The text of the report.

    Args:
        error: What was raised.
        config: The settings of the run.
        events: The latest ones as JSON lines.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    num_cores = os.cpu_count() or 1
    parts = {
        "traceback": "".join(traceback.format_exception(error)),
        "versions": "\n".join(
            [
                f"mien {__version__}, Python {platform.python_version()}, torch "
                f"{torch.__version__}, CUDA {torch.version.cuda}, GPU {gpu}",
                f"{platform.platform()}, {num_cores} {plural(num_cores, 'core')}",
                ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
                f"command {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}",
            ]
        ),
        "settings": to_toml(config),
        "latest events": "\n".join(events),
    }
    text = "\n".join(f"== {title} ==\n{content.rstrip()}\n" for title, content in parts.items())
    # Over the whole text: a traceback or an event may quote any of it.
    return _without_secrets(_without_faces(text, config), config)


def _without_secrets(text: str, config: Config) -> str:
    """The same without the values of private settings, which the command line has, too."""
    for spec in all_settings():
        secret = spec.of(config) if spec.is_private else ""
        # As it is, and as TOML and JSON write it.
        for written in {secret, json.dumps(secret)[1:-1]} - {""}:
            text = text.replace(written, "(private)")
    return text


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _without_faces(text: str, config: Config) -> str:
    """The same with the name of no file in a folder of faces."""
    data, measured, preview = config.data, config.evaluate, config.preview
    folders = {
        *each_path([*data.input_a, *data.input_b]),
        *(measured.held_out_a, measured.held_out_b),
        *(preview.timelapse_input_a, preview.timelapse_input_b),
    }
    # The longest first: one folder may lie within another.
    for folder in sorted(folders - {""}, key=len, reverse=True):
        inside = re.compile(re.escape(folder.rstrip("/")) + r"/[^\n\"]*?\.png", re.IGNORECASE)
        text = inside.sub(f"{folder}/(a face)", text)
    return text


def _free_path(model_dir: Path) -> Path:
    stamp = time.strftime("%Y%m%d_%H%M%S")
    path, number = model_dir / f"crash_report_{stamp}.txt", 1
    # Two may fall into one second, and none is written over.
    while path.exists():
        number += 1
        path = model_dir / f"crash_report_{stamp}-{number}.txt"
    return path
