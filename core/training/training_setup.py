"""Everything that a trainer needs, opened and checked, for one session of training."""

from dataclasses import dataclass

import torch

from ...models.autoencoder import Autoencoder
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.saver import Saver
from ..checkpoint.state import TrainingState
from ..config import Config
from ..console.tensorboard import Log
from ..data.feed import Feed
from ..data.sides import SideFaces
from ..distribute.council import Council
from ..evaluate.evaluate import Evaluation
from ..optim.lr_schedule import Schedule
from ..precision import Precision
from ..preview.previewer import Pictures
from .engine import Engine
from .recipe_progress import RecipeProgress
from .step import TrainStep


@dataclass
class StepSetup:
    """What every rank of a run trains with, ready to go."""

    config: Config
    state: TrainingState
    model: Autoencoder
    step: TrainStep
    engine: Engine
    precision: Precision
    schedule: Schedule
    feed: Feed
    progress: RecipeProgress | None
    """The recipe and where training stands in it."""

    device: torch.device
    council: Council | None
    """Agreement with the other ranks; None: this process trains alone."""

    def set_rate(self) -> None:
        """Have the next iteration's update take its rate."""
        self.step.update.set_rate(self.schedule.rate(self.state.iterations))

    def iterate(self) -> None:
        """Train on the next batch and count it."""
        # The rate goes to the device before the step: a captured graph reads it from there.
        self.set_rate()
        self.engine(self.state.faces_seen)
        self.state.advance()


@dataclass
class TrainingSetup(StepSetup):
    """The parts of a training session, with what is written and shown of it."""

    folder: ModelFolder
    saver: Saver
    log: Log
    images: Pictures
    faces: dict[str, SideFaces]
    evaluation: Evaluation | None
