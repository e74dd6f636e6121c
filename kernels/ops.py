"""The public scan and convolution: shapes checked, index brought to the device, then the operator.

Shape suffixes: b clips · L tokens · D inner channels · N states · K taps.
"""

from __future__ import annotations

from torch import Tensor

from boldforge.kernels import operators
from boldforge.kernels.index import ScanIndex

MAX_STATES = 64
MAX_TAPS = 16


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
) -> Tensor:
    """Return the selective scan of every clip along ``index``, in token order, with gradients.

    delta = softplus(dt + dt_bias); h <- exp(delta A) h + delta u B; y = sum_n C h + D u; y silu(z)
    (Gu and Dao, arXiv 2312.00752). The state starts from zero at every sequence and restart of the index.

    Parameters
    ----------
    u, dt, z : [b, L, D]
        Input, step size before softplus, and gate; ``z`` may be None (no gate).
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

    Returns
    -------
    [b, L, D]
        In the type of ``u``. The state is float32, or float64 where ``u`` is float64 (torch backend).

    Raises
    ------
    ValueError
        If a shape, type or device does not fit; names the argument, what was found and what was wanted.
    BackendError
        If the backend cannot run here.
    """
    _check("u", u, (None, index.n_tokens, None), u)
    b, L, channels = u.shape
    _check("dt", dt, (b, L, channels), u)
    _check("A", A, (channels, None), u)
    states = A.shape[1]
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"A must have 1 to {MAX_STATES} states (second axis), found {list(A.shape)}.")
    _check("B", B, (b, L, states), u)
    _check("C", C, (b, L, states), u)
    for name, tensor, shape in (("D", D, (channels,)), ("z", z, (b, L, channels)), ("dt_bias", dt_bias, (channels,))):
        if tensor is not None:
            _check(name, tensor, shape, u)
    index = index.to(u.device)
    return operators.scan(u, dt, A, B, C, D, z, dt_bias, index.rows, index.cu_seqlens, backend)


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
        If a shape, type or device does not fit; names the argument, what was found and what was wanted.
    BackendError
        If the backend cannot run here.
    """
    _check("x", x, (None, index.n_tokens, None), x)
    _check("weight", weight, (x.shape[2], None), x)
    if not 1 <= weight.shape[1] <= MAX_TAPS:
        raise ValueError(f"weight must have 1 to {MAX_TAPS} taps (second axis), found {list(weight.shape)}.")
    if bias is not None:
        _check("bias", bias, (x.shape[2],), x)
    index = index.to(x.device)
    return operators.conv(x, weight, bias, index.rows, index.cu_seqlens, backend)


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Raise ValueError unless the tensor is floating, on the device of ``like`` and of this shape (None: any size)."""
    fits = tensor.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or 0 in tensor.shape:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], found {list(tensor.shape)}.")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, found {tensor.dtype}.")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the first argument, found {tensor.device}.")
