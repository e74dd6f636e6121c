"""The scan's forward pass for widths that are no multiple of a program's: lanes run over sequences and channels alike.

A program of 64 channels would leave 56 of 128 lanes idle at 72 channels. Here every lane but the last few has work; the
price is that neighbouring lanes may belong to different sequences, so each reads B and C for itself.

Shape suffixes: b clips · L tokens · D inner channels · N states.
"""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from boldforge.kernels.triton_scan_parts import load_state, load_weights, softplus, store_state

LANES = 32
"""Sequences times channels of a program."""


@triton.jit
def scan_forward_flat_kernel(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    rows_ptr,
    cu_ptr,
    y_ptr,
    initial_ptr,
    last_ptr,
    n_sequences,
    n_clips,
    n_channels,
    n_tokens,
    u_row,
    dt_row,
    B_row,
    C_row,
    z_row,
    N: tl.constexpr,
    LANES: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr,
):
    """One program: LANES lanes of (clip, sequence, channel), the channel fastest; as long as its longest sequence."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    channel = lane % n_channels
    number = lane // n_channels
    clip = number // n_sequences
    exists = clip < n_clips
    start = tl.load(cu_ptr + number % n_sequences)
    length = tl.where(exists, tl.load(cu_ptr + number % n_sequences + 1) - start, 0)
    first_row = clip.to(tl.int64) * n_tokens
    u_ptr += first_row * u_row + channel
    dt_ptr += first_row * dt_row + channel
    B_ptr += first_row * B_row
    C_ptr += first_row * C_row
    z_ptr += first_row * z_row + channel
    y_ptr += first_row * n_channels + channel
    rows_ptr += start
    A = ()
    h = ()
    for n in tl.static_range(N):
        A = A + (tl.load(A_ptr + channel * N + n).to(tl.float32) * 1.4426950408889634,)
        h = h + (tl.zeros([LANES], tl.float32),)
    end = number.to(tl.int64) * N * n_channels + channel
    if HAS_INITIAL:
        h = load_state(initial_ptr + end, n_channels, exists, N)
    for t in range(0, tl.max(length, axis=0)):
        here = t < length
        code = tl.load(rows_ptr + t, mask=here, other=0)
        row = code & 0x7FFFFFFF
        cut = tl.where(code < 0, -1.0e30, 0.0)
        u = tl.load(u_ptr + row * u_row, mask=here, other=0.0).to(tl.float32)
        # After the end of a lane's sequence the step is softplus(-inf) = 0, which leaves its state as it is.
        delta = tl.load(dt_ptr + row * dt_row, mask=here, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            delta += tl.load(bias_ptr + channel).to(tl.float32)
        delta = softplus(delta)
        x = delta * u
        y = tl.zeros([LANES], tl.float32)
        B = load_weights(B_ptr + row * B_row, here, N, PACKED)
        C = load_weights(C_ptr + row * C_row, here, N, PACKED)
        h_next = ()
        for n in tl.static_range(N):
            h_n = tl.exp2(delta * A[n] + cut) * h[n] + x * B[n]
            h_next = h_next + (h_n,)
            y += h_n * C[n]
        h = h_next
        if HAS_D:
            y += u * tl.load(D_ptr + channel).to(tl.float32)
        if HAS_Z:
            z = tl.load(z_ptr + row * z_row, mask=here, other=0.0).to(tl.float32)
            y = y * z / (1.0 + tl.exp2(-z * 1.4426950408889634))
        tl.store(y_ptr + row * n_channels, y.to(y_ptr.dtype.element_ty), mask=here)
    if HAS_LAST:
        store_state(last_ptr + end, h, n_channels, exists, N)
