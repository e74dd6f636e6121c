"""mamba-ssm's function over ours: the same signature and layout, on any device.

Shape suffixes: B batch · D channels · L tokens · N states · G groups of channels that share B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from boldforge.kernels.index import ScanIndex, window_index
from boldforge.kernels.ops import shifted_scan

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
        Input, step size and gate; ``z`` may be None (no gate).
    A : [D, N]
        Decay rates, real and negative.
    B, C : [B, N, L] or [B, G, N, L]
        Input and output weights of the states, for all channels or for each of G groups of neighbouring channels.
    D, delta_bias : [D]
        Skip weight and step-size bias; either may be None (zero).
    delta_softplus : bool
        Whether the step size, bias added, goes through softplus. Without it every step must be positive.
    return_last_state : bool
        Also return the state after the last token.
    backend : str
        As for ``shifted_scan``.

    Returns
    -------
    [B, D, L], or that and float32 [B, D, N]
        The output in the type of ``u``, and the last state if it was asked for.

    Raises
    ------
    ValueError
        If a shape or type does not fit, if B or C do not vary along the sequence, or if a step that is not sent
        through softplus is not positive.
    BackendError
        If the backend cannot run here.
    """
    for name, weights in (("B", B), ("C", C)):
        if weights.ndim not in (3, 4):
            raise ValueError(f"{name} must have shape [B, N, L] or [B, G, N, L], found {list(weights.shape)}.")
    if A.is_complex():
        raise ValueError(f"A must be real, found {A.dtype}.")
    B, C = (weights.unsqueeze(1) if weights.ndim == 3 else weights for weights in (B, C))
    groups = B.shape[1]
    if C.shape[1] != groups or u.shape[1] % groups:
        raise ValueError(
            f"B and C must have the same number of groups, and it must divide the {u.shape[1]} channels of u; "
            f"found {groups} and {C.shape[1]}."
        )
    if not delta_softplus:
        delta, delta_bias = _before_softplus(delta, delta_bias), None
    index = _whole_sequences(u.shape[2])
    outputs, states = [], []
    for g, channels in enumerate(torch.arange(u.shape[1]).chunk(groups)):
        some = slice(int(channels[0]), int(channels[-1]) + 1)
        D_g, bias_g = (None if vector is None else vector[some] for vector in (D, delta_bias))
        z_g = None if z is None else z[:, some].mT
        u_g, delta_g, A_g, B_g, C_g = u[:, some].mT, delta[:, some].mT, A[some], B[:, g].mT, C[:, g].mT
        outputs.append(shifted_scan(u_g, delta_g, A_g, B_g, C_g, D_g, z_g, bias_g, index, backend).mT)
        if return_last_state:
            states.append(_last_state(u_g, delta_g, A_g, B_g, bias_g))
    y = torch.cat(outputs, dim=1)
    return (y, torch.cat(states, dim=1)) if return_last_state else y


def _whole_sequences(length: int) -> ScanIndex:
    """Return the path of one window that holds every token, made once per length."""
    if length not in _paths:
        _paths[length] = window_index((length,), (length,), (0,))
    return _paths[length]


def _before_softplus(delta: Tensor, bias: Tensor | None) -> Tensor:
    """Return what softplus turns into these steps: delta + log(1 - e^-delta)."""
    step = delta.float() if bias is None else delta.float() + bias.float()[:, None]
    if not bool((step > 0).all()):
        raise ValueError("delta must be positive at every token unless delta_softplus is True; found zero or less.")
    return step + torch.log(-torch.expm1(-step))


def _last_state(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Return sum_t exp(A (delta_t+1 + … + delta_L)) delta_t u_t B_t; no term grows, so nothing overflows."""
    step = softplus(delta.float() if bias is None else delta.float() + bias.float())
    after = step.flip(1).cumsum(1).flip(1) - step
    entering = step * u.float()
    return torch.stack(
        [(torch.exp(after * A.float()[:, n]) * entering * B.float()[:, :, n, None]).sum(1) for n in range(A.shape[1])],
        dim=-1,
    )
