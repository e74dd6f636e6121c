"""Compile every kernel variant without a GPU and report the resources it takes: ``python -m boldforge.kernels.aot``.

Must run in a process without TRITON_INTERPRET, which accepts code that the compiler refuses.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from boldforge.kernels import triton_scan

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Resources:
    """What one compiled variant takes: registers per lane, spilled bytes per lane, machine instructions in all."""

    variant: str
    registers: int
    spilled_bytes: int
    instructions: int


def variants(types: Sequence[str], states: Sequence[int]) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Yield (name, kernel, signature, constants) of every kernel for these input types and numbers of states."""
    pointers = ("u", "dt", "B", "C", "z", "y")
    scalars = ("n_channels", "n_tokens", "u_row", "dt_row", "B_row", "C_row", "z_row")
    for dtype in types:
        for n_states in states:
            signature = {f"{name}_ptr": f"*{dtype}" for name in pointers}
            signature |= dict.fromkeys(("A_ptr", "D_ptr", "bias_ptr"), "*fp32")
            signature |= {"rows_ptr": "*i32", "cu_ptr": "*i32"} | dict.fromkeys(scalars, "i32")
            constants = {
                "N": n_states,
                "CHANNELS": triton_scan.channels_per_program(n_states),
                "HAS_D": True,
                "HAS_Z": True,
                "HAS_BIAS": True,
            }
            yield f"scan_forward {dtype} N={n_states}", triton_scan.scan_forward_kernel, signature, constants


def compile_variant(kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int) -> bytes:
    """Return the machine code (cubin) of a kernel for an NVIDIA compute capability such as 90."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")},
    )
    options = {"num_warps": 1, "num_stages": 1, **triton_scan.compile_options()}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def resources(variant: str, cubin: bytes) -> Resources:
    """Return what a cubin takes, read with the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(TOOLS / "cuobjdump"), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources: {usage}")
    registers, stack, local = map(int, found.groups())
    return Resources(
        variant, registers, stack + local, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE))
    )


def main() -> None:
    """Print the resources of every variant as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--capability", type=int, default=90, help="NVIDIA compute capability (90: Hopper)")
    parser.add_argument("--types", nargs="+", default=["fp32", "bf16", "fp16"], help="input types")
    parser.add_argument("--states", nargs="+", type=int, default=[1, 4, 16, 64], help="numbers of states N")
    chosen = parser.parse_args()
    report = [
        asdict(resources(name, compile_variant(kernel, signature, constants, chosen.capability)))
        for name, kernel, signature, constants in variants(chosen.types, chosen.states)
    ]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
