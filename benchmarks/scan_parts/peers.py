"""What the shifted scan is measured beside. Sequences lie side by side: u, dt, z [Q, M, D], B, C [Q, M, N]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def _steps(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return u, C and z in float32, and the decay of and what enters every state [Q, M, D, N]."""
    u, dt, B, C, z = (tensor.float() for tensor in (u, dt, B, C, z))
    delta = softplus(dt + dt_bias)
    return u, C, z, torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None, :]


def plain_loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """Return the scan, one step after another."""
    kind = u.dtype
    u, C, z, decay, entering = _steps(u, dt, A, B, C, z, dt_bias)
    h = torch.zeros_like(decay[:, 0])
    outputs = []
    # Unbound once: the gradient of an index into all tokens is as large as all tokens, at every step.
    for a, x, c in zip(decay.unbind(1), entering.unbind(1), C.unbind(1), strict=True):
        h = a * h + x
        outputs.append(torch.einsum("qdn,qn->qd", h, c))
    return ((torch.stack(outputs, dim=1) + u * D) * silu(z)).to(kind)


def parallel_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """Return the same in log2 M rounds over all tokens instead of M steps."""
    kind, length = u.dtype, u.shape[1]
    u, C, z, decay, h = _steps(u, dt, A, B, C, z, dt_bias)
    apart = 1
    while apart < length:
        h = torch.cat([h[:, :apart], torch.addcmul(h[:, apart:], decay[:, apart:], h[:, :-apart])], dim=1)
        decay = torch.cat([decay[:, :apart], decay[:, apart:] * decay[:, :-apart]], dim=1)
        apart *= 2
    return ((torch.einsum("qmdn,qmn->qmd", h, C) + u * D) * silu(z)).to(kind)


def mamba_ssm(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """Return the same from mamba-ssm's CUDA kernel; channels before tokens: u, dt, z [Q, D, M], B, C [Q, N, M]."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, dt, A, B, C, D, z, dt_bias, delta_softplus=True)


def grid_to_grid(
    scan: Callable[..., Tensor],
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    inputs: dict[str, Tensor],
) -> Tensor:
    """Return the shifted scan as it is done with tensors: roll, cut into windows, scan, put together, roll back.

    ``scan`` takes channels before tokens, as mamba-ssm's does. The grid must be a multiple of the window.
    """
    axes = (1, 2, 3, 4)
    n_windows = [g // w for g, w in zip(grid, window, strict=True)]
    cut = [size for pair in zip(n_windows, window, strict=True) for size in pair]

    def to_windows(tensor: Tensor) -> Tensor:
        b, _, width = tensor.shape
        rolled = tensor.view(b, *grid, width).roll([-s for s in shift], axes)
        apart = rolled.view(b, *cut, width).permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9)
        return apart.reshape(-1, math.prod(window), width).mT.contiguous()

    y = scan(**{name: to_windows(value) if value.ndim == 3 else value for name, value in inputs.items()})
    b, _, width = inputs["u"].shape
    together = y.mT.reshape(b, *n_windows, *window, width).permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9)
    return together.reshape(b, *grid, width).roll(list(shift), axes).reshape(b, -1, width)
