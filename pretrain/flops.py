"""How many floating-point operations a training step takes, from the shape of the network alone.

A matrix product of [a, b] and [b, c] counts 2·a·b·c. The scan counts 9 for each token, inner channel and state (the
decay's product and exponential, the input's two products, the update's two, the output's two, and one for what is
token-wise), the convolution 2 for each tap. A backward pass takes two products for every one of the forward, but for
the patch embedding, whose input needs no gradient. Position in mm and time in seconds are not counted: once a batch,
they are thousands of times less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from boldforge.pretrain.model_config import ModelConfig

SCAN_FLOPS = 9


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass and of a whole step (forward and backward), by kind."""

    matmul: float
    scan: float
    step_matmul: float
    step_scan: float

    @property
    def step(self) -> float:
        """Operations of forward and backward."""
        return self.step_matmul + self.step_scan


def block_flops(config: ModelConfig, dim: int) -> tuple[float, float]:
    """Return the operations of one block's forward pass for one token: matrix products; scan and convolution."""
    inner, rank = config.expand * dim, math.ceil(dim / 16)
    hidden = max(1, int(dim * config.mlp_ratio))
    ways = 2 if config.bidirectional else 1
    projections = dim * 2 * inner + ways * (inner * (rank + 2 * config.d_state) + rank * inner) + inner * dim
    matmul = 2 * (projections + 2 * dim * hidden)
    return matmul, ways * inner * (SCAN_FLOPS * config.d_state + 2 * config.d_conv)


def clip_flops(
    config: ModelConfig, tokens: Sequence[float], patch_voxels: int, seen: Sequence[float] | None = None
) -> Flops:
    """Count the operations of one clip.

    Parameters
    ----------
    config
        The network, with its decoder if it has one.
    tokens
        Tokens of a clip at every stage, all frames.
    patch_voxels
        P, voxels in a patch.
    seen
        Tokens that the encoder computes at every stage, where ``encoder_sees: visible``; None: all.
    """
    seen = tokens if seen is None else seen
    dims = [config.embed_dim * 2**i for i in range(config.n_stages)]
    joined = config.frames_joined
    embedding = 2.0 * seen[0] * patch_voxels * dims[0]
    matmul = scan = 0.0
    visits = [depth * rows for depth, rows in zip(config.depths, seen, strict=True)]
    if config.decoder:
        for i, depth in enumerate(config.decoder_depths[::-1]):
            visits[i] += depth * tokens[i]
            matmul += 2 * tokens[i + 1] * dims[i + 1] * 4 * joined[i] * dims[i + 1]
        matmul += 2 * tokens[0] * dims[0] * patch_voxels
    for i, (dim, rows) in enumerate(zip(dims, visits, strict=True)):
        products, rest = block_flops(config, dim)
        matmul += rows * products
        scan += rows * rest
        if i + 1 < config.n_stages:
            matmul += 2 * seen[i + 1] * 8 * joined[i] * dim * 2 * dim
    return Flops(matmul=embedding + matmul, scan=scan, step_matmul=2 * embedding + 3 * matmul, step_scan=3 * scan)
