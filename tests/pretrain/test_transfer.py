"""A model on another grid than that of its training: other voxels, another field of view."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.configs import ConfigError
from boldforge.data_shards import Grid, brain_mask, get_grid, mask_hash
from boldforge.pretrain import (
    ExportError,
    ModelConfig,
    Pretrained,
    TokenGrid,
    build_model,
    gather_patches,
    load_pretrained,
    move_to_grid,
    write_export,
)
from boldforge.pretrain.patch_lattice import PatchLattice, overlap

CONFIG = ModelConfig(
    frames=2, embed_dim=4, depths=(1, 1), decoder_depths=(1,), d_state=2, backend="torch", position="mm", time="seconds"
)


def exported(folder: Path, config: ModelConfig = CONFIG, name: str = "mni4mm") -> Pretrained:
    grid = get_grid(name)
    torch.manual_seed(0)
    model = build_model(config, brain_mask(grid), grid.voxel_size, grid.affine)
    data = {"grid": name, "tr": 2.0, "mask_sha256": mask_hash(brain_mask(grid)), "clip_length": config.frames}
    return load_pretrained(
        write_export(model.state_dict(), {"model": config.model_dump(mode="json"), "data": data}, folder)
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return exported(tmp_path_factory.mktemp("export"))


@settings(max_examples=60, deadline=None)
@given(cells=st.integers(1, 7), parts=st.integers(1, 7))
def test_overlap_is_the_share_of_fine_steps_that_both_hold(cells: int, parts: int) -> None:
    step = np.arange(cells * parts)
    wanted = np.zeros((cells, parts))
    for n in step:
        wanted[n // parts, n // cells] += 1 / parts
    np.testing.assert_allclose(overlap(cells, parts), wanted, atol=1e-12)


def test_a_cell_is_the_mean_of_its_brain_voxels_and_brain_where_half_of_it_is() -> None:
    mask = np.random.default_rng(0).random((8, 8, 8)) < 0.55
    token_grid = TokenGrid(mask, (4, 4, 4), 3, 1)
    lattice = PatchLattice(token_grid.patch_voxels, token_grid.n_voxels, 2)
    values = torch.randn(2, 3, token_grid.n_voxels, generator=torch.Generator().manual_seed(0))
    found = lattice.read(gather_patches(values, torch.from_numpy(token_grid.patch_voxels)))
    volume = np.full((2, 3, 8, 8, 8), np.nan, dtype=np.float32)
    volume[..., mask] = values.numpy()
    seen = set()
    for row, (s, t) in enumerate(product(range(len(token_grid.patch_voxels)), range(3))):
        patch = volume[:, t][(slice(None), *(slice(4 * n, 4 * n + 4) for n in token_grid.stages[0].coordinates[s]))]
        for cell, (i, j, k) in enumerate(product(range(2), repeat=3)):
            block = patch[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].reshape(2, 8)
            brain = np.isfinite(block[0]).sum()
            seen.add(brain >= 4)
            wanted = np.nanmean(block, axis=1) if brain >= 4 else np.zeros(2)
            np.testing.assert_allclose(found[:, row, cell], wanted, atol=1e-5)
    assert seen == {True, False}


@pytest.mark.parametrize(("own", "other"), [("mni4mm", "mni2mm"), ("mni2mm", "mni4mm")])
def test_it_sees_on_the_other_grid_what_it_would_have_seen_on_its_own(own: str, other: str, tmp_path: Path) -> None:
    model, moved = (here := exported(tmp_path, name=own)).model, move_to_grid(here, get_grid(other)).model
    fine, coarse = (model, moved) if own == "mni2mm" else (moved, model)
    # One picture on both: the 4 mm voxels' values, repeated on the 2 mm voxels in them.
    values = torch.randn(1, 2, coarse.token_grid.n_voxels, generator=torch.Generator().manual_seed(0))
    volume = np.zeros((2, 48, 48, 48), dtype=np.float32)
    volume[:, coarse.token_grid.mask] = values[0]
    repeated = volume.repeat(2, 1).repeat(2, 2).repeat(2, 3)[:, fine.token_grid.mask]
    clips = {id(coarse): values, id(fine): torch.from_numpy(repeated)[None]}
    rows, inner = [], []
    for network in (model, moved):
        grid = network.token_grid
        patches = network.embed_patches(clips[id(network)]).unflatten(1, (-1, 2))[0]
        rows.append(
            {tuple(place): row for place, row in zip(grid.stages[0].coordinates.tolist(), patches, strict=True)}
        )
        whole = (grid.patch_voxels < grid.n_voxels).all(axis=1)
        inner.append({tuple(place) for place in grid.stages[0].coordinates[whole].tolist()})
    shared = inner[0] & inner[1]
    assert len(shared) > 500
    for place in shared:
        torch.testing.assert_close(rows[1][place], rows[0][place], rtol=1e-4, atol=1e-5)
    # On the brain's border half-filled voxels of 4 mm are one or the other: alike, not equal.
    with torch.no_grad():
        pooled = [network.encode(clips[id(network)], tr=2.0).mean(dim=1) for network in (model, moved)]
    assert torch.cosine_similarity(*pooled) > 0.99
    with torch.no_grad():
        assert moved(clips[id(moved)], tr=2.0).shape == (
            1,
            2 * moved.token_grid.stages[0].n_tokens,
            moved.token_grid.patch_voxels.shape[1],
        )


def test_a_smaller_field_of_view_moves_what_is_left_nowhere(pretrained: Pretrained) -> None:
    own = get_grid("mni4mm")
    affine = np.array(own.affine)
    affine[:3, 3] += 4.0 * np.array([6, 0, 12])
    cut = Grid("cut", (42, 48, 36), affine)
    moved = move_to_grid(pretrained, cut, brain_mask(own)[6:, :, 12:])
    assert moved.model.lattice is None and moved.config["data"]["grid"] == "cut"
    before, after = (
        {tuple(place): row for place, row in zip(m.token_grid.centres(1).tolist(), m.stages[1].position(), strict=True)}
        for m in (pretrained.model, moved.model)
    )
    assert after.keys() < before.keys() and len(after) > 100
    assert all(torch.equal(before[place], row) for place, row in after.items())
    assert moved.model.encode(torch.zeros(1, 5, moved.model.token_grid.n_voxels), tr=0.8).isfinite().all()


def test_the_way_there_and_back_is_no_way(pretrained: Pretrained) -> None:
    there = move_to_grid(pretrained, get_grid("mni2mm"))
    back = move_to_grid(there, get_grid("mni4mm"))
    values = torch.randn(1, 3, pretrained.model.token_grid.n_voxels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(back.model(values, tr=1.1), pretrained.model(values, tr=1.1))
    assert back.config["data"] == pretrained.config["data"]


def test_a_moved_model_can_be_written_and_read_again(pretrained: Pretrained, tmp_path: Path) -> None:
    moved = move_to_grid(pretrained, get_grid("mni2mm"))
    described = {key: moved.config[key] for key in ("model", "data")}
    again = load_pretrained(write_export(moved.model.state_dict(), described, tmp_path))
    values = torch.randn(1, 2, moved.model.token_grid.n_voxels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.model.encode(values, tr=2.0), moved.model.encode(values, tr=2.0))


def test_what_cannot_be_moved_says_why(pretrained: Pretrained, tmp_path: Path) -> None:
    learned = exported(tmp_path, CONFIG.model_copy(update={"position": "learned"}))
    with pytest.raises(ExportError, match=r"pretrained on grid mni4mm with a learned position .* model\.position=mm"):
        move_to_grid(learned, get_grid("mni2mm"))
    odd = Grid("odd", (40, 40, 40), np.diag([5.0, 5.0, 5.0, 1.0]))
    with pytest.raises(ConfigError, match=r"model\.patch_mm is 12, no multiple of the grid's voxels of 5 mm"):
        move_to_grid(pretrained, odd, np.ones(odd.shape, dtype=bool))
    with pytest.raises(ConfigError, match="not to the right, to the front and up"):
        move_to_grid(pretrained, get_grid("neurostorm"))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), edge=st.integers(1, 5), points=st.integers(1, 5))
def test_a_voxel_is_the_mean_of_the_trained_cells_it_meets_whatever_the_others_hold(
    seed: int, edge: int, points: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((2 * edge, edge, edge)) < 0.6
    mask[0, 0, 0] = mask[-1, 0, 0] = True
    token_grid = TokenGrid(mask, (edge, edge, edge), 3, 1)
    lattice = PatchLattice(token_grid.patch_voxels, token_grid.n_voxels, points)
    trained = rng.random((2, points**3)) < 0.4
    lattice.trained_SQ.copy_(torch.from_numpy(trained))
    cells = rng.standard_normal((1, 2, 3, points**3)).astype(np.float32)
    poisoned = np.where(trained[:, None], cells, rng.choice([np.nan, np.inf, 1e38], cells.shape)).astype(np.float32)
    found = lattice.write(torch.from_numpy(poisoned).flatten(1, 2)).unflatten(1, (2, 3))[0].numpy()
    share = overlap(edge, points)
    for s, (voxel, (x, y, z)) in product(range(2), enumerate(product(range(edge), repeat=3))):
        weights = np.einsum("i,j,k->ijk", share[x], share[y], share[z]).reshape(-1) * trained[s]
        total = weights.sum()
        wanted = (cells[0, s] * weights).sum(axis=1) / total if total > 1e-6 else np.zeros(3)
        np.testing.assert_allclose(found[s, :, voxel], wanted, atol=1e-5)


@pytest.mark.parametrize(("own", "other"), [("mni4mm", "mni2mm"), ("mni2mm", "mni4mm")])
def test_what_no_loss_has_seen_does_not_reach_a_moved_models_picture(own: str, other: str, tmp_path: Path) -> None:
    here = exported(tmp_path / "own", name=own)
    moved = move_to_grid(here, get_grid(other))
    written = write_export(moved.model.state_dict(), {key: moved.config[key] for key in ("model", "data")}, tmp_path)
    there = {token: tuple(row) for token, row in enumerate(moved.model.token_grid.stages[0].coordinates.tolist())}
    edge = here.model.config.patch_size(get_grid(own).voxel_size)[0]
    brain = brain_mask(get_grid(own))  # both grids cover one cube, so the tokens of one box are the other's
    seen = np.stack(
        [brain[tuple(slice(edge * n, edge * (n + 1)) for n in place)].reshape(-1) for place in there.values()]
    )
    assert 0.1 < (~seen).mean() < 0.9
    untrained_LQ = torch.from_numpy(~seen).repeat_interleave(2, dim=0)
    values = torch.randn(1, 2, moved.model.token_grid.n_voxels, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(1, len(untrained_LQ), dtype=torch.bool)
    pictures = []
    for network in (moved.model, load_pretrained(written).model):
        for poison in (0.0, float("nan"), 3e38):
            handle = network.decoder_pred.register_forward_hook(
                lambda _, __, cells, poison=poison: cells.masked_fill(untrained_LQ, poison)
            )
            with torch.no_grad():
                pictures.append(network(values, hidden, tr=2.0))
            handle.remove()
    assert pictures[0].isfinite().all() and pictures[0].any()
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    own_again = move_to_grid(moved, get_grid(own)).model
    assert own_again.lattice is None, "on its own grid a model writes its voxels themselves"


def test_a_second_move_knows_what_the_first_training_saw(pretrained: Pretrained) -> None:
    there = move_to_grid(pretrained, get_grid("mni2mm"))
    affine = np.array(get_grid("mni2mm").affine)
    affine[:3, 3] += 12.0 * np.array([1, 2, 0])
    cut = Grid("cut", (84, 72, 96), affine)
    mask = brain_mask(get_grid("mni2mm"))[6:-6, 12:-12]
    direct, detour = (move_to_grid(one, cut, mask).model for one in (pretrained, there))
    assert torch.equal(direct.lattice.trained_SQ, detour.lattice.trained_SQ)
    numbers = there.model.token_grid.stages[0].numbers
    rows = [numbers[x + 1, y + 2, z] for x, y, z in direct.token_grid.stages[0].coordinates]
    assert torch.equal(direct.lattice.trained_SQ, there.model.lattice.trained_SQ[rows])


def test_an_export_that_does_not_say_what_was_trained_can_be_read(pretrained: Pretrained, tmp_path: Path) -> None:
    moved = move_to_grid(pretrained, get_grid("mni2mm"))
    state = moved.model.state_dict()
    del state["lattice.trained_SQ"]
    again = load_pretrained(write_export(state, {key: moved.config[key] for key in ("model", "data")}, tmp_path))
    values = torch.zeros(1, 2, moved.model.token_grid.n_voxels)
    with torch.no_grad():
        assert again.model(values, tr=2.0).isfinite().all()
