"""What the Triton kernels have in common: softplus, packed weights, and how tensors must lie in memory."""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softplus(x):
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
    """Return the N weights of a token as float32; packed, one 64-bit load brings two or four of them."""
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
