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
    """Operations of a forward pass and of a whole step (forward, backward, and what is computed again), by kind."""

    matmul: float
    scan: float
    step_matmul: float
    step_scan: float

    @property
    def step(self) -> float:
        """Operations of forward and backward, and of what is computed again between them."""
        return self.step_matmul + self.step_scan


def block_flops(config: ModelConfig, dim: int) -> tuple[float, float]:
    """Return the operations of one block's forward pass for one token: matrix products; scan and convolution."""
    inner, rank = config.expand * dim, math.ceil(dim / 16)
    hidden = max(1, int(dim * config.mlp_ratio))
    ways = 2 if config.bidirectional else 1
    projections = dim * 2 * inner + ways * (inner * (rank + 2 * config.d_state) + rank * inner) + inner * dim
    matmul = 2 * (projections + 2 * dim * hidden)
    return matmul, ways * inner * (SCAN_FLOPS * config.d_state + 2 * config.d_conv)


def block_visits(config: ModelConfig, tokens: Sequence[float], seen: Sequence[float]) -> list[float]:
    """Return how many tokens go through a block of each stage, every block of encoder and decoder counted."""
    visits = [depth * rows for depth, rows in zip(config.depths, seen, strict=True)]
    for i, depth in enumerate(config.decoder_depths[::-1] if config.decoder else ()):
        visits[i] += depth * tokens[i]
    return visits


def clip_flops(
    config: ModelConfig,
    tokens: Sequence[float],
    patch_voxels: int,
    seen: Sequence[float] | None = None,
    checkpointed: bool = False,
) -> Flops:
    """Count the operations of one clip; prompts and redundancy dropout are not counted.

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
    checkpointed
        Whether the backward pass computes every block's forward again.
    """
    seen = tokens if seen is None else seen
    dims = [config.embed_dim * 2**i for i in range(config.n_stages)]
    joined = config.frames_joined
    embedding = 2.0 * seen[0] * patch_voxels * dims[0]
    matmul = scan = in_blocks = 0.0
    if config.decoder:
        for i in range(len(config.decoder_depths)):
            matmul += 2 * tokens[i + 1] * dims[i + 1] * 4 * joined[i] * dims[i + 1]
        matmul += 2 * tokens[0] * dims[0] * patch_voxels
    for i, (dim, rows) in enumerate(zip(dims, block_visits(config, tokens, seen), strict=True)):
        products, rest = block_flops(config, dim)
        in_blocks += rows * products
        scan += rows * rest
        if i + 1 < config.n_stages:
            matmul += 2 * seen[i + 1] * 8 * joined[i] * dim * 2 * dim
    passes = 4 if checkpointed else 3
    return Flops(
        matmul=embedding + matmul + in_blocks,
        scan=scan,
        step_matmul=2 * embedding + 3 * matmul + passes * in_blocks,
        step_scan=passes * scan,
    )
