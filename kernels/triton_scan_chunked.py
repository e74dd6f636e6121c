"""The scan of few long sequences in Triton: cut into chunks that run side by side, in three passes.

One lane per channel leaves a device idle where a batch has one sequence of 81,920 tokens. The scan is linear in its
state, so (1) every chunk runs from zero and leaves its last state E and the sum of its steps; (2) the carry
H <- exp(A sum(delta)) H + E goes from chunk to chunk; (3) the usual kernel takes the chunks as sequences that start
from H. Backwards the gradient of the state takes the same way in reverse. A restart inside a chunk stops the carry.

This is what the ``triton`` backend calls; all but few long sequences go straight to the usual kernels.

Shape suffixes: b clips · L tokens · D inner channels · N states.
"""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005, SIM108

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from boldforge.kernels import triton_scan, triton_scan_backward, triton_scan_keep
from boldforge.kernels.index import ScanIndex
from boldforge.kernels.index_balance import long_first
from boldforge.kernels.torch_backend import ScanGradients
from boldforge.kernels.triton_scan_parts import (
    by_rows,
    compile_options,
    load_weights,
    packed,
    softplus,
    store_state,
    token,
)

# The rule is of shapes only, so that a result does not depend on the device: an H100 has 132 multiprocessors of 512
# lanes that compute at once. Below a quarter of that, cutting pays for the pass that it adds.
DEVICE_LANES = 1 << 16
MOST_LANES = DEVICE_LANES // 4
LEAST_LENGTH = 2048
# A step of the carry takes about as long as a token, so shorter chunks than these would wait for the carry.
LEAST_CHUNK, MOST_CHUNK = 128, 1024

CARRY_LANES = 32
CARRY_STEPS = 8
"""Chunks whose states are loaded at once; one by one, each would wait for memory."""


@triton.jit
def scan_ends_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    z_ptr,
    bias_ptr,
    rows_ptr,
    cu_ptr,
    ends_ptr,
    total_ptr,
    n_channels,
    n_tokens,
    x_row,
    dt_row,
    B_row,
    z_row,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    BIG: tl.constexpr,
):
    """One program: one chunk (axis 0), CHANNELS channels (axis 1), one clip (axis 2); sequential in time from zero.

    Forwards, x is u: the last state, and the sum of the steps. In reverse, x is the gradient of the output and C takes
    the place of B: what the chunk adds to the gradient of the state before it.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < n_channels
    clip = tl.program_id(2).to(tl.int64)
    x_ptr += clip * n_tokens * x_row
    dt_ptr += clip * n_tokens * dt_row
    B_ptr += clip * n_tokens * B_row
    z_ptr += clip * n_tokens * z_row
    start = tl.load(cu_ptr + tl.program_id(0))
    stop = tl.load(cu_ptr + tl.program_id(0) + 1)
    A = ()
    h = ()
    for n in tl.static_range(N):
        A = A + (tl.load(A_ptr + channel * N + n, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634,)
        h = h + (tl.zeros([CHANNELS], tl.float32),)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    for done in range(0, stop - start):
        if REVERSE:
            place = stop - 1 - done
        else:
            place = start + done
        code = tl.load(rows_ptr + place)
        row = token(code, BIG)
        # A restart as an exponent: 2^-1e30 is zero, and the addition fuses into the multiplication.
        cut = tl.where(code < 0, -1.0e30, 0.0)
        x = tl.load(x_ptr + row * x_row + channel, mask=exists, other=0.0).to(tl.float32)
        delta = softplus(tl.load(dt_ptr + row * dt_row + channel, mask=exists, other=0.0).to(tl.float32) + bias)
        if HAS_Z:
            z = tl.load(z_ptr + row * z_row + channel, mask=exists, other=0.0).to(tl.float32)
            x = x * z / (1.0 + tl.exp2(-z * 1.4426950408889634))
        B = load_weights(B_ptr + row * B_row, True, N, PACKED)
        h_next = ()
        for n in tl.static_range(N):
            decay = tl.exp2(delta * A[n] + cut)
            if REVERSE:
                h_next = h_next + (decay * (h[n] + x * B[n]),)
            else:
                h_next = h_next + (decay * h[n] + delta * x * B[n],)
        h = h_next
        total += delta
    chunk = clip * tl.num_programs(0) + tl.program_id(0)
    store_state(ends_ptr + chunk * N * n_channels + channel, h, n_channels, exists, N)
    if not REVERSE:
        tl.store(total_ptr + chunk * n_channels + channel, total, mask=exists)


@triton.jit
def carry_kernel(
    ends_ptr,
    total_ptr,
    A_ptr,
    cut_ptr,
    first_ptr,
    n_channels,
    n_chunks,
    N: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One program: one sequence (axis 0), LANES of its N D states (axis 1), one clip (axis 2); chunk after chunk.

    In place: every chunk's last state becomes the state it starts from (in reverse: what it adds to the gradient of
    the state before it becomes the gradient of its last state).
    """
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    exists = lane < N * n_channels
    channel = lane % n_channels
    A = tl.load(A_ptr + channel * N + lane // n_channels, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634
    first_chunk = tl.program_id(2).to(tl.int64) * n_chunks
    ends_ptr += first_chunk * N * n_channels + lane
    total_ptr += first_chunk * n_channels + channel
    first = tl.load(first_ptr + tl.program_id(0))
    stop = tl.load(first_ptr + tl.program_id(0) + 1)
    carry = tl.zeros([LANES], tl.float32)
    for run in range(0, tl.cdiv(stop - first, STEPS)):
        ends = ()
        decays = ()
        for k in tl.static_range(STEPS):
            step = run * STEPS + k
            if REVERSE:
                chunk = stop - 1 - step
            else:
                chunk = first + step
            # A scalar in a comparison, because the interpreter cannot combine a scalar mask with a vector's.
            here = exists & (step + lane * 0 < stop - first)
            cut = tl.load(cut_ptr + chunk, mask=step < stop - first, other=0)
            total = tl.load(total_ptr + chunk.to(tl.int64) * n_channels, mask=here, other=0.0)
            ends = ends + (tl.load(ends_ptr + chunk.to(tl.int64) * N * n_channels, mask=here, other=0.0),)
            decays = decays + (tl.exp2(A * total + tl.where(cut != 0, -1.0e30, 0.0)),)
        for k in tl.static_range(STEPS):
            step = run * STEPS + k
            if REVERSE:
                chunk = stop - 1 - step
            else:
                chunk = first + step
            here = exists & (step + lane * 0 < stop - first)
            tl.store(ends_ptr + chunk.to(tl.int64) * N * n_channels, carry, mask=here)
            carry = decays[k] * carry + ends[k]


@dataclass(frozen=True, eq=False)
class Chunks:
    """An index whose sequences are cut into chunks.

    Parameters
    ----------
    index : ScanIndex
        The same rows with a sequence for every chunk.
    first : int32 [sequences + 1]
        The first chunk of every sequence.
    cut : int32 [chunks]
        Not zero where the state restarts inside the chunk, so that nothing passes through.
    """

    index: ScanIndex
    first: Tensor
    cut: Tensor


def chunks_of(index: ScanIndex, length: int) -> Chunks:
    """Return every sequence cut into chunks of ``length`` places (the last may be shorter); kept on the index."""
    return index.cached(("chunks", length), lambda: _make_chunks(index, length))


def _make_chunks(index: ScanIndex, length: int) -> Chunks:
    device = index.rows.device
    edges = index.cu_seqlens.cpu().long()
    each = (edges.diff() + length - 1) // length
    first = torch.nn.functional.pad(each.cumsum(0), (1, 0))
    number = torch.arange(int(first[-1])) - torch.repeat_interleave(first[:-1], each)
    starts = torch.repeat_interleave(edges[:-1], each) + number * length
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=index.n_tokens)
    restarts = torch.nn.functional.pad((index.rows.cpu() < 0).cumsum(0), (1, 0))
    cut = (restarts[cu_seqlens[1:]] - restarts[cu_seqlens[:-1]]).to(torch.int32)
    finer = ScanIndex(index.rows, cu_seqlens.to(device, torch.int32), index.n_tokens)
    return Chunks(finer, first.to(device, torch.int32), cut.to(device))


def chunk_length(index: ScanIndex, b: int, n_channels: int) -> int:
    """Return how many places a chunk has for these shapes, 0 where the sequences are not cut.

    They are cut where there are at most MOST_LANES channels over all sequences and clips, and one sequence has at least
    LEAST_LENGTH tokens; into chunks that would fill the device, a power of two between LEAST_CHUNK and MOST_CHUNK.
    """
    if b * index.n_sequences * n_channels > MOST_LANES or index.longest < LEAST_LENGTH:
        return 0
    filling = max(1, b * index.n_tokens * n_channels // DEVICE_LANES)
    return min(MOST_CHUNK, max(LEAST_CHUNK, 1 << (filling.bit_length() - 1)))


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
    chunk: int | None = None,
) -> Tensor:
    """Return the selective scan along ``index``; shapes and formula as in ``scan_oracle``, state in float32.

    ``chunk`` is the number of places of a chunk, 0 for whole sequences; ``chunk_length`` decides unless it is given.
    """
    index = long_first(index)
    chunk = chunk_length(index, len(u), len(A)) if chunk is None else chunk
    if not chunk:
        return triton_scan.scan_forward(u, dt, A, B, C, D, z, dt_bias, index)
    chunks = chunks_of(index, chunk)
    initial, _ = _states_before(u, dt, A, B, dt_bias, chunks)
    return triton_scan.scan_forward(u, dt, A, B, C, D, z, dt_bias, chunks.index, initial=initial)


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
    """Return the scan and the states for its backward; none (an empty tensor) where it computes them itself."""
    if A.shape[1] > triton_scan_backward.MAX_STATES or chunk_length(index, len(u), len(A)):
        none = u.new_empty(len(u), 0, *A.T.shape, dtype=torch.float32)
        return scan_forward(u, dt, A, B, C, D, z, dt_bias, index), none
    return triton_scan_keep.scan_keeping(u, dt, A, B, C, D, z, dt_bias, long_first(index))


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
    chunk: int | None = None,
    states: Tensor | None = None,
) -> ScanGradients:
    """Return the gradient of every argument of ``scan_forward``, each in the type of its argument.

    ``states`` are those of ``scan_keeping``.
    """
    index = long_first(index)
    chunk = chunk_length(index, len(u), len(A)) if chunk is None else chunk
    if not chunk:
        return triton_scan_backward.scan_backward(dout, u, dt, A, B, C, D, z, dt_bias, index, states=states)
    chunks = chunks_of(index, chunk)
    initial, total = _states_before(u, dt, A, B, dt_bias, chunks)
    grad_last = _chunk_ends(dout, dt, A, C, z, dt_bias, chunks.index, None)
    _carry(grad_last, total, A, chunks, reverse=True)
    return triton_scan_backward.scan_backward(
        dout, u, dt, A, B, C, D, z, dt_bias, chunks.index, initial=initial, grad_last=grad_last
    )


def _states_before(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Return the state before every chunk, float32 [b, chunks, N, D], and the sum of its steps [b, chunks, D]."""
    total = u.new_empty(len(u), chunks.index.n_sequences, len(A), dtype=torch.float32)
    ends = _chunk_ends(u, dt, A, B, None, dt_bias, chunks.index, total)
    _carry(ends, total, A, chunks, reverse=False)
    return ends, total


def _chunk_ends(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    weight: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
    total: Tensor | None,
) -> Tensor:
    """Run every chunk from zero, forwards where there is a ``total`` to fill, else in reverse; [b, chunks, N, D]."""
    n_channels, n_states = A.shape
    channels = triton_scan.channels_per_program(n_states)
    x, dt, weight = (by_rows(tensor) for tensor in (x, dt, weight))
    z_rows = x if z is None else by_rows(z)
    ends = x.new_empty(len(x), index.n_sequences, n_states, n_channels, dtype=torch.float32)
    scan_ends_kernel[(index.n_sequences, triton.cdiv(n_channels, channels), len(x))](
        x,
        dt,
        A.contiguous(),
        weight,
        z_rows,
        x if dt_bias is None else dt_bias.contiguous(),
        index.rows,
        index.cu_seqlens,
        ends,
        ends if total is None else total,
        n_channels,
        x.shape[1],
        x.stride(1),
        dt.stride(1),
        weight.stride(1),
        z_rows.stride(1),
        N=n_states,
        CHANNELS=channels,
        HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None,
        PACKED=packed(weight),
        REVERSE=total is None,
        BIG=x.shape[1] * max(tensor.stride(1) for tensor in (x, dt, weight, z_rows)) >= 2**31,
        num_warps=1,
        num_stages=1,
        **compile_options(),
    )
    return ends


def _carry(ends: Tensor, total: Tensor, A: Tensor, chunks: Chunks, reverse: bool) -> None:
    """Turn what the chunks end with, run from zero, into what they start from (in reverse: what comes back to them)."""
    b, n_chunks, n_states, n_channels = ends.shape
    carry_kernel[(len(chunks.first) - 1, triton.cdiv(n_states * n_channels, CARRY_LANES), b)](
        ends,
        total,
        A.contiguous(),
        chunks.cut,
        chunks.first,
        n_channels,
        n_chunks,
        N=n_states,
        LANES=CARRY_LANES,
        STEPS=CARRY_STEPS,
        REVERSE=reverse,
        num_warps=1,
        num_stages=1,
        **compile_options(),
    )
