"""The detour through padded sequences, with mamba-ssm's kernel replaced by its published formula.

The package itself needs a CUDA device; test_gpu.py runs it where it imports.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import silu, softplus

from boldforge.kernels import BackendError, available_backends, mamba_backend, scan_oracle, shifted_scan
from tests.kernels.conftest import SCAN_ARGUMENTS, ragged_index, relative_error, scan_inputs


def published_formula(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Channel-first, as in the package: u, delta, z [Q, D, M]; B, C [Q, N, M]."""
    assert delta_softplus
    delta = softplus(delta + (0 if delta_bias is None else delta_bias[:, None]))
    h, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for m in range(u.shape[2]):
        h = torch.exp(delta[..., m, None] * A) * h + (delta * u)[..., m, None] * B[:, None, :, m]
        outputs.append((h * C[:, None, :, m]).sum(-1))
    y = torch.stack(outputs, dim=-1) + (0 if D is None else D[:, None] * u)
    return y if z is None else y * silu(z)


@pytest.fixture
def standing_in(monkeypatch):
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = published_formula
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)


@pytest.mark.parametrize("missing", [None, "D", "z", "dt_bias"])
def test_padded_sequences_give_the_same_scan_and_gradients(standing_in, missing):
    index = ragged_index()
    inputs = scan_inputs(index, dtype=torch.float32) | ({missing: None} if missing else {})
    leaves = [None if inputs[n] is None else inputs[n].double().requires_grad_() for n in SCAN_ARGUMENTS]
    wanted = scan_oracle(*leaves, index)
    dout = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    wanted.backward(dout.double())
    arguments = [inputs[name] for name in SCAN_ARGUMENTS]
    assert relative_error(mamba_backend.scan_forward(*arguments, index), wanted.detach()) < 1e-5
    for found, leaf in zip(mamba_backend.scan_backward(dout, *arguments, index), leaves, strict=True):
        assert (found is None) == (leaf is None)
        assert leaf is None or relative_error(found, leaf.grad) < 1e-5


def test_says_why_it_cannot_run(monkeypatch, standing_in):
    inputs = scan_inputs(ragged_index(), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r'"mamba_ssm" cannot run here: no CUDA device was found'):
        shifted_scan(**inputs, index=ragged_index(), backend="mamba_ssm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available_backends()["mamba_ssm"] == ""
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)
    assert "does not import" in available_backends()["mamba_ssm"]
