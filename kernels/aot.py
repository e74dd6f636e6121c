"""Compile every kernel without a GPU and write down what it takes: ``python -m boldforge.kernels.aot``.

Must run in a process without TRITON_INTERPRET, which accepts code that the compiler refuses.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from boldforge.kernels import (
    triton_conv,
    triton_scan,
    triton_scan_backward,
    triton_scan_chunked,
    triton_scan_flat,
    triton_scan_keep,
    triton_scan_parts,
    triton_scan_spans,
)

RECORD = Path(__file__).with_name("resources.json")
"""Where the figures of the last change lie; a test compares with them."""

CAPABILITIES = (80, 90, 100)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATES = (1, 4, 16, 64)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_OPTIONAL = {"HAS_D": True, "HAS_Z": True, "HAS_BIAS": True}
_WHOLE = {"HAS_INITIAL": False, "HAS_LAST": False}
# Pointers whose type does not follow that of the input.
_FIXED_TYPES = dict.fromkeys(
    ("rows_ptr", "codes_ptr", "cu_ptr", "before_ptr", "after_ptr", "cut_ptr", "first_ptr"), "*i32"
)
_FIXED_TYPES |= dict.fromkeys(
    (
        *("A_ptr", "D_ptr", "bias_ptr", "states_ptr", "dA_ptr", "dBC_ptr", "dD_ptr", "dbias_ptr"),
        *("weight_ptr", "dtotal_ptr", "dweight_ptr", "initial_ptr", "last_ptr", "grad_initial_ptr", "grad_last_ptr"),
        *("ends_ptr", "total_ptr"),
    ),
    "*fp32",
)


@dataclass(frozen=True)
class Variant:
    """One kernel with all its compile-time arguments.

    Parameters
    ----------
    name : str
        Kernel, input type and number of states.
    kernel : triton kernel
        What is compiled.
    dtype : str
        Type of the inputs, as Triton spells it.
    constants : mapping
        Compile-time arguments.
    warps : int
        Warps of a program.
    elements : int
        Tokens times channels that one program treats in one run of its longest loop, or in all where it has none.
    aligned : tuple of str
        Integers that are multiples of 16, which Triton sees for itself where it compiles at the launch.
    """

    name: str
    kernel: Any
    dtype: str
    constants: Mapping[str, Any]
    warps: int
    elements: int
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What one compiled variant takes; lane instructions are those of the longest loop per token and channel."""

    variant: str
    registers: int
    spilled_bytes: int
    lane_instructions: float


def variants(types: Sequence[str] = tuple(TYPES), states: Sequence[int] = STATES) -> Iterator[Variant]:
    """Yield every kernel for these input types and numbers of states."""
    for dtype in types:
        for n in states:
            packed = n * TYPES[dtype].itemsize % 8 == 0
            constants = triton_scan.constants(n) | _OPTIONAL | _WHOLE | {"BIG": False}
            channels = constants["CHANNELS"]
            kernel = triton_scan.scan_forward_kernel
            # It only sees widths that are multiples of its channels.
            rows = ("n_channels", "u_row", "dt_row", "z_row")
            yield Variant(f"scan_forward {dtype} N={n}", kernel, dtype, constants, 1, channels, rows)
            lanes = triton_scan_flat.LANES
            flat = {"N": n, "LANES": lanes, "PACKED": packed, **_OPTIONAL, **_WHOLE, "BIG": False}
            kernel = triton_scan_flat.scan_forward_flat_kernel
            yield Variant(f"scan_forward_flat {dtype} N={n}", kernel, dtype, flat, 1, lanes)
            yield from _passes_of_long_sequences(dtype, n, channels, packed)
            if n > triton_scan_backward.MAX_STATES:
                continue
            yield from _backward_variants(dtype, n, {"PACKED": packed, **_OPTIONAL, **_WHOLE})
        constants = triton_conv.constants(4) | {"BIG": False}
        elements = triton_conv.TOKENS * triton_conv.CHANNELS
        for name in ("forward", "backward", "input_gradient"):
            kernel = getattr(triton_conv, f"conv_{name}_kernel")
            extra = {"HAS_BIAS": True} if "HAS_BIAS" in kernel.arg_names else {}
            yield Variant(f"conv_{name} {dtype}", kernel, dtype, constants | extra, 4, elements)


def _passes_of_long_sequences(dtype: str, n: int, channels: int, packed: bool) -> Iterator[Variant]:
    kernel = triton_scan_chunked.scan_ends_kernel
    for name, reverse in (("scan_ends", False), ("scan_ends_back", True)):
        constants = {"N": n, "CHANNELS": channels, "PACKED": packed, "HAS_Z": reverse, "HAS_BIAS": True}
        constants["BIG"] = False
        yield Variant(f"{name} {dtype} N={n}", kernel, dtype, constants | {"REVERSE": reverse}, 1, channels)
    if dtype == "fp32":  # all that it reads is float32, whatever the inputs are
        lanes, steps = triton_scan_chunked.CARRY_LANES, triton_scan_chunked.CARRY_STEPS
        constants = {"N": n, "LANES": lanes, "STEPS": steps, "REVERSE": False}
        yield Variant(f"scan_carry N={n}", triton_scan_chunked.carry_kernel, dtype, constants, 1, lanes * steps)


def _backward_variants(dtype: str, n: int, common: dict[str, Any]) -> Iterator[Variant]:
    """Yield the kernels that the scan's backward needs: its states, alone or with the output, and itself."""
    keep = triton_scan_keep.scan_states_kernel
    channels = triton_scan_keep.channels_per_program(triton_scan_keep.WIDE_CHANNELS, TYPES[dtype])
    steps = triton_scan_spans.steps_for(TYPES[dtype])
    known = common | {"N": n, "CHANNELS": channels, "STEPS": steps, "WIDE": False}
    for name, output in (("scan_states", False), ("scan_forward_keeping", True)):
        constants = _known(keep, known | {"OUTPUT": output})
        yield Variant(f"{name} {dtype} N={n}", keep, dtype, constants, 1, channels * steps)
    backward = triton_scan_backward.scan_backward_kernel
    elements = triton_scan_backward.CHANNELS * steps
    constants = triton_scan_backward.constants(n, TYPES[dtype]) | common | {"WIDE": False}
    yield Variant(f"scan_backward {dtype} N={n}", backward, dtype, _known(backward, constants), 1, elements)


def _known(kernel: Any, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Return the compile-time arguments that this kernel has."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def compile_variant(variant: Variant, capability: int) -> bytes:
    """Return the machine code (cubin) of a variant for an NVIDIA compute capability such as 90."""
    names = variant.kernel.arg_names
    kinds = {name: _FIXED_TYPES.get(name, f"*{variant.dtype}") if name.endswith("_ptr") else "i32" for name in names}
    aligned = {name for name in names if name.endswith("_ptr")} | set(variant.aligned)
    source = ASTSource(
        fn=variant.kernel,
        signature={name: "constexpr" if name in variant.constants else kinds[name] for name in names},
        constexprs=dict(variant.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": 1, **triton_scan_parts.compile_options()}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def resources(variant: Variant, cubin: bytes) -> Resources:
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
    per_element = longest_loop(code) * 32 * variant.warps / variant.elements
    return Resources(variant.name, registers, stack + local, round(per_element, 1))


def longest_loop(code: str) -> int:
    """Return the instructions of the longest loop without a loop inside in a listing of machine code, else of all."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9][\w.]*)(.*?);", re.MULTILINE)
    instructions = [(int(address, 16), name, rest) for address, name, rest in line.findall(code)]
    loops = []
    for address, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        # The endless loop after the end, where the processor may look ahead, branches to itself.
        if target and int(target[1], 16) < address:
            loops.append(range(int(target[1], 16), address + 1))
    innermost = [
        loop for loop in loops if not any(other != loop and other[0] in loop and other[-1] in loop for other in loops)
    ]
    return max((sum(address in loop for address, *_ in instructions) for loop in innermost), default=len(instructions))


def main() -> None:
    """Compile, and write {"triton": version, "sm_90": [...], ...} as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--capability", nargs="+", type=int, default=CAPABILITIES, help="90: Hopper, 80: Ampere")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="input types")
    parser.add_argument("--states", nargs="+", type=int, default=STATES, help="numbers of states N")
    parser.add_argument("--out", type=Path, default=RECORD, help="file to write")
    chosen = parser.parse_args()
    report: dict[str, Any] = {"triton": triton.__version__}
    for capability in chosen.capability:
        report[f"sm_{capability}"] = [
            asdict(resources(variant, compile_variant(variant, capability)))
            for variant in variants(chosen.types, chosen.states)
        ]
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Wrote {chosen.out}.")


if __name__ == "__main__":
    main()
