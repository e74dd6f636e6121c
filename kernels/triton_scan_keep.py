"""The states the scan's backward starts its spans from: kept while the output is made, or computed again without it.

Both ways run the same lines of the same kernel, so the gradients have the same bits.

Shape suffixes: b clips · L tokens · D inner channels · N states.
"""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from boldforge.kernels.index import ScanIndex
from boldforge.kernels.triton_scan_backward_kernel import load_step, load_vector, row_of, sigmoid, zero_unless
from boldforge.kernels.triton_scan_parts import (
    by_rows,
    compile_options,
    load_state,
    load_weights,
    packed,
    softplus,
    store_state,
)
from boldforge.kernels.triton_scan_spans import MOST_IN_32_BITS, spans_of, steps_for

WIDE_CHANNELS, NARROW_CHANNELS = 64, 32
"""Channels of a program: two per lane of a warp share the loads of B and C."""


@triton.jit
def scan_states_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, codes_ptr, cu_ptr, y_ptr, states_ptr, initial_ptr,
    n_channels, n_tokens, n_spans, u_row, dt_row, B_row, C_row, z_row,
    N: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    OUTPUT: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one sequence (axis 0), CHANNELS channels (axis 1), one clip (axis 2)."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < n_channels
    near = tl.minimum(channel, n_channels - 1)
    clip = tl.program_id(2).to(tl.int64)
    # Clips are told apart in 64 bits once; inside a clip 32 bits are enough and half the work.
    first_row = clip * n_tokens
    u_ptr += first_row * u_row
    dt_ptr += first_row * dt_row
    B_ptr += first_row * B_row
    C_ptr += first_row * C_row
    z_ptr += first_row * z_row
    y_ptr += first_row * n_channels
    bias = load_vector(bias_ptr, near, HAS_BIAS)
    A = ()
    h = ()
    for n in tl.static_range(N):
        # exp(delta A) as 2^(delta A log2 e): the hardware's exponential has base 2.
        A = A + (tl.load(A_ptr + near * N + n).to(tl.float32) * 1.4426950408889634,)
        h = h + (tl.zeros([CHANNELS], tl.float32),)
    if HAS_INITIAL:
        end = (clip * tl.num_programs(0) + tl.program_id(0)) * N * n_channels + near
        h = load_state(initial_ptr + end, n_channels, exists, N)
    for span in range(tl.load(cu_ptr + tl.program_id(0)), tl.load(cu_ptr + tl.program_id(0) + 1)):
        code = tl.load(codes_ptr + span * STEPS)
        h = zero_unless(code >= 0, h, N)
        store_state(states_ptr + (clip * n_spans + span) * N * n_channels + near, h, n_channels, exists, N)
        for k in tl.static_range(STEPS):
            if k > 0:
                code = tl.load(codes_ptr + span * STEPS + k)
            row = row_of(code, WIDE)
            u = tl.load(u_ptr + row * u_row + near).to(tl.float32)
            delta = softplus(load_step(dt_ptr + row * dt_row + near, bias, code, k == 0))
            x = delta * u
            B = load_weights(B_ptr + row * B_row, True, N, PACKED)
            h_next = ()
            for n in tl.static_range(N):
                h_next = h_next + (tl.exp2(delta * A[n]) * h[n] + x * B[n],)
            h = h_next
            if OUTPUT:
                C = load_weights(C_ptr + row * C_row, True, N, PACKED)
                y = tl.zeros([CHANNELS], tl.float32)
                for n in tl.static_range(N):
                    y += h[n] * C[n]
                if HAS_D:
                    y += u * tl.load(D_ptr + near).to(tl.float32)
                if HAS_Z:
                    z = tl.load(z_ptr + row * z_row + near).to(tl.float32)
                    y *= z * sigmoid(z)
                present = exists if k == 0 else exists & (code + channel * 0 >= 0)
                tl.store(y_ptr + row * n_channels + near, y.to(y_ptr.dtype.element_ty), mask=present)


def keep_states(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, index: ScanIndex, initial: Tensor | None = None
) -> Tensor:
    """Return the state before every span of ``spans_of``, float32 [b, spans, N, D]; at most sixteen states.

    ``initial`` as in ``triton_scan.scan_forward``.
    """
    return _launch(u, dt, A, B, B, None, None, dt_bias, index, initial, None)


def scan_keeping(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
) -> tuple[Tensor, Tensor]:
    """Return the scan's output and, from the same pass, what ``keep_states`` returns."""
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return y, _launch(u, dt, A, B, C, D, z, dt_bias, index, None, y)


def _launch(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
    initial: Tensor | None,
    y: Tensor | None,
) -> Tensor:
    """Return the states, and fill ``y`` where it is given; what is missing is stood in for and never touched."""
    n_channels, n_states = A.shape
    spans = spans_of(index, steps_for(u.dtype))
    states = torch.empty(len(u), len(spans.rows), n_states, n_channels, dtype=torch.float32, device=u.device)
    u, dt, B, C, z_rows = (by_rows(tensor) for tensor in (u, dt, B, C, u if z is None else z))
    strides = [tensor.stride(1) for tensor in (u, dt, B, C, z_rows)]
    channels = channels_per_program(n_channels, u.dtype)
    scan_states_kernel[(index.n_sequences, triton.cdiv(n_channels, channels), len(u))](
        u,
        dt,
        A.contiguous(),
        B,
        C,
        u if D is None else D.contiguous(),
        z_rows,
        u if dt_bias is None else dt_bias.contiguous(),
        spans.rows,
        spans.cu_spans,
        u if y is None else y,
        states,
        u if initial is None else initial.contiguous(),
        n_channels,
        u.shape[1],
        len(spans.rows),
        *strides,
        N=n_states,
        CHANNELS=channels,
        STEPS=spans.rows.shape[1],
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None,
        HAS_INITIAL=initial is not None,
        OUTPUT=y is not None,
        PACKED=packed(B, C),
        WIDE=u.shape[1] * max(*strides, n_channels) > MOST_IN_32_BITS,
        num_warps=1,
        num_stages=1,
        **compile_options(),
    )
    return states


def channels_per_program(n_channels: int, dtype: torch.dtype) -> int:
    """Return the channels of a program: those that leave the fewest lanes idle, and many rather than few.

    In float32 there is no unpacking of B and C to share, and many would spill.
    """
    if dtype == torch.float32:
        return NARROW_CHANNELS
    idle = {channels: -n_channels % channels for channels in (WIDE_CHANNELS, NARROW_CHANNELS)}
    return min(idle, key=lambda channels: idle[channels])
