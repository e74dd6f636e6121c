"""The public scan and convolution: shapes checked, index brought to the device, then the operator.

Shape suffixes: b clips · L tokens · D inner channels · N states · K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boldforge.kernels import operators
from boldforge.kernels.checks import (
    MAX_TAPS,
    check_clips,
    check_contiguous,
    check_index,
    check_rows,
    check_states,
    check_tensor,
)
from boldforge.kernels.index import ScanIndex


def shifted_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
    backend: str = "auto",
    delta_softplus: bool = True,
    keep_states: bool = False,
) -> Tensor:
    """Return the selective scan of every clip along ``index``, in token order, with gradients.

    delta = softplus(dt + dt_bias); h <- exp(delta A) h + delta u B; y = sum_n C h + D u; y silu(z)
    (Gu and Dao, arXiv 2312.00752). The state starts from zero at every sequence and restart of the index.

    Parameters
    ----------
    u, dt, z : [b, L, D]
        Input, step size before softplus, and gate; ``z`` may be None (no gate). Contiguous, or slices of the last axis
        of a contiguous tensor (as are B and C), because a kernel reads rows where they lie.
    A : [D, N]
        Decay rates, negative; N at most 64.
    B, C : [b, L, N]
        Input and output weights of the states.
    D, dt_bias : [D]
        Skip weight and step-size bias; either may be None (zero).
    index : ScanIndex
        The order of the L tokens; moved to the device of ``u`` if it is elsewhere.
    backend : str
        ``auto`` (triton for CUDA tensors and cpu for CPU tensors where they run, else torch) or a key of
        ``available_backends()``.
    delta_softplus : bool
        False: delta = dt + dt_bias as it is, of any sign; only the torch backend has this, and it runs whatever
        ``backend`` says.
    keep_states : bool
        True: the triton backend keeps the state before every span of four tokens for the backward, N float32 numbers
        per span and channel, instead of computing it again: faster, the same gradients bit for bit. Others ignore it,
        as does ``torch.compile``, and triton itself where N is above 16 or the sequences are long and cut in chunks.

    Returns
    -------
    [b, L, D]
        In the type of ``u``. The state is float32, or float64 where ``u`` is float64 (torch backend).

    Raises
    ------
    ValueError
        If a shape, type, device or memory layout does not fit; names the argument, what was found and what was wanted.
    BackendError
        If the backend cannot run here.
    """
    check_tensor("u", u, ("b", "L", "D"), u)
    check_index(index, "u", u)
    check_clips("u", u, backend)
    b, L, channels = u.shape
    check_tensor("dt", dt, (b, L, channels), u)
    check_tensor("A", A, (channels, "N"), u)
    states = check_states("A", A)
    check_tensor("B", B, (b, L, states), u)
    check_tensor("C", C, (b, L, states), u)
    check_contiguous("A", A)
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check_tensor(name, vector, (channels,), u)
            check_contiguous(name, vector)
    if z is not None:
        check_tensor("z", z, (b, L, channels), u)
    for name, rows in (("u", u), ("dt", dt), ("B", B), ("C", C), ("z", z)):
        if rows is not None:
            check_rows(name, rows)
    index = index.to(u.device)
    if keep_states and delta_softplus and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y, _ = operators.scan_keeping(u, dt, A, B, C, D, z, dt_bias, index.rows, index.cu_seqlens, backend)
        return y
    return operators.scan(u, dt, A, B, C, D, z, dt_bias, index.rows, index.cu_seqlens, backend, delta_softplus)


def shifted_conv(x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex, backend: str = "auto") -> Tensor:
    """Return the causal depthwise convolution of every clip along ``index``, then SiLU, with gradients.

    Parameters
    ----------
    x : [b, L, D]
        Input in token order.
    weight : [D, K]
        ``weight[:, K - 1]`` meets the token itself, ``weight[:, K - 1 - j]`` the one ``j`` places before it in the
        scan; there is nothing (zero) before a restart or the start of a sequence. K at most 16.
    bias : [D] or None
        Added before SiLU.
    index : ScanIndex
        The order of the L tokens; moved to the device of ``x`` if it is elsewhere.
    backend : str
        As for ``shifted_scan``.

    Returns
    -------
    [b, L, D]
        In token order and in the type of ``x``.

    Raises
    ------
    ValueError
        If a shape, type, device or memory layout does not fit; names the argument, what was found and what was wanted.
    BackendError
        If the backend cannot run here.
    """
    check_tensor("x", x, ("b", "L", "D"), x)
    check_index(index, "x", x)
    check_clips("x", x, backend)
    check_rows("x", x)
    check_tensor("weight", weight, (x.shape[2], "K"), x)
    if weight.shape[1] > MAX_TAPS:
        raise ValueError(f"weight must have 1 to {MAX_TAPS} taps (second axis), found {list(weight.shape)}.")
    check_contiguous("weight", weight)
    if bias is not None:
        check_tensor("bias", bias, (x.shape[2],), x)
        check_contiguous("bias", bias)
    index = index.to(x.device)
    return operators.conv(x, weight, bias, index.rows, index.cu_seqlens, backend)
