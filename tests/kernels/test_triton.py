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

triton = pytest.importorskip("triton", reason="triton is not installed here")


def run(*arguments: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiled(cache: Path, *arguments: str) -> list[dict]:
    return json.loads(run("-m", "boldforge.kernels.aot", "--capability", "90", *arguments, TRITON_CACHE_DIR=str(cache)))


def assert_fits(report: list[dict]) -> None:
    assert {kernel["variant"]: kernel["spilled_bytes"] for kernel in report if kernel["spilled_bytes"]} == {}
    assert max(kernel["registers"] for kernel in report) <= 255
    assert min(kernel["instructions"] for kernel in report) > 100


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 cannot loop up to a tensor with numpy 2.4 or newer",
)
def test_the_interpreted_kernel_matches_the_oracle():
    passed = run("-m", "pytest", str(Path(__file__).with_name("triton_cases.py")), TRITON_INTERPRET="1")
    assert "passed" in passed
    assert "skipped" not in passed


def test_the_widest_variants_compile_for_hopper_without_spilling(tmp_path):
    report = compiled(tmp_path, "--types", "bf16", "--states", "16", "64")
    assert len(report) == 2
    assert_fits(report)


@pytest.mark.slow
def test_every_variant_compiles_for_hopper_without_spilling(tmp_path):
    report = compiled(tmp_path)
    assert len(report) == 12
    assert_fits(report)
