"""The kernel of the scan's backward pass: one lane per channel, back through the spans of a sequence.

Shape suffixes: b clips · L tokens · D inner channels · N states.
"""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, misc"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from boldforge.kernels.triton_scan_backward_parts import pickers, store_channel_sums
from boldforge.kernels.triton_scan_parts import (
    first_state,
    load_decay,
    load_state,
    load_weights,
    reciprocal,
    softplus,
    store_state,
)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return reciprocal(1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def load_codes(first_ptr, STEPS: tl.constexpr):
    """Return the codes of a span."""
    codes = ()
    for k in tl.static_range(STEPS):
        codes = codes + (tl.load(first_ptr + k),)
    return codes


@triton.jit
def widened(number, WIDE: tl.constexpr):
    """Return the number in 64 bits where addresses are WIDE."""
    if WIDE:
        number = number.to(tl.int64)
    return number


@triton.jit
def row_of(code, WIDE: tl.constexpr):
    """Return the token that a code of the spans names."""
    return widened(code & 0x7FFFFFFF, WIDE)


@triton.jit
def load_step(dt_ptr, bias, code, FIRST: tl.constexpr):
    """Return the step size before softplus; after the end of a span softplus(-inf) = 0 leaves everything as it is."""
    step = tl.load(dt_ptr).to(tl.float32) + bias
    if FIRST:
        return step
    return tl.where(code < 0, float("-inf"), step)


@triton.jit
def load_vector(vector_ptr, channel, GIVEN: tl.constexpr):
    """Return one number per channel, or zeros where there is no such vector."""
    out = tl.zeros(channel.shape, tl.float32)
    if GIVEN:
        out += tl.load(vector_ptr + channel).to(tl.float32)
    return out


@triton.jit
def zero_unless(condition, v, N: tl.constexpr):
    """Return the N vectors, or zeros where the condition does not hold."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tl.where(condition, v[n], 0.0),)
    return out


@triton.jit
def store_as(target_ptr, value, mask):
    """Store a value in the target's type."""
    tl.store(target_ptr, value.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def before_gate(dout, z_ptr, HAS_Z: tl.constexpr):
    """Return the gradient before the gate, the gate's input and its sigmoid."""
    if HAS_Z:
        z = tl.load(z_ptr).to(tl.float32)
        gate = sigmoid(z)
        return dout * (z * gate), z, gate
    return dout, dout, dout


@triton.jit
def states_again(
    h, A, bias, codes, u_ptr, dt_ptr, B_ptr, n_channels, B_row,
    N: tl.constexpr, STEPS: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the state after every token of a span, from that before it, and every token's input and step size."""
    history = ()
    us = ()
    steps = ()
    deltas = ()
    for k in tl.static_range(STEPS):
        row = row_of(codes[k], WIDE)
        u = tl.load(u_ptr + row * n_channels).to(tl.float32)
        step = load_step(dt_ptr + row * n_channels, bias, codes[k], k == 0)
        delta = softplus(step)
        x = delta * u
        B = load_weights(B_ptr + row * B_row, True, N, PACKED)
        h_next = ()
        for n in tl.static_range(N):
            h_next = h_next + (tl.exp2(delta * A[n]) * h[n] + x * B[n],)
        h = h_next
        history = history + (h,)
        us = us + (u,)
        steps = steps + (step,)
        deltas = deltas + (delta,)
    return history, us, steps, deltas


@triton.jit
def back_one_token(
    dh, dA, A, h, before, dy, delta, x, B, C, N: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """Carry the state's gradient over one token; ``before`` is the state before it, not used for a FIRST."""
    y = tl.zeros_like(dy)
    gB = tl.zeros_like(dy)
    pA = tl.zeros_like(dy)
    dh_next = ()
    dA_next = ()
    dB = ()
    dC = ()
    for n in tl.static_range(N):
        g = dh[n] + dy * C[n]
        y += h[n] * C[n]
        dC = dC + (dy * h[n],)
        dB = dB + (g * x,)
        gB += g * B[n]
        passed = tl.exp2(delta * A[n]) * g
        # The decay times the state before this token. In half precision that of a first one is not kept, which would
        # spill, and a difference stands in for it that rounding spoils where the decay is strong.
        p = g * (h[n] - x * B[n]) if FIRST else passed * before[n]
        pA += p * A[n]
        dA_next = dA_next + (dA[n] + p * delta,)
        dh_next = dh_next + (passed,)
    for _ in tl.static_range(16 - N):
        dB = dB + (tl.zeros_like(dy),)
        dC = dC + (tl.zeros_like(dy),)
    return y, gB, pA * 0.6931471805599453, dB, dC, dh_next, dA_next


@triton.jit
def scan_backward_kernel(
    dout_ptr, u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    codes_ptr, cu_ptr, states_ptr, grad_last_ptr,
    du_ptr, ddt_ptr, dz_ptr, dA_ptr, dBC_ptr, dD_ptr, dbias_ptr, grad_initial_ptr,
    n_channels, n_tokens, n_spans, B_row, C_row, z_row,
    N: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAST: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one sequence (axis 0), CHANNELS channels (axis 1), one clip (axis 2); back through time."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < n_channels
    # A lane without a channel reads the last one's values, so that only its output gradient needs a mask.
    near = tl.minimum(channel, n_channels - 1)
    clip = widened(tl.program_id(2), WIDE)
    group = widened(tl.program_id(1), WIDE)
    token = clip * n_tokens
    here = token * n_channels + near
    share = (clip * tl.num_programs(0) + tl.program_id(0)) * N * n_channels + near
    dBC_ptr += (group * tl.num_programs(2) * n_tokens + token) * (2 * N)
    skip = load_vector(D_ptr, near, HAS_D)
    bias = load_vector(bias_ptr, near, HAS_BIAS)
    A = load_decay(A_ptr, near, exists, N)
    dA = first_state(dA_ptr + share, n_channels, exists, N, False)
    dh = first_state(grad_last_ptr + share, n_channels, exists, N, HAS_LAST)
    dD = tl.zeros([CHANNELS], tl.float32)
    dbias = tl.zeros([CHANNELS], tl.float32)
    pick, four = pickers(SPLIT)
    start = tl.load(cu_ptr + tl.program_id(0))
    stop = tl.load(cu_ptr + tl.program_id(0) + 1)
    for done in range(0, stop - start):
        span = stop - 1 - done
        codes = load_codes(codes_ptr + span * STEPS, STEPS)
        # Across a restart nothing passes, not even a NaN, which a product with zero would let through.
        known = exists & (codes[0] + channel * 0 >= 0)
        h = load_state(states_ptr + (clip * n_spans + span) * N * n_channels + near, n_channels, known, N)
        history, us, steps, deltas = states_again(
            h, A, bias, codes, u_ptr + here, dt_ptr + here, B_ptr + token * B_row, n_channels, B_row,
            N, STEPS, PACKED, WIDE,
        )  # fmt: skip
        for k in tl.static_range(STEPS - 1, -1, -1):
            row = row_of(codes[k], WIDE)
            present = exists if k == 0 else exists & (codes[k] + channel * 0 >= 0)
            u = us[k]
            dout = tl.load(dout_ptr + row * n_channels + here, mask=present, other=0.0).to(tl.float32)
            dy, z, gate = before_gate(dout, z_ptr + row * z_row + (token * z_row + near), HAS_Z)
            B = load_weights(B_ptr + (token + row) * B_row, True, N, PACKED)
            C = load_weights(C_ptr + (token + row) * C_row, True, N, PACKED)
            y, gB, pA, dB, dC, dh, dA = back_one_token(
                dh,
                dA,
                A,
                history[k],
                history[k - 1] if k > 0 else h,
                dy,
                deltas[k],
                deltas[k] * u,
                B,
                C,
                N,
                False if SPLIT else k == 0,
            )
            ddt = (pA + gB * u) * sigmoid(steps[k])
            dD += dy * u
            dbias += ddt
            target = row * n_channels + here
            store_as(du_ptr + target, dy * skip + gB * deltas[k], present)
            store_as(ddt_ptr + target, ddt, present)
            if HAS_Z:
                store_as(dz_ptr + target, dout * gate * (1.0 + z * (1.0 - gate)) * (y + skip * u), present)
            n_stored = N if k == 0 else tl.where(codes[k] >= 0, N, 0)
            store_channel_sums(dBC_ptr + row * (2 * N), dB, dC, pick, four, n_stored, N, SPLIT)
        dh = zero_unless(codes[0] >= 0, dh, N)
    store_state(dA_ptr + share, dA, n_channels, exists, N)
    if HAS_INITIAL:
        store_state(grad_initial_ptr + share, dh, n_channels, exists, N)
    vector = (clip * tl.num_programs(0) + tl.program_id(0)) * n_channels + near
    tl.store(dD_ptr + vector, dD, mask=exists)
    tl.store(dbias_ptr + vector, dbias, mask=exists)
