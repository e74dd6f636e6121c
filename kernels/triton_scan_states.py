"""The states along the scan, kept every few tokens for the backward pass; no output.

Shape suffixes: b clips · L tokens · D inner channels · N states.
"""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from boldforge.kernels.triton_scan_parts import first_state, load_decay, restart, softplus, spread, store_state


@triton.jit
def scan_states_kernel(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    rows_ptr,
    cu_ptr,
    states_ptr,
    initial_ptr,
    last_ptr,
    n_channels,
    n_tokens,
    n_slots,
    u_row,
    dt_row,
    B_row,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr,
    BIG: tl.constexpr,
):
    """As ``scan_forward_kernel``, but what is written is the state before every KEEP-th token of the sequence."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < n_channels
    first_row = tl.program_id(2).to(tl.int64) * n_tokens
    u_ptr += first_row * u_row + channel
    dt_ptr += first_row * dt_row + channel
    lane = tl.arange(0, GROUP)
    B_ptr += first_row * B_row
    A = load_decay(A_ptr, channel, exists, N)
    end = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * N * n_channels + channel
    h = first_state(initial_ptr + end, n_channels, exists, N, HAS_INITIAL)
    start = tl.load(cu_ptr + tl.program_id(0))
    stop = tl.load(cu_ptr + tl.program_id(0) + 1)
    slot = tl.program_id(2).to(tl.int64) * n_slots + start // KEEP + tl.program_id(0)
    for place in range(start, stop):
        code = tl.load(rows_ptr + place)
        row = code & 0x7FFFFFFF
        if BIG:
            row = row.to(tl.int64)
        h = restart(h, code)
        if (place - start) % KEEP == 0:
            store_state(states_ptr + slot * N * n_channels + channel, h, n_channels, exists, N)
            slot += 1
        u = tl.load(u_ptr + row * u_row, mask=exists, other=0.0).to(tl.float32)
        delta = tl.load(dt_ptr + row * dt_row, mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            delta += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        delta = softplus(delta)
        x = delta * u
        h_next = ()
        for first in tl.static_range(0, N, GROUP):
            B = spread(tl.load(B_ptr + row * B_row + first + lane, mask=first + lane < N, other=0.0).to(tl.float32))
            for n in tl.static_range(first, min(first + GROUP, N)):
                h_next = h_next + (tl.exp2(delta * A[n]) * h[n] + x * B[n - first],)
        h = h_next
    if HAS_LAST:
        store_state(last_ptr + end, h, n_channels, exists, N)
