"""Cases of the chunked Triton scan, run by test_triton_chunked.py in a process with TRITON_INTERPRET=1."""

from functools import partial

import pytest
import torch

from boldforge.kernels import ScanIndex, scan_oracle, shifted_scan, triton_scan_chunked, window_index
from tests.kernels.conftest import SCAN_ARGUMENTS, relative_error, scan_inputs

RESTART = -(2**31)


def path(lengths, restarts=()):
    """Sequences of these lengths over shuffled tokens, with a restart before these places."""
    n_tokens = sum(lengths)
    rows = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    rows[list(restarts)] |= RESTART
    return ScanIndex(rows, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), n_tokens)


PATHS = {
    "whole chunks": path([16]),
    "a short last chunk, beside shorter sequences": path([3, 11, 4]),
    "restarts inside a chunk, at both its edges, and twice in one": path([21], [3, 8, 15, 17, 18]),
}


def gradients(inputs, dout, index, dtype):
    tensors = {k: None if v is None else v.to(dtype, copy=True).requires_grad_() for k, v in inputs.items()}
    scan_oracle(**tensors, index=index).backward(dout.double())
    return [None if tensors[name] is None else tensors[name].grad for name in SCAN_ARGUMENTS]


def check(inputs, index, tolerance=2e-6, chunk=8):
    y = triton_scan_chunked.scan_forward(**inputs, index=index, chunk=chunk)
    assert relative_error(y, scan_oracle(**inputs, index=index)) <= tolerance
    dout = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    found = triton_scan_chunked.scan_backward(dout, **inputs, index=index, chunk=chunk)
    wanted = gradients(inputs, dout, index, torch.float64)
    for name, ours, right in zip(SCAN_ARGUMENTS, found, wanted, strict=True):
        assert (ours is None) == (right is None), name
        if right is not None:
            assert ours.dtype == inputs[name].dtype
            assert relative_error(ours, right) <= tolerance, name


@pytest.mark.parametrize("name", PATHS)
def test_values_and_gradients(name):
    check(scan_inputs(PATHS[name], 2 if name == "whole chunks" else 1, 3, 2, torch.float32), PATHS[name])


def test_more_states_than_a_backward_program_holds():
    index = path([7], [5])
    check(scan_inputs(index, 1, 2, 17, torch.float32), index, chunk=4)


def test_optional_arguments():
    index = path([9], [5])
    check(scan_inputs(index, 1, 2, 2, torch.float32) | dict.fromkeys(("D", "z", "dt_bias")), index, chunk=4)


def test_bfloat16_inputs_keep_a_float32_state():
    index = path([11], [6])
    check(scan_inputs(index, 1, 4, 4, torch.bfloat16), index, tolerance=1e-2, chunk=4)


def test_memory_that_lasts_over_every_chunk():
    """Slow decays: the first token is still felt at the last one, ten chunks and two runs of the carry later."""
    index = path([20])
    inputs = scan_inputs(index, 1, 1, 2, torch.float32)
    inputs |= {"dt": torch.full_like(inputs["dt"], -4.0), "A": torch.full_like(inputs["A"], -0.1)}
    inputs["u"][:, index.tokens[0]] += 1e3
    y = triton_scan_chunked.scan_forward(**inputs, index=index, chunk=2)
    moved = scan_oracle(**inputs, index=index)
    assert relative_error(y[:, index.tokens[-1]], moved[:, index.tokens[-1]]) < 1e-5


def test_two_runs_give_the_same_bits():
    index = path([9], [7])
    inputs = scan_inputs(index, 1, 3, 2, torch.float32)
    dout = torch.ones_like(inputs["u"])
    first, second = (
        [
            triton_scan_chunked.scan_forward(**inputs, index=index, chunk=4),
            *triton_scan_chunked.scan_backward(dout, **inputs, index=index, chunk=4),
        ]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_lies_before_a_restart_changes_nothing_after_it():
    index = path([16], [9])
    inputs = scan_inputs(index, 1, 2, 2, torch.float32)
    clean = triton_scan_chunked.scan_forward(**inputs, index=index, chunk=4)
    inputs["u"] = inputs["u"].index_fill(1, index.tokens[:9], 1e6)
    y = triton_scan_chunked.scan_forward(**inputs, index=index, chunk=4)
    changed = (y != clean).any(-1)[0][index.tokens]
    assert changed.tolist() == [True] * 9 + [False] * 7


def test_the_backend_cuts_long_sequences_by_itself(monkeypatch):
    index = window_index((12,), (12,), (0,))
    inputs = scan_inputs(index, 1, 2, 2, torch.float32)
    monkeypatch.setattr(triton_scan_chunked, "LEAST_LENGTH", 12)
    monkeypatch.setattr(triton_scan_chunked, "LEAST_CHUNK", 4)
    asked = []
    chunks_of = triton_scan_chunked.chunks_of
    monkeypatch.setattr(triton_scan_chunked, "chunks_of", lambda *a: asked.append(a[1]) or chunks_of(*a))
    tensors = {name: value.requires_grad_() for name, value in inputs.items()}
    shifted_scan(**tensors, index=index, backend="triton").square().sum().backward()
    assert asked == [4, 4]
    right = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    partial(scan_oracle, **right)(index=index).square().sum().backward()
    for name in SCAN_ARGUMENTS:
        assert relative_error(tensors[name].grad, right[name].grad) < 2e-6, name
