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

# Two channels per lane of one warp share the loads of B and C; with more than 16 states that would spill registers.
WIDE_CHANNELS, NARROW_CHANNELS, WIDE_STATES = 64, 32, 16


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e^-|x|), with log1p(v) = 2 atanh(v / (2 + v)): seven terms reach 2e-8 for v in [0, 1]."""
    v = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    s = v / (2.0 + v)
    s2 = s * s
    series = 1.0 / 11.0 + s2 * (1.0 / 13.0)
    series = 1.0 / 9.0 + s2 * series
    series = 1.0 / 7.0 + s2 * series
    series = 1.0 / 5.0 + s2 * series
    series = 1.0 / 3.0 + s2 * series
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + s2 * series)


@triton.jit
def load_weights(row_ptr, inside, N: tl.constexpr, PACKED: tl.constexpr):
    """The N weights of a token as scalars in float32; packed, one 64-bit load brings two or four of them."""
    out = ()
    kind: tl.constexpr = row_ptr.dtype.element_ty
    if PACKED:
        per_word: tl.constexpr = 64 // kind.primitive_bitwidth
        for j in tl.static_range(N // per_word):
            word = tl.load(row_ptr.to(tl.pointer_type(tl.int64)) + j, mask=inside, other=0)
            for i in tl.static_range(per_word):
                if per_word == 2:
                    out = out + ((word >> (32 * i)).to(tl.int32).to(tl.float32, bitcast=True),)
                elif kind == tl.bfloat16:
                    # A bfloat16 is the upper half of a float32.
                    out = out + (((word >> (16 * i)).to(tl.int32) << 16).to(tl.float32, bitcast=True),)
                else:
                    out = out + ((word >> (16 * i)).to(tl.int16).to(kind, bitcast=True).to(tl.float32),)
    else:
        for n in tl.static_range(N):
            out = out + (tl.load(row_ptr + n, mask=inside, other=0.0).to(tl.float32),)
    return out


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
        delta = _softplus(delta)
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
    """Return the selective scan along ``index``; shapes and formula as in ``scan_oracle``, state in float32.

    All tensors are on one CUDA device (any device in the interpreter) and the shapes have been checked.
    """
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    _launch(u, dt, A, B, C, D, z, dt_bias, index, y, None, 0)
    return y


def keep_states(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, index: ScanIndex, every: int
) -> Tensor:
    """Return the state before every ``every``-th token of every sequence, float32 [b, slots, N, D].

    Sequence ``i`` of a clip begins at slot ``cu_seqlens[i] // every + i``; slots between sequences stay unwritten.
    """
    slots = index.n_tokens // every + index.n_sequences
    states = torch.empty(len(u), slots, A.shape[1], len(A), dtype=torch.float32, device=u.device)
    _launch(u, dt, A, B, B, None, None, dt_bias, index, None, states, every)
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
) -> None:
    """Run the kernel for its output, or for its states; a tensor that is missing is stood in for and never touched."""
    n_channels, n_states = A.shape
    channels = channels_per_program(n_states)
    u, dt, B, C = (by_rows(tensor) for tensor in (u, dt, B, C))
    z_rows = u if z is None else by_rows(z)
    scan_forward_kernel[(index.n_sequences, triton.cdiv(n_channels, channels), len(u))](
        u,
        dt,
        A.contiguous(),
        B,
        C,
        u if D is None else D.contiguous(),
        z_rows,
        u if dt_bias is None else dt_bias.contiguous(),
        index.rows,
        index.cu_seqlens,
        u if y is None else y,
        u if states is None else states,
        n_channels,
        u.shape[1],
        u.stride(1),
        dt.stride(1),
        B.stride(1),
        C.stride(1),
        z_rows.stride(1),
        0 if states is None else states.shape[1],
        N=n_states,
        CHANNELS=channels,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None,
        PACKED=packed(B, C),
        KEEP=every,
        num_warps=1,
        num_stages=1,
        **compile_options(),
    )


def channels_per_program(n_states: int) -> int:
    """Return how many channels one program holds, so that its states stay in registers."""
    return WIDE_CHANNELS if n_states <= WIDE_STATES else NARROW_CHANNELS


def packed(*weights: Tensor) -> bool:
    """Return whether every row of these [b, L, N] tensors consists of whole, aligned 64-bit words."""
    return all(
        bytes_ % 8 == 0
        for tensor in weights
        for bytes_ in (
            tensor.shape[2] * tensor.element_size(),
            tensor.stride(1) * tensor.element_size(),
            tensor.data_ptr(),
        )
    )


def compile_options() -> dict[str, bool]:
    """Return the options every kernel is compiled with.

    Fused multiply-add is asked for by name, because some versions of Triton leave it out unless told, which costs a
    third of the speed.
    """
    return {"enable_fp_fusion": True}


def by_rows(tensor: Tensor) -> Tensor:
    """Return the tensor itself where row r of clip c starts at (c L + r) times one stride, so views need no copy."""
    regular = tensor.stride(2) == 1 and (len(tensor) == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1))
    return tensor if regular else tensor.contiguous()
