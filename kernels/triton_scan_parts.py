"""What the Triton kernels have in common: softplus, packed weights, and how tensors must lie in memory."""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

NVIDIA = tl.constexpr(torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1")
"""Whether kernels may hold lines of PTX; the interpreter cannot read them."""


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(e^-|x|), with log1p(v) = v P(v): degree eight reaches 4e-8 for v in [0, 1], no division."""
    v = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    p = 0.0053647239692509174 * v - 0.030065417289733887
    p = p * v + 0.07920397073030472
    p = p * v - 0.13753758370876312
    p = p * v + 0.19153636693954468
    p = p * v - 0.24857158958911896
    p = p * v + 0.333213210105896
    p = p * v - 0.49999648332595825
    p = p * v + 1.0
    return tl.maximum(x, 0.0) + v * p


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place; a division also scales, which takes four more instructions."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def token(code, BIG: tl.constexpr):
    """Return the token that an entry of the index names; in 64 bits where the clip is BIG."""
    row = code & 0x7FFFFFFF
    return row.to(tl.int64) if BIG else row


@triton.jit
def load_step(dt_ptr, bias_ptr, HAS_BIAS: tl.constexpr):
    """Return softplus(dt + bias)."""
    step = tl.load(dt_ptr).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr).to(tl.float32)
    return softplus(step)


@triton.jit
def skipped(u, D_ptr, HAS_D: tl.constexpr):
    """Return D u, or zero without D: what the sum over states is added to."""
    return u * tl.load(D_ptr).to(tl.float32) if HAS_D else tl.zeros(u.shape, tl.float32)


@triton.jit
def store_gated(y_ptr, y, z_ptr, exists, HAS_Z: tl.constexpr):
    """Write y, times SiLU of z where there is a gate."""
    if HAS_Z:
        z = tl.load(z_ptr).to(tl.float32)
        y *= z * reciprocal(1.0 + tl.exp2(-z * 1.4426950408889634))
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def locate(first_row, u_ptr, u_row, dt_ptr, dt_row, z_ptr, z_row, y_ptr, n_channels, channel):
    """Return where every lane's channel of a clip's first token lies in u, dt, z and y."""
    u_ptr += first_row * u_row + channel
    dt_ptr += first_row * dt_row + channel
    z_ptr += first_row * z_row + channel
    y_ptr += first_row * n_channels + channel
    return u_ptr, dt_ptr, z_ptr, y_ptr


@triton.jit
def load_decay(A_ptr, channel, exists, N: tl.constexpr):
    """Return A log2 e: exp(delta A) as 2^(delta A log2 e), because the hardware's exponential has base 2."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tl.load(A_ptr + channel * N + n, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634,)
    return out


@triton.jit
def spread(v):
    """Return the elements of a vector one by one, each known to every lane.

    The compiler sends the vector through shared memory, where one instruction reads four elements; so a lane converts
    one element of a token instead of all.
    """
    out = (v,)
    for level in tl.static_range(8):
        if (v.shape[0] >> level) > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                if (v.shape[0] >> level) > 2:
                    pair = tl.permute(tl.reshape(out[i], [2, v.shape[0] >> (level + 1)]), [1, 0])
                else:
                    pair = out[i]
                first, second = tl.split(pair)
                halves = halves + (first, second)
            out = halves
    return out


@triton.jit
def load_weights(row_ptr, inside, N: tl.constexpr, PACKED: tl.constexpr):
    """Return the N weights of a token as float32; packed, one 64-bit load brings two or four of them."""
    out = ()
    kind: tl.constexpr = row_ptr.dtype.element_ty
    if PACKED:
        per_word: tl.constexpr = 64 // kind.primitive_bitwidth
        for j in tl.static_range(N // per_word):
            word = tl.load(row_ptr.to(tl.pointer_type(tl.int64)) + j, mask=inside, other=0)
            for i in tl.static_range(2):
                half = (word >> (32 * i)).to(tl.int32)
                if per_word == 2:
                    out = out + (half.to(tl.float32, bitcast=True),)
                elif kind == tl.bfloat16:
                    # A bfloat16 is the upper half of a float32.
                    out = out + (
                        (half << 16).to(tl.float32, bitcast=True),
                        (half & -65536).to(tl.float32, bitcast=True),
                    )
                else:
                    for k in tl.static_range(2):
                        out = out + ((half >> (16 * k)).to(tl.int16).to(kind, bitcast=True).to(tl.float32),)
    else:
        for n in tl.static_range(N):
            out = out + (tl.load(row_ptr + n, mask=inside, other=0.0).to(tl.float32),)
    return out


@triton.jit
def first_state(first_ptr, n_channels, exists, N: tl.constexpr, GIVEN: tl.constexpr):
    """Return the N states that every lane starts from: zero, or the GIVEN ones."""
    if GIVEN:
        return load_state(first_ptr, n_channels, exists, N)
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros(first_ptr.shape, tl.float32),)
    return out


@triton.jit
def restart(h, code):
    """Return the states, zero where the state restarts: chosen, not multiplied, so that no NaN crosses a restart."""
    out = ()
    for n in tl.static_range(len(h)):
        out = out + (tl.where(code < 0, 0.0, h[n]),)
    return out


@triton.jit
def load_state(first_ptr, n_channels, exists, N: tl.constexpr):
    """Return the N states of every lane, float32; state n lies n * n_channels after the first."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tl.load(first_ptr + n * n_channels, mask=exists, other=0.0),)
    return out


@triton.jit
def store_state(first_ptr, h, n_channels, exists, N: tl.constexpr):
    """Write the N states of every lane where ``load_state`` finds them."""
    for n in tl.static_range(N):
        tl.store(first_ptr + n * n_channels, h[n], mask=exists)


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
