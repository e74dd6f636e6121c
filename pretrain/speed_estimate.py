"""How fast a recipe would train on this machine: an estimate from a few blocks that are run for a moment.

A block of each stage's width runs forward and backward on few tokens, and an optimiser steps over some parameters; the
rest follows from the numbers of tokens, operations and parameters. Reading clips and communication are left out.
"""

import time
from collections.abc import Callable, Sequence

import torch

from boldforge.kernels import window_index
from boldforge.pretrain.flops import block_flops, clip_flops
from boldforge.pretrain.mamba import Block, ShiftedMamba
from boldforge.pretrain.model_config import ModelConfig

WIDEST = 512
"""Wider blocks are not run: their time is that of this width, times the ratio of operations."""
_TOKENS = {"cpu": 1024, "cuda": 65536}
_WINDOW = 256
_PARAMETERS = 1 << 20


def seconds_per_frame(
    config: ModelConfig,
    patch_voxels: int,
    tokens: Sequence[float],
    seen: Sequence[float],
    parameters: int,
    batch_size: int,
    bf16: bool,
    device: str,
) -> float:
    """Estimate the time that one rank takes for a frame: forward, backward, and its share of the optimiser's step.

    Parameters
    ----------
    config
        The network.
    patch_voxels
        P, voxels in a patch.
    tokens, seen
        Tokens of a clip at every stage, and those that the encoder computes.
    parameters
        That this rank's optimiser updates.
    batch_size
        Clips of this rank in a step.
    bf16
        Whether products are computed under autocast to bf16.
    device
        ``cpu`` or ``cuda``.
    """
    visits = [depth * rows for depth, rows in zip(config.depths, seen, strict=True)]
    for i, depth in enumerate(config.decoder_depths[::-1] if config.decoder else ()):
        visits[i] += depth * tokens[i]
    in_blocks = seconds = 0.0
    for i, rows in enumerate(visits):
        dim = config.embed_dim * 2**i
        per_flop = _block_seconds_per_flop(config, min(dim, WIDEST), bf16, device)
        operations = 3 * rows * sum(block_flops(config, dim))
        seconds += operations * per_flop
        in_blocks += operations
    # Embedding, merging, expanding and the last layer are products like those in blocks.
    seconds *= clip_flops(config, tokens, patch_voxels, seen).step / in_blocks
    return seconds / config.frames + parameters * _update_seconds(device) / (batch_size * config.frames)


def _block_seconds_per_flop(config: ModelConfig, dim: int, bf16: bool, device: str) -> float:
    """Time a block of this width forward and backward, per operation."""
    tokens = max(_WINDOW, _TOKENS[device] * 64 // max(dim, 64) // _WINDOW * _WINDOW)
    mixer = ShiftedMamba(dim, config.d_state, config.d_conv, config.expand, config.backend, config.bidirectional)
    block = Block(dim, mixer, config.mlp_ratio, 0.0).to(device)
    x_BLC = torch.randn(1, tokens, dim, device=device, requires_grad=True)
    index = window_index((tokens,), (_WINDOW,), (0,)).to(x_BLC.device)

    def work() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y_BLC = block(x_BLC, index)
        y_BLC.backward(torch.ones_like(y_BLC))

    return _shortest(work, device) / (3 * tokens * sum(block_flops(config, dim)))


def _update_seconds(device: str) -> float:
    """Time AdamW, per parameter."""
    weights = torch.zeros(_PARAMETERS, device=device, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    return _shortest(torch.optim.AdamW([weights]).step, device) / _PARAMETERS


def _shortest(work: Callable[[], object], device: str, runs: int = 3) -> float:
    """Return the wall time of the shortest of a few runs after one to warm up."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
