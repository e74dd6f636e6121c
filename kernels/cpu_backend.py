"""The scan and the convolution on the CPU through the C++ of ``kernels/cpu``; float32 state, no float64.

Shape suffixes: b clips · L tokens · D inner channels · N states · K taps.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from boldforge.kernels import cpu_build
from boldforge.kernels.index import ScanIndex
from boldforge.kernels.index_balance import even_tasks
from boldforge.kernels.torch_backend import ScanGradients

# Neighbouring sequences make a task and neighbouring channels a group; a task times a group is what one thread takes at
# a time. Both numbers follow from the shapes alone, so the number of threads changes no bit. Each task writes its share
# of the gradients of A, D and the bias, each group its share of those of B and C.
_MAX_TASKS = 128
_GROUP_CHANNELS = 96
# Few long sequences make few tasks; smaller groups, down to the 16 channels of a vector, then occupy the threads.
_LEAST_PROGRAMS, _LEAST_GROUP_CHANNELS = 4, 16
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Rows(ctypes.Structure):
    """A matrix in memory, as ``Rows`` in lanes.h."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("type", ctypes.c_int32))


def _fields(rows: str, pointers: str, numbers: str) -> tuple[tuple[str, type], ...]:
    kinds = ((rows, _Rows), (pointers, ctypes.c_void_p), (numbers, ctypes.c_int64))
    return tuple((name, kind) for names, kind in kinds for name in names.split())


class _ScanCall(ctypes.Structure):
    """The arguments of the scan, as ``Scan`` in scan.h."""

    _fields_ = _fields(
        "u dt B C z out du ddt dz",
        "A D bias dA dD dbias dB dC rows edges tasks",
        "n_tasks n_groups n_sequences n_tokens n_clips n_channels n_states",
    )


class _ConvCall(ctypes.Structure):
    """The arguments of the convolution, as ``Conv`` in conv.cpp."""

    _fields_ = _fields(
        "x out dx",
        "weight bias dweight dbias rows edges tasks",
        "n_tasks n_sequences n_tokens n_channels n_taps",
    )


def scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
) -> Tensor:
    """Return the selective scan along ``index``; shapes and formula as in ``scan_oracle``, state in float32."""
    y = torch.empty(u.shape, dtype=_stored(u), device="cpu")
    tensors = _scan_tensors(u, dt, A, B, C, D, z, dt_bias, index) | {"out": y}
    _call("boldforge_scan_forward", _ScanCall, tensors, _scan_sizes(tensors, index))
    return y.to(u.dtype)


def scan_backward(
    dout: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
) -> ScanGradients:
    """Return the gradient of every argument of ``scan_forward``, each in the type of its argument."""
    tensors = _scan_tensors(u, dt, A, B, C, D, z, dt_bias, index) | {"out": _by_rows(dout)}
    sizes = _scan_sizes(tensors, index)
    n_channels, n_states = A.shape
    found = {f"d{name}": _like(tensor) for name, tensor in (("u", u), ("dt", dt), ("z", z)) if tensor is not None}
    found["dA"] = torch.empty(sizes["n_tasks"], n_states, n_channels)
    found |= {name: torch.empty(sizes["n_tasks"], n_channels) for name in ("dD", "dbias")}
    found |= {name: torch.empty(sizes["n_groups"], *B.shape) for name in ("dB", "dC")}
    _call("boldforge_scan_backward", _ScanCall, {**tensors, **found}, sizes)
    return ScanGradients(
        found["du"].to(u.dtype),
        found["ddt"].to(dt.dtype),
        found["dA"].sum(0).T.to(A.dtype),
        found["dB"].sum(0).to(B.dtype),
        found["dC"].sum(0).to(C.dtype),
        None if D is None else found["dD"].sum(0).to(D.dtype),
        None if z is None else found["dz"].to(z.dtype),
        None if dt_bias is None else found["dbias"].sum(0).to(dt_bias.dtype),
    )


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex) -> Tensor:
    """Return the causal depthwise convolution along ``index``, then SiLU; shapes as in ``conv_oracle``."""
    y = _like(x)
    tensors = _conv_tensors(x, weight, bias, index) | {"out": y}
    _call("boldforge_conv_forward", _ConvCall, tensors, _conv_sizes(x, weight, tensors, index))
    return y.to(x.dtype)


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``x``, ``weight`` and ``bias`` (None where there is none), each in its type."""
    tensors = _conv_tensors(x, weight, bias, index) | {"out": _by_rows(dout)}
    sizes = _conv_sizes(x, weight, tensors, index)
    dx = _like(x)
    dweight = torch.empty(sizes["n_tasks"], *weight.T.shape)
    dbias = torch.empty(sizes["n_tasks"], len(weight))
    _call("boldforge_conv_backward", _ConvCall, tensors | {"dx": dx, "dweight": dweight, "dbias": dbias}, sizes)
    return (
        dx.to(x.dtype),
        dweight.sum(0).T.to(weight.dtype),
        None if bias is None else dbias.sum(0).to(bias.dtype),
    )


def _scan_tensors(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
) -> dict[str, Tensor | None]:
    """Return what both passes read, in the layout that the library wants."""
    return {
        "u": _by_rows(u),
        "dt": _by_rows(dt),
        "B": _by_rows(B),
        "C": _by_rows(C),
        "z": None if z is None else _by_rows(z),
        "A": (A.float() * math.log2(math.e)).T.contiguous(),
        "D": _vector(D),
        "bias": _vector(dt_bias),
        **_path(index, len(u)),
    }


def _conv_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex) -> dict[str, Tensor | None]:
    weight_KD = weight.float().T.contiguous()
    return {"x": _by_rows(x), "weight": weight_KD, "bias": _vector(bias), **_path(index, len(x))}


def _path(index: ScanIndex, b: int) -> dict[str, Tensor]:
    return {
        "rows": index.rows,
        "edges": index.cu_seqlens,
        "tasks": index.cached(("cpu tasks", b), lambda: even_tasks(index, b, _MAX_TASKS)),
    }


def _scan_sizes(tensors: dict[str, Tensor | None], index: ScanIndex) -> dict[str, int]:
    u, A, tasks = (tensors[name] for name in ("u", "A", "tasks"))
    assert u is not None and A is not None and tasks is not None
    return {
        "n_tasks": len(tasks) - 1,
        "n_groups": _n_groups(len(tasks) - 1, A.shape[1]),
        "n_sequences": index.n_sequences,
        "n_tokens": index.n_tokens,
        "n_clips": len(u),
        "n_channels": A.shape[1],
        "n_states": A.shape[0],
    }


def _n_groups(n_tasks: int, n_channels: int) -> int:
    usual, most = (-(-n_channels // size) for size in (_GROUP_CHANNELS, _LEAST_GROUP_CHANNELS))
    return min(most, max(usual, -(-_LEAST_PROGRAMS // n_tasks)))


def _conv_sizes(x: Tensor, weight: Tensor, tensors: dict[str, Tensor | None], index: ScanIndex) -> dict[str, int]:
    tasks = tensors["tasks"]
    assert tasks is not None
    return {
        "n_tasks": len(tasks) - 1,
        "n_sequences": index.n_sequences,
        "n_tokens": index.n_tokens,
        "n_channels": x.shape[2],
        "n_taps": weight.shape[1],
    }


def _call(
    function: str, kind: type[ctypes.Structure], tensors: Mapping[str, Tensor | None], sizes: dict[str, int]
) -> None:
    """Run one function of the library; ctypes lets other Python threads run meanwhile."""
    library, reason = cpu_build.load()
    assert library is not None, reason
    call = kind(**sizes)
    kinds = dict(kind._fields_)  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if kinds[name] is _Rows:
            setattr(call, name, _Rows(tensor.data_ptr(), tensor.stride(-2), _TYPES[tensor.dtype]))
        else:
            setattr(call, name, tensor.data_ptr())
    getattr(library, function)(ctypes.byref(call))


def _stored(tensor: Tensor) -> torch.dtype:
    """Return the type the library reads or writes this tensor in."""
    return tensor.dtype if tensor.dtype in _TYPES else torch.float32


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=_stored(tensor))


def _by_rows(tensor: Tensor) -> Tensor:
    """Return the tensor itself where row r of clip c starts at (c L + r) times one stride, so views need no copy."""
    tensor = tensor.to(_stored(tensor))
    regular = tensor.stride(2) == 1 and (len(tensor) == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1))
    return tensor if regular else tensor.contiguous()


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
