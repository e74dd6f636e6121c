"""The operators inside torch's machinery: compiled without a break, checked by torch's own test of operators."""

import gc

import pytest
import torch

from boldforge.kernels import ScanIndex, operators, shifted_conv, shifted_scan, window_index
from boldforge.kernels.index import index_of
from tests.kernels.conftest import SCAN_ARGUMENTS, ragged_index, scan_inputs


def block(index, u, dt, A, B, C, D, z, dt_bias, weight):
    u = shifted_conv(u, weight, None, index)
    return shifted_scan(u, dt * 2, A, B, C, D, z, dt_bias, index).square().sum()


def results(function, index, missing=()):
    inputs = scan_inputs(index, dtype=torch.float32)
    weight = torch.linspace(-1, 1, 20).view(5, 4)
    tensors = [None if name in missing else inputs[name].requires_grad_() for name in SCAN_ARGUMENTS]
    loss = function(index, *tensors, weight.requires_grad_())
    loss.backward()
    return [loss.detach(), weight.grad, *(tensor.grad for tensor in tensors if tensor is not None)]


@pytest.mark.parametrize("missing", [(), ("D", "z", "dt_bias")])
def test_compiling_breaks_no_graph_and_changes_no_bit(missing):
    index = ragged_index()
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(results(compiled, index, missing), results(block, index, missing), strict=True):
        assert torch.equal(found, wanted)


OPCHECKS = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}


@pytest.mark.parametrize("delta_softplus", [True, False])
@pytest.mark.parametrize("missing", [(), ("D", "z", "dt_bias")])
def test_torchs_own_checks_of_the_scan(missing, delta_softplus):
    index = window_index((5,), (3,), (0,))
    inputs = {name: value.requires_grad_() for name, value in scan_inputs(index, 1, 2, 2, torch.float32).items()}
    arguments = [None if name in missing else inputs[name] for name in SCAN_ARGUMENTS]
    found = torch.library.opcheck(operators.scan, (*arguments, index.rows, index.cu_seqlens, "torch", delta_softplus))
    assert found == dict.fromkeys(OPCHECKS, "SUCCESS")


def test_torchs_own_checks_of_the_scan_that_keeps_its_states():
    index = window_index((5,), (3,), (0,))
    inputs = {name: value.requires_grad_() for name, value in scan_inputs(index, 1, 2, 2, torch.float32).items()}
    found = torch.library.opcheck(operators.scan_keeping, (*inputs.values(), index.rows, index.cu_seqlens, "torch"))
    assert found == dict.fromkeys(OPCHECKS, "SUCCESS")


def test_asking_to_keep_states_changes_no_bit_and_breaks_no_graph():
    def keeping(index, *tensors):
        return shifted_scan(*tensors[:-1], index, keep_states=True).square().sum() + tensors[-1].sum()

    def computing(index, *tensors):
        return shifted_scan(*tensors[:-1], index).square().sum() + tensors[-1].sum()

    index = ragged_index()
    torch.compiler.reset()
    compiled = torch.compile(keeping, backend="aot_eager", fullgraph=True)
    wanted = results(computing, index)
    for function in (keeping, compiled):
        for a, b in zip(results(function, index), wanted, strict=True):
            assert torch.equal(a, b)


def test_torchs_own_checks_of_the_convolution():
    index = window_index((5,), (3,), (0,))
    x, weight = torch.randn(1, 5, 2, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    found = torch.library.opcheck(operators.conv, (x, weight, None, index.rows, index.cu_seqlens, "torch"))
    assert found == dict.fromkeys(OPCHECKS, "SUCCESS")


def test_an_operator_finds_its_index_and_keeps_none_alive():
    index = ragged_index()
    assert index_of(index.rows, index.cu_seqlens) is index
    rows, edges = index.rows, index.cu_seqlens
    del index
    gc.collect()
    assert torch.equal(index_of(rows, edges).rows, rows)
    assert isinstance(index_of(rows, edges), ScanIndex)
