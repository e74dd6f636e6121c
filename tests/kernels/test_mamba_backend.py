"""The detour through padded sequences, with mamba-ssm's kernel replaced by its published formula.

The package itself needs a CUDA device; test_gpu.py runs it where it imports.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import silu, softplus

from boldforge.kernels import (
    BackendError,
    available_backends,
    mamba_backend,
    scan_oracle,
    selective_scan_fn,
    shifted_scan,
)
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


@pytest.fixture
def reference(monkeypatch):
    """The package's own reference functions, which are plain torch; a module stands in for a missing compiled part."""
    package = importlib.util.find_spec("mamba_ssm")
    if package is None:
        pytest.skip("mamba-ssm is not installed here")
    name = "mamba_ssm.ops.selective_scan_interface"
    if importlib.util.find_spec("selective_scan_cuda") is None:
        bare = ModuleType("mamba_ssm")  # its own __init__ imports every model of the package
        bare.__path__ = list(package.submodule_search_locations)
        for found in [module for module in sys.modules if module.split(".")[0] == "mamba_ssm"]:
            monkeypatch.delitem(sys.modules, found)
        monkeypatch.setitem(sys.modules, "mamba_ssm", bare)
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
    try:
        interface = importlib.import_module(name)
    except Exception as reason:
        pytest.skip(f"{name} does not import here: {reason}")
    yield interface
    for found in [module for module in sys.modules if module.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, found, raising=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("B_axes", ["DN", "BNL", "BGNL"])
@pytest.mark.parametrize("C_axes", ["DN", "BNL", "BGNL"])
@pytest.mark.parametrize("steps", ["softplus", "positive", "any sign"])
@pytest.mark.parametrize("optional", [True, False])
def test_the_function_agrees_with_the_packages_reference(reference, B_axes, C_axes, steps, optional):
    sizes = {"B": 2, "D": 6, "L": 37, "N": 4, "G": 3}
    generator = torch.Generator().manual_seed(0)
    axes = {"u": "BDL", "delta": "BDL", "A": "DN", "B": B_axes, "C": C_axes}
    axes |= {"D": "D", "z": "BDL", "delta_bias": "D"} if optional else {}
    given = {
        name: torch.randn([sizes[axis] for axis in letters], generator=generator) for name, letters in axes.items()
    }
    given["A"] = -(given["A"] * 0.3).exp()
    if steps == "positive":
        given["delta"] = given["delta"].abs() + 5
    elif steps == "any sign":
        given |= {name: value * 0.1 for name, value in given.items() if name.startswith("delta")}
    both = []
    for function in (selective_scan_fn, reference.selective_scan_ref):
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        y, state = function(**leaves, delta_softplus=steps == "softplus", return_last_state=True)
        (y.square().sum() + state.square().sum()).backward()
        both.append([y.detach(), state.detach(), *(leaf.grad for leaf in leaves.values())])
    for found, wanted in zip(*both, strict=True):
        assert found.dtype == wanted.dtype
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("missing", [None, "D", "z", "dt_bias"])
def test_the_backend_agrees_through_the_packages_reference(reference, monkeypatch, missing):
    monkeypatch.setattr(reference, "selective_scan_fn", reference.selective_scan_ref)
    index = ragged_index()
    inputs = scan_inputs(index, dtype=torch.float32) | ({missing: None} if missing else {})
    arguments = [inputs[name] for name in SCAN_ARGUMENTS]
    y = mamba_backend.scan_forward(*arguments, index)
    assert relative_error(y, scan_oracle(*arguments, index)) < 1e-5
    leaves = [None if value is None else value.double().requires_grad_() for value in arguments]
    scan_oracle(*leaves, index).square().sum().backward()
    for found, leaf in zip(mamba_backend.scan_backward(2 * y, *arguments, index), leaves, strict=True):
        assert leaf is None or relative_error(found, leaf.grad) < 1e-5
