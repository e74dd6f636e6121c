"""mamba-ssm's signature: its formula in its layout, groups, the last state, and what is refused."""

import pytest
import torch
from torch.nn.functional import silu, softplus

from boldforge.kernels import selective_scan_fn
from tests.kernels.conftest import relative_error


def inputs(groups=None, batch=2, channels=6, length=11, states=3):
    generator = torch.Generator().manual_seed(0)
    names = {
        "u": (batch, channels, length),
        "delta": (batch, channels, length),
        "A": (channels, states),
        "B": (batch, *([groups] if groups else []), states, length),
        "C": (batch, *([groups] if groups else []), states, length),
        "D": (channels,),
        "z": (batch, channels, length),
        "delta_bias": (channels,),
    }
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in names.items()}
    return found | {"A": -found["A"].exp()}


def formula(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    delta = delta + delta_bias[:, None]
    delta = softplus(delta) if delta_softplus else delta
    B, C = (w if w.ndim == 4 else w[:, None] for w in (B, C))
    B, C = (w.repeat_interleave(u.shape[1] // w.shape[1], dim=1) for w in (B, C))
    h, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta * u)[..., t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    return (torch.stack(outputs, -1) + D[:, None] * u) * silu(z), h


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_values_last_state_and_gradients(groups, delta_softplus):
    given = inputs(groups)
    if not delta_softplus:
        given |= {"delta": given["delta"].exp(), "delta_bias": given["delta_bias"].abs()}
    wanted, wanted_state = formula(**given, delta_softplus=delta_softplus)
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    reference = {name: value.clone().requires_grad_() for name, value in given.items()}
    y, state = selective_scan_fn(**leaves, delta_softplus=delta_softplus, return_last_state=True)
    assert relative_error(y.detach(), wanted) < 1e-6
    assert relative_error(state.detach(), wanted_state) < 1e-6
    (y.square().sum() + state.square().sum()).backward()
    y, state = formula(**reference, delta_softplus=delta_softplus)
    (y.square().sum() + state.square().sum()).backward()
    for name in given:
        assert relative_error(leaves[name].grad, reference[name].grad) < 1e-5, name


def test_optional_arguments_may_be_missing_and_the_type_is_that_of_u():
    given = {name: value.bfloat16() for name, value in inputs().items()}
    y = selective_scan_fn(*(given[name] for name in ("u", "delta", "A", "B", "C")), delta_softplus=True)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 6, 11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(6, 3)}, r"B must have shape .*found \[6, 3\]"),
        ({"C": torch.zeros(2, 4, 3, 11)}, "same number of groups"),
        ({"B": torch.zeros(2, 4, 3, 11), "C": torch.zeros(2, 4, 3, 11)}, "divide the 6 channels"),
        ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, "must be real"),
        ({}, "positive at every token"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**inputs() | change)
