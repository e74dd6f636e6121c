"""Activation checkpointing, bf16 and accumulation: memory as predicted, the same losses."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from boldforge.configs import load_config
from boldforge.pretrain import MaskConfig, MaskSampler, ModelConfig, NeuroStorm, TokenGrid
from boldforge.pretrain.activations import activation_bytes, block_bytes
from boldforge.pretrain.merging import frames_at
from boldforge.pretrain.visible import visible_tokens

CASES = {
    "float32": (False, False, {}),
    "bf16": (True, False, {}),
    "float32, checkpointed": (False, True, {}),
    "bf16, checkpointed": (True, True, {"depths": (1, 2, 3), "decoder_depths": (2, 1)}),
    "three stages": (True, False, {"depths": (1, 2, 1), "decoder_depths": (2, 1), "mlp_ratio": 3.0, "d_state": 5}),
    "both ways, frames joined": (False, False, {"bidirectional": True, "merge_time": (True,), "frames": 4}),
    "visible tokens": (False, False, {"encoder_sees": "visible", "depths": (1, 2, 1), "decoder_depths": (2, 1)}),
    "visible tokens, bf16, checkpointed": (True, True, {"encoder_sees": "visible"}),
}


def build(config: ModelConfig, mask: np.ndarray, **changes: object) -> NeuroStorm:
    config = load_config(ModelConfig, config.model_dump() | {"embed_dim": 18} | changes)
    torch.manual_seed(0)
    return NeuroStorm(config, TokenGrid(mask, (2, 2, 2), config.frames, config.n_stages))


def batch(model: NeuroStorm, clips: int) -> tuple[Tensor, Tensor]:
    """Make clips and masks; the masks hide the same patches in every clip, so that each adds the same."""
    grid, generator = model.token_grid, torch.Generator().manual_seed(1)
    sampler = MaskSampler(grid, load_config(MaskConfig, {"strategy": "tube", "ratio": 0.6}))
    hidden_BL = sampler.sample([(3,)]).expand(clips, -1)
    return torch.randn(clips, grid.frames, grid.n_voxels, generator=generator), hidden_BL


@contextmanager
def counting(model: NeuroStorm) -> Iterator[dict[int, Tensor]]:
    """Collect what autograd keeps, weights apart: every piece of memory once, by its address."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own and tensor.is_floating_point():
            kept[address] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_bytes(model: NeuroStorm, clips: int, bf16: bool) -> int:
    values_BTV, hidden_BL = batch(model, clips)
    with counting(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(values_BTV, hidden_BL)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("case", CASES)
def test_a_clip_keeps_as_many_bytes_as_predicted(case: str, small_config: ModelConfig, small_mask: np.ndarray) -> None:
    bf16, checkpointed, changes = CASES[case]
    model = build(small_config, small_mask, **changes)
    model.checkpoint_activations = checkpointed
    # What does not depend on the number of clips, copies of weights in bf16 for one, is no activation.
    found = kept_bytes(model, 5, bf16) - kept_bytes(model, 2, bf16)
    joined, stages = model.config.frames_joined, model.token_grid.stages
    tokens = [stage.n_tokens * frames_at(i, model.config.frames, joined) for i, stage in enumerate(stages)]
    visible = None
    if model.config.encoder_sees == "visible":
        _, hidden_BL = batch(model, 1)
        visible = [len(stage.row_N) for stage in visible_tokens(hidden_BL, model.token_grid, torch.device("cpu"))]
        assert visible[0] < 0.5 * tokens[0] and visible[-1] <= tokens[-1]
    assert found == 3 * activation_bytes(model.config, 8, tokens, bf16, checkpointed, visible)


def test_checkpointing_keeps_a_tenth_and_bf16_about_half(small_config: ModelConfig) -> None:
    config = load_config(ModelConfig, small_config.model_dump() | {"embed_dim": 64, "mlp_ratio": 4.0, "d_state": 16})
    whole = block_bytes(config, 64, bf16=False)
    assert 0.5 < block_bytes(config, 64, bf16=True) / whole < 0.6
    assert 4 * 64 / whole < 0.05


DROPS = {"drop_path": 0.5, "redundancy_dropout": True}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("changes", [DROPS, DROPS | {"encoder_sees": "visible"}, DROPS | {"prompts": 2}], ids=str)
def test_checkpointing_changes_no_bit_of_the_output_and_the_gradients(
    changes: dict, bf16: bool, small_config: ModelConfig, small_mask: np.ndarray
) -> None:
    model = build(small_config, small_mask, **changes)
    values_BTV, hidden_BL = batch(model, 3)
    found = []
    for checkpointed in (False, True, False):
        model.checkpoint_activations = checkpointed
        model.zero_grad()
        torch.manual_seed(7 if len(found) < 2 else 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            patches_BLP = model(values_BTV, hidden_BL)
        patches_BLP.square().mean().backward()
        found.append([patches_BLP.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]])
        drawn_after = torch.rand(1)
        found[-1].append(drawn_after)
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0]), "the draws decide what is dropped"


def test_bf16_stays_within_a_hundredth_of_float32(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    model = build(small_config, small_mask, encoder_sees="visible")
    values_BTV, hidden_BL = batch(model, 3)
    losses = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            patches_BLP = model(values_BTV, hidden_BL)
        losses.append(float((patches_BLP.detach().float() - 1).square().mean()))
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
