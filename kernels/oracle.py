"""The scan and the convolution as plain loops over time in float64: slow, obvious, the judge of every backend.

Shape suffixes: b clips · L tokens · D inner channels · N states · K taps.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from boldforge.kernels.index import ScanIndex


def scan_oracle(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
    delta_softplus: bool = True,
) -> Tensor:
    """Return the selective scan along ``index``, in float64, differentiable by autograd.

    Per channel: delta = softplus(dt + dt_bias); h <- exp(delta A) h + delta u B; y = sum_n C h + D u; y silu(z)
    (Gu and Dao, arXiv 2312.00752, algorithm 2, with the zero-order hold for A and Euler's step for B).

    Parameters
    ----------
    u, dt, z : [b, L, D]
        Input, step size before softplus, gate; ``z`` may be None (no gate).
    A : [D, N]
        Decay rates, negative.
    B, C : [b, L, N]
        Input and output weights of the states.
    D, dt_bias : [D]
        Skip weight and step-size bias; either may be None (zero).
    index : ScanIndex
        The order of the L tokens.
    delta_softplus : bool
        False: delta = dt + dt_bias, of any sign.

    Returns
    -------
    float64 [b, L, D]
        In token order.
    """
    u, dt, A, B, C = (tensor.double() for tensor in (u, dt, A, B, C))
    step = dt if dt_bias is None else dt + dt_bias.double()
    # softplus as log(e^step + e^0), whose derivative is right at zero too.
    delta = torch.logaddexp(step, torch.zeros_like(step)) if delta_softplus else step
    outputs: list[Tensor] = [torch.empty(0)] * index.n_tokens
    edges = index.cu_seqlens.tolist()
    for start, stop in pairwise(edges):
        h = u.new_zeros(u.shape[0], *A.shape)
        for place in range(start, stop):
            row = int(index.rows[place])
            token = row & 0x7FFFFFFF
            if row < 0:
                h = torch.zeros_like(h)
            decay = torch.exp(delta[:, token, :, None] * A)
            h = decay * h + (delta[:, token] * u[:, token])[:, :, None] * B[:, token, None, :]
            outputs[token] = (h * C[:, token, None, :]).sum(-1)
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + u * D.double()
    return y if z is None else y * z.double() * torch.sigmoid(z.double())


def conv_oracle(x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex) -> Tensor:
    """Return the causal depthwise convolution along ``index`` followed by SiLU, in float64.

    Parameters
    ----------
    x : [b, L, D]
        Input in token order.
    weight : [D, K]
        ``weight[:, K - 1]`` meets the token itself, ``weight[:, K - 1 - j]`` the one ``j`` places before it in the
        scan; places before a restart or the start of a sequence count as zero.
    bias : [D] or None
        Added before SiLU.
    index : ScanIndex
        The order of the L tokens.

    Returns
    -------
    float64 [b, L, D]
        In token order.
    """
    x, weight = x.double(), weight.double()
    outputs: list[Tensor] = [torch.empty(0)] * index.n_tokens
    edges = index.cu_seqlens.tolist()
    for start, stop in pairwise(edges):
        past: list[Tensor] = []
        for place in range(start, stop):
            row = int(index.rows[place])
            token = row & 0x7FFFFFFF
            past = [x[:, token]] if row < 0 else [x[:, token], *past]
            total = torch.zeros_like(x[:, token]) if bias is None else bias.double().expand_as(x[:, token])
            for back, value in enumerate(past[: weight.shape[1]]):
                total = total + weight[:, weight.shape[1] - 1 - back] * value
            outputs[token] = total * torch.sigmoid(total)
    return torch.stack(outputs, dim=1)
