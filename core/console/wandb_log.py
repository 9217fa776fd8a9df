"""A run at Weights & Biases: its scalars, previews and settings.

`log.wandb` names the project. Whether anything leaves the machine, and where to, is W&B's to say:
`wandb login`, and WANDB_MODE (offline keeps all in the model folder, for `wandb sync`). wandb is
imported only where a WandbLog is made.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any

from ..system.printable import printable
from ..system.requirements import install_command
from .spacing import Means, Pause
from .tensorboard import ITERATION, Encode, LogError

_SECONDS_BETWEEN_ROWS = 1.0  # thousands of iterations a minute would be refused; chosen, unmeasured
_FINISH_S = 60.0
"""Seconds for which the end of a run waits for what is still being sent; the rest stays in the
folder, for `wandb sync`. Chosen."""

_AXIS = "iteration"
"""Horizontal axis of all charts. W&B's own step cannot be: after a crash or a divergence a run goes
back to a checkpoint, and that step never does."""


class WandbLog:
    """One session of a run; all sessions of a model are one run at W&B.

    Args:
        project: Name of the project.
        model_dir: The model folder, in whose `logs` W&B keeps its files.
        run_id: Identity of the run.
        settings: Settings of the run, plain values without what is private.

    Raises:
        ValueError: wandb is not installed.
        LogError: W&B refuses, as where nobody has logged in, or cannot write to such a folder.
    """

    def __init__(self, project: str, model_dir: Path, run_id: str, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "log.wandb needs wandb, which is not installed; install it with "
                f"`{install_command('mien[wandb]')}`, or leave log.wandb out"
            ) from None
        self._wandb = wandb
        folder = model_dir / "logs"
        if os.fsencode(folder) != str(folder).encode(errors="replace"):
            raise LogError(
                f"W&B keeps no files in {printable(str(folder))}, no UTF-8 name; rename it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                # The run's own, so that a resume adds to it in place of beginning another.
                id=run_id,
                # The name and not the path, which would tell others about the user's folders.
                name=printable(model_dir.name),
                dir=str(folder),
                config=settings,
                resume="allow",
                # Nothing of the user's but what is logged: no code, no output, no state of git.
                settings=wandb.Settings(
                    console="off", disable_git=True, disable_code=True, silent=True
                ),
            )
        except wandb.errors.Error as error:
            reason = str(error).strip().partition("\n")[0]
            raise LogError(
                f"W&B cannot be used ({reason}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric(_AXIS)
        self._run.define_metric("*", step_metric=_AXIS)
        self._next_step: int = self._run.starting_step
        """Lowest step that W&B takes: one that goes back it drops."""

        self._means = Means()
        self._rows = Pause(_SECONDS_BETWEEN_ROWS)

    def scalars(self, values: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Record the values of one iteration, as `Log.scalars`; of many a second their means."""
        # Means first, which are of the iterations before.
        if ITERATION not in values:
            self._write_means()
            self._write(values, step)
            return
        self._means.add(values, step, time.time() if wall_time is None else wall_time)
        if self._rows.is_over(time.monotonic()):
            self._write_means()

    def picture(self, name: str, encode: Encode, step: int) -> None:
        """Record a picture of a save, as `Log.picture`."""
        # As a file: W&B would decode and encode pixels.
        path = Path(self._run.dir) / f"{name}.jpg"
        try:
            path.write_bytes(encode()[0])
        except OSError as error:
            raise LogError(
                f"cannot write pictures for W&B to {path.parent}: {error.strerror}; free space, or "
                "leave log.wandb out"
            ) from error
        self._write({name: self._wandb.Image(str(path))}, step)

    def flush(self) -> None:
        """Hand what waits to W&B's own process, which sends it."""
        self._write_means()

    def close(self) -> None:
        """End the session."""
        self._write_means()
        # A thread: without a network W&B tries for hours.
        finish = threading.Thread(target=self._run.finish, daemon=True)
        finish.start()
        finish.join(_FINISH_S)

    def _write_means(self) -> None:
        means, self._means = self._means, Means()
        if means.count:
            self._write(means.values(), means.step)

    def _write(self, row: dict[str, Any], iteration: int) -> None:
        """Record values of an iteration, also of one that is trained again after going back."""
        step = max(iteration, self._next_step)
        self._run.log({_AXIS: iteration, **row}, step=step)
        self._next_step = step + 1
