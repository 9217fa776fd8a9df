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
from ..evaluate.evaluate import Evaluation
from ..optim.lr_schedule import Schedule
from ..precision import Precision
from ..preview.previewer import Pictures
from .engine import Engine
from .recipe_progress import RecipeProgress
from .step import TrainStep


@dataclass
class TrainingSetup:
    """The parts of a training session, ready to go."""

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

    folder: ModelFolder
    saver: Saver
    log: Log
    images: Pictures
    evaluation: Evaluation | None
    device: torch.device

    def set_rate(self) -> None:
        """Have the next iteration's update take its rate."""
        self.step.update.set_rate(self.schedule.rate(self.state.iterations))
