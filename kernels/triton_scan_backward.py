"""The scan's backward pass in Triton: states kept every few tokens, the ones between computed again in registers.

One lane per channel, as forwards. The gradients of B and C are sums over channels: a product with a matrix of ones adds
them on the tensor cores, each program writes its own share, and torch adds the shares in a fixed order. There are no
atomics, so two runs give the same bits.

Shape suffixes: b clips · L tokens · D inner channels · N states · G channel groups.
"""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005, SIM108

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from boldforge.kernels.index import ScanIndex
from boldforge.kernels.torch_backend import ScanGradients
from boldforge.kernels.triton_scan import keep_states
from boldforge.kernels.triton_scan_parts import (
    by_rows,
    compile_options,
    load_state,
    load_weights,
    packed,
    softplus,
    store_state,
)

STEPS = 4
"""Tokens between kept states; their states live in registers, and eight of them would spill."""

CHANNELS = 32
"""Channels of a program: one per lane of a warp."""


MAX_STATES = 16
"""States of a program."""


@triton.jit
def _stack(v, FIRST: tl.constexpr):
    """Sixteen vectors [CHANNELS] from the FIRST on as one matrix [CHANNELS, 16], without moving anything."""
    a0 = tl.join(v[FIRST + 0], v[FIRST + 8])
    a1 = tl.join(v[FIRST + 4], v[FIRST + 12])
    a2 = tl.join(v[FIRST + 2], v[FIRST + 10])
    a3 = tl.join(v[FIRST + 6], v[FIRST + 14])
    a4 = tl.join(v[FIRST + 1], v[FIRST + 9])
    a5 = tl.join(v[FIRST + 5], v[FIRST + 13])
    a6 = tl.join(v[FIRST + 3], v[FIRST + 11])
    a7 = tl.join(v[FIRST + 7], v[FIRST + 15])
    c0 = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    c1 = tl.join(tl.join(a4, a5), tl.join(a6, a7))
    return tl.reshape(tl.join(c0, c1), [v[FIRST].shape[0], 16])


@triton.jit
def _store_sums(target_ptr, v, exists, N: tl.constexpr, N_PADDED: tl.constexpr, SPLIT: tl.constexpr):
    """Write the sum over channels of each of the N vectors; the sixteen rows of the product are the same."""
    ones = tl.full([16, v[0].shape[0]], 1.0, tl.float32)
    row = tl.arange(0, 16)
    for j in tl.static_range(N_PADDED // 16):
        terms = _stack(v, j * 16)
        if SPLIT:
            # The tensor cores read 11 bits of each factor: the first 11 and what is left of each term make 22.
            upper = (terms.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            sums = tl.dot(ones, terms - upper, tl.dot(ones, upper, input_precision="tf32"), input_precision="tf32")
        else:
            sums = tl.dot(ones, terms, input_precision="tf32")
        n = j * 16 + tl.arange(0, 16)
        # A scalar in a comparison, because the interpreter cannot combine a scalar mask with a vector's.
        mask = (row[:, None] == 0) & (n[None, :] < tl.where(exists, N, 0))
        tl.store(target_ptr + n[None, :] + row[:, None] * 0, sums, mask=mask)


@triton.jit
def scan_backward_kernel(
    dout_ptr,
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
    states_ptr,
    grad_last_ptr,
    du_ptr,
    ddt_ptr,
    dz_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dD_ptr,
    dbias_ptr,
    grad_initial_ptr,
    n_channels,
    n_tokens,
    n_slots,
    dout_row,
    u_row,
    dt_row,
    B_row,
    C_row,
    z_row,
    N: tl.constexpr,
    N_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """One program: one sequence (axis 0), CHANNELS channels (axis 1), one clip (axis 2); back through time."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < n_channels
    clip = tl.program_id(2).to(tl.int64)
    # Clips are told apart in 64 bits once; inside a clip 32 bits are enough and half the work.
    first_row = clip * n_tokens
    n_rows = tl.num_programs(2).to(tl.int64) * n_tokens
    dout_ptr += first_row * dout_row
    u_ptr += first_row * u_row
    dt_ptr += first_row * dt_row
    B_ptr += first_row * B_row
    C_ptr += first_row * C_row
    z_ptr += first_row * z_row
    du_ptr += first_row * n_channels
    ddt_ptr += first_row * n_channels
    dz_ptr += first_row * n_channels
    dB_ptr += (tl.program_id(1) * n_rows + first_row) * N
    dC_ptr += (tl.program_id(1) * n_rows + first_row) * N
    start = tl.load(cu_ptr + tl.program_id(0))
    stop = tl.load(cu_ptr + tl.program_id(0) + 1)
    states_ptr += (clip * n_slots + start // STEPS + tl.program_id(0)) * N * n_channels
    skip = tl.zeros([CHANNELS], tl.float32)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_D:
        skip += tl.load(D_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    A = ()
    dh = ()
    dA = ()
    for n in tl.static_range(N):
        A = A + (tl.load(A_ptr + channel * N + n, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634,)
        dh = dh + (tl.zeros([CHANNELS], tl.float32),)
        dA = dA + (tl.zeros([CHANNELS], tl.float32),)
    share = clip * tl.num_programs(0) + tl.program_id(0)
    if HAS_LAST:
        dh = load_state(grad_last_ptr + share * N * n_channels + channel, n_channels, exists, N)
    dD = tl.zeros([CHANNELS], tl.float32)
    dbias = tl.zeros([CHANNELS], tl.float32)
    n_chunks = tl.cdiv(stop - start, STEPS)
    for done in range(0, n_chunks):
        chunk = n_chunks - 1 - done
        first = start + chunk * STEPS
        h = ()
        for n in tl.static_range(N):
            h = h + (tl.load(states_ptr + (chunk.to(tl.int64) * N + n) * n_channels + channel, mask=exists, other=0.0),)
        history = ()
        us = ()
        steps = ()
        deltas = ()
        for k in tl.static_range(STEPS):
            inside = first + k < stop
            code = tl.load(rows_ptr + first + k, mask=inside, other=0)
            row = code & 0x7FFFFFFF
            cut = tl.where(code < 0, -1.0e30, 0.0)
            here = exists & (first + k + channel * 0 < stop)
            u = tl.load(u_ptr + row * u_row + channel, mask=here, other=0.0).to(tl.float32)
            # After the end the step is softplus(-inf) = 0, which leaves states and gradients as they are.
            step = tl.load(dt_ptr + row * dt_row + channel, mask=here, other=float("-inf")).to(tl.float32) + bias
            delta = softplus(step)
            x = delta * u
            B = load_weights(B_ptr + row * B_row, inside, N, PACKED)
            h_next = ()
            for n in tl.static_range(N):
                h_next = h_next + (tl.exp2(delta * A[n] + cut) * h[n] + x * B[n],)
            h = h_next
            history = history + (h,)
            us = us + (u,)
            steps = steps + (step,)
            deltas = deltas + (delta,)
        for back in tl.static_range(STEPS):
            place = first + (STEPS - 1 - back)
            inside = place < stop
            code = tl.load(rows_ptr + place, mask=inside, other=0)
            row = code & 0x7FFFFFFF
            cut = tl.where(code < 0, -1.0e30, 0.0)
            here = exists & (place + channel * 0 < stop)
            u = us[STEPS - 1 - back]
            step = steps[STEPS - 1 - back]
            delta = deltas[STEPS - 1 - back]
            dout = tl.load(dout_ptr + row * dout_row + channel, mask=here, other=0.0).to(tl.float32)
            dy = dout
            if HAS_Z:
                z = tl.load(z_ptr + row * z_row + channel, mask=here, other=0.0).to(tl.float32)
                gate = 1.0 / (1.0 + tl.exp2(-z * 1.4426950408889634))
                dy = dout * z * gate
            x = delta * u
            y = skip * u
            gB = tl.zeros([CHANNELS], tl.float32)
            pA = tl.zeros([CHANNELS], tl.float32)
            dh_next = ()
            dA_next = ()
            dB = ()
            dC = ()
            B = load_weights(B_ptr + row * B_row, inside, N, PACKED)
            C = load_weights(C_ptr + row * C_row, inside, N, PACKED)
            for n in tl.static_range(N):
                h_n = history[STEPS - 1 - back][n]
                g = dh[n] + dy * C[n]
                y += h_n * C[n]
                dC = dC + (dy * h_n,)
                dB = dB + (g * x,)
                gB += g * B[n]
                passed = tl.exp2(delta * A[n] + cut) * g
                # The decay times the state before this token; keeping that of the first one too would spill.
                if back < STEPS - 1:
                    p = passed * history[STEPS - 2 - back][n]
                else:
                    p = g * (h_n - x * B[n])
                pA += p * A[n]
                dA_next = dA_next + (dA[n] + p * delta,)
                dh_next = dh_next + (passed,)
            for _ in tl.static_range(N_PADDED - N):
                dB = dB + (tl.zeros([CHANNELS], tl.float32),)
                dC = dC + (tl.zeros([CHANNELS], tl.float32),)
            dh = dh_next
            dA = dA_next
            ddt = (pA * 0.6931471805599453 + gB * u) / (1.0 + tl.exp2(-step * 1.4426950408889634))
            dD += dy * u
            dbias += ddt
            target = row * n_channels + channel
            tl.store(du_ptr + target, (dy * skip + gB * delta).to(du_ptr.dtype.element_ty), mask=here)
            tl.store(ddt_ptr + target, ddt.to(ddt_ptr.dtype.element_ty), mask=here)
            if HAS_Z:
                dz = dout * gate * (1.0 + z * (1.0 - gate)) * y
                tl.store(dz_ptr + target, dz.to(dz_ptr.dtype.element_ty), mask=here)
            _store_sums(dB_ptr + row * N, dB, inside, N, N_PADDED, SPLIT)
            _store_sums(dC_ptr + row * N, dC, inside, N, N_PADDED, SPLIT)
    store_state(dA_ptr + share * N * n_channels + channel, dA, n_channels, exists, N)
    if HAS_INITIAL:
        store_state(grad_initial_ptr + share * N * n_channels + channel, dh, n_channels, exists, N)
    tl.store(dD_ptr + share * n_channels + channel, dD, mask=exists)
    tl.store(dbias_ptr + share * n_channels + channel, dbias, mask=exists)


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
) -> ScanGradients:
    """Return the gradient of every argument of ``triton_scan.scan_forward``, each in the type of its argument.

    Every sequence started from ``initial`` (zero where it is None), and ``grad_last`` is the gradient of its last state
    (zero likewise). The gradient of its starting state is written into ``grad_initial`` where that is given. All three
    are float32 [b, sequences, N, D].

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
        ends = [None if end is None else end[:, :, some] for end in (initial, grad_last, grad_initial)]
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
) -> ScanGradients:
    """Run the kernel for at most MAX_STATES states; gradients of u, dt and z in ``kinds``, all others in float32."""
    b, n_tokens, n_channels = u.shape
    n_states = A.shape[1]
    dout, u, dt, B, C = (by_rows(tensor) for tensor in (dout, u, dt, B, C))
    z_rows = u if z is None else by_rows(z)
    states = keep_states(u, dt, A, B, dt_bias, index, STEPS, initial)
    dh = None if grad_initial is None else grad_initial.new_empty(grad_initial.shape)
    groups = triton.cdiv(n_channels, CHANNELS)
    shares = b * index.n_sequences
    du, ddt, dz = (torch.empty(u.shape if kind else 0, dtype=kind, device=u.device) for kind in kinds)
    dA = u.new_empty(shares, n_states, n_channels, dtype=torch.float32)
    dD, dbias = u.new_empty(2, shares, n_channels, dtype=torch.float32)
    dB, dC = u.new_empty(2, groups, b, n_tokens, n_states, dtype=torch.float32)
    scan_backward_kernel[(index.n_sequences, groups, b)](
        dout,
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
        states,
        u if grad_last is None else grad_last.contiguous(),
        du,
        ddt,
        dz,
        dA,
        dB,
        dC,
        dD,
        dbias,
        u if dh is None else dh,
        n_channels,
        n_tokens,
        states.shape[1],
        dout.stride(1),
        u.stride(1),
        dt.stride(1),
        B.stride(1),
        C.stride(1),
        z_rows.stride(1),
        **constants(n_states, u.dtype),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None,
        PACKED=packed(B, C),
        HAS_LAST=grad_last is not None,
        HAS_INITIAL=dh is not None,
        num_warps=1,
        num_stages=1,
        **compile_options(),
    )
    if grad_initial is not None and dh is not None:
        grad_initial.copy_(dh)
    return ScanGradients(
        du,
        ddt,
        dA.sum(0).T,
        dB.sum(0),
        dC.sum(0),
        None if D is None else dD.sum(0),
        None if z is None else dz,
        None if dt_bias is None else dbias.sum(0),
    )


def constants(n_states: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the compile-time arguments that follow from the number of states and the type of the input.

    The tensor cores' 11 bits are enough for the gradients of half-precision inputs; float32 takes two products.
    """
    return {
        "N": n_states,
        "N_PADDED": triton.cdiv(n_states, 16) * 16,
        "CHANNELS": CHANNELS,
        "STEPS": STEPS,
        "SPLIT": dtype == torch.float32,
    }
