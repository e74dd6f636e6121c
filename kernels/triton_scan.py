"""The scan's forward pass in Triton: one lane per channel, all states in registers, token order through the index.

Compiled for CUDA tensors; with TRITON_INTERPRET=1 in the environment before triton is imported it runs on the CPU, for
tests.

Shape suffixes: b clips · L tokens · D inner channels · N states.
"""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

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
    first_state,
    load_decay,
    load_step,
    locate,
    packed,
    restart,
    skipped,
    spread,
    store_gated,
    store_state,
    token,
)

# Two channels per lane of one warp share what is per token; with more than 16 states that would spill registers.
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
    initial_ptr,
    last_ptr,
    n_channels,
    n_tokens,
    u_row,
    dt_row,
    B_row,
    C_row,
    z_row,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr,
    BIG: tl.constexpr,
):
    """One program: one sequence (axis 0), CHANNELS channels (axis 1), one clip (axis 2); sequential in time.

    The inner loop runs to the next restart, so a restart costs nothing elsewhere. Weights are read GROUP states at a
    time. Inside a clip 32 bits address every element unless it is BIG.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < n_channels
    first_row = tl.program_id(2).to(tl.int64) * n_tokens
    u_ptr, dt_ptr, z_ptr, y_ptr = locate(
        first_row, u_ptr, u_row, dt_ptr, dt_row, z_ptr, z_row, y_ptr, n_channels, channel
    )
    # One lane, one weight of B or C.
    lane = tl.arange(0, 2 * GROUP)
    weight_row = tl.where(lane < GROUP, B_row, C_row)
    weight_ptr = tl.where(lane < GROUP, B_ptr, C_ptr) + first_row * weight_row + lane % GROUP
    A = load_decay(A_ptr, channel, exists, N)
    end = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * N * n_channels + channel
    h = first_state(initial_ptr + end, n_channels, exists, N, HAS_INITIAL)
    place = tl.load(cu_ptr + tl.program_id(0))
    stop = tl.load(cu_ptr + tl.program_id(0) + 1)
    code = tl.load(rows_ptr + place, mask=place < stop, other=0)
    while place < stop:
        h = restart(h, code)
        go_on = True
        while go_on:
            row = token(code, BIG)
            place += 1
            code = tl.load(rows_ptr + place, mask=place < stop, other=-1)
            go_on = code >= 0
            u = tl.load(u_ptr + row * u_row).to(tl.float32)
            delta = load_step(dt_ptr + row * dt_row, bias_ptr + channel, HAS_BIAS)
            x = delta * u
            y = skipped(u, D_ptr + channel, HAS_D)
            h_next = ()
            for first in tl.static_range(0, N, GROUP):
                inside = first + lane % GROUP < N
                weights = spread(tl.load(weight_ptr + row * weight_row + first, mask=inside, other=0.0).to(tl.float32))
                for n in tl.static_range(first, min(first + GROUP, N)):
                    h_n = tl.exp2(delta * A[n]) * h[n] + x * weights[n - first]
                    h_next = h_next + (h_n,)
                    y += h_n * weights[GROUP + n - first]
            h = h_next
            store_gated(y_ptr + row * n_channels, y, z_ptr + row * z_row, None, HAS_Z)
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
    n_channels, n_states = A.shape
    channels = channels_per_program(n_states)
    flat = n_channels % channels != 0
    u, dt, B, C = (by_rows(tensor) for tensor in (u, dt, B, C))
    if B.dtype != C.dtype:
        B, C = B.float(), C.float()
    if flat and not packed(B, C):
        # Every lane reads them; two copies cost less than reading them piece by piece.
        B, C = B.clone(memory_format=torch.contiguous_format), C.clone(memory_format=torch.contiguous_format)
    z_rows = u if z is None else by_rows(z)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    D_or_u, bias_or_u = (u if vector is None else vector.contiguous() for vector in (D, dt_bias))
    strides = (u.stride(1), dt.stride(1), B.stride(1), C.stride(1), z_rows.stride(1))
    arguments = (u, dt, A.contiguous(), B, C, D_or_u, z_rows, bias_or_u, index.rows, index.cu_seqlens, y)
    ends = (u if initial is None else initial.contiguous(), u if last is None else last)
    given = {"HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None}
    # Flat lanes are rounded up to whole programs, which must not step over 2^31 either.
    lanes = len(u) * index.n_sequences * n_channels + 1024
    largest = max(u.shape[1] * max(*strides, n_channels), lanes)
    options = given | _options(initial, last, largest)
    if flat:
        programs = triton.cdiv(len(u) * index.n_sequences * n_channels, LANES)
        sizes = (index.n_sequences, len(u), n_channels, u.shape[1])
        options |= {"N": n_states, "LANES": LANES, "PACKED": packed(B, C)}
        scan_forward_flat_kernel[(programs,)](*arguments, *ends, *sizes, *strides, **options)
    else:
        grid = (index.n_sequences, n_channels // channels, len(u))
        sizes = (n_channels, u.shape[1])
        scan_forward_kernel[grid](*arguments, *ends, *sizes, *strides, **constants(n_states), **options)
    return y


def _options(initial: Tensor | None, last: Tensor | None, largest: int) -> dict[str, bool | int]:
    """Return what all the forward kernels are told in the same way; ``largest`` bounds what they count."""
    return {
        "HAS_INITIAL": initial is not None,
        "HAS_LAST": last is not None,
        "BIG": largest >= 2**31,
        "num_warps": 1,
        "num_stages": 1,
        **compile_options(),
    }


def channels_per_program(n_states: int) -> int:
    """Return how many channels one program holds, so that its states stay in registers."""
    return WIDE_CHANNELS if n_states <= WIDE_STATES else NARROW_CHANNELS


def constants(n_states: int) -> dict[str, int]:
    """Return the compile-time arguments of a program of channels that follow from the number of states."""
    group = min(triton.next_power_of_2(n_states), WIDE_STATES)
    return {"N": n_states, "CHANNELS": channels_per_program(n_states), "GROUP": group}
