"""NeuroSTORM in plain PyTorch, as fast as whole-tensor operations make it: what our training step is measured beside.

The parameters and the assembly are those of the transcription in tests/pretrain. What differs is how: windows are cut
by views and permutations of the whole batch, and the scan is one of benchmarks/scan_parts/peers.py.

Arrays are [B, x, y, z, t, C], windows [Q, places, C].
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from scan_parts.peers import mamba_ssm, parallel_scan, plain_loop  # noqa: E402

from tests.pretrain.neurostorm_transcription import PlainBlock, PlainExpanding, PlainMamba, Transcription  # noqa: E402

Scan = Callable[..., Tensor]


def scan_in_parts(scan: Scan, states_at_once: int, recompute: bool, rows: dict[str, Tensor], rest: tuple) -> Tensor:
    """Scan as many windows at a time as have this many states [Q, M, D, N]; the rows are u, dt, B, C, z.

    With ``recompute`` a part's states are computed again in the backward, as mamba-ssm's kernel does.
    """
    A, D, dt_bias = rest
    _, length, channels = rows["u"].shape
    many = max(1, states_at_once // (length * channels * A.shape[1]))

    def one(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        return scan(u, dt, A, B, C, D, z, dt_bias)

    whole = partial(checkpoint, one, use_reentrant=False, preserve_rng_state=False) if recompute else one
    parts = zip(*(tensor.split(many) for tensor in rows.values()), strict=True)
    return torch.cat([whole(*part) for part in parts])


def by_mamba_ssm(rows: dict[str, Tensor], rest: tuple) -> Tensor:
    """Scan with mamba-ssm's CUDA kernel, which wants channels before tokens."""
    u, dt, B, C, z = (tensor.mT.contiguous() for tensor in rows.values())
    A, D, dt_bias = rest
    return mamba_ssm(u, dt, A, B, C, D, z, dt_bias).mT


SCANS: dict[str, Callable[[dict[str, Tensor], tuple], Tensor]] = {
    "loop": partial(scan_in_parts, plain_loop, 1 << 62, False),
    "loop in parts": partial(scan_in_parts, plain_loop, 1 << 24, True),
    "parallel in parts": partial(scan_in_parts, parallel_scan, 1 << 19, True),
    "mamba-ssm": by_mamba_ssm,
}
"""loop: token after token, all windows at once. In parts: so many windows at a time as the cache likes, their states
computed again in the backward. parallel: combining tokens 1, 2, 4, … apart; whole, it keeps eight times the states."""


class WindowMamba(PlainMamba):
    """The same mixer on whole tensors."""

    scan: Callable[[dict[str, Tensor], tuple], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """[Q, M, C] to [Q, M, C]."""
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = functional.silu(self.conv1d(u.mT)[..., : x.shape[1]]).mT
        dt, B, C = self.x_proj(u).split([self.rank, self.states, self.states], dim=-1)
        dt = functional.linear(dt, self.dt_proj.weight)
        rows = {"u": u, "dt": dt, "B": B, "C": C, "z": gate}
        return self.out_proj(self.scan(rows, (-self.A_log.exp(), self.D, self.dt_proj.bias)))


class WindowBlock(PlainBlock):
    """Pad, roll, partition, Mamba, reverse, roll back, crop: each one operation on the whole batch."""

    def __init__(self, dim: int, window: tuple[int, ...], shifted: bool, prompts: int = 0) -> None:
        super().__init__(dim, window, shifted, prompts)
        self.mamba = WindowMamba(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, x, y, z, t, C] to the same."""
        grid = x.shape[1:5]
        window = [min(g, w) for g, w in zip(grid, self.window, strict=True)]
        move = [w // 2 if self.shifted and g > w else 0 for g, w in zip(grid, window, strict=True)]
        missing = [-g % w for g, w in zip(grid, window, strict=True)]
        h = self.norm1(x)
        if any(missing):
            h = functional.pad(h, (0, 0, *(n for far in missing[::-1] for n in (0, far))))
        if any(move):
            h = h.roll([-m for m in move], (1, 2, 3, 4))
        h = uncut(self.mamba(cut(h, window)), window, h.shape)
        if any(move):
            h = h.roll(move, (1, 2, 3, 4))
        if any(missing):
            X, Y, Z, T = grid
            h = h[:, :X, :Y, :Z, :T]
        x = x + h
        return x + self.mlp(self.norm2(x))


def cut(x: Tensor, window: list[int]) -> Tensor:
    """[B, x, y, z, t, C] to windows [Q, places, C]."""
    B, *grid, C = x.shape
    sizes = [size for g, w in zip(grid, window, strict=True) for size in (g // w, w)]
    return x.view(B, *sizes, C).permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9).reshape(-1, math.prod(window), C)


def uncut(pieces: Tensor, window: list[int], shape: torch.Size) -> Tensor:
    """Undo `cut`."""
    B, *grid, C = shape
    counts = [g // w for g, w in zip(grid, window, strict=True)]
    return pieces.view(B, *counts, *window, C).permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).reshape(shape)


class WholeExpanding(PlainExpanding):
    """The same expanding, its children put in place by one permutation."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, x, y, z, t, C] to [B, 2x, 2y, 2z, t, C / 2]."""
        B, X, Y, Z, T, C = x.shape
        made = self.expand(x).view(B, X, Y, Z, T, 2, 2, 2, C // 2).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
        return self.norm(made.reshape(B, 2 * X, 2 * Y, 2 * Z, T, C // 2))


class Peer(Transcription):
    """The masked autoencoder; `use` says how it scans."""

    block, expanding = WindowBlock, WholeExpanding

    def use(self, scan: str) -> Peer:
        """Scan by one of `SCANS` from now on."""
        for module in self.modules():
            if isinstance(module, WindowMamba):
                module.scan = SCANS[scan]
        return self


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
