"""The scan's forward pass in Triton: one lane per channel, all states in registers, token order through the index.

Compiled for CUDA tensors; with TRITON_INTERPRET=1 in the environment before triton is imported it runs on the CPU, for
tests.

Shape suffixes: b clips · L tokens · D inner channels · N states.
"""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from boldforge.kernels.index import ScanIndex
from boldforge.kernels.triton_scan_flat import LANES, scan_forward_flat_kernel
from boldforge.kernels.triton_scan_parts import (
    by_rows,
    compile_options,
    load_state,
    load_weights,
    packed,
    softplus,
    store_state,
)

# Two channels per lane of one warp share the loads of B and C; with more than 16 states that would spill registers.
WIDE_CHANNELS, NARROW_CHANNELS, WIDE_STATES = 64, 32, 16


@triton.jit
def scan_forward_kernel(
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
    states_ptr,
    initial_ptr,
    last_ptr,
    n_channels,
    n_tokens,
    u_row,
    dt_row,
    B_row,
    C_row,
    z_row,
    n_slots,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr,
):
    """One program: one sequence (axis 0), CHANNELS channels (axis 1), one clip (axis 2); sequential in time.

    With KEEP > 0 there is no output but the state before every KEEP-th token of the sequence, for the backward pass.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < n_channels
    # Clips are told apart in 64 bits once; inside a clip 32 bits are enough and half the work.
    first_row = tl.program_id(2).to(tl.int64) * n_tokens
    u_ptr += first_row * u_row
    dt_ptr += first_row * dt_row
    B_ptr += first_row * B_row
    C_ptr += first_row * C_row
    z_ptr += first_row * z_row
    y_ptr += first_row * n_channels
    start = tl.load(cu_ptr + tl.program_id(0))
    stop = tl.load(cu_ptr + tl.program_id(0) + 1)
    A = ()
    h = ()
    for n in tl.static_range(N):
        # exp(delta A) as 2^(delta A log2 e): the hardware's exponential has base 2.
        A = A + (tl.load(A_ptr + channel * N + n, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634,)
        h = h + (tl.zeros([CHANNELS], tl.float32),)
    end = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * N * n_channels + channel
    if HAS_INITIAL:
        h = load_state(initial_ptr + end, n_channels, exists, N)
    if KEEP > 0:
        slot = tl.program_id(2).to(tl.int64) * n_slots + start // KEEP + tl.program_id(0)
    for place in range(start, stop):
        if KEEP > 0:
            if (place - start) % KEEP == 0:
                for n in tl.static_range(N):
                    tl.store(states_ptr + (slot * N + n) * n_channels + channel, h[n], mask=exists)
                slot += 1
        code = tl.load(rows_ptr + place)
        row = code & 0x7FFFFFFF
        # A restart as an exponent: 2^-1e30 is zero, and the addition fuses into the multiplication.
        cut = tl.where(code < 0, -1.0e30, 0.0)
        u = tl.load(u_ptr + row * u_row + channel, mask=exists, other=0.0).to(tl.float32)
        delta = tl.load(dt_ptr + row * dt_row + channel, mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            delta += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        delta = softplus(delta)
        x = delta * u
        y = tl.zeros([CHANNELS], tl.float32)
        h_next = ()
        B = load_weights(B_ptr + row * B_row, True, N, PACKED)
        if KEEP == 0:
            C = load_weights(C_ptr + row * C_row, True, N, PACKED)
        for n in tl.static_range(N):
            h_n = tl.exp2(delta * A[n] + cut) * h[n] + x * B[n]
            h_next = h_next + (h_n,)
            if KEEP == 0:
                y += h_n * C[n]
        h = h_next
        if KEEP == 0:
            if HAS_D:
                y += u * tl.load(D_ptr + channel, mask=exists, other=0.0).to(tl.float32)
            if HAS_Z:
                z = tl.load(z_ptr + row * z_row + channel, mask=exists, other=0.0).to(tl.float32)
                y = y * z / (1.0 + tl.exp2(-z * 1.4426950408889634))
            tl.store(y_ptr + row * n_channels + channel, y.to(y_ptr.dtype.element_ty), mask=exists)
    if HAS_LAST:
        store_state(last_ptr + end, h, n_channels, exists, N)


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
    initial: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Return the selective scan along ``index``; shapes and formula as in ``scan_oracle``, state in float32.

    All tensors are on one CUDA device (any device in the interpreter) and the shapes have been checked. Every sequence
    starts from ``initial``, float32 [b, sequences, N, D] (zero where it is None); its last state is written into
    ``last``, of the same shape, where that is given.
    """
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    _launch(u, dt, A, B, C, D, z, dt_bias, index, y, None, 0, initial, last)
    return y


def keep_states(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    index: ScanIndex,
    every: int,
    initial: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Return the state before every ``every``-th token of every sequence, float32 [b, slots, N, D].

    Sequence ``i`` of a clip begins at slot ``cu_seqlens[i] // every + i``; slots between sequences stay unwritten.
    ``initial`` and ``last`` as in ``scan_forward``.
    """
    slots = index.n_tokens // every + index.n_sequences
    states = torch.empty(len(u), slots, A.shape[1], len(A), dtype=torch.float32, device=u.device)
    _launch(u, dt, A, B, B, None, None, dt_bias, index, None, states, every, initial, last)
    return states


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
    y: Tensor | None,
    states: Tensor | None,
    every: int,
    initial: Tensor | None,
    last: Tensor | None,
) -> None:
    """Run the kernel that fits, for its output or for its states; what is missing is stood in for and never touched."""
    n_channels, n_states = A.shape
    channels = channels_per_program(n_states)
    u, dt, B, C = (by_rows(tensor) for tensor in (u, dt, B, C))
    z_rows = u if z is None else by_rows(z)
    D_or_u, bias_or_u = (u if vector is None else vector.contiguous() for vector in (D, dt_bias))
    read = (u, dt, A.contiguous(), B, C, D_or_u, z_rows, bias_or_u, index.rows, index.cu_seqlens)
    ends = (u if initial is None else initial.contiguous(), u if last is None else last)
    strides = (u.stride(1), dt.stride(1), B.stride(1), C.stride(1), z_rows.stride(1))
    options = {
        "N": n_states,
        "HAS_D": D is not None,
        "HAS_Z": z is not None,
        "HAS_BIAS": dt_bias is not None,
        "PACKED": packed(B, C),
        "HAS_INITIAL": initial is not None,
        "HAS_LAST": last is not None,
        "num_warps": 1,
        "num_stages": 1,
        **compile_options(),
    }
    if y is not None and n_states <= WIDE_STATES and n_channels % WIDE_CHANNELS:
        programs = triton.cdiv(len(u) * index.n_sequences * n_channels, LANES)
        sizes = (index.n_sequences, len(u), n_channels, u.shape[1])
        scan_forward_flat_kernel[(programs,)](*read, y, *ends, *sizes, *strides, LANES=LANES, **options)
        return
    scan_forward_kernel[(index.n_sequences, triton.cdiv(n_channels, channels), len(u))](
        *read,
        u if y is None else y,
        u if states is None else states,
        *ends,
        n_channels,
        u.shape[1],
        *strides,
        0 if states is None else states.shape[1],
        CHANNELS=channels,
        KEEP=every,
        **options,
    )


def channels_per_program(n_states: int) -> int:
    """Return how many channels one program holds, so that its states stay in registers."""
    return WIDE_CHANNELS if n_states <= WIDE_STATES else NARROW_CHANNELS
