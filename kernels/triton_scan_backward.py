"""The scan's backward pass in Triton: states kept every few tokens, the ones between computed again in registers.

One lane per channel, as forwards. The gradients of B and C are sums over channels: the tensor cores add them, each
program writes its own share, and torch adds the shares in a fixed order. There are no atomics: two runs give the same
bits.

Shape suffixes: b clips · L tokens · D inner channels · N states · G channel groups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from boldforge.kernels.index import ScanIndex
from boldforge.kernels.torch_backend import ScanGradients
from boldforge.kernels.triton_scan_backward_kernel import scan_backward_kernel
from boldforge.kernels.triton_scan_keep import keep_states
from boldforge.kernels.triton_scan_parts import by_rows, compile_options, packed
from boldforge.kernels.triton_scan_spans import MOST_IN_32_BITS, spans_of, steps_for

CHANNELS = 32
"""Channels of a program: one per lane of a warp."""

MAX_STATES = 16
"""States of a program."""


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
    initial: Tensor | None = None,
    grad_last: Tensor | None = None,
    grad_initial: Tensor | None = None,
    states: Tensor | None = None,
) -> ScanGradients:
    """Return the gradient of every argument of ``triton_scan.scan_forward``, each in the type of its argument.

    Every sequence started from ``initial`` (zero where it is None), and ``grad_last`` is the gradient of its last state
    (zero likewise). The gradient of its starting state is written into ``grad_initial`` where that is given. All three
    are float32 [b, sequences, N, D]. ``states`` are those that ``keep_states`` found, computed again where it is None.

    More than sixteen states do not fit into a program's registers. Every gradient is a sum over states, so they are
    taken sixteen at a time, and only the first time has the skip.
    """
    arguments = (u, dt, A, B, C, D, z, dt_bias)
    several = A.shape[1] > MAX_STATES
    kinds = [torch.float32 if several and t is not None else getattr(t, "dtype", None) for t in (u, dt, z)]
    found: list[ScanGradients] = []
    for first in range(0, A.shape[1], MAX_STATES):
        some = slice(first, first + MAX_STATES)
        skip = None if first else D
        ends = [None if end is None else end[:, :, some] for end in (initial, grad_last, grad_initial, states)]
        found.append(
            _backward(dout, u, dt, A[:, some], B[..., some], C[..., some], skip, z, dt_bias, index, kinds, *ends)
        )
    if several:
        found = [ScanGradients(*map(_join, ScanGradients._fields, zip(*found, strict=True)))]
    return ScanGradients(
        *(
            None if argument is None or gradient is None else gradient.to(argument.dtype)
            for argument, gradient in zip(arguments, found[0], strict=True)
        )  # type: ignore[arg-type]
    )


def _join(name: str, parts: tuple[Tensor | None, ...]) -> Any:
    """Return one gradient from those for sixteen states each: side by side where it has a state axis, else the sum."""
    given = [part for part in parts if part is not None]
    if name in ("A", "B", "C"):
        return torch.cat(given, dim=-1)
    return torch.stack(given).sum(0) if given else None


def _backward(
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
    kinds: list[torch.dtype | None],
    initial: Tensor | None,
    grad_last: Tensor | None,
    grad_initial: Tensor | None,
    states: Tensor | None,
) -> ScanGradients:
    """Run the kernel for at most MAX_STATES states; gradients of u, dt and z in ``kinds``, all others in float32."""
    b, n_tokens, n_channels = u.shape
    n_states = A.shape[1]
    if states is None:
        states = keep_states(u, dt, A, B, dt_bias, index, initial)
    spans = spans_of(index, steps_for(u.dtype))
    dout, u, dt = (tensor.contiguous() for tensor in (dout, u, dt))
    B, C, z_rows = (by_rows(tensor) for tensor in (B, C, u if z is None else z))
    dh = None if grad_initial is None else grad_initial.new_empty(grad_initial.shape)
    groups = triton.cdiv(n_channels, CHANNELS)
    shares = b * index.n_sequences
    du, ddt, dz = (torch.empty(u.shape if kind else 0, dtype=kind, device=u.device) for kind in kinds)
    dA = u.new_empty(shares, n_states, n_channels, dtype=torch.float32)
    dD, dbias = u.new_empty(2, shares, n_channels, dtype=torch.float32)
    dBC = u.new_empty(groups, b, n_tokens, 2, n_states, dtype=torch.float32)
    rows = b * n_tokens
    largest = max(states.numel(), dA.numel(), dBC.numel(), *(rows * tensor.stride(1) for tensor in (u, B, C, z_rows)))
    given = [u if vector is None else vector.contiguous() for vector in (D, dt_bias, grad_last)]
    scan_backward_kernel[(index.n_sequences, groups, b)](
        *(dout, u, dt, A.contiguous(), B, C, given[0], z_rows, given[1]),
        *(spans.rows, spans.cu_spans, states.contiguous(), given[2]),
        *(du, ddt, dz, dA, dBC, dD, dbias, u if dh is None else dh),
        *(n_channels, n_tokens, len(spans.rows), B.stride(1), C.stride(1), z_rows.stride(1)),
        **constants(n_states, u.dtype),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None,
        HAS_LAST=grad_last is not None,
        HAS_INITIAL=dh is not None,
        PACKED=packed(B, C),
        WIDE=largest > MOST_IN_32_BITS,
        num_warps=1,
        num_stages=1,
        **compile_options(),
    )
    if grad_initial is not None and dh is not None:
        grad_initial.copy_(dh)
    dB, dC = dBC.sum(0).unbind(2)
    return ScanGradients(
        du,
        ddt,
        dA.sum(0).T,
        dB,
        dC,
        None if D is None else dD.sum(0),
        None if z is None else dz,
        None if dt_bias is None else dbias.sum(0),
    )


def constants(n_states: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the compile-time arguments that follow from the number of states and the type of the input.

    The tensor cores' 11 bits are enough for the gradients of half-precision inputs; float32 takes two products.
    """
    return {"N": n_states, "CHANNELS": CHANNELS, "STEPS": steps_for(dtype), "SPLIT": dtype == torch.float32}
