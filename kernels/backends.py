"""Which backend runs: what there is, why one cannot run here, and what ``auto`` stands for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from boldforge.configs import BoldForgeError
from boldforge.kernels import cpu_build, torch_backend


class BackendError(BoldForgeError):
    """The backend that was asked for does not exist or cannot run here."""


class Backend(NamedTuple):
    """The functions that make a backend; signatures as in ``torch_backend``.

    ``scan_keeping``, where there is one, returns the scan and a tensor for the backward's argument ``states``.
    """

    scan_forward: Callable[..., Tensor]
    scan_backward: Callable[..., torch_backend.ScanGradients]
    conv_forward: Callable[..., Tensor]
    conv_backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    scan_keeping: Callable[..., tuple[Tensor, Tensor]] | None = None


def available_backends() -> dict[str, str]:
    """Return every backend with an empty string if it runs here, else the reason it does not."""
    return {name: why_not() for name, why_not in _WHY_NOT.items()}


TORCH = Backend(
    torch_backend.scan_forward, torch_backend.scan_backward, torch_backend.conv_forward, torch_backend.conv_backward
)


def choose(name: str, tensor: Tensor) -> Backend:
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
        from boldforge.kernels import triton_conv, triton_scan_chunked

        return Backend(
            triton_scan_chunked.scan_forward,
            triton_scan_chunked.scan_backward,
            triton_conv.conv_forward,
            triton_conv.conv_backward,
            triton_scan_chunked.scan_keeping,
        )
    if name == "mamba_ssm":
        from boldforge.kernels import mamba_backend

        return TORCH._replace(scan_forward=mamba_backend.scan_forward, scan_backward=mamba_backend.scan_backward)
    return TORCH


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
