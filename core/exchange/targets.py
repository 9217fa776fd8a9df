"""What a model can be exported to."""

from typing import Any

from ... import models

TARGETS = ("keras", "dfm", "onnx", "safetensors")


def targets_of(family: str, options: dict[str, Any] | None) -> tuple[list[str], str]:
    """Members of `TARGETS` that a model can be written as, and why the others are refused.

    Args:
        family: Name of its family.
        options: Options of the model; None: unknown, as is then what it can be written as.
    """
    if options is None:
        return [], ""
    try:
        # Tried, by a model without memory: the options decide which layers a family has.
        models.meta_model(family, **options).graph()
    except ValueError as error:  # a layer of it has no description
        return ["safetensors"], str(error)
    return [*TARGETS], ""
