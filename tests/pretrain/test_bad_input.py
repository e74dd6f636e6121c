"""What pretraining cannot use ends in one sentence before the first step; an atlas of any lattice and table is used."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from boldforge.configs import ConfigError, load_config
from boldforge.data_shards import DataRecipe, build_shards, find_runs, load_manifest
from boldforge.pretrain import MaskConfig, MaskSampler, PretrainConfig, TokenGrid, region_tokens
from boldforge.pretrain.region_errors import COLUMNS
from boldforge.pretrain.run_folder import changes

DATA = Path(__file__).parents[1] / "data"
TINY = [
    *("model.frames=4", "model.embed_dim=8", "model.depths=[1,2]", "model.decoder_depths=[1]", "model.d_state=4"),
    *("batch_size=2", "steps=2", "checkpoint_every=2", "evaluate_every=2", "evaluation_clips=3"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    build_shards(find_runs(DATA).runs, out, DataRecipe(grid="mni4mm", tr=4.0))
    return out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.frames=200", "the longest run has 45 frames, a clip needs model.frames = 200; lower model.frames, or"),
        ("model.frames=20", "the longest held-out stretch has 12 frames, a clip needs model.frames = 20; raise"),
        ("mask.ratio=0.9999", "mask.ratio is 0.9999, which hides all 1419 patches of this grid, so that nothing is"),
        ("mask.ratio=1e-5", "mask.ratio is 1e-05, which hides none of the 1419 patches of this grid, so that there is"),
        ("mask.atlas={run}", "has shape 49×58×47×110, expected a 3D volume"),
        ("mask.atlas={folder}/brain.nii.gz", "one region fills all 1419 patches of this grid, so that nothing is left"),
        ("mask.labels={folder}/table.txt", "table.txt: line 2 begins with 'Left', expected 'id name'"),
    ],
)
def test_what_does_not_fit_the_data_ends_the_command_with_one_sentence(
    shards: Path, tmp_path: Path, monkeypatch, capsys, override: str, said: str
) -> None:
    from boldforge.pretrain import train

    # The data are looked at before any rank is needed.
    monkeypatch.setattr(train, "join_ranks", lambda: (0, 1))
    grid = load_manifest(shards).grid
    nib.save(nib.Nifti1Image(np.ones(grid.shape, np.int16), grid.affine), tmp_path / "brain.nii.gz")
    (tmp_path / "table.txt").write_text("1 Precentral_L\nLeft Precentral_R\n")
    run = next(DATA.glob("*happy*.nii.gz"))
    overrides = [override.format(run=run, folder=tmp_path), "holdout.fraction=0.25"]
    strategy = "mask.strategy=atlas" if "brain" in override else "mask.strategy=region"
    paths = ["--config", "pretrain/tiny.yaml", f"shards={shards}", f"out={tmp_path / 'out'}"]
    assert train.main([*paths, *TINY, strategy, *overrides]) == 2
    shown = capsys.readouterr().err.strip()
    assert said in shown and shown.startswith("boldforge: ") and "\n" not in shown


@pytest.mark.parametrize("n_patches", [2, 3, 7, 1419, 30_011])
def test_the_ratio_that_a_refusal_names_is_one_that_works(n_patches: int) -> None:
    token_grid = TokenGrid(np.ones((n_patches, 1, 1), dtype=bool), (1, 1, 1), 1, 1)
    for ratio in (1e-7, 1 - 1e-7):
        with pytest.raises(ConfigError) as refused:
            MaskSampler(token_grid, MaskConfig(strategy="random", ratio=ratio))
        named = float(str(refused.value).rsplit(" ", 1)[1].rstrip("."))
        assert 0 < MaskSampler(token_grid, MaskConfig(strategy="random", ratio=named)).n_hidden < n_patches


def test_a_single_patch_cannot_be_hidden() -> None:
    with pytest.raises(ConfigError, match=r"a single patch, so that nothing is left to see .* lower model\.patch_mm"):
        MaskSampler(TokenGrid(np.ones((2, 2, 2), dtype=bool), (2, 2, 2), 3, 1), MaskConfig(strategy="random"))


def test_a_changed_recipe_is_named_by_its_key_alone() -> None:
    paths = {"shards": "shards", "out": "out"}
    before = load_config(PretrainConfig, paths).model_dump(mode="json")
    now = load_config(PretrainConfig, paths, ["model.embed_dim=64", "mask.ratio=0.6"]).model_dump(mode="json")
    assert changes(before, before) == []
    assert changes(before, now) == [("model.embed_dim", 32, 64), ("mask.ratio", 0.5, 0.6)]


def odd_atlas(folder: Path) -> tuple[Path, nib.Nifti1Image]:
    """Two regions on a lattice that is turned by 20°, runs from right to left, and has uneven voxels."""
    turn = np.radians(20)
    axes = np.array([[-np.cos(turn), np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = axes * (7.3, 9.1, 8.2)
    affine[:3, 3] = -affine[:3, :3] @ (11, 10, 8)
    data = np.zeros((23, 21, 17), dtype=np.int16)
    places = np.moveaxis(np.indices(data.shape), 0, -1)
    x_mm, y_mm, z_mm = np.moveaxis(nib.affines.apply_affine(affine, places), -1, 0)
    near = (np.abs(y_mm) < 25) & (z_mm > -5) & (z_mm < 40)
    data[near & (np.abs(x_mm + 35) < 15)] = 7
    data[near & (np.abs(x_mm - 35) < 15)] = 300
    image = nib.Nifti1Image(data, affine)
    nib.save(image, folder / "odd.nii.gz")
    (folder / "odd.csv").write_text("# id,name\n7,Side_L\n300,Side_R\n")
    return folder / "odd.nii.gz", image


@pytest.mark.distributed
def test_an_atlas_on_a_turned_lattice_is_hidden_measured_and_mapped_where_it_lies(shards: Path, tmp_path: Path) -> None:
    path, image = odd_atlas(tmp_path)
    out = tmp_path / "run"
    recipe = ["--config", "pretrain/tiny.yaml", f"shards={shards}", f"out={out}", *TINY, "mask.strategy=pair"]
    tables = [f"mask.atlas={path}", f"mask.labels={tmp_path / 'odd.csv'}", "mask.ratio=0.1"]
    command = [sys.executable, "-m", "boldforge.launch.cli", "pretrain", *recipe, *tables]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(",") for line in (out / "regions.csv").read_text().splitlines()]
    assert rows[0] == list(COLUMNS[1:]) and [row[:2] for row in rows[1:]] == [["7", "Side_L"], ["300", "Side_R"]]
    found = nib.load(out / "region_error.nii.gz")
    figures = np.asarray(found.dataobj)
    for number, row in zip((7, 300), rows[1:], strict=True):
        there = nib.affines.apply_affine(found.affine, np.argwhere(np.isclose(figures, float(row[3]), rtol=1e-6)))
        meant = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) == number))
        assert np.abs(there.mean(axis=0) - meant.mean(axis=0)).max() < 4  # a voxel of the grid
        assert (there[:, 0] < 0).all() == (number == 7)
    written = yaml.safe_load((out / "config.yaml").read_text())["mask"]
    assert written["strategy"] == "pair" and written["atlas"] == str(path)


def test_a_lattice_does_not_matter_only_where_the_regions_lie(shards: Path, tmp_path: Path) -> None:
    from boldforge.data_shards import load_atlas

    manifest = load_manifest(shards)
    token_grid = TokenGrid(manifest.brain_mask(), (3, 3, 3), 4, 2)
    path, image = odd_atlas(tmp_path)
    data = np.asarray(image.dataobj)
    flipped = image.affine @ np.array([[-1, 0, 0, 22], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(data[::-1], flipped), tmp_path / "flipped.nii.gz")
    swapped = image.affine[:, [2, 0, 1, 3]]
    nib.save(nib.Nifti1Image(data.transpose(2, 0, 1), swapped), tmp_path / "swapped.nii.gz")
    first = region_tokens(load_atlas(path), manifest.grid, token_grid)
    for name in ("flipped", "swapped"):
        again = region_tokens(load_atlas(tmp_path / f"{name}.nii.gz"), manifest.grid, token_grid)
        assert again.names == first.names
        assert np.array_equal(again.share, first.share) and np.array_equal(again.member, first.member)
