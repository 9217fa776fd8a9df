"""The trainings that are disturbed, and what an undisturbed one of each comes to.

A course is a tiny model's training, most of whose time is saving. Its *straight* run keeps every
save, so that whatever a disturbed one has saved can be compared with it, bit for bit.
"""

import contextlib
import copy
import functools
import itertools
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trial import Outcome, Sabotage, Trial, count_calls

from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.faces.synthetic import draw_folder

NUM_FACES = 28
"""Of each side: three more than a side needs."""

RECIPE = """
[[stage]]
name = "learn"
iterations = 3

[[stage]]
name = "slow down"
rate_factor = 0.5
set.augment.warp = false
plateau = { window = 2, patience = 2, improvement = 100 }

[[stage]]
name = "finish"
set.augment.flip = false
iterations = 3
"""


Cases = Iterator[tuple[str, Callable[[], str]]]
"""What is done, and the doing of it, which gives what was seen."""

SKIPPED = "skipped: "
"""How the words of what was seen begin where the machine does not allow a case."""


class Failed(Exception):
    """Why a case was not passed."""


def require(holds: object, why: str) -> None:
    """Fail the case where something does not hold."""
    if not holds:
        raise Failed(why)


@dataclass(frozen=True)
class Saved:
    """What is compared of a save."""

    iterations: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor] | None
    counters: dict[str, Any]
    """Iterations, faces seen, lowest mean loss and the parts' values; no times."""


@dataclass(frozen=True)
class Straight:
    """A training that nothing disturbs."""

    saves: dict[int, Saved]
    """Every one, by iteration."""

    seconds: float
    num_calls: int
    """How often it changes the disk."""


@dataclass(frozen=True)
class Course:
    """One kind of training."""

    name: str
    until: int
    words: tuple[str, ...] = ()
    recipe: str = ""


KEEP_ALL = ("--set", "save.keep_generations=100")
"""Words that have a straight run keep every save."""

COURSES = {
    course.name: course
    for course in (
        Course("fp32", 10),
        Course(
            "bf16",
            10,
            (
                *("--precision", "bf16", "--set", "optimizer.gradient_accumulation=2"),
                *("--set", "optimizer.gradient_clipping=autoclip", "--warmup", "6"),
            ),
        ),
        Course("stages", 10, ("--set", "save.keep_generations=1"), recipe=RECIPE),
    )
}


@dataclass
class Workshop:
    """Where the trials take place: faces, straight runs, a folder for each case."""

    root: Path
    _straight: dict[str, Straight] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_STATE_HOME"] = str(self.root / "state")
        os.environ["MIEN_DISK_RESERVE_MIB"] = "0"  # decoded faces are kept on small disks, too
        for side in "ab":
            draw_folder(self.root / side, identity=side, count=NUM_FACES, size_px=96)

    def new_folder(self) -> Path:
        """A folder that no other case uses; not made yet."""
        path = self.root / f"case{next(self._numbers)}"
        path.mkdir()
        return path / "model"

    def copy(self, model_dir: Path) -> Path:
        """A copy of a model folder that a case may spoil."""
        return shutil.copytree(model_dir, self.new_folder(), symlinks=True)

    def copy_of_faces(self, side: str, model_dir: Path) -> Path:
        """Faces of a side that a case may spoil."""
        return shutil.copytree(self.root / side, model_dir.parent / f"faces_{side}")

    def words(self, course: Course, model_dir: Path, until: int, *more: str) -> list[str]:
        """The command line that trains from wherever the folder is to an iteration."""
        done = None
        with contextlib.suppress(ValueError):  # nothing whole is left
            done = newest(model_dir)
        # Given twice, a flag of faces would add a folder to the first one.
        faces = {"-A": self.root / "a", "-B": self.root / "b"}
        words = [
            "train",
            *(str(word) for flag in faces if flag not in more for word in (flag, faces[flag])),
            *("-m", str(model_dir), "-t", "lightweight", "--set", "model.options.width=8"),
            *("-b", "4", "-s", "1", "--device", "cpu", "--json", "--set", "data.num_threads=1"),
            *("--set", "data.decoder=opencv", "--set", "preview.preview_images=2"),
            *("-i", str(max(until - (done.iterations if done else 0), 1)), *course.words),
        ]
        if course.recipe:
            path = self.root / f"{course.name}.toml"
            path.write_text(course.recipe)
            words += ["--recipe", str(path)]
        return [*words, *more]

    def start(
        self,
        course: Course,
        model_dir: Path,
        *more: str,
        until: int | None = None,
        sabotage: Sabotage | None = None,
    ) -> Trial:
        """A training of the course, under way."""
        output = self.root / f"trial{next(self._numbers)}"  # never on a disk that is spoilt
        words = self.words(course, model_dir, until or course.until, *more)
        return Trial(words, output, sabotage)

    def start_ranks(
        self,
        course: Course,
        model_dir: Path,
        *more: str,
        sabotages: dict[int, Sabotage] | None = None,
    ) -> list[Trial]:
        """Two ranks that train the course together, under way.

        Args:
            course: What is trained.
            model_dir: Folder of the model.
            more: Further words of the command line.
            sabotages: By rank, what is spoilt in it first.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        words = self.words(course, model_dir, course.until, *more)
        variables = {
            **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        trials = []
        for rank in range(2):
            own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sabotage = (sabotages or {}).get(rank)
            output = self.root / f"trial{next(self._numbers)}"
            trials.append(Trial(words, output, functools.partial(_become, own, sabotage)))
        return trials

    def train(
        self,
        course: Course,
        model_dir: Path,
        *more: str,
        until: int | None = None,
        sabotage: Sabotage | None = None,
    ) -> Outcome:
        """A training of the course, ended."""
        return self.start(course, model_dir, *more, until=until, sabotage=sabotage).end()

    def straight(
        self, course: Course, train: Callable[[Path, Path], Outcome] | None = None
    ) -> Straight:
        """The course without a disturbance; all its saves are kept.

        Args:
            course: What is trained.
            train: Trains it in a folder, with a file for `count_calls`; None: in one process.
        """
        if course.name not in self._straight:
            path = self.new_folder()
            report = path.parent / "calls"
            outcome = (train or functools.partial(self._train_straight, course))(path, report)
            require(outcome.code == 0, f"the straight run of {course.name}: {outcome.told}")
            self._straight[course.name] = Straight(
                saves={saved.iterations: saved for saved in all_saves(path)},
                seconds=outcome.seconds,
                num_calls=report.stat().st_size,
            )
        return self._straight[course.name]

    def _train_straight(self, course: Course, model_dir: Path, report: Path) -> Outcome:
        return self.train(course, model_dir, *KEEP_ALL, sabotage=count_calls(report))

    def finish(self, course: Course, model_dir: Path, *more: str) -> Outcome:
        """Resume to the end of the course; the model must then be the straight run's."""
        outcome = self.train(course, model_dir, *more)
        require(outcome.code == 0, f"the resume ended with {outcome.code}: {outcome.told[-400:]}")
        last = newest(model_dir)
        require(last is not None and last.iterations == course.until, "the resume fell short")
        self.compare(course, model_dir)
        require(not (left := leftovers(model_dir)), f"left over: {left}")
        return outcome

    def compare(self, course: Course, model_dir: Path) -> None:
        """All saves in the folder, its backup and snapshots are the straight run's, bit for bit."""
        straight = self.straight(course).saves
        for saved in all_saves(model_dir):
            require(saved.iterations in straight, f"iteration {saved.iterations} is unknown")
            _compare(saved, straight[saved.iterations])
        for path in model_dir.parent.glob(f"{model_dir.name}_snapshot_*_iters"):
            copied = newest(path)
            require(copied, f"snapshot {path.name} cannot be read")
            assert copied is not None
            require(path.name.split("_")[-2] == str(copied.iterations), f"{path.name} is another")
            _compare(copied, straight[copied.iterations])


def _become(variables: dict[str, str], sabotage: Sabotage | None) -> None:
    """Be a rank, with something spoilt."""
    os.environ.update(variables)
    if sabotage:
        sabotage()


def newest(model_dir: Path) -> Saved | None:
    """The save that a resume would begin with."""
    if not (model_dir / "generations").is_dir():
        return None
    with ModelFolder(model_dir, read_only=True) as folder:
        generation = folder.load()
    return _saved(generation) if generation else None


def all_saves(model_dir: Path) -> list[Saved]:
    """Every save in the folder, and its backup."""
    from mien.core.checkpoint.format import read_generation, read_manifest

    found = []
    names = [path for path in (model_dir / "generations").iterdir() if path.name[0] != "."]
    for path in [*names, model_dir / "backup"]:
        if path.is_dir():
            generation = read_generation(path, read_manifest(path))
            found.append(_saved(generation))
    return found


def leftovers(model_dir: Path) -> list[str]:
    """What a run should have cleared away."""
    hidden = [path for path in model_dir.rglob(".*") if path != model_dir / ".lock"]
    return sorted(str(path) for path in [*hidden, *model_dir.parent.glob(".*")])


def _saved(generation: Any) -> Saved:
    state = copy.deepcopy(generation.state)
    state["parts"].get("recipe", {"place": {}})["place"].pop("seconds", None)
    counters = {
        name: state[name] for name in ("iterations", "faces_seen", "lowest_mean_loss", "parts")
    }
    counters["of_sessions"] = sum(session["iterations"] for session in state["sessions"])
    return Saved(state["iterations"], generation.model, generation.optimizer, counters)


def _compare(ours: Saved, straight: Saved) -> None:
    at = f"iteration {ours.iterations}"
    require(ours.counters == straight.counters, f"{at}: {ours.counters} != {straight.counters}")
    for kind in ("model", "optimizer"):
        one, other = getattr(ours, kind), getattr(straight, kind)
        require(one is not None and one.keys() == other.keys(), f"{at}: {kind} has other tensors")
        for name in one:
            same = one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])
            require(same, f"{at}: {kind} {name} differs")
