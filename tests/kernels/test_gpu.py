"""The compiled Triton kernels on a CUDA device, against float64; every case also runs on the CPU, which tests the test.

On a GPU machine where nothing can be installed: PYTHONPATH=.links python3 -m pytest -m gpu tests/kernels
"""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from boldforge.kernels import (
    available_backends,
    conv_oracle,
    scan_oracle,
    selective_scan_fn,
    shifted_conv,
    shifted_scan,
    window_index,
)
from tests.kernels.conftest import (
    BACKWARD,
    FORWARD,
    SCAN_ARGUMENTS,
    accuracy_inputs,
    assert_accurate,
    poisoned_memory,
    ragged_index,
    relative_error,
    values_and_gradients,
)

on_the_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
PLACES = [pytest.param(("cuda", "triton"), marks=on_the_gpu, id="cuda"), pytest.param(("cpu", "auto"), id="cpu")]


@pytest.fixture(params=PLACES)
def place(request) -> tuple[str, str]:
    """Device and backend."""
    device, backend = request.param
    if device == "cuda" and (reason := available_backends()[backend]):
        pytest.fail(f"there is a CUDA device, but {backend} does not run: {reason}")
    return device, backend


def placed(inputs, device):
    return {name: value.to(device) for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(
    ("channels", "states"), [(1, 1), (64, 16), (128, 4), (72, 16), (130, 5), (33, 64), (64, 64), (576, 16), (200, 17)]
)
def test_values_and_every_gradient(place, channels, states, dtype):
    """Widths that are a multiple of 64 or not, and every range of N, take kernels of their own."""
    device, backend = place
    index = ragged_index()
    inputs = placed(accuracy_inputs(index, 2, channels, states, dtype), device)
    assert assert_accurate(partial(shifted_scan, backend=backend), inputs, index)


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias"])
@pytest.mark.parametrize("channels", [64, 72])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"mode": "wrap"}], ids=["region", "reverse", "wrap"])
def test_without_optional_arguments_along_every_kind_of_path(place, missing, channels, options):
    device, backend = place
    index = ragged_index(**options)
    inputs = placed(accuracy_inputs(index, 2, channels, 16), device)
    del inputs[missing]
    assert assert_accurate(partial(shifted_scan, backend=backend), inputs, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "channels"), [(1, 72), (1000, 72), (3001, 64), (20001, 24)])
def test_few_long_sequences(place, length, channels, dtype):
    """These go in chunks where that is faster; the judge is the torch backend in float64, on the same device."""
    device, backend = place
    if device == "cpu":
        length = min(length, 1000)
    index = window_index((length,), (length,), (0,))
    inputs = placed(accuracy_inputs(index, 1, channels, 16, dtype), device)
    exact = {name: value.double() for name, value in inputs.items()}
    wanted = values_and_gradients(partial(shifted_scan, backend="torch"), exact, index)
    with poisoned_memory():
        found = values_and_gradients(partial(shifted_scan, backend=backend), inputs, index)
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    assert errors["y"] <= FORWARD[dtype]
    assert max(errors.values()) <= BACKWARD[dtype], errors


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("channels", "taps"), [(1, 1), (72, 4), (128, 4), (33, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_and_its_gradients(place, channels, taps, with_bias, dtype):
    device, backend = place
    index = ragged_index()
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, index.n_tokens, channels), (channels, taps), (channels,)][: 2 + with_bias]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    dout = torch.randn(shapes[0], generator=generator).to(dtype)
    results = []
    for conv, kind, where in (
        (partial(shifted_conv, backend=backend), dtype, device),
        (conv_oracle, torch.float64, "cpu"),
    ):
        leaves = [value.to(where, kind, copy=True).requires_grad_() for value in given]
        x, weight, *bias = leaves
        with poisoned_memory():
            y = conv(x, weight, bias[0] if bias else None, index)
            y.backward(dout.to(y))
        results.append([y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    y, *gradients = (relative_error(found, wanted) for found, wanted in zip(*results, strict=True))
    assert y <= FORWARD[dtype]
    assert max(gradients) <= BACKWARD[dtype]


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("length", "channels", "states"), [(0, 72, 16), (0, 128, 16), (0, 64, 40), (5000, 24, 16)])
def test_two_runs_give_the_same_bits(place, length, channels, states, dtype):
    device, backend = place
    index = window_index((length,), (length,), (0,)) if length else ragged_index()
    inputs = placed(accuracy_inputs(index, 4, channels, states, dtype), device)
    scan = partial(shifted_scan, backend=backend)
    first = values_and_gradients(scan, inputs, index)
    crowd = [torch.randn(1 << 16, device=device) for _ in range(8)]  # other addresses the second time
    second = values_and_gradients(scan, inputs, index)
    assert len(crowd) == 8
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_auto_stands_for(place):
    device, backend = place
    index = ragged_index()
    inputs = placed(accuracy_inputs(index, 2, 72), device)
    found = (values_and_gradients(partial(shifted_scan, backend=name), inputs, index) for name in ("auto", backend))
    assert all(torch.equal(one, other) for one, other in zip(*(each.values() for each in found), strict=True))


def test_the_drop_in_function(place):
    device, backend = place
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 72, 50), "delta": (2, 72, 50), "A": (72, 8), "B": (2, 2, 8, 50), "C": (2, 2, 8, 50)}
    exact = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    exact["A"] = -exact["A"].exp()
    options = {"delta_softplus": True, "return_last_state": True}
    wanted = selective_scan_fn(**exact, **options)
    found = selective_scan_fn(**placed({k: v.float() for k, v in exact.items()}, device), **options, backend=backend)
    assert max(relative_error(a.cpu(), b) for a, b in zip(found, wanted, strict=True)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mamba_ssm_agrees(dtype):
    """To the tolerance of that package's own tests in float32."""
    if reason := available_backends()["mamba_ssm"]:
        pytest.skip(reason)
    index = ragged_index()
    inputs = accuracy_inputs(index, 2, 72, 16, dtype)
    leaves = {name: value.double().requires_grad_() for name, value in inputs.items()}
    scan_oracle(**leaves, index=index).square().sum().backward()
    tensors = [inputs[name].cuda().requires_grad_() for name in SCAN_ARGUMENTS]
    shifted_scan(*tensors, index, backend="mamba_ssm").square().sum().backward()
    limit = 1e-3 if dtype == torch.float32 else 2e-2
    errors = [relative_error(t.grad.cpu(), leaves[n].grad) for n, t in zip(SCAN_ARGUMENTS, tensors, strict=True)]
    assert max(errors) < limit, errors


def sanitizer() -> str | None:
    """Path of compute-sanitizer, which comes with the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def memcheck_command(program: str) -> list[str]:
    cases = f"{Path(__file__)}::test_values_and_every_gradient"
    chosen = ["-k", "cuda and (64-16 or 72-16 or 33-64)", "-m", "gpu"]
    return [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", cases, *chosen]


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_no_kernel_touches_memory_that_is_not_its_own():
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is not on this machine")
    # Without the cache every tensor is an allocation of its own, so a step over its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(memcheck_command(program), env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_cases_chosen_for_memcheck_exist():
    _, *command = memcheck_command("compute-sanitizer")
    listed = [*command[command.index(sys.executable) :], "--collect-only", "-o", "addopts=-q --import-mode=importlib"]
    found = subprocess.run(listed, capture_output=True, text=True, timeout=120).stdout
    assert found.count("test_values_and_every_gradient[cuda") == 9, found  # three kernels in three types
