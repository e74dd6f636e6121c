"""What a recipe will need before it is run: parameters, memory by ZeRO stage, operations and speed.

Shape suffixes: S spatial tokens of a stage · T frames · L = S·T tokens of a clip · P voxels in a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from boldforge.pretrain.activations import activation_bytes, block_bytes
from boldforge.pretrain.checks import Prepared, parameter_shapes
from boldforge.pretrain.config import BUCKET_ELEMENTS, LIVE_PARAMETERS, PretrainConfig
from boldforge.pretrain.flops import Flops, clip_flops
from boldforge.pretrain.merging import frames_at
from boldforge.pretrain.model import MASK_TOKEN_NAMES
from boldforge.pretrain.model_config import ModelConfig
from boldforge.pretrain.speed_estimate import Speed, measure_speed
from boldforge.pretrain.tokens import TokenGrid
from boldforge.pretrain.visible import visible_tokens

_SINGLE = 4
_MASKS = 8
"""Masks drawn to learn how many tokens an encoder of visible tokens computes."""
_DECODER = ("expanding", "decoder", "norm_up", "decoder_pred", *MASK_TOKEN_NAMES.values())


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at its peak, in the middle of a step.

    Attributes
    ----------
    parameters, gradients, optimizer
        Weights; their gradients; Adam's two moments and, where ZeRO shards them, the copy of the weights that it
        updates.
    passing
        Gradients on their way to the rank whose share they are, and at stage 3 weights that are whole for a while.
    activations
        What one micro-batch keeps from its forward until its backward pass, the loss included, and the clips of the
        rank's whole share.
    """

    parameters: int
    gradients: int
    optimizer: int
    passing: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes in all; what operations need in passing is not counted."""
        return self.parameters + self.gradients + self.optimizer + self.passing + self.activations


@dataclass(frozen=True)
class TrainingPlan:
    """What a recipe needs at some number of ranks.

    Attributes
    ----------
    parameters, encoder_parameters
        Of the network, and of it without its decoder and its mask tokens.
    tokens, seen
        Tokens of a clip at every stage, and those that the encoder computes (their mean over a few masks).
    hidden
        Share of the first stage's tokens that is hidden.
    micro_batch
        Clips of a rank in one forward pass.
    flops
        Operations of one clip.
    frames
        T.
    memory
        By ZeRO stage, 0 to 3.
    """

    parameters: int
    encoder_parameters: int
    tokens: tuple[int, ...]
    seen: tuple[float, ...]
    hidden: float
    micro_batch: int
    flops: Flops
    frames: int
    memory: dict[int, Memory]


def plan_training(config: PretrainConfig, prepared: Prepared, world_size: int) -> TrainingPlan:
    """Count what a recipe needs; nothing of the network's size is allocated.

    Parameters
    ----------
    config
        The recipe.
    prepared
        Tokens and masks of the data's grid.
    world_size
        Ranks.
    """
    token_grid = prepared.token_grid
    shapes = parameter_shapes(config, token_grid)
    parameters = sum(map(prod, shapes.values()))
    in_decoder = sum(prod(shape) for name, shape in shapes.items() if name.split(".")[0] in _DECODER)
    masks_BL = prepared.sampler.sample([(9, config.seed, number) for number in range(_MASKS)])
    tokens = stage_tokens(config.model, token_grid)
    seen: tuple[float, ...] = tokens
    if config.model.encoder_sees == "visible":
        stages = visible_tokens(masks_BL, token_grid, torch.device("cpu"), config.model.frames_joined)
        seen = tuple(float(stage.visible_BL.sum()) / _MASKS for stage in stages)
    patch = token_grid.patch_voxels.shape[1]
    share = config.batch_size // world_size
    micro_batch = config.micro_batch_size or share
    activations = micro_batch * clip_bytes(config, patch, tokens, seen, token_grid.n_voxels)
    activations += (share - micro_batch) * waiting_bytes(config, patch, tokens, token_grid.n_voxels)
    return TrainingPlan(
        parameters=parameters,
        encoder_parameters=parameters - in_decoder,
        tokens=tokens,
        seen=seen,
        hidden=float(masks_BL.float().mean()),
        micro_batch=micro_batch,
        flops=clip_flops(config.model, tokens, patch, seen, config.checkpoint_activations),
        frames=config.model.frames,
        memory={stage: rank_memory(parameters, stage, world_size, activations) for stage in range(4)},
    )


def stage_tokens(config: ModelConfig, token_grid: TokenGrid) -> tuple[int, ...]:
    """Return L of every stage, fine to coarse."""
    frames = [frames_at(i, config.frames, config.frames_joined) for i in range(config.n_stages)]
    return tuple(stage.n_tokens * count for stage, count in zip(token_grid.stages, frames, strict=True))


def rank_memory(parameters: int, stage: int, world_size: int, activations: int) -> Memory:
    """Return what one rank holds at a ZeRO stage; weights, gradients and moments are float32 throughout.

    From stage 1 on ZeRO updates a copy of its share of the weights. On the way to their shares gradients are whole at
    stage 1, fill a bucket at stage 2, and at stage 3 a bucket of fixed size; there as many weights as may be alive are
    whole besides.
    """
    whole, share = _SINGLE * parameters, _SINGLE * -(-parameters // world_size)
    bucket, live = _SINGLE * BUCKET_ELEMENTS, _SINGLE * LIVE_PARAMETERS
    return Memory(
        parameters=share if stage == 3 else whole,
        gradients=share if stage else whole,
        optimizer=3 * share if stage else 2 * whole,
        passing=(0, whole, min(whole, bucket), bucket + min(whole, live))[stage],
        activations=activations,
    )


def clip_bytes(
    config: PretrainConfig, patch_voxels: int, tokens: Sequence[int], seen: Sequence[float], n_voxels: int
) -> int:
    """Return what a clip keeps until its backward pass: the clip, the network's activations, and the loss's.

    The loss keeps the target and the prediction's difference from it, its term of changes these too and where they
    count; its terms by region keep sums that are small beside these.
    """
    model, bf16 = config.model, config.precision == "bf16"
    visible = [round(count) for count in seen] if model.encoder_sees == "visible" else None
    kept = activation_bytes(model, patch_voxels, tokens, bf16, config.checkpoint_activations, visible)
    if config.checkpoint_activations:
        dims = [model.embed_dim * 2**i for i in range(model.n_stages)]
        # One block at a time is computed again; the decoder's see every token.
        kept += max(block_bytes(model, dim, bf16) * count for dim, count in zip(dims, tokens, strict=True))
    loss = tokens[0] * patch_voxels * (2 * _SINGLE + 1)
    if config.loss.gradient:
        loss += tokens[0] * patch_voxels * (_SINGLE + 1) * (model.frames - 1) // model.frames
    return kept + loss + waiting_bytes(config, patch_voxels, tokens, n_voxels)


def waiting_bytes(config: PretrainConfig, patch_voxels: int, tokens: Sequence[int], n_voxels: int) -> int:
    """Return what a clip holds before its turn: its values, which voxels have signal and which of them count."""
    return (_SINGLE * config.model.frames + 1) * n_voxels + tokens[0] * patch_voxels


def estimate_speed(
    config: PretrainConfig, plan: TrainingPlan, patch_voxels: int, world_size: int, device: str
) -> Speed:
    """Estimate what a rank takes for a frame on this machine; see `boldforge.pretrain.speed_estimate`."""
    share = 1 if config.zero_stage == 0 else world_size
    return measure_speed(
        config.model,
        patch_voxels,
        plan.tokens,
        plan.seen,
        -(-plan.parameters // share),
        config.batch_size // world_size,
        config.precision == "bf16",
        device,
        config.checkpoint_activations,
    )
