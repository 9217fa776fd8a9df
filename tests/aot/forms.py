"""Forms of the Triton kernels: all that a launch tells the compiler.

A kernel is compiled anew for every combination of types, of what is a multiple of 16 and of the
values that are compiled in. `forms.jsonl` lists those that training on a GPU asks for: `walk.py`
writes it, `compile_forms.py` compiles it. A form is a line of it,

    ["enlarge._forward_kernel", 4, 3, "*bf16/16", "*bf16/16", "i32/16", "i32/16", "i32/16", 2, ...]

the kernel by its module, its warps and pipeline stages, and of each argument its type, with "/16"
where it is a multiple of 16, or its value where that is compiled in.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

FILE = Path(__file__).with_name("forms.jsonl")

ALIGNED = "/16"
"""Behind the type of a pointer or number that is a multiple of 16."""

Argument = str | float | bool | None


@dataclass(frozen=True)
class Form:
    """One of the kernels that the compiler makes of one in the source."""

    kernel: str
    num_warps: int
    num_stages: int
    arguments: tuple[Argument, ...]

    @classmethod
    def read(cls, line: str) -> Self:
        """The form that a line describes."""
        kernel, num_warps, num_stages, *arguments = json.loads(line)
        return cls(kernel, num_warps, num_stages, tuple(arguments))

    def __str__(self) -> str:
        return json.dumps([self.kernel, self.num_warps, self.num_stages, *self.arguments])

    def kind(self) -> tuple[Argument, ...]:
        """What the forms have in common that differ in sizes and in what is a multiple of 16."""
        return (self.kernel, *map(_kind_of, self.arguments))


def _kind_of(argument: Argument) -> Argument:
    if isinstance(argument, str):
        return argument.removesuffix(ALIGNED)
    # A size that is 1 is compiled in, where others are an argument.
    return argument if argument is None or isinstance(argument, bool) else "i32"


def read_all() -> list[Form]:
    """Every form of the list."""
    return [Form.read(line) for line in FILE.read_text().splitlines()]
