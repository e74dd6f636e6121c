"""The Triton kernel without a GPU: its values in the interpreter, and what the real compiler makes of it.

Each in its own process, because TRITON_INTERPRET decides when triton is imported whether a kernel is compiled or
interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RECORD = Path(__file__).parents[2] / "kernels/resources.json"

triton = pytest.importorskip("triton", reason="triton is not installed here")


def run(*arguments: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recorded_and_compiled(folder: Path, *arguments: str) -> list[tuple[str, dict, dict]]:
    """(capability, what kernels/resources.json says, what the compiler makes of it now) of every variant."""
    record = json.loads(RECORD.read_text())
    if record["triton"] != triton.__version__:
        pytest.skip(f"kernels/resources.json is for Triton {record['triton']}, found {triton.__version__}")
    out = folder / "resources.json"
    run("-m", "boldforge.kernels.aot", "--out", str(out), *arguments, TRITON_CACHE_DIR=str(folder / "cache"))
    found = json.loads(out.read_text())
    capabilities = [name for name in found if name != "triton"]
    return [
        (name, {kernel["variant"]: kernel for kernel in record[name]}.get(now["variant"], {}), now)
        for name in capabilities
        for now in found[name]
    ]


def assert_no_worse(pairs: list[tuple[str, dict, dict]]) -> None:
    """Fail where a kernel spills, needs 3 % more instructions than recorded, or was never recorded."""
    for capability, before, now in pairs:
        where = f"{now['variant']} on {capability}"
        assert before, f"{where} is not in kernels/resources.json; run python -m boldforge.kernels.aot"
        assert now["spilled_bytes"] <= before["spilled_bytes"], where
        assert now["lane_instructions"] <= before["lane_instructions"] * 1.03, where


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 cannot loop up to a tensor with numpy 2.4 or newer",
)
@pytest.mark.parametrize("cases", ["triton_cases.py", pytest.param("triton_backward_cases.py", marks=pytest.mark.slow)])
def test_the_interpreted_kernel_matches_the_oracle(cases):
    passed = run("-m", "pytest", str(Path(__file__).with_name(cases)), TRITON_INTERPRET="1")
    assert "passed" in passed
    assert "skipped" not in passed


def test_the_kernels_of_the_default_model_get_no_slower_on_hopper(tmp_path):
    pairs = recorded_and_compiled(tmp_path, "--capability", "90", "--types", "bf16", "--states", "16")
    assert len(pairs) == 10
    assert_no_worse(pairs)


def test_no_recorded_kernel_spills():
    record = json.loads(RECORD.read_text())
    kernels = [kernel for name, found in record.items() if name != "triton" for kernel in found]
    assert len({kernel["variant"] for kernel in kernels}) * 3 == len(kernels)
    assert [kernel for kernel in kernels if kernel["spilled_bytes"]] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_kernel_gets_slower_on_any_device(tmp_path):
    assert_no_worse(recorded_and_compiled(tmp_path))
