"""The public scan and convolution: shapes checked, backend chosen, gradients attached.

Shape suffixes: b clips · L tokens · D inner channels · N states · K taps.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from boldforge.configs import BoldForgeError
from boldforge.kernels import cpu_build, torch_backend
from boldforge.kernels.index import ScanIndex

MAX_STATES = 64
MAX_TAPS = 16


class BackendError(BoldForgeError):
    """The backend that was asked for does not exist or cannot run here."""


class Backend(NamedTuple):
    """The four functions that make a backend; signatures as in ``torch_backend``."""

    scan_forward: Callable[..., Tensor]
    scan_backward: Callable[..., torch_backend.ScanGradients]
    conv_forward: Callable[..., Tensor]
    conv_backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def available_backends() -> dict[str, str]:
    """Return every backend with an empty string if it runs here, else the reason it does not."""
    return {name: why_not() for name, why_not in _WHY_NOT.items()}


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
    return _Scan.apply(u, dt, A, B, C, D, z, dt_bias, index.to(u.device), _choose(backend, u))


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
    return _Conv.apply(x, weight, bias, index.to(x.device), _choose(backend, x))


class _Scan(torch.autograd.Function):
    """Keeps the inputs only; the backward computes states again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, index, backend = args
        ctx.save_for_backward(*tensors)
        ctx.index, ctx.backend = index, backend
        with torch.autocast(tensors[0].device.type, enabled=False):
            return backend.scan_forward(*tensors, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dout.device.type, enabled=False):
            return (*ctx.backend.scan_backward(dout, *ctx.saved_tensors, ctx.index), None, None)


class _Conv(torch.autograd.Function):
    """Keeps the inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex, backend: Backend) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.index, ctx.backend = index, backend
        with torch.autocast(x.device.type, enabled=False):
            return backend.conv_forward(x, weight, bias, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dout.device.type, enabled=False):
            return (*ctx.backend.conv_backward(dout, *ctx.saved_tensors, ctx.index), None, None)


_TORCH = Backend(
    torch_backend.scan_forward, torch_backend.scan_backward, torch_backend.conv_forward, torch_backend.conv_backward
)


def _choose(name: str, tensor: Tensor) -> Backend:
    """Return the backend for tensors like this one."""
    if name == "auto":
        name = _fastest(tensor)
    if name not in _WHY_NOT:
        raise BackendError(f'There is no scan backend named "{name}"; use auto or one of: {_working()}.')
    reason = _WHY_NOT[name]() or _why_not_here(name, tensor)
    if reason:
        raise BackendError(f'The scan backend "{name}" cannot run here: {reason}. Use auto or one of: {_working()}.')
    # Imported only when used: triton and mamba-ssm take a moment to import and are not everywhere.
    if name == "cpu":
        from boldforge.kernels import cpu_backend

        return Backend(
            cpu_backend.scan_forward, cpu_backend.scan_backward, cpu_backend.conv_forward, cpu_backend.conv_backward
        )
    if name == "triton":
        from boldforge.kernels import triton_conv, triton_scan, triton_scan_backward

        return Backend(
            triton_scan.scan_forward,
            triton_scan_backward.scan_backward,
            triton_conv.conv_forward,
            triton_conv.conv_backward,
        )
    if name == "mamba_ssm":
        from boldforge.kernels import mamba_backend

        return _TORCH._replace(scan_forward=mamba_backend.scan_forward, scan_backward=mamba_backend.scan_backward)
    return _TORCH


def _fastest(tensor: Tensor) -> str:
    """Return the name of the backend that ``auto`` stands for; the same for the life of the process."""
    if tensor.dtype != torch.float64:
        if tensor.device.type == "cuda" and not _why_no_triton():
            return "triton"
        if tensor.device.type == "cpu" and not cpu_build.why_not() and not cpu_build.load()[1]:
            return "cpu"
    return "torch"


def _working() -> str:
    return ", ".join(name for name, reason in available_backends().items() if not reason)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str:
    if not _triton_installed():
        return "triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA device was found"
    return ""


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_no_mamba_ssm() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    try:
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError as error:
        return f"mamba-ssm with its compiled CUDA scan does not import ({error})"
    return ""


_WHY_NOT: dict[str, Callable[[], str]] = {
    "torch": lambda: "",
    "cpu": cpu_build.why_not,
    "triton": _why_no_triton,
    "mamba_ssm": _why_no_mamba_ssm,
}


def _why_not_here(name: str, tensor: Tensor) -> str:
    """Return why a backend that works on this machine cannot take tensors like this one."""
    if name == "torch":
        return ""
    if tensor.dtype == torch.float64:
        return "it has no float64, which the torch backend has"
    if name == "cpu":
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device.type}, not on the CPU"
        return cpu_build.load()[1]
    if tensor.device.type != "cuda" and not (name == "triton" and _interpreted()):
        return f"the tensors are on {tensor.device.type}, not on a CUDA device"
    return ""


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
