"""The grid and the normalisation ``neurostorm`` beside that model's own preprocessing, written down by array index."""

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from boldforge.data_shards import DataRecipe, ShardReader, brain_mask, build_shards, find_runs, get_grid, prepare_run
from boldforge.data_shards.runs import Run

SHAPE, FRAMES = (91, 109, 91), 6
LAS = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
RECIPE = DataRecipe(grid="neurostorm", tr=0.8, normalisation="neurostorm", dtype="int16")


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    """A skull-stripped run as stored in a 91×109×91 MNI file: zero outside an off-centre ellipsoid."""
    rng = np.random.default_rng(0)
    x, y, z = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    inside = ((x - 42) / 36) ** 2 + ((y - 50) / 44) ** 2 + ((z - 47) / 35) ** 2 <= 1
    values = rng.normal(300, 90, (*SHAPE, FRAMES)).astype(np.float32)
    assert (values[inside] < 0).any()  # they are set to zero
    return np.where(inside[..., None], values, 0)


def write(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 0.8
    nib.save(image, path)
    return path


def preprocess_by_index(values: np.ndarray) -> np.ndarray:
    """NeuroSTORM's steps for an array at 2 mm and 0.8 s: crop, negatives to zero, z-score the brain, fill, pad."""
    crop = tuple(slice((n - 96) // 2, (n - 96) // 2 + 96) if n > 96 else slice(None) for n in values.shape[:3])
    values = values[crop].astype(np.float64)
    background = (values == 0).all(axis=-1)
    values = np.maximum(values, 0)
    inside = values[~background]
    values = (values - inside.mean()) / inside.std()
    values[background] = values[~background].min()
    missing = [96 - n for n in values.shape[:3]]
    pads = [(math.ceil(m / 2), math.floor(m / 2)) for m in missing] + [(0, 0)]
    return np.pad(values, pads, constant_values=values[0, 0, 0, 0])


def cube(path: Path) -> np.ndarray:
    prepared = prepare_run(Run(subject="1", session=None, site=None, tr=None, path=path), RECIPE)
    return prepared.values_TV.T.reshape(96, 96, 96, -1)


def test_the_corners_lie_where_the_array_recipe_puts_them() -> None:
    grid = get_grid("neurostorm")
    assert grid.shape == (96, 96, 96) and grid.voxel_size == 2.0
    place = np.linalg.inv(grid.affine) @ LAS
    assert np.array_equal(place @ [0, 6, 0, 1], [3, 0, 3, 1])
    assert np.array_equal(place @ [90, 101, 90, 1], [93, 95, 93, 1])
    assert brain_mask(grid).all()


def test_a_file_as_stored_gives_the_same_cube(brain: np.ndarray, tmp_path: Path) -> None:
    found = cube(write(tmp_path / "las.nii", brain, LAS))
    np.testing.assert_allclose(found, preprocess_by_index(brain), atol=2e-5)


def test_any_orientation_and_any_margin_give_the_same_cube(brain: np.ndarray, tmp_path: Path) -> None:
    wanted = preprocess_by_index(brain)
    image = nib.Nifti1Image(brain, LAS)
    turned = image.as_reoriented(nib.io_orientation(np.diag([-1.0, 1, 1, 1])))
    assert nib.aff2axcodes(turned.affine) == ("R", "A", "S")
    found = cube(write(tmp_path / "ras.nii", np.asarray(turned.dataobj), turned.affine))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    affine = LAS.copy()
    affine[:3, 3] -= LAS[:3, :3] @ [4, 2, 5]
    padded = np.pad(brain, ((4, 1), (2, 3), (5, 0), (0, 0)))
    np.testing.assert_allclose(cube(write(tmp_path / "wider.nii", padded, affine)), wanted, atol=2e-5)


def test_shards_hold_the_background_too(brain: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    write(folder / "sub-01_task-rest_space-MNI152_bold.nii", brain, LAS)
    manifest = build_shards(find_runs(folder), tmp_path / "shards", RECIPE).manifest
    assert manifest.n_voxels == 96**3 and manifest.runs[0].coverage < 0.4
    stored = ShardReader(manifest).read(0, 0, FRAMES)
    found = (stored.mean + stored.q * stored.scale).T.reshape(96, 96, 96, -1)
    np.testing.assert_allclose(found, preprocess_by_index(brain), atol=1e-3)
    outside = stored.scale == 0
    assert set(stored.mean[outside].tolist()) == {float(stored.mean[0])}
