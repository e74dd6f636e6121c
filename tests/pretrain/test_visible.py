"""An encoder that sees visible tokens only: the same as computing every clip alone, token by token."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from boldforge.configs import ConfigError, load_config
from boldforge.kernels import ScanIndex, window_index
from boldforge.pretrain import MaskConfig, MaskSampler, ModelConfig, NeuroStorm, TokenGrid, gather_patches
from boldforge.pretrain.visible import visible_tokens

TR = 1.5


def visible_model(config: ModelConfig, mask: np.ndarray, **changes: object) -> NeuroStorm:
    config = load_config(ModelConfig, config.model_dump() | {"encoder_sees": "visible"} | changes)
    torch.manual_seed(0)
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    return NeuroStorm(config, TokenGrid(mask, (2, 2, 2), config.frames, config.n_stages, affine))


def clips_of(model: NeuroStorm, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    grid = model.token_grid
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, grid.frames, grid.n_voxels, generator=generator, dtype=dtype)


def masks_of(model: NeuroStorm, strategy: str, ratio: float, count: int) -> Tensor:
    config = load_config(MaskConfig, {"strategy": strategy, "ratio": ratio})
    return MaskSampler(model.token_grid, config, window=model.config.window).sample([(seed,) for seed in range(count)])


def encode_slowly(model: NeuroStorm, values_TV: Tensor, hidden_L: Tensor) -> Tensor:
    """Encode one clip from a dict of its visible tokens: the stage's tokens with mask tokens elsewhere, [L, C]."""
    grid, T, n_stages = model.token_grid, model.token_grid.frames, model.config.n_stages
    patches_LP = gather_patches(values_TV[None], model.patch_voxels)[0]
    tokens: dict[tuple[int, int, int, int], Tensor] = {}
    for row in range(len(patches_LP)):
        if not hidden_L[row]:
            x, y, z = grid.stages[0].coordinates[row // T].tolist()
            tokens[x, y, z, row % T] = model.patch_embed(patches_LP[row])
    for i, stage in enumerate(grid.stages):
        learned, embedding_STC = model.stages[i], model._embedding(i, T, 1, TR)[0]
        keep = torch.zeros(*stage.grid, T, dtype=torch.bool)
        for place, token in tokens.items():
            keep[place] = True
            tokens[place] = token + embedding_STC[stage.numbers[place[:3]], place[3]]
        window = (i == n_stages - 1 and model.config.last_window) or model.config.window
        places = sorted(tokens)
        x_1NC = torch.stack([tokens[place] for place in places])[None]
        for number, block in enumerate(learned.blocks):
            odd = number % 2 == 1 and (i < n_stages - 1 or model.config.last_shifted)
            shift = [w // 2 if odd and g > w else 0 for w, g in zip(window, keep.shape, strict=True)]
            x_1NC = block(x_1NC, window_index(keep.shape, window, shift, model.config.scan_mode, keep))
        tokens = dict(zip(places, x_1NC[0], strict=True))
        if i < n_stages - 1:
            tokens = merge_slowly(model.merging[i], tokens, model.config.frames_joined[i])
            T = -(-T // model.config.frames_joined[i])
    result = []
    for s, place in enumerate(grid.stages[-1].coordinates.tolist()):
        for t in range(T):
            result.append(tokens.get((*place, t), model._mask_token() + embedding_STC[s, t]))
    return torch.stack(result)


def merge_slowly(
    merging: torch.nn.Module, tokens: dict[tuple[int, int, int, int], Tensor], times: int
) -> dict[tuple[int, int, int, int], Tensor]:
    zero = torch.zeros_like(next(iter(tokens.values())))
    merged = {}
    for x, y, z, t in {(x // 2, y // 2, z // 2, t // times) for x, y, z, t in tokens}:
        steps = [(i, j, k, h) for i in (0, 1) for j in (0, 1) for k in (0, 1) for h in range(times)]
        corners = [(2 * x + i, 2 * y + j, 2 * z + k, times * t + h) for i, j, k, h in steps]
        together = torch.cat([tokens.get(corner, zero) for corner in corners])
        merged[x, y, z, t] = merging.reduction(merging.norm(together))
    return merged


CASES = {
    "random tokens": ("random", 0.5, {}),
    "most of them": ("random", 0.93, {}),
    "patches over all frames": ("tube", 0.75, {}),
    "windows": ("window", 0.6, {"depths": (1, 2, 2), "decoder_depths": (1, 1)}),
    "frames merged": ("random", 0.8, {"depths": (1, 1, 1), "decoder_depths": (1, 1), "merge_time": (True, False)}),
    "both ways": ("random", 0.5, {"bidirectional": True}),
    "millimetres and seconds": ("random", 0.9, {"position": "mm", "time": "seconds", "merge_time": (True,)}),
    "as NeuroSTORM scans": ("random", 0.7, {"scan_mode": "wrap", "last_window": (3, 2, 1, 3), "last_shifted": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_every_clip_alone(
    case: str, small_config: ModelConfig, small_mask: np.ndarray
) -> None:
    strategy, ratio, changes = CASES[case]
    model = visible_model(small_config, small_mask, **changes).double()
    hidden_BL, values_BTV = masks_of(model, strategy, ratio, 3), clips_of(model, 3, torch.float64)
    gradients = []
    for encode in (model.encode, lambda values, mask, _: torch.stack([*map(encode_slowly, [model] * 3, values, mask)])):
        model.zero_grad()
        values_BTV.grad = None
        tokens_BLC = encode(values_BTV.requires_grad_(), hidden_BL, TR)
        model.decode(tokens_BLC).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        gradients[-1] |= {"tokens": tokens_BLC.detach(), "values": values_BTV.grad.clone()}
    for name, wanted in gradients[1].items():
        largest = wanted.abs().max()
        assert largest > 0, f"{name} has no part in this"
        # The scan takes these three in float32, and gives their gradients in it.
        single = name.endswith(("A_log", ".D", "dt_bias"))
        assert (gradients[0][name] - wanted).abs().max() <= (1e-6 if single else 1e-11) * largest, name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), strategy=st.sampled_from(["random", "tube"]), ratio=st.floats(0.1, 0.9))
def test_hidden_values_have_no_influence_whatever_they_are(
    seed: int, strategy: str, ratio: float, small_mask: np.ndarray
) -> None:
    config = ModelConfig(frames=3, embed_dim=4, depths=(1, 1), decoder_depths=(1,), window=(2, 2, 2, 2), d_state=2)
    model = visible_model(config, small_mask)
    hidden_BL, values_BTV = masks_of(model, strategy, ratio, 2), clips_of(model, 2)
    hidden_BTV = torch.zeros_like(values_BTV, dtype=torch.bool)
    for clip, row in hidden_BL.nonzero().tolist():
        columns = model.patch_voxels[row // 3]
        hidden_BTV[clip, row % 3, columns[columns < model.token_grid.n_voxels]] = True
    poisoned_BTV = torch.where(hidden_BTV, float("nan"), values_BTV)
    assert torch.equal(model.encode(values_BTV, hidden_BL), model.encode(poisoned_BTV, hidden_BL))
    assert torch.equal(model(values_BTV, hidden_BL), model(poisoned_BTV, hidden_BL))


@pytest.mark.parametrize("prompts", [0, 2])
def test_with_nothing_hidden_it_is_the_encoder_of_all_tokens_with_the_same_draws(
    prompts: int, small_config: ModelConfig, small_mask: np.ndarray
) -> None:
    model = visible_model(small_config, small_mask, drop_path=0.5, redundancy_dropout=True, prompts=prompts)
    values_BTV = clips_of(model, 3)
    hidden_BL = torch.zeros(3, model.token_grid.stages[0].n_tokens * 3, dtype=torch.bool)
    found = []
    for mask in (hidden_BL, None):
        torch.manual_seed(5)
        found.append(model.encode(values_BTV, mask))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], model.eval().encode(values_BTV), atol=1e-3), "nothing was dropped"


def test_every_path_is_built_once_a_step(
    small_config: ModelConfig, small_mask: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, built = visible_model(small_config, small_mask), []
    hidden_BL, values_BTV = masks_of(model, "random", 0.5, 2), clips_of(model, 2)
    model(values_BTV, hidden_BL)  # whole paths, which all steps share
    check = ScanIndex.__post_init__
    monkeypatch.setattr(ScanIndex, "__post_init__", lambda index: (built.append(index.n_tokens), check(index))[1])
    model(values_BTV, hidden_BL).square().mean().backward()
    assert len(built) == 4, "two stages, each with straight and shifted windows"


def test_a_dropped_branch_is_dropped_for_one_clip_and_not_for_its_neighbour(
    small_config: ModelConfig, small_mask: np.ndarray
) -> None:
    model = visible_model(small_config, small_mask, drop_path=0.9)
    hidden_BL = masks_of(model, "random", 0.5, 6)
    block = model.stages[-1].blocks[-1]
    seen: list[tuple[Tensor, Tensor]] = []
    block.register_forward_hook(lambda _, arguments, result: seen.append((arguments, result)))
    torch.manual_seed(2)
    model.encode(clips_of(model, 6), hidden_BL)
    ((x_1NC, _, _, visible, _), y_1NC) = seen[0]
    same_N = (x_1NC == y_1NC)[0].all(dim=1)
    by_clip = [same_N[visible.clip_N == clip] for clip in range(6)]
    assert all(same.all() or not same.any() for same in by_clip)
    assert {bool(same.all()) for same in by_clip} == {True, False}


def test_hiding_three_quarters_costs_the_encoder_a_quarter_where_no_token_is_merged(
    small_config: ModelConfig, small_mask: np.ndarray
) -> None:
    model = visible_model(small_config, small_mask, depths=(4,), decoder_depths=())
    flops = {}
    for ratio in (0.5, 0.75):
        hidden_BL = masks_of(model, "tube", ratio, 2)
        with FlopCounterMode(display=False) as counter:
            model.encode(clips_of(model, 2), hidden_BL)
        flops[ratio] = counter.get_total_flops() / int((~hidden_BL).sum())
    assert flops[0.5] == flops[0.75], "work per visible token"


@pytest.mark.parametrize("frames", [5, 6])
def test_merging_may_join_frames(frames: int, small_mask: np.ndarray) -> None:
    grid = TokenGrid(small_mask, (2, 2, 2), frames, 3)
    seen_BL = torch.rand(2, grid.stages[0].n_tokens * frames, generator=torch.Generator().manual_seed(0)) < 0.1
    stages = visible_tokens(~seen_BL, grid, torch.device("cpu"), joined=(2, 2))
    fine = [
        (clip, *grid.stages[0].coordinates[row // frames], row % frames) for clip, row in seen_BL.nonzero().tolist()
    ]
    for level, (stage, coarse) in enumerate(pairwise(stages), start=1):
        T = -(-frames // 2**level)
        places = grid.stages[level].coordinates
        L = len(places) * T
        found = [(row // L, *places[row % L // T], row % T) for row in coarse.row_N.tolist()]
        assert [*map(tuple, found)] == sorted({(place[0], *(n // 2 for n in place[1:])) for place in fine})
        assert sorted(stage.children_NK[stage.children_NK < len(fine)].tolist()) == list(range(len(fine)))
        for parent, children in zip(found, stage.children_NK.tolist(), strict=True):
            for slot, child in enumerate(children):
                if child < len(fine):
                    offsets = (slot >> 3 & 1, slot >> 2 & 1, slot >> 1 & 1, slot & 1)
                    at = [2 * place + offset for place, offset in zip(parent[1:], offsets, strict=True)]
                    assert tuple(fine[child]) == (parent[0], *at)
        fine = found


def test_masks_that_cannot_be_used_are_refused(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    model = visible_model(small_config, small_mask)
    hidden_BL = masks_of(model, "random", 0.5, 2)
    with pytest.raises(ValueError, match=r"the mask must be bool \[B, 156 · frames\], found torch.bool \[2, 5\]"):
        model.encode(clips_of(model, 2), hidden_BL[:, :5])
    hidden_BL[1] = True
    with pytest.raises(ValueError, match="hides all tokens of a clip"):
        model.encode(clips_of(model, 2), hidden_BL)
    with pytest.raises(ConfigError, match=r"encoder_sees is visible, .* list random instead"):
        load_config(ModelConfig, {"encoder_sees": "visible", "mask_tokens": ["window"]})
