"""Clips of any length, and merging that halves time too, beside loops over tokens."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.configs import ConfigError, load_config
from boldforge.pretrain import ModelConfig, NeuroStorm, TokenGrid
from boldforge.pretrain.merging import PatchExpanding, PatchMerging, frames_at

PLACE = np.diag([6.0, 6.0, 6.0, 1.0])
ANY_LENGTH = {"position": "mm", "time": "seconds"}


def network(config: ModelConfig, mask: np.ndarray, seed: int = 0) -> NeuroStorm:
    torch.manual_seed(seed)
    return NeuroStorm(config, TokenGrid(mask, (2, 2, 2), config.frames, config.n_stages, PLACE)).eval()


def clips_of(model: NeuroStorm, frames: int) -> torch.Tensor:
    return torch.randn(2, frames, model.token_grid.n_voxels, generator=torch.Generator().manual_seed(frames))


def hidden_in(model: NeuroStorm, frames: int) -> torch.Tensor:
    tokens = model.token_grid.stages[0].n_tokens * frames
    return torch.rand(2, tokens, generator=torch.Generator().manual_seed(9)) < 0.5


@pytest.mark.parametrize("merge_time", [(), (True, False), (True, True)])
@pytest.mark.parametrize("token", ["random", "window"])
def test_a_clip_of_another_length_gives_what_a_model_of_that_length_gives(
    small_config: ModelConfig, small_mask: np.ndarray, merge_time: tuple[bool, ...], token: str
) -> None:
    shape = {"depths": (2, 1, 1), "decoder_depths": (1, 2), "merge_time": merge_time, "mask_tokens": (token,)}
    config = small_config.model_copy(update={**ANY_LENGTH, **shape, "frames": 4})
    model = network(config, small_mask)
    for frames in (4, 5, 7, 12):
        other = network(config.model_copy(update={"frames": frames}), small_mask, seed=1)
        other.load_state_dict(model.state_dict())
        clips, hidden = clips_of(model, frames), hidden_in(model, frames)
        with torch.no_grad():
            assert torch.equal(model(clips, hidden, tr=1.5), other(clips, hidden, tr=1.5))
            assert model(clips, hidden, tr=1.5).shape == (2, hidden.shape[1], 8)


def test_one_frame_is_a_clip_where_nothing_is_joined(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    model = network(small_config.model_copy(update=ANY_LENGTH), small_mask)
    assert model(clips_of(model, 1), hidden_in(model, 1), tr=2.0).isfinite().all()


def test_lengths_that_cannot_be_read_are_one_sentence(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    learned = network(small_config, small_mask)
    with pytest.raises(ValueError, match=r"expected clips \[B, 3 frames, .*\], got \[2, 5, "):
        learned(clips_of(learned, 5))
    config = small_config.model_copy(update={**ANY_LENGTH, "frames": 4, "merge_time": (True,)})
    joined = network(config, small_mask)
    with pytest.raises(ValueError, match=r"expected clips \[B, 2 frames or more, .*\], got \[2, 1, "):
        joined(clips_of(joined, 1), tr=2.0)
    with pytest.raises(ValueError, match=r"got \[2, 0, "):
        joined(clips_of(joined, 0), tr=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_time": [True, True]}, "merge_time has 2 entries, expected one per merging, one fewer than depths: 3"),
        (
            {"frames": 3, "merge_time": [True, False, True]},
            "merge_time halves time 2 times, which needs frames of at least 4, found 3",
        ),
    ],
)
def test_a_recipe_that_merges_more_time_than_there_is_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ModelConfig, changes)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), frames=st.integers(1, 7), times=st.sampled_from([1, 2]), edge=st.integers(2, 5))
def test_merging_joins_the_children_of_each_token(seed: int, frames: int, times: int, edge: int) -> None:
    generator = np.random.default_rng(seed)
    mask = generator.random((edge, 4, 3)) < 0.4
    mask[0, 0, 0] = True
    grid = TokenGrid(mask, (1, 1, 1), frames, 2)
    fine, coarse = grid.stages
    torch.manual_seed(seed)
    merging = PatchMerging(2, times).double()
    x = torch.randn(1, fine.n_tokens, frames, 2, dtype=torch.float64)
    here = {(*place, t): x[0, s, t] for s, place in enumerate(fine.coordinates.tolist()) for t in range(frames)}
    found = merging(x, torch.from_numpy(grid.children[0]))
    assert found.shape[2] == frames_at(1, frames, (times,)) == -(-frames // times)
    for s, place in enumerate(coarse.coordinates.tolist()):
        for t in range(found.shape[2]):
            children = []
            for step in product((0, 1), (0, 1), (0, 1), range(times)):
                child = (*(2 * p + d for p, d in zip(place, step[:3], strict=True)), times * t + step[3])
                children.append(here.get(child, torch.zeros(2, dtype=torch.float64)))
            wanted = merging.reduction(merging.norm(torch.cat(children)))
            torch.testing.assert_close(found[0, s, t], wanted)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), frames=st.integers(1, 7), times=st.sampled_from([1, 2]))
def test_expanding_gives_every_token_its_part_of_its_parent(seed: int, frames: int, times: int) -> None:
    mask = np.random.default_rng(seed).random((5, 4, 3)) < 0.4
    mask[0, 0, 0] = True
    grid = TokenGrid(mask, (1, 1, 1), frames, 2)
    fine, coarse = grid.stages
    torch.manual_seed(seed)
    expanding = PatchExpanding(4, times).double()
    x = torch.randn(1, coarse.n_tokens, -(-frames // times), 4, dtype=torch.float64)
    found = expanding(x, torch.from_numpy(grid.parent[0]), torch.from_numpy(grid.slot[0]), frames)
    assert found.shape == (1, fine.n_tokens, frames, 2)
    for s, place in enumerate(fine.coordinates.tolist()):
        parent = coarse.numbers[tuple(p // 2 for p in place)]
        for t in range(frames):
            slot = ((place[0] % 2 * 2 + place[1] % 2) * 2 + place[2] % 2) * times + t % times
            whole = expanding.expand(x[0, parent, t // times])
            torch.testing.assert_close(found[0, s, t], expanding.norm(whole[slot * 2 : slot * 2 + 2]))


def test_every_parameter_learns_with_time_merged(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    config = small_config.model_copy(update={**ANY_LENGTH, "merge_time": (True,)})
    model = network(config, small_mask).train()
    model(clips_of(model, 5), hidden_in(model, 5), tr=1.5).square().mean().backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []


def test_a_hidden_token_does_not_leak_through_joined_frames(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    model = network(small_config.model_copy(update={**ANY_LENGTH, "merge_time": (True,)}), small_mask)
    clips, hidden = clips_of(model, 5), torch.zeros(2, model.token_grid.stages[0].n_tokens * 5, dtype=torch.bool)
    hidden[:, 5 * 5 + 4] = True  # the last of an odd number of frames
    changed = clips.clone()
    columns = torch.from_numpy(model.token_grid.patch_voxels[5])
    changed[:, 4, columns[columns < model.token_grid.n_voxels]] += 100.0
    with torch.no_grad():
        assert torch.equal(model(clips, hidden, tr=2.0), model(changed, hidden, tr=2.0))
        assert not torch.equal(model(clips, tr=2.0), model(changed, tr=2.0))


@pytest.mark.parametrize("sees", ["all", "visible"])
def test_the_options_go_together(small_config: ModelConfig, small_mask: np.ndarray, sees: str) -> None:
    options = {"merge_time": (True,), "bidirectional": True, "encoder_sees": sees, "redundancy_dropout": True}
    config = small_config.model_copy(
        update={**ANY_LENGTH, **options, "prompts": 2, "drop_path": 0.2, "patch_points": 3}
    )
    model = network(config, small_mask).train()
    clips, hidden, found = clips_of(model, 5), hidden_in(model, 5), []
    for again in (False, True):
        model.checkpoint_activations = again
        model.zero_grad()
        torch.manual_seed(3)
        y = model(clips, hidden, tr=torch.tensor([0.8, 1.5]))
        y.square().mean().backward()
        found.append([y.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(tensor.isfinite().all() and tensor.any() for tensor in found[0])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True)), "the same bits with activations computed again"
