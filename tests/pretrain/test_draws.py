"""What is dropped while training is a function of the clip and the layer, however the batch is cut."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from boldforge.configs import load_config
from boldforge.pretrain import MaskConfig, MaskSampler, ModelConfig, NeuroStorm, TokenGrid, read_metrics
from boldforge.pretrain.draws import draw
from boldforge.pretrain.mamba import Block
from boldforge.pretrain.masking import sample_keys
from tests.pretrain.test_train import launch

CPU = torch.device("cpu")
DROPS = {"drop_path": 0.6, "redundancy_dropout": True}
KEYS = sample_keys(3, 40, 4)


def test_a_clips_numbers_are_uniform_and_its_own() -> None:
    together = draw(4, 5000, CPU, (1, 2), KEYS)
    for clip, key in enumerate(KEYS):
        alone = draw(1, 5000, CPU, (1, 2), [key])
        assert torch.equal(alone.branches_B2[0], together.branches_B2[clip])
        assert torch.equal(alone.tokens_BL[0], together.tokens_BL[clip])
    assert torch.equal(draw(4, 0, CPU, (1, 2), KEYS).branches_B2, together.branches_B2), "with tokens or without"
    numbers = together.tokens_BL.double()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean(dim=1).numpy() == pytest.approx(0.5, abs=0.02)
    assert numbers.var(dim=1).numpy() == pytest.approx(1 / 12, rel=0.05)


def test_other_clips_seeds_stages_and_blocks_have_other_numbers() -> None:
    places = [(stage, number) for stage in range(3) for number in range(3)]
    keys = [*sample_keys(0, 0, 3), *sample_keys(1, 0, 3)]
    drawn = torch.cat([draw(6, 50, CPU, place, keys).tokens_BL for place in places])
    assert len({tuple(row) for row in drawn.tolist()}) == len(places) * len(keys)
    assert np.corrcoef(drawn.numpy())[~np.eye(len(drawn), dtype=bool)].max() < 0.7


def test_a_key_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="found 4 keys for 3 clips"):
        draw(3, 0, CPU, (0, 0), KEYS)


def drawing_model(config: ModelConfig, mask: np.ndarray, **changes: object) -> tuple[NeuroStorm, Tensor, Tensor]:
    config = load_config(ModelConfig, config.model_dump() | DROPS | changes)
    torch.manual_seed(0)
    model = NeuroStorm(config, TokenGrid(mask, (2, 2, 2), config.frames, config.n_stages))
    sampler = MaskSampler(model.token_grid, load_config(MaskConfig, {"strategy": "random", "ratio": 0.5}))
    values = torch.randn(4, config.frames, model.token_grid.n_voxels, generator=torch.Generator().manual_seed(1))
    return model, values, sampler.sample(KEYS)


def gradients(model: NeuroStorm, values_BTV: Tensor, mask_BL: Tensor, size: int) -> list[Tensor]:
    """Cut the batch into parts of this size, and return their outputs and the sum of their gradients."""
    model.zero_grad()
    found = []
    for start in range(0, 4, size):
        torch.manual_seed(start + 10 * size)  # the global generator must have no part in it
        part = slice(start, start + size)
        found.append(model(values_BTV[part], mask_BL[part], keys=KEYS[part]))
        found[-1].square().mean(dim=(1, 2)).sum().backward()
    return [torch.cat(found).detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


@pytest.mark.parametrize("changes", [{}, {"encoder_sees": "visible"}, {"encoder_sees": "visible", "prompts": 2}])
def test_a_batch_cut_in_any_way_drops_the_same(
    changes: dict[str, object], small_config: ModelConfig, small_mask: np.ndarray
) -> None:
    model, values_BTV, mask_BL = drawing_model(small_config, small_mask, **changes)
    wanted = gradients(model, values_BTV, mask_BL, 4)
    for size, checkpointed in ((1, False), (2, True)):
        model.checkpoint_activations = checkpointed
        for found, one in zip(gradients(model, values_BTV, mask_BL, size), wanted, strict=True):
            assert (found - one).abs().max() < 1e-5 * one.abs().max() + 1e-8
    plain, _, _ = drawing_model(small_config, small_mask, **changes, drop_path=0.0, redundancy_dropout=False)
    plain.load_state_dict(model.state_dict())
    assert (plain(values_BTV, mask_BL) - wanted[0]).abs().max() > 0.05 * wanted[0].abs().max(), "nothing was dropped"


class Constant(torch.nn.Module):
    """A branch that adds 1 to one channel of every token."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel

    def forward(self, x_BLC: Tensor, *index: object) -> Tensor:
        added_BLC = torch.zeros_like(x_BLC)
        added_BLC[..., self.channel] = 1
        return added_BLC


@pytest.mark.parametrize("shared", [False, True])
def test_a_blocks_two_branches_are_dropped_independently_and_keep_their_mean(shared: bool) -> None:
    clips, tokens, rate = 4000, 3, 0.3
    block = Block(2, Constant(0), 1.0, rate)
    block.mlp = Constant(1)
    draws = draw(clips, 0, CPU, (1, 0), sample_keys(0, 0, clips))
    x_BLC = torch.zeros(clips, tokens, 2)
    visible = SimpleNamespace(clip_N=torch.arange(clips).repeat_interleave(tokens)) if shared else None
    added_BLC = block(x_BLC.view(1, -1, 2) if shared else x_BLC, None, visible=visible, draws=draws).view_as(x_BLC)
    assert torch.equal(added_BLC, added_BLC[:, :1].expand_as(added_BLC)), "a clip's branch is dropped whole"
    added_BC = added_BLC[:, 0]
    for kept in added_BC.unique().tolist():
        assert kept in (0.0, pytest.approx(1 / (1 - rate)))
    # Four standard errors.
    assert added_BC.mean(dim=0).tolist() == pytest.approx([1, 1], abs=4 * (rate / (1 - rate) / clips) ** 0.5)
    assert abs(np.corrcoef(added_BC.T.numpy())[0, 1]) < 4 / clips**0.5


def test_in_evaluation_nothing_is_dropped(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    model, values_BTV, mask_BL = drawing_model(small_config, small_mask)
    model.eval()
    assert torch.equal(model(values_BTV, mask_BL, keys=KEYS), model(values_BTV, mask_BL))


@pytest.mark.slow
@pytest.mark.distributed
def test_losses_with_drops_are_those_of_any_ranks_and_micro_batches(real_shards: Path, tmp_path: Path) -> None:
    same = ["model.drop_path=0.5", "model.redundancy_dropout=true", "precision=fp32", "batch_size=4", "steps=4"]
    same += ["checkpoint_every=4", "model.encoder_sees=visible"]
    ways = {"one rank, four clips": (1, 4), "two ranks, two clips": (2, 2), "two ranks, one clip": (2, 1)}
    losses = {}
    for name, (ranks, size) in ways.items():
        done = launch(real_shards, tmp_path / name, *same, f"micro_batch_size={size}", ranks=ranks)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    for name in ways:
        assert losses[name] == pytest.approx(losses["one rank, four clips"], rel=1e-5), name
