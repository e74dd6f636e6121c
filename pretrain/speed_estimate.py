"""How fast a recipe would train on this machine: an estimate from a few blocks that are run for a moment.

A block of each stage's width runs forward and backward on few tokens, and an optimiser steps over some parameters; the
rest follows from the numbers of tokens, operations and parameters. Reading clips and communication are left out, and so
are prompts and redundancy dropout. Everything is timed several times over, in turns: the spread is that of these
measurements, and says nothing of how far a whole step lies from them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from boldforge.kernels import window_index
from boldforge.pretrain.flops import block_flops, block_visits, clip_flops
from boldforge.pretrain.mamba import Block, ShiftedMamba
from boldforge.pretrain.model_config import ModelConfig

WIDEST = 512
"""Wider blocks are not run: their time is that of this width, times the ratio of operations."""
ROUNDS = 7
_WARM_UPS = 2
_SHORTEST_SAMPLE = 0.05
"""Seconds; what is faster runs several times for one sample, or the clock and the scheduler would be what is timed."""
_TOKENS = {"cpu": 1024, "cuda": 65536}
_WINDOW = 256
_PARAMETERS = 1 << 20


@dataclass(frozen=True)
class Speed:
    """Seconds that one rank takes for a frame: the median of `ROUNDS` measurements, the shortest and the longest."""

    median: float
    shortest: float
    longest: float


def measure_speed(
    config: ModelConfig,
    patch_voxels: int,
    tokens: Sequence[float],
    seen: Sequence[float],
    parameters: int,
    batch_size: int,
    bf16: bool,
    device: str,
    checkpointed: bool = False,
) -> Speed:
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
    checkpointed
        Whether blocks keep their input only, and compute the rest again.
    """
    visits, passes = block_visits(config, tokens, seen), 4 if checkpointed else 3
    dims = [config.embed_dim * 2**i for i in range(config.n_stages)]
    operations = [passes * rows * sum(block_flops(config, dim)) for rows, dim in zip(visits, dims, strict=True)]
    # Embedding, merging, expanding and the last layer are products like those in blocks.
    rest = clip_flops(config, tokens, patch_voxels, seen, checkpointed).step / sum(operations)
    widths = [min(dim, WIDEST) for dim in dims]
    probes = {width: _block(config, width, bf16, device, checkpointed) for width in widths}
    of_block = {width: passes * _block_tokens(width, device) * sum(block_flops(config, width)) for width in widths}
    update = _update(device)
    found = []
    for round_ in _timed([*probes.values(), update], device):
        seconds = dict(zip(probes, round_, strict=False))
        clip = rest * sum(
            count * seconds[width] / of_block[width] for count, width in zip(operations, widths, strict=True)
        )
        step = parameters * round_[-1] / _PARAMETERS
        found.append((clip + step / batch_size) / config.frames)
    return Speed(statistics.median(found), min(found), max(found))


def _block_tokens(dim: int, device: str) -> int:
    return max(_WINDOW, _TOKENS[device] * 64 // max(dim, 64) // _WINDOW * _WINDOW)


def _block(config: ModelConfig, dim: int, bf16: bool, device: str, checkpointed: bool) -> Callable[[], object]:
    """Return the forward and backward pass of a block of this width."""
    tokens = _block_tokens(dim, device)
    mixer = ShiftedMamba(dim, config.d_state, config.d_conv, config.expand, config.backend, config.bidirectional)
    block = Block(dim, mixer, config.mlp_ratio, 0.0).to(device)
    x_BLC = torch.randn(1, tokens, dim, device=device, requires_grad=True)
    index = window_index((tokens,), (_WINDOW,), (0,)).to(x_BLC.device)

    def work() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y_BLC = checkpoint(block, x_BLC, index, use_reentrant=False) if checkpointed else block(x_BLC, index)
        y_BLC.backward(torch.ones_like(y_BLC))

    return work


def _update(device: str) -> Callable[[], object]:
    """Return a step of AdamW."""
    weights = torch.zeros(_PARAMETERS, device=device, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    return torch.optim.AdamW([weights]).step


def _timed(works: Sequence[Callable[[], object]], device: str) -> list[list[float]]:
    """Time every piece of work once in every round; the wall seconds of one run each, [ROUNDS][len(works)]."""
    repeats = []
    for work in works:
        for _ in range(_WARM_UPS):
            seconds = _seconds(work, 1, device)
        repeats.append(max(1, round(_SHORTEST_SAMPLE / seconds)))
    return [[_seconds(work, count, device) for work, count in zip(works, repeats, strict=True)] for _ in range(ROUNDS)]


def _seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats
