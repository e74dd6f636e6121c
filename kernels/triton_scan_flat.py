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

from boldforge.kernels.triton_scan_parts import (
    first_state,
    load_decay,
    load_step,
    load_weights,
    locate,
    restart,
    skipped,
    store_gated,
    store_state,
    token,
)

LANES = 32
"""Sequences times channels of a program."""


@triton.jit
def _advance(h, y, A, delta, x, B, C, here, N: tl.constexpr, HOLD: tl.constexpr):
    """Return the states after one token and y plus their sum; HOLD keeps those of lanes that are not here."""
    h_next = ()
    for n in tl.static_range(N):
        h_n = tl.exp2(delta * A[n]) * h[n] + x * B[n]
        if HOLD:
            h_n = tl.where(here, h_n, h[n])
        h_next = h_next + (h_n,)
        y += h_n * C[n]
    return h_next, y


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
    BIG: tl.constexpr,
):
    """One program: LANES lanes of (clip, sequence, channel), the channel fastest; as long as its longest sequence.

    The inner loop runs until any lane restarts. A lane whose sequence is over goes on reading its clip's first token
    and writes nothing.
    """
    program = tl.program_id(0).to(tl.int64) if BIG else tl.program_id(0)
    lane = program * LANES + tl.arange(0, LANES)
    channel = lane % n_channels
    number = lane // n_channels
    exists = number < n_sequences * n_clips
    clip = tl.minimum(number // n_sequences, n_clips - 1)
    start = tl.load(cu_ptr + number % n_sequences)
    length = tl.where(exists, tl.load(cu_ptr + number % n_sequences + 1) - start, 0)
    longest = tl.max(length, axis=0)
    first_row = clip.to(tl.int64) * n_tokens
    u_ptr, dt_ptr, z_ptr, y_ptr = locate(
        first_row, u_ptr, u_row, dt_ptr, dt_row, z_ptr, z_row, y_ptr, n_channels, channel
    )
    B_ptr += first_row * B_row
    C_ptr += first_row * C_row
    rows_ptr += start
    A = load_decay(A_ptr, channel, exists, N)
    end = number.to(tl.int64) * N * n_channels + channel
    h = first_state(initial_ptr + end, n_channels, exists, N, HAS_INITIAL)
    t = 0
    code = tl.load(rows_ptr, mask=length > 0, other=0)
    while t < longest:
        h = restart(h, code)
        go_on = True
        while go_on:
            row = token(code, BIG)
            here = t < length
            t += 1
            code = tl.load(rows_ptr + t, mask=t < length, other=0)
            go_on = tl.where(t < longest, tl.min(code, axis=0), -1) >= 0
            u = tl.load(u_ptr + row * u_row).to(tl.float32)
            delta = load_step(dt_ptr + row * dt_row, bias_ptr + channel, HAS_BIAS)
            y = skipped(u, D_ptr + channel, HAS_D)
            B = load_weights(B_ptr + row * B_row, True, N, PACKED)
            C = load_weights(C_ptr + row * C_row, True, N, PACKED)
            h, y = _advance(h, y, A, delta, delta * u, B, C, here, N, HAS_LAST)
            store_gated(y_ptr + row * n_channels, y, z_ptr + row * z_row, here, HAS_Z)
    if HAS_LAST:
        store_state(last_ptr + end, h, n_channels, exists, N)
