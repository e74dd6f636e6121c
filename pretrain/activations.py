"""How many bytes the forward pass keeps for the backward pass, counted from the shape of the network.

Shape suffixes: C channels · D inner channels · N states · R rank of the step size · L tokens of a clip at a stage.
"""

from collections.abc import Sequence
from math import ceil

from boldforge.pretrain.model_config import ModelConfig

_SINGLE, _HALF = 4, 2
_STATISTICS = 2 * _SINGLE  # mean and reciprocal deviation of a token, which LayerNorm keeps


def block_bytes(config: ModelConfig, dim: int, bf16: bool) -> int:
    """Return what one block keeps per token.

    The residual stream stays float32; what enters and leaves the projections, the convolution and the scan is of the
    compute type. The scan keeps its inputs only, because its backward computes the states again.

    Parameters
    ----------
    config
        Shape of the network. Prompts and redundancy dropout are not counted.
    dim
        C of the block's stage.
    bf16
        Whether it computes under autocast to bf16.
    """
    inner, rank, hidden = config.expand * dim, ceil(dim / 16), int(config.mlp_ratio * dim)
    normalised, gated, convolved, step, scanned = dim, 2 * inner, inner, inner, inner
    path = convolved + (rank + 2 * config.d_state) + step
    mixer = normalised + gated + path * (2 if config.bidirectional else 1) + scanned
    mlp = dim + 2 * hidden  # its input, and what enters and leaves GELU
    return 2 * (_SINGLE * dim + _STATISTICS) + (_HALF if bf16 else _SINGLE) * (mixer + mlp)


def activation_bytes(
    config: ModelConfig,
    patch_voxels: int,
    tokens: Sequence[int],
    bf16: bool,
    checkpointed: bool,
    visible: Sequence[int] | None = None,
) -> int:
    """Return what a clip keeps from its forward until its backward pass; weights and tables are not counted.

    Where activations are checkpointed, one block's (`block_bytes` times its tokens) are added while it is computed
    again.

    Parameters
    ----------
    config
        Shape of the network.
    patch_voxels
        P, voxels of a patch.
    tokens
        L of every stage, fine to coarse. Where frames are joined, an even number is supposed at every merging.
    bf16, checkpointed
        How the run computes.
    visible
        Of these, the tokens that the encoder computes, where ``encoder_sees: visible``. None: all.
    """
    width = _HALF if bf16 else _SINGLE
    seen = tokens if visible is None else visible
    dims = [config.embed_dim * 2**i for i in range(config.n_stages)]

    def blocks(stage: int, depth: int, count: int) -> int:
        each = _SINGLE * dims[stage] if checkpointed else block_bytes(config, dims[stage], bf16)
        return depth * each * count

    kept = width * patch_voxels * seen[0]
    for stage, depth in enumerate(config.depths):
        kept += blocks(stage, depth, seen[stage])
        if stage + 1 < config.n_stages:
            merged = 8 * config.frames_joined[stage] * dims[stage]
            kept += (merged * (_SINGLE + width) + _STATISTICS) * seen[stage + 1]
    if not config.decoder:
        return kept
    if visible is not None:
        kept += _SINGLE * dims[-1] * seen[-1]  # putting them back among the mask tokens
    for depth, stage in zip(config.decoder_depths, range(config.n_stages - 2, -1, -1), strict=True):
        kept += width * dims[stage + 1] * tokens[stage + 1]  # expanding
        kept += (_SINGLE * dims[stage] + _STATISTICS) * tokens[stage]
        kept += blocks(stage, depth, tokens[stage])
    return kept + ((_SINGLE + width) * dims[0] + _STATISTICS) * tokens[0]
