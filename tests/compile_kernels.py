"""Compile Triton kernels for GPUs that are not here, and say what the compiler made of them.

    python tests/compile_kernels.py tests/aot/adam.json 80 90      one JSON object a line

Its own process, because kernels that were imported for Triton's interpreter cannot be compiled.
A case of the JSON file: ``module``, ``kernel``, ``signature`` (argument -> type, as Triton writes
them; "constexpr" for compile-time ones), ``constexprs``, ``num_warps`` and what is asserted of it.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", re.M)


def _function(case):
    """The kernel without the decorators that choose its configuration."""
    function = getattr(importlib.import_module(case["module"]), case["kernel"])
    while not isinstance(function, triton.runtime.jit.JITFunction):
        function = function.fn
    return function


def compiled(case, target):
    """Registers, stack, shared memory and counts of memory instructions of one case."""
    function, signature = _function(case), case["signature"]
    # Pointers and sizes that are multiples of 16, as the launcher finds them at run time.
    aligned = set(case.get("aligned", [k for k, v in signature.items() if v.startswith("*")]))
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name in aligned
    }
    source = ASTSource(function, signature, constexprs=case["constexprs"], attrs=attrs)
    kernel = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": case["num_warps"]}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = INSTRUCTION.findall(_tool("cuobjdump", "-sass", file.name))
    return {
        "kernel": case["kernel"],
        "target": target,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": kernel.metadata.shared,
        "local_accesses": _count(sass, r"LDL|STL"),
        "loads": _count(sass, r"LDG"),
        "wide_loads": _count(sass, r"LDG\..*(64|128)"),
        "stores": _count(sass, r"STG"),
        "wide_stores": _count(sass, r"STG\..*(64|128)"),
    }


def _tool(*words):
    command = [TOOLS / words[0], *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _count(instructions, pattern):
    return sum(bool(re.match(pattern, each)) for each in instructions)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "unset TRITON_INTERPRET"
    for case in json.loads(Path(sys.argv[1]).read_text()):
        for target in map(int, sys.argv[2:]):
            print(json.dumps({"case": case["name"], **compiled(case, target)}), flush=True)
