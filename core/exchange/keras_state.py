"""The state that faceswap keeps beside a model, `<plugin>_state.json`, both ways.

Its `config` holds every option by name, flat and strictly typed: a float without a decimal point
stops the program. A key that is missing leaves the setting of whoever converts in force.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ... import models
from ...models.fields import Field, plain, shown
from ...models.fields import fields_of as rules_of
from ...models.graph import Network
from ..checkpoint.format import MAX_COUNT, MAX_JSON_BYTES, parse_json
from ..checkpoint.state import IMPORTED, Session, TrainingState
from ..config import Config, nested, setting_at
from ..config.faceswap_ini import MODEL_PLACES, SWITCHES
from ..config.settings import Place
from ..optim.lr_schedule import LR_FINDER, found_rate
from ..system.durable_files import DamagedError, read_regular
from ..system.saved_values import MAX_SECONDS
from .keras_order import ordered_layers

Json = dict[str, Any]

# faceswap's word for a model that no rate was looked for.
_NO_RATE = -1.0
_NOT_THERE = {"width", "enc_weights", "enc_normalize"}
"""Options of families that only mien has; the first shows in the shapes."""

_OF_A_SESSION = """
    mixed_precision nan_protection loss_function loss_function_2 loss_weight_2 loss_function_3
    loss_weight_3 loss_function_4 loss_weight_4 mask_loss_function eye_multiplier mouth_multiplier
    mask_dilation mask_blur_kernel mask_threshold learning_rate epsilon_exponent save_optimizer
    gradient_clipping clipping_value autoclip_history weight_decay gradient_accumulation
""".split()
_NEVER_MIXED = {"AdaInstanceNormalization", "Dropout", "InputLayer"}


# Writing


def state_of(config: Config, state: TrainingState, graph: Network) -> Json:
    """The state of a model of mien as faceswap keeps it.

    Args:
        config: Settings of the model.
        state: State of its training.
        graph: Description of the model.
    """
    options = _options_there(config)
    rules = rules_of(models.family(config.model.trainer).Config)
    free = [name for name, item in rules.items() if not item.locked]
    of_a_session = [key for key in (*_OF_A_SESSION, *free) if key in options]
    found = found_rate(state)
    last = state.sessions[-1] if state.sessions else None
    lowest = state.lowest_mean_loss or state.imported.lowest_loss
    # One session that sums up the training; mien's own early ones are summed up already.
    together = {
        "timestamp": float(state.sessions[0].started) if state.sessions else 0.0,
        # The logs stay in mien's folder.
        "no_logs": True,
        "batchsize": last.batch_size if last else config.train.batch_size or 1,
        "iterations": state.iterations,
        "config": {key: options[key] for key in of_a_session},
    }
    return {
        "name": config.model.trainer.replace("-", "_"),
        "sessions": {"1": together} if state.iterations else {},
        "lowest_avg_loss": float(lowest or 0.0),
        "iterations": state.iterations,
        # Though the file is fp32: faceswap looks the names up when its user turns it on.
        "mixed_precision_layers": _names_of_mixed_layers(graph),
        "lr_finder": _NO_RATE if found is None else found,
        "config": options,
    }


def _options_there(config: Config) -> Json:
    """Every option by faceswap's name for it."""
    options: Json = {}
    for key, place in MODEL_PLACES.items():
        value = setting_at(place).of(config)
        if key == "autoclip":  # the old name of one that has a new
            continue
        if key in SWITCHES:
            value = value not in ("off", "none")
        options[key] = value
    options["mixed_precision"] = False  # the file is fp32, and convert would compute in half
    own = models.options_of(config.model.trainer, config.model.options)
    return options | {key: value for key, value in plain(own).items() if key not in _NOT_THERE}


def _names_of_mixed_layers(graph: Network) -> list[str]:
    """Layers that faceswap may compute in half precision."""
    names = []
    for network in ordered_layers(graph):
        if not isinstance(network, Network):
            continue
        outputs = {value.call.layer.name for value in network.outputs}
        for layer in ordered_layers(network):
            kind = "" if isinstance(layer, Network) else layer.kind
            is_output = kind == "Activation" and layer.name in outputs
            if kind not in _NEVER_MIXED and not is_output:
                names.append(layer.name)
    return names


# Reading


def read_state(path: Path) -> Json:
    """What a state file says, with the parts that are needed checked.

    Raises:
        ValueError: It cannot be read, or names no model.
    """
    try:
        values = parse_json(path.name, read_regular(path.resolve(), MAX_JSON_BYTES))
    except DamagedError as damage:
        raise ValueError(f"{path} is damaged: {damage}") from damage
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    name = values.get("name")
    if not isinstance(name, str) or name.replace("_", "-") not in models.available():
        raise ValueError(
            f"{path} is of the model {shown(name)}, which mien does not have; it has: "
            f"{', '.join(models.available())}"
        )
    for key in ("config", "sessions"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"{key} of {path} must be an object, got {shown(values[key])}")
    return {"config": {}, "sessions": {}} | values


def options_of(values: Json) -> Json:
    """The family's own options; ValueError where one breaks its rule."""
    family = values["name"].replace("_", "-")
    rules = rules_of(models.family(family).Config)
    given = {key: value for key, value in values["config"].items() if key in rules}
    return dataclasses.asdict(models.options_of(family, given))


def settings_of(values: Json) -> tuple[dict[str, Json], list[str]]:
    """Settings of mien by section, and a line for each that could not be taken over.

    Raises:
        ValueError: What the faces are cut out by breaks its rule.
    """
    # Of old files, which do not say it.
    settings: dict[Place, Any] = {("data", "centering"): "legacy", ("data", "coverage"): 62.5}
    report = []
    for key, value in values["config"].items():
        if key not in MODEL_PLACES or key in ("mixed_precision", "autoclip"):
            continue
        place = MODEL_PLACES[key]
        value = "none" if value is None else value
        if key in SWITCHES and isinstance(value, bool):
            value = SWITCHES[key][value]
        try:
            # A whole number passes for a float here, which faceswap itself would refuse.
            settings[place] = setting_at(place).take(value, ".".join(place))
        except ValueError as error:
            # Refused and not left out: with another crop every swap would be misplaced.
            if key in ("centering", "coverage", "vertical_offset"):
                raise ValueError(f"{key} of the state: {error}") from error
            report.append(f"{key} = {shown(value)}: left out; {error}")
    return nested(settings), report


def training_state_of(values: Json) -> TrainingState:
    """Iterations, sessions, lowest loss and found rate.

    Raises:
        ValueError: A count is none.
    """
    state = TrainingState(
        trainer=values["name"].replace("_", "-"),
        iterations=_count(values.get("iterations", 0), "iterations"),
    )
    for key, session in values["sessions"].items():
        state.sessions.append(_session(key, session))
    # By number: in JSON they are texts, where 10 stands before 2.
    state.sessions.sort(key=lambda session: session.number)
    numbers = [session.number for session in state.sessions]
    if len(set(numbers)) != len(numbers):
        raise ValueError("two sessions of the state have one number")
    state.parts[IMPORTED] = {
        "last_session": max(numbers, default=0),
        "lowest_loss": _lowest(values.get("lowest_avg_loss")),
    }
    faces = sum(session.iterations * session.batch_size for session in state.sessions)
    # faceswap does not count them: as many as its sessions have shown.
    state.faces_seen = dict.fromkeys("ab", min(faces, MAX_COUNT))
    rate = values.get("lr_finder")
    if type(rate) is float and 0 < rate <= 1:
        state.parts[LR_FINDER] = {"rate": rate}
    return state


def _session(key: str, values: Any) -> Session:
    if not isinstance(values, dict) or not key.isdecimal():
        raise ValueError(f"session {shown(key)} of the state is none")
    started = values.get("timestamp", 0.0)
    is_time = type(started) in (int, float) and 0 <= started <= MAX_SECONDS
    return Session(
        # Cut before it is a number: Python is slow over one of a million digits.
        number=_count(int(key[:16]), "the number of a session", low=1),
        started=float(started) if is_time else 0.0,
        batch_size=_count(values.get("batchsize", 1), "batchsize of a session", low=1),
        logs=False,  # they stay where they are
        iterations=_count(values.get("iterations", 0), "iterations of a session"),
    )


def _count(value: Any, name: str, low: int = 0) -> int:
    return Field(type=int, low=low).take(value, f"{name} of the state")


def _lowest(value: Any) -> float | None:
    """The lowest mean loss; older files have one of each side."""
    parts = list(value.values()) if isinstance(value, dict) else [value]
    if not all(type(part) in (int, float) and 0 <= part < 1e6 for part in parts):
        return None
    # 0 is faceswap's word for none.
    return float(sum(parts)) or None
