"""The causal depthwise convolution with SiLU in Triton, forward and backward, in token order through tables.

Every token looks its neighbours along the scan path up (``ScanIndex.neighbours``), so tokens need not wait for each
other. Sums over tokens are written as one share per program and added by torch in a fixed order: no atomics.

Shape suffixes: b clips · L tokens · D channels · K taps.
"""

# Triton reads a kernel's source: its arguments carry no types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from boldforge.kernels.index import ScanIndex
from boldforge.kernels.triton_scan_parts import by_rows, compile_options

TOKENS, CHANNELS = 16, 64
"""The tile of one program."""


@triton.jit
def _tile(n_tokens, n_channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BIG: tl.constexpr):
    """Return tokens [T, 1], in 64 bits where the clip is BIG, channels [1, D] and which of them exist [T, D]."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    if BIG:
        token = token.to(tl.int64)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return token, channel, (token < n_tokens) & (channel < n_channels)


@triton.jit
def _neighbour(x_ptr, table_ptr, row, token, channel, exists, n_tokens, x_row, BIG: tl.constexpr):
    """Return the values of the tokens that one row of the table names; zero where it names none."""
    other = tl.load(table_ptr + row * n_tokens + token, mask=token < n_tokens, other=0)
    if BIG:
        other = other.to(tl.int64)
    return tl.load(x_ptr + other * x_row + channel, mask=exists & (other < n_tokens), other=0.0).to(tl.float32)


@triton.jit
def _total(
    x_ptr,
    weight_ptr,
    bias_ptr,
    before_ptr,
    token,
    channel,
    exists,
    n_tokens,
    n_channels,
    x_row,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIG: tl.constexpr,
):
    """Return the convolution before SiLU, and x itself."""
    x = tl.load(x_ptr + token * x_row + channel, mask=exists, other=0.0).to(tl.float32)
    total = x * tl.load(weight_ptr + channel * TAPS + TAPS - 1, mask=channel < n_channels, other=0.0).to(tl.float32)
    for back in tl.static_range(1, TAPS):
        tap = tl.load(weight_ptr + channel * TAPS + TAPS - 1 - back, mask=channel < n_channels, other=0.0)
        past = _neighbour(x_ptr, before_ptr, back - 1, token, channel, exists, n_tokens, x_row, BIG)
        total += past * tap.to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel, mask=channel < n_channels, other=0.0).to(tl.float32)
    return total, x


@triton.jit
def conv_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    before_ptr,
    y_ptr,
    n_tokens,
    n_channels,
    x_row,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIG: tl.constexpr,
):
    """One program: TOKENS tokens (axis 0), CHANNELS channels (axis 1), one clip (axis 2)."""
    first_row = tl.program_id(2).to(tl.int64) * n_tokens
    x_ptr += first_row * x_row
    y_ptr += first_row * n_channels
    token, channel, exists = _tile(n_tokens, n_channels, TOKENS, CHANNELS, BIG)
    total, _ = _total(
        x_ptr, weight_ptr, bias_ptr, before_ptr, token, channel, exists, n_tokens, n_channels, x_row,
        TAPS, HAS_BIAS, BIG,
    )  # fmt: skip
    y = total / (1.0 + tl.exp2(-total * 1.4426950408889634))
    tl.store(y_ptr + token * n_channels + channel, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def conv_backward_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    before_ptr,
    dtotal_ptr,
    dweight_ptr,
    dbias_ptr,
    n_tokens,
    n_channels,
    dout_row,
    x_row,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIG: tl.constexpr,
):
    """Write the gradient of the convolution before SiLU, and a share of those of the taps and the bias."""
    first_row = tl.program_id(2).to(tl.int64) * n_tokens
    dout_ptr += first_row * dout_row
    x_ptr += first_row * x_row
    dtotal_ptr += first_row * n_channels
    token, channel, exists = _tile(n_tokens, n_channels, TOKENS, CHANNELS, BIG)
    total, x = _total(
        x_ptr, weight_ptr, bias_ptr, before_ptr, token, channel, exists, n_tokens, n_channels, x_row,
        TAPS, HAS_BIAS, BIG,
    )  # fmt: skip
    gate = 1.0 / (1.0 + tl.exp2(-total * 1.4426950408889634))
    dout = tl.load(dout_ptr + token * dout_row + channel, mask=exists, other=0.0).to(tl.float32)
    dtotal = dout * gate * (1.0 + total * (1.0 - gate))
    tl.store(dtotal_ptr + token * n_channels + channel, dtotal, mask=exists)
    share = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    target = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(dbias_ptr + share * n_channels + target, tl.sum(dtotal, axis=0), mask=target < n_channels)
    dweight_ptr += share * TAPS * n_channels
    tl.store(dweight_ptr + (TAPS - 1) * n_channels + target, tl.sum(dtotal * x, axis=0), mask=target < n_channels)
    for back in tl.static_range(1, TAPS):
        past = _neighbour(x_ptr, before_ptr, back - 1, token, channel, exists, n_tokens, x_row, BIG)
        dtap = tl.sum(dtotal * past, axis=0)
        tl.store(dweight_ptr + (TAPS - 1 - back) * n_channels + target, dtap, mask=target < n_channels)


@triton.jit
def conv_input_gradient_kernel(
    dtotal_ptr,
    weight_ptr,
    after_ptr,
    dx_ptr,
    n_tokens,
    n_channels,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIG: tl.constexpr,
):
    """Write the gradient of x: what every token did to itself and to those ahead of it."""
    first_row = tl.program_id(2).to(tl.int64) * n_tokens
    dtotal_ptr += first_row * n_channels
    dx_ptr += first_row * n_channels
    token, channel, exists = _tile(n_tokens, n_channels, TOKENS, CHANNELS, BIG)
    dtotal = tl.load(dtotal_ptr + token * n_channels + channel, mask=exists, other=0.0)
    dx = dtotal * tl.load(weight_ptr + channel * TAPS + TAPS - 1, mask=channel < n_channels, other=0.0).to(tl.float32)
    for ahead in tl.static_range(1, TAPS):
        tap = tl.load(weight_ptr + channel * TAPS + TAPS - 1 - ahead, mask=channel < n_channels, other=0.0)
        future = _neighbour(dtotal_ptr, after_ptr, ahead - 1, token, channel, exists, n_tokens, n_channels, BIG)
        dx += future * tap.to(tl.float32)
    tl.store(dx_ptr + token * n_channels + channel, dx.to(dx_ptr.dtype.element_ty), mask=exists)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex) -> Tensor:
    """Return the causal depthwise convolution along ``index``, then SiLU; shapes as in ``conv_oracle``."""
    _, n_tokens, n_channels = x.shape
    x, weight = by_rows(x), weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    conv_forward_kernel[_grid(x)](
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        _neighbours(index, weight.shape[1] - 1),
        y,
        n_tokens,
        n_channels,
        x.stride(1),
        HAS_BIAS=bias is not None,
        BIG=_is_big(x),
        **constants(weight.shape[1]),
        **compile_options(),
    )
    return y


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``x``, ``weight`` and ``bias`` (None where there is none), each in its type."""
    b, n_tokens, n_channels = x.shape
    taps = weight.shape[1]
    dout, x, weight = by_rows(dout), by_rows(x), weight.contiguous()
    grid = _grid(x)
    dtotal = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    dweight = dtotal.new_empty(grid[0] * b, taps, n_channels)
    dbias = dtotal.new_empty(grid[0] * b, n_channels)
    conv_backward_kernel[grid](
        dout,
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        _neighbours(index, taps - 1),
        dtotal,
        dweight,
        dbias,
        n_tokens,
        n_channels,
        dout.stride(1),
        x.stride(1),
        HAS_BIAS=bias is not None,
        BIG=_is_big(dout, x),
        **constants(taps),
        **compile_options(),
    )
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    after = _neighbours(index, 1 - taps)
    conv_input_gradient_kernel[grid](
        dtotal, weight, after, dx, n_tokens, n_channels, BIG=_is_big(dx), **constants(taps), **compile_options()
    )
    return dx, dweight.sum(0).T.to(weight.dtype), None if bias is None else dbias.sum(0).to(bias.dtype)


def constants(taps: int) -> dict[str, int]:
    """Return the compile-time arguments every kernel here takes."""
    return {"TAPS": taps, "TOKENS": TOKENS, "CHANNELS": CHANNELS}


def _neighbours(index: ScanIndex, steps: int) -> Tensor:
    """Return the table of neighbours as int32; one tap has none, and a kernel still wants a pointer."""
    return index.cached(
        ("int32 neighbours", steps), lambda: index.neighbours(steps).int() if steps else index.rows.new_empty(1)
    )


def _is_big(*tensors: Tensor) -> bool:
    """Return whether 32 bits do not reach every element of a clip."""
    return any(tensor.shape[1] * max(tensor.stride(1), tensor.shape[2]) >= 2**31 for tensor in tensors)


def _grid(x: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[1], TOKENS), triton.cdiv(x.shape[2], CHANNELS), len(x)
