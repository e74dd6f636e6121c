"""The C++ scan: the same bits at any number of threads, chosen by itself, and every reason not to."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from boldforge.kernels import (
    BackendError,
    available_backends,
    backends,
    cpu_backend,
    cpu_build,
    shifted_conv,
    shifted_scan,
    window_index,
)
from tests.kernels.conftest import SCAN_ARGUMENTS, ragged_index, relative_error, scan_inputs

needs_the_op = pytest.mark.skipif(available_backends()["cpu"] != "", reason=available_backends()["cpu"])

USE = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from boldforge.kernels import shifted_conv, window_index
index = window_index((2,), (2,), (0,))
print(shifted_conv(torch.ones(1, 2, 1), torch.ones(1, 1), None, index).sum().item())
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process, with an empty cache folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpu_build.load.cache_clear()
    yield monkeypatch
    cpu_build.load.cache_clear()


def everything(inputs, index):
    tensors = [inputs[name].clone().requires_grad_() for name in SCAN_ARGUMENTS]
    x, weight = inputs["u"].clone().requires_grad_(), inputs["A"][:, :3].clone().requires_grad_()
    y, conv = shifted_scan(*tensors, index, backend="cpu"), shifted_conv(x, weight, None, index, backend="cpu")
    (y.square().sum() + conv.square().sum()).backward()
    return [y, conv, x.grad, weight.grad, *(tensor.grad for tensor in tensors)]


@needs_the_op
def test_the_number_of_threads_changes_no_bit():
    index = window_index((13, 5, 6), (4, 2, 3), (1, 0, 2))
    inputs = scan_inputs(index, 3, 200, 16, torch.float32)
    torch.set_num_threads(1)
    one = everything(inputs, index)
    torch.set_num_threads(2)
    two = everything(inputs, index)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_the_op
def test_one_long_sequence_is_cut_into_groups_of_channels_and_no_bit_changes_with_the_threads():
    index = window_index((81_920,), (81_920,), (0,))
    generator = torch.Generator().manual_seed(0)
    u, dt = torch.randn(2, 1, index.n_tokens, 40, generator=generator)
    B, C = torch.randn(2, 1, index.n_tokens, 2, generator=generator)
    A = -torch.rand(40, 2, generator=generator)
    tensors = (u, dt - 3, A, B, C, None, None, None, index)
    assert cpu_backend._n_groups(1, 40) == 3
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([cpu_backend.scan_forward(*tensors), *cpu_backend.scan_backward(u, *tensors)])
    for one, two in zip(*results, strict=True):
        assert one is None or torch.equal(one, two)
    # Each half of the channels alone: a short cut through other groups, to the same values.
    for some in (slice(0, 20), slice(20, 40)):
        half = cpu_backend.scan_forward(u[..., some], dt[..., some] - 3, A[some], B, C, None, None, None, index)
        assert relative_error(half, results[0][0][..., some]) < 1e-6


@pytest.mark.parametrize(
    ("tasks", "channels", "groups"), [(1, 8, 1), (1, 72, 4), (1, 1024, 11), (3, 288, 3), (128, 72, 1), (128, 288, 3)]
)
def test_few_tasks_take_small_groups(tasks, channels, groups):
    assert cpu_backend._n_groups(tasks, channels) == groups


@needs_the_op
def test_it_is_chosen_for_cpu_tensors_except_float64():
    chosen = backends.choose("auto", torch.zeros(1))
    assert chosen.scan_forward.__module__ == "boldforge.kernels.cpu_backend"
    assert backends.choose("auto", torch.zeros(1, dtype=torch.float64)) is backends.TORCH
    index = ragged_index()
    with pytest.raises(BackendError, match="float64"):
        shifted_scan(**scan_inputs(index), index=index, backend="cpu")


def test_it_can_be_turned_off(fresh):
    fresh.setenv(cpu_build.SWITCH, "0")
    assert "BOLDFORGE_CPU_OP=0" in available_backends()["cpu"]
    assert backends.choose("auto", torch.zeros(1)) is backends.TORCH


def test_without_a_compiler_the_torch_backend_takes_over(fresh):
    fresh.setenv("CXX", "there-is-no-such-compiler")
    assert "no C++ compiler" in available_backends()["cpu"]
    assert backends.choose("auto", torch.zeros(1)) is backends.TORCH


@needs_the_op
def test_a_failing_build_is_one_warning_and_the_torch_backend(fresh, tmp_path, caplog):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$1" in -*version*) exec c++ "$@";; esac\necho "scan.cpp:1: error: no room" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    with caplog.at_level(logging.WARNING):
        assert backends.choose("auto", torch.zeros(1)) is backends.TORCH
        assert backends.choose("auto", torch.zeros(1)) is backends.TORCH
    (warning,) = caplog.records
    assert "no room" in warning.getMessage()
    with pytest.raises(BackendError, match="no room"):
        backends.choose("cpu", torch.zeros(1))
    assert [path.suffix for path in tmp_path.iterdir() if path != compiler] == [".lock"]


@needs_the_op
def test_a_cache_folder_that_cannot_be_written_is_no_error(fresh, tmp_path):
    (tmp_path / "file").write_text("")
    fresh.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    assert backends.choose("auto", torch.zeros(1)) is backends.TORCH


@pytest.mark.slow
@needs_the_op
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_ranks_that_start_together_build_it_once(tmp_path, level):
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if level != "default":
        environment["ATEN_CPU_CAPABILITY"] = level
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", USE], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    answers = [rank.communicate(timeout=200) for rank in ranks]
    assert [out for out, _ in answers] == [answers[0][0]] * 3
    assert sum("Building the C++ scan" in log for _, log in answers) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]
