"""mamba-ssm's function over ours: the same signature and layout, on any device.

Shape suffixes: B batch · D channels · L tokens · N states · G groups of channels that share B and C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from boldforge.kernels.checks import check_states, check_tensor
from boldforge.kernels.index import ScanIndex, window_index
from boldforge.kernels.ops import shifted_scan

_KEPT_PATHS = 16
_paths: dict[int, ScanIndex] = {}


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the selective scan of whole sequences, channels before tokens (mamba-ssm's ``selective_scan_fn``).

    Parameters
    ----------
    u, delta, z : [B, D, L]
        Input, step size and gate; ``z`` may be None (no gate). Any memory layout: they are copied into token order.
    A : [D, N]
        Decay rates, real.
    B, C : [D, N], [B, N, L] or [B, G, N, L]
        Input and output weights of the states: constant along the sequence, or for all channels, or for each of G
        groups of neighbouring channels. The two may differ in this.
    D, delta_bias : [D]
        Skip weight and step-size bias; either may be None (zero).
    delta_softplus : bool
        Whether the step size, bias added, goes through softplus. Without it a step may have any sign; where all are
        positive the fast backends run, else (and always under ``torch.compile``) the torch backend.
    return_last_state : bool
        Also return the state after the last token; gradients flow through it as well.
    backend : str
        As for ``shifted_scan``.

    Returns
    -------
    [B, D, L], or that and [B, D, N]
        The output in the type of ``u``, and the last state if it was asked for, in float32 (float64 where ``u`` is).

    Raises
    ------
    ValueError
        If a shape, type or device does not fit, or A, B or C is complex.
    BackendError
        If the backend cannot run here.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    if not delta_softplus and _all_positive(delta, delta_bias):
        delta, delta_bias, delta_softplus = _before_softplus(delta, delta_bias, work), None, True
    steps = (delta, delta_bias, delta_softplus)
    if B.ndim == 2 or C.ndim == 2:
        y = _constant_weights(u, steps, A, B, C, D, z, work, backend)
    else:
        y = _grouped(u, steps, A, _with_groups(B), _with_groups(C), D, z, backend)
    return (y, _last_state(u, steps, A, B, work)) if return_last_state else y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    for name, weights in (("A", A), ("B", B), ("C", C)):
        if isinstance(weights, Tensor) and weights.is_complex():
            raise ValueError(f"{name} must be real, found {weights.dtype}: complex states are not supported.")
    check_tensor("u", u, ("B", "D", "L"), u)
    b, channels, length = u.shape
    check_tensor("delta", delta, (b, channels, length), u)
    check_tensor("A", A, (channels, "N"), u)
    states = check_states("A", A)
    for name, weights in (("B", B), ("C", C)):
        shapes = {2: (channels, states), 3: (b, states, length), 4: (b, "G", states, length)}
        if weights.ndim not in shapes:
            kinds = "[D, N], [B, N, L] or [B, G, N, L]"
            raise ValueError(f"{name} must have shape {kinds}, found {list(weights.shape)}.")
        check_tensor(name, weights, shapes[weights.ndim], u)
        if weights.ndim == 4 and channels % weights.shape[1]:
            raise ValueError(
                f"{name} must have a number of groups (second axis) that divides the {channels} channels of u, "
                f"found {list(weights.shape)}."
            )
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            check_tensor(name, vector, (channels,), u)
    if z is not None:
        check_tensor("z", z, (b, channels, length), u)


def _all_positive(delta: Tensor, bias: Tensor | None) -> bool:
    """Return whether every step is positive; False while compiling, where values must not decide what runs."""
    if torch.compiler.is_compiling():
        return False
    steps = delta if bias is None else delta + bias[:, None]
    return bool((steps > 0).all())


def _before_softplus(delta: Tensor, bias: Tensor | None, work: torch.dtype) -> Tensor:
    """Return what softplus turns into these steps: delta + log(1 - e^-delta)."""
    step = delta.to(work) if bias is None else delta.to(work) + bias.to(work)[:, None]
    return step + torch.log(-torch.expm1(-step))


Steps = tuple[Tensor, Tensor | None, bool]
"""delta, its bias, and whether softplus comes after."""


def _grouped(
    u: Tensor, steps: Steps, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, backend: str
) -> Tensor:
    """Return the scan of every group of channels that shares both B and C, side by side."""
    delta, bias, delta_softplus = steps
    index = _whole_sequences(u.shape[2])
    n_groups = math.lcm(B.shape[1], C.shape[1])
    size = u.shape[1] // n_groups
    outputs = []
    for g in range(n_groups):
        some = slice(g * size, (g + 1) * size)
        u_g, delta_g = (tensor[:, some].mT.contiguous() for tensor in (u, delta))
        B_g, C_g = (weights[:, g * weights.shape[1] // n_groups].mT.contiguous() for weights in (B, C))
        D_g, bias_g = (None if vector is None else vector[some].contiguous() for vector in (D, bias))
        z_g = None if z is None else z[:, some].mT.contiguous()
        A_g = A[some].contiguous()
        outputs.append(shifted_scan(u_g, delta_g, A_g, B_g, C_g, D_g, z_g, bias_g, index, backend, delta_softplus).mT)
    return torch.cat(outputs, dim=1)


def _constant_weights(
    u: Tensor,
    steps: Steps,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    work: torch.dtype,
    backend: str,
) -> Tensor:
    """Return the scan where B or C is constant: one scan per state, because such a weight only scales its state."""
    inputs, y = u.to(work), torch.zeros_like(u, dtype=work)
    ones = inputs.new_ones(u.shape[0], 1, 1, u.shape[2])
    for n in range(A.shape[1]):
        state, scale = [], inputs.new_ones(())
        for weights in (B, C):
            constant = weights.ndim == 2
            state.append(ones if constant else _with_groups(weights)[:, :, n : n + 1])
            scale = scale * weights[:, n, None].to(work) if constant else scale
        y = y + scale * _grouped(inputs, steps, A[:, n : n + 1], state[0], state[1], None, None, backend)
    if D is not None:
        y = y + D.to(work)[:, None] * inputs
    return (y if z is None else y * silu(z.to(work))).to(u.dtype)


def _with_groups(weights: Tensor) -> Tensor:
    return weights.unsqueeze(1) if weights.ndim == 3 else weights


def _whole_sequences(length: int) -> ScanIndex:
    """Return the path of one window that holds every token; those of a few lengths are kept."""
    # Not lru_cache, which torch.compile traces through with a warning.
    if length not in _paths:
        if len(_paths) == _KEPT_PATHS:
            del _paths[next(iter(_paths))]
        _paths[length] = window_index((length,), (length,), (0,))
    return _paths[length]


def _last_state(u: Tensor, steps: Steps, A: Tensor, B: Tensor, work: torch.dtype) -> Tensor:
    """Return sum_t exp(A (delta_t+1 + … + delta_L)) delta_t u_t B_t: no step is scaled up and down again."""
    delta, bias, delta_softplus = steps
    step = delta.to(work) if bias is None else delta.to(work) + bias.to(work)[:, None]
    step = softplus(step) if delta_softplus else step
    after = (step.double().sum(2, keepdim=True) - step.double().cumsum(2)).to(work)
    entering = step * u.to(work)
    if B.ndim > 2:
        B = _with_groups(B).to(work).repeat_interleave(u.shape[1] // _with_groups(B).shape[1], dim=1)
    states = []
    for n in range(A.shape[1]):
        kept = torch.exp(after * A[:, n, None].to(work)) * entering
        states.append((kept * (B[:, :, n] if B.ndim > 2 else B[:, n, None].to(work))).sum(2))
    return torch.stack(states, dim=-1)
