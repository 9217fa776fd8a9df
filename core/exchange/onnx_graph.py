"""Writer of ONNX files that every runtime since 2021 loads: opset 13, IR version 7.

Operations are added one by one and named by the value that they give; what no output depends on
is left out of the file. Only the number of faces is symbolic, so that a program can read every
other size from the file.
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from ... import __version__
from ..system.requirements import install_command

OPSET = 13
IR_VERSION = 7
"""Versions of the format that came together. onnxruntime 1.15.1, the oldest that is met, takes
opset 19 and IR 9 at most; the operators used here have not changed in between."""

MAX_FILE_BYTES = 2**31 - 2**20
"""Bytes of weights in the largest message that protobuf has, with room for the operations."""

BATCH = "N"


def import_onnx() -> ModuleType:
    """The package onnx.

    Raises:
        ValueError: It is not installed.
    """
    try:
        # Here and not at the top: an extra, which only exports need.
        import onnx
    except ImportError as error:
        raise ValueError(
            f"ONNX files need {error.name}, which is not installed; install it with "
            f"`{install_command('mien[exchange]')}`"
        ) from error
    return onnx


@dataclass(frozen=True)
class Port:
    """An input or output of the file: float32, (N, ...)."""

    name: str
    shape: tuple[int, ...]
    """Sizes without the batch."""


@dataclass
class OnnxGraph:
    """Operations and constants of a file in the making.

    A value is known by its name. ``nodes`` and ``constants`` are what onnx.helper makes of them.
    """

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append an operation; name of its output.

        Args:
            operator: Operator of ONNX.
            inputs: Names of values; "" for an optional input that is left out.
            output: Name to give to the output; a number by default.
            attributes: Attributes of the operator.
        """
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        node = import_onnx().helper.make_node(
            operator, list(inputs), [output], name=output, **attributes
        )
        self.nodes.append(node)
        return output

    def constant(self, values: Any, name: str = "") -> str:
        """Store numbers, float32 unless they are an array of another kind; the name for them.

        Args:
            values: Numbers, or an array.
            name: Name to give to them; the same numbers are then stored once only.
        """
        name = name or f"constant_{len(self.constants)}"
        if name not in self.constants:
            array = values if isinstance(values, np.ndarray) else np.array(values, np.float32)
            self.constants[name] = np.ascontiguousarray(array)
        return name

    def sizes(self, *sizes: int) -> str:
        """Store whole numbers, as shapes and axes are given."""
        return self.constant(np.array(sizes, np.int64))

    def content(
        self, inputs: list[Port], outputs: list[Port], metadata: dict[str, str], title: str
    ) -> bytes:
        """Content of the file.

        Args:
            inputs: Values that are given from outside.
            outputs: Values that are asked for, in their order.
            metadata: Texts by name.
            title: Name of the graph.

        Raises:
            ValueError: It would be too large for one file.
        """
        helper, nodes, constants = import_onnx().helper, *self._needed(outputs)
        size = sum(array.nbytes for array in constants.values())
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"an ONNX file holds at most {MAX_FILE_BYTES:,} bytes, this model has {size:,}; "
                "export it as safetensors"
            )
        ports = [
            [
                # Only the batch is a name: VisoMaster allocates by the other sizes.
                helper.make_tensor_value_info(
                    port.name, helper.TensorProto.FLOAT, [BATCH, *port.shape]
                )
                for port in side
            ]
            for side in (inputs, outputs)
        ]
        graph = helper.make_graph(nodes, title, *ports, _tensors(constants))
        model = helper.make_model(
            graph,
            producer_name="mien",
            producer_version=__version__,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        helper.set_model_props(model, metadata)
        return model.SerializeToString()

    def _needed(self, outputs: list[Port]) -> tuple[list[Any], dict[str, np.ndarray]]:
        """The operations that the outputs depend on, in order, and their constants."""
        names, nodes = {port.name for port in outputs}, []
        # From the end: what an output needs is known before what made it is met.
        for node in reversed(self.nodes):
            if names & {*node.output}:
                names |= {*node.input}
                nodes.append(node)
        constants = {name: array for name, array in self.constants.items() if name in names}
        return nodes[::-1], constants


def _tensors(constants: dict[str, np.ndarray]) -> list[Any]:
    from_array = import_onnx().numpy_helper.from_array
    return [from_array(array, name) for name, array in constants.items()]
