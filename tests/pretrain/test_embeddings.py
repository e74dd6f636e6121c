"""Position in millimetres and time in seconds, beside the formulas written out."""

import math

import numpy as np
import pytest
import torch

from boldforge.configs import ConfigError
from boldforge.data_shards import brain_mask, get_grid
from boldforge.pretrain import ModelConfig, NeuroStorm, TokenGrid, build_model
from boldforge.pretrain.embeddings import PositionInMillimetres, TimeInSeconds

FREE = {"position": "mm", "time": "seconds"}


def affine(edge: float = 6.0, origin: tuple[float, float, float] = (-37.0, -41.0, -29.0)) -> np.ndarray:
    matrix = np.diag([edge, edge, edge, 1.0])
    matrix[:3, 3] = origin
    return matrix


@pytest.fixture
def config(small_config: ModelConfig) -> ModelConfig:
    return small_config.model_copy(update=FREE)


def network(config: ModelConfig, mask: np.ndarray, place: np.ndarray, edge: int = 2, seed: int = 0) -> NeuroStorm:
    torch.manual_seed(seed)
    grid = TokenGrid(mask, (edge,) * 3, config.frames, config.n_stages, place)
    return NeuroStorm(config, grid).eval()


def by_place(model: NeuroStorm, stage: int) -> dict[tuple[float, ...], torch.Tensor]:
    """What each token of a stage gets, by its centre in mm."""
    embedded = model.stages[stage].position()[:, 0]
    centres = model.token_grid.centres(stage).round(6)
    return {tuple(centre): row for centre, row in zip(centres.tolist(), embedded, strict=True)}


def test_centres_are_the_mean_of_a_whole_patch(small_mask: np.ndarray) -> None:
    grid = TokenGrid(small_mask, (2, 2, 2), 1, 2, affine())
    for stage, edge in ((0, 2), (1, 4)):
        for token, (x, y, z) in enumerate(grid.stages[stage].coordinates):
            voxels = np.stack(np.meshgrid(*(np.arange(edge) + edge * n for n in (x, y, z))), -1).reshape(-1, 3)
            centre = (voxels @ affine()[:3, :3].T + affine()[:3, 3]).mean(axis=0)
            assert np.allclose(grid.centres(stage)[token], centre)


def test_position_is_an_mlp_of_sines_and_cosines_of_the_centre() -> None:
    centre = (13.0, -40.5, 77.0)
    torch.manual_seed(0)
    module = PositionInMillimetres(np.array([centre]), 12.0, 5).double()
    wavelengths = [48 * 16 ** (k / 7) for k in range(8)]  # from four tokens to 768 mm
    sides = [[f(2 * math.pi * c / w) for f in (math.sin, math.cos) for w in wavelengths] for c in centre]
    x = torch.tensor([value for side in sides for value in side], dtype=torch.float64)
    hidden = module.hidden.weight @ x + module.hidden.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(module()[0, 0], module.out.weight @ hidden + module.out.bias, rtol=1e-5, atol=1e-7)


def test_time_is_a_linear_map_of_sines_and_cosines_of_seconds_and_of_the_tr() -> None:
    torch.manual_seed(0)
    module = TimeInSeconds(5, joined=2).double()
    torch.nn.init.normal_(module.tr.weight)
    tr_B = (0.8, 2.0, 3.1)
    found = module(3, torch.tensor(tr_B))
    assert found.shape == (3, 1, 3, 5)
    for clip, tr in enumerate(tr_B):
        for token in range(3):
            seconds = tr * (2 * token + (2 * token + 1)) / 2  # the middle of its two frames
            periods = [4 * 128 ** (k / 7) for k in range(8)]
            x = [f(2 * math.pi * seconds / p) for f in (math.sin, math.cos) for p in periods]
            wanted = module.seconds.weight @ torch.tensor(x, dtype=torch.float64) + module.seconds.bias
            wanted = wanted + module.tr.weight[:, 0] * math.log2(tr / 2)
            torch.testing.assert_close(found[clip, 0, token], wanted, rtol=1e-5, atol=1e-6)


def test_new_embeddings_start_about_as_small_as_learned_ones() -> None:
    grid = get_grid("mni4mm")
    for dim in (32, 256):
        torch.manual_seed(0)
        config = ModelConfig(embed_dim=dim, depths=(1,), decoder_depths=(), **FREE)
        stage = build_model(config, brain_mask(grid), grid.voxel_size, grid.affine).stages[0]
        for found in (stage.position(), stage.time(20, torch.tensor([2.0]))):
            assert 0.01 < found.square().mean().sqrt() < 0.04


def test_the_same_place_in_mm_gets_the_same_embedding_in_another_field_of_view(
    config: ModelConfig, small_mask: np.ndarray
) -> None:
    whole = network(config, small_mask, affine())
    # Two voxels off one side, three and four off others, and air added at a third: other tokens, other places in the
    # table; what coincides in mm at each stage must agree.
    for cut, air in (((2, 0, 4), 0), ((4, 4, 0), 4)):
        mask = np.pad(small_mask[tuple(slice(n, None) for n in cut)], ((0, 0), (0, 0), (air, 0)))
        first = np.array(cut) - (0, 0, air)
        moved = affine()
        moved[:3, 3] += 6.0 * first
        other = network(config, mask, moved, seed=1)
        weights = whole.state_dict()
        weights["brain_mask_bits"] = other.state_dict()["brain_mask_bits"]
        other.load_state_dict(weights)
        for stage in range(config.n_stages):
            here, there = by_place(whole, stage), by_place(other, stage)
            shared = here.keys() & there.keys()
            if not (first % 2 ** (stage + 1)).any():
                assert len(shared) > 0.3 * len(there)
            assert all(torch.equal(here[place], there[place]) for place in shared)
    assert len({tuple(row.tolist()) for row in by_place(whole, 0).values()}) == whole.token_grid.stages[0].n_tokens


def test_a_patch_has_the_same_embedding_on_both_mni_grids() -> None:
    config = ModelConfig(embed_dim=8, depths=(1, 1), decoder_depths=(1,), **FREE)
    models = []
    for name in ("mni4mm", "mni2mm"):
        grid = get_grid(name)
        torch.manual_seed(0)
        models.append(build_model(config, brain_mask(grid), grid.voxel_size, grid.affine))
    # The patch embedding is another, so weights drawn after it are too: take the first model's.
    models[1].stages.load_state_dict(models[0].stages.state_dict())
    for stage in range(2):
        coarse, fine = (by_place(model, stage) for model in models)
        assert coarse.keys() <= fine.keys(), "2 mm can only find more brain on a patch's border"
        assert all(torch.equal(fine[place], row) for place, row in coarse.items())


def test_two_trs_agree_where_their_frames_fall_on_the_same_second(config: ModelConfig, small_mask: np.ndarray) -> None:
    time = network(config, small_mask, affine()).stages[0].time
    slow, fast = time(5, torch.tensor([2.4]))[0, 0], time(15, torch.tensor([0.8]))[0, 0]
    torch.testing.assert_close(slow, fast[::3])
    torch.nn.init.normal_(time.tr.weight)
    assert (time(5, torch.tensor([2.4]))[0, 0] - fast[::3][:5]).abs().min() > 1e-3, "the TR itself is seen"
    torch.testing.assert_close(time(5, torch.tensor([2.0, 2.0]))[0], time(5, torch.tensor([2.0]))[0])


def test_each_clip_of_a_batch_has_its_own_tr(config: ModelConfig, small_mask: np.ndarray) -> None:
    model = network(config, small_mask, affine())
    clips = torch.randn(2, 3, model.token_grid.n_voxels, generator=torch.Generator().manual_seed(1))
    together = model(clips, tr=torch.tensor([0.8, 2.5]))
    alone = [model(clips[i : i + 1], tr=tr) for i, tr in enumerate((0.8, 2.5))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together, model(clips, tr=2.5), atol=1e-4)


def test_embeddings_stay_float32_under_autocast(config: ModelConfig, small_mask: np.ndarray) -> None:
    model = network(config, small_mask, affine())
    plain = model._embedding(0, 3, 1, 1.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model._embedding(0, 3, 1, 1.3), plain)


@pytest.mark.parametrize(
    ("tr", "message"),
    [
        (None, r"was not told the repetition time; pass tr, in seconds"),
        (torch.tensor([2.0, 2.0, 2.0]), r"one per clip \(2\), in seconds; got shape \[3\]"),
        (0.0, "must be seconds per frame, above 0"),
        (math.nan, "must be seconds per frame, above 0"),
    ],
)
def test_a_tr_that_is_missing_or_wrong_is_one_sentence(
    config: ModelConfig, small_mask: np.ndarray, tr: float | torch.Tensor | None, message: str
) -> None:
    model = network(config, small_mask, affine())
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 3, model.token_grid.n_voxels), tr=tr)


def test_a_grid_without_places_or_with_mirrored_axes_is_refused(config: ModelConfig) -> None:
    grid = get_grid("neurostorm")
    mask = np.ones((4, 4, 4), dtype=bool)
    with pytest.raises(ConfigError, match=r"model\.position is mm, but the grid's axes run along .* mni2mm or mni4mm"):
        build_model(config, mask, grid.voxel_size, grid.affine)
    with pytest.raises(ValueError, match="no affine"):
        build_model(config, mask, grid.voxel_size)
