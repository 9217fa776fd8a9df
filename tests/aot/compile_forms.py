"""Compile forms of the Triton kernels for GPUs that are not here, and hold them to their bounds.

    python tests/aot/compile_forms.py 80 90 < tests/aot/forms.jsonl      forms, one a line

Tells of each form and target that breaks a bound, then what the compiler made of each kernel, and
ends with 1 where something broke one. None has a stack or spills. What is compiled lies in Triton's
cache: a call that was stopped goes on from where it was.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from forms import ALIGNED, Argument, Form
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
WIDE_BITS = 64
"""Width of a wide load or store at least."""


@dataclass(frozen=True)
class Bounds:
    """What a form of a kernel may cost."""

    most_registers: int
    """Registers of a thread."""

    least_wide_loads: int = 0
    """Instructions that load 8 or 16 bytes, where every run of channels is a multiple of 8. Those
    of a loop that is unrolled after PTX count once."""

    least_wide_stores: int = 0

    most_registers_uneven: int | None = None
    """Registers where a run of channels is no multiple of 8, as the last layer's three are: values
    then have addresses of their own. None: as many as elsewhere."""

    most_registers_reflecting: int | None = None
    """Registers where a border mirrors the pixels: each gradient is gathered from up to nine
    places, which the compiler for sm_120 loads ahead. None: as many as elsewhere."""

    def most_registers_of(self, form: Form) -> int:
        """Registers that a thread of the form may have."""
        if self.most_registers_uneven is not None and not _has_whole_runs(form):
            return self.most_registers_uneven
        if self.most_registers_reflecting is not None and _named(form).get("REFLECTS"):
            return self.most_registers_reflecting
        return self.most_registers


BOUNDS = {
    # With 104 registers a multiprocessor holds 65,536 / (104 * 128 threads) = 4 blocks, where 96
    # leave room for 5. Their 512 threads have 16 bytes of at least two loads on the way, 16 KiB;
    # to keep the memory of the fastest card of sm_120 busy (1.8 TB/s, 0.8 us, 188 multiprocessors)
    # takes 8 KiB.
    "bias_act._backward_kernel": Bounds(96, 2, 2, most_registers_reflecting=104),
    "bias_act._forward_kernel": Bounds(64, 2, 2, most_registers_uneven=88),
    "dense_norm._gram_kernel": Bounds(224, 4),
    "dense_norm._product_kernel": Bounds(72, 5, 1),
    # Blocks of 256 threads: with 81 to 128 registers a multiprocessor holds 2. Most forms take no
    # more than 96; on sm_80 those whose gradient is multiplied in fp32 take 110.
    "dense_update._dense_update_kernel": Bounds(128, 18, 4),
    "enlarge._backward_kernel": Bounds(80, 1, 1, most_registers_uneven=128),
    "enlarge._forward_kernel": Bounds(80, 1, 1, most_registers_uneven=128),
    "gradient_norm._factors_kernel": Bounds(48, 5),
    "gradient_norm._norm_kernel": Bounds(64, 6, 1),
    "norm_history._record_kernel": Bounds(96, 10, 1),
    "optimize._update_kernel": Bounds(64, 14, 2),
    "scalars_update._scalars_kernel": Bounds(96, 17, 13),
    # Blocks of 128 threads: with 80 registers a multiprocessor holds 6, with 72 it holds 7. Its
    # images are of three channels, so that addresses take registers.
    "to_image._backward_kernel": Bounds(72, 0, 2, most_registers_uneven=80),
    "to_image._forward_kernel": Bounds(64, 0, 1),
}

RUNS = ("CHANNELS", "LENGTH", "NUM_CHANNELS")
"""Arguments that say how many values lie together."""


@dataclass(frozen=True)
class Usage:
    """What the compiler made of a form."""

    registers: int
    stack_bytes: int
    wide_loads: int
    wide_stores: int

    def broken(self, form: Form) -> str:
        """The bounds that it breaks, in words; empty where it keeps them."""
        bounds = BOUNDS[form.kernel]
        found = {
            f"{self.stack_bytes} bytes of stack": self.stack_bytes > 0,
            f"{self.registers} registers": self.registers > bounds.most_registers_of(form),
        }
        if _has_whole_runs(form):
            found[f"{self.wide_loads} wide loads"] = self.wide_loads < bounds.least_wide_loads
            found[f"{self.wide_stores} wide stores"] = self.wide_stores < bounds.least_wide_stores
        return ", ".join(words for words, is_broken in found.items() if is_broken)


def _function(form: Form) -> Any:
    module, _, name = form.kernel.partition(".")
    return getattr(importlib.import_module(f"mien.kernels.{module}"), name)


def _named(form: Form) -> dict[str, Argument]:
    return dict(zip(_function(form).arg_names, form.arguments, strict=True))


def _has_whole_runs(form: Form) -> bool:
    return all(value % 8 == 0 for name, value in _named(form).items() if name in RUNS)


def compiled(form: Form, target: int) -> Usage:
    """The form, compiled for sm_``target``."""
    function = _function(form)
    signature, constants, attributes = {}, {}, {}
    for index, (param, value) in enumerate(zip(function.params, form.arguments, strict=True)):
        if param.is_constexpr or not isinstance(value, str):
            signature[param.name], constants[index,] = "constexpr", value
            continue
        signature[param.name] = value.removesuffix(ALIGNED)
        if value.endswith(ALIGNED):
            attributes[index,] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": form.num_warps, "num_stages": form.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Usage(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        # Where registers spill, or a value has an address, there is a stack.
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        wide_loads=_count_wide("ld", kernel.asm["ptx"]),
        wide_stores=_count_wide("st", kernel.asm["ptx"]),
    )


def _count_wide(operation: str, ptx: str) -> int:
    # ptxas neither splits nor joins them, and to disassemble what it makes takes five times as long
    # as to compile it.
    accesses = re.findall(rf"\b{operation}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return sum(int(values or 1) * int(bits) >= WIDE_BITS for values, bits in accesses)


def main(targets: list[int], forms: list[Form]) -> int:
    """Compile every form for every target; 1 where a bound is broken, else 0."""
    num_broken = 0
    for target in targets:
        registers = defaultdict(list)
        for form in forms:
            usage = compiled(form, target)
            registers[form.kernel].append(usage.registers)
            if broken := usage.broken(form):
                num_broken += 1
                print(f"sm_{target}: {broken}: {form}", flush=True)
        for kernel, numbers in sorted(registers.items()):
            print(f"sm_{target} {kernel}: {len(numbers)} forms, {max(numbers)} registers at most")
    print(f"{len(forms)} forms for {len(targets)} targets, {num_broken} break a bound")
    return min(num_broken, 1)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "unset TRITON_INTERPRET"
    sys.exit(main([*map(int, sys.argv[1:])], [*map(Form.read, sys.stdin)]))
