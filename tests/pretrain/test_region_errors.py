"""Per-region errors: the figures, the table that grows, and a map on which left is left."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from boldforge.data_shards import Grid, brain_mask, get_grid, load_atlas
from boldforge.pretrain import HeldoutError, RegionVoxels, region_voxels
from boldforge.pretrain.region_errors import RegionError, log_table, region_errors, write_map, write_table


def test_errors_are_means_over_each_regions_voxels_in_their_shares() -> None:
    rng = np.random.default_rng(0)
    count = np.array([0.0, 4, 2, 0, 7, 1])
    measured = HeldoutError(rng.random(6) * count, rng.random(6) * count, count)
    pairs = [(0, 0, 0.5), (1, 0, 0.25), (1, 1, 0.75), (2, 1, 1.0), (3, 2, 1.0), (4, 3, 0.01)]
    voxel, region, share = (np.array(column) for column in zip(*pairs, strict=True))
    regions = RegionVoxels((2, 4, 6, 8), ("a", "b", "never", "tiny"), voxel, region, share)
    rows = region_errors(measured, regions)
    assert [row.name for row in rows] == ["a", "b", "tiny"]  # what no mask hides is not measured
    for row in rows:
        members = [(v, w) for v, r, w in pairs if regions.ids[r] == row.region]
        held = sum(w * count[v] for v, w in members)
        assert row.voxels_measured == pytest.approx(held)
        assert row.error == pytest.approx(sum(w * measured.error_V[v] for v, w in members) / held)
        assert row.baseline == pytest.approx(sum(w * measured.baseline_V[v] for v, w in members) / held)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_table_grows_by_a_block_per_evaluation_and_forgets_what_a_killed_run_wrote(tmp_path: Path) -> None:
    path = tmp_path / "region_errors.tsv"
    blocks = {
        step: [RegionError(1, "a", 3.5, step / 3, 0.1), RegionError(2, "b", 1.0, step / 7, 0.2)] for step in (10, 20)
    }
    log_table(path, 10, blocks[10])
    log_table(path, 20, [RegionError(1, "a", 9.0, 9.0, 9.0)])
    log_table(path, 30, blocks[10])
    log_table(path, 20, blocks[20])
    rows = read(path)
    assert [(row["step"], row["name"]) for row in rows] == [("10", "a"), ("10", "b"), ("20", "a"), ("20", "b")]
    assert float(rows[2]["error"]) == 20 / 3  # full precision
    assert [child.name for child in tmp_path.iterdir()] == ["region_errors.tsv"]


@pytest.mark.parametrize("name", ["mni4mm", "neurostorm"])
def test_on_the_map_left_is_left_and_every_region_has_its_figure(tmp_path: Path, name: str) -> None:
    atlas, grid = load_atlas(), get_grid(name)
    mask = brain_mask(grid)
    regions = region_voxels(atlas, grid, mask)
    values = {label: float(label) for label in atlas.labels if label != 2}  # Precentral_R was not measured
    write_map(tmp_path / "map.nii.gz", values, regions, grid, mask)
    image = nib.load(tmp_path / "map.nii.gz")
    volume = image.get_fdata()
    assert volume.shape == grid.shape and image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.affine, grid.affine)
    assert image.header["sform_code"] == image.header["qform_code"] == 4
    np.testing.assert_allclose(image.get_qform(), grid.affine, atol=1e-5)
    assert not np.isfinite(volume[~mask]).any()

    def at(*mm: float) -> float:
        return float(volume[tuple(np.rint(np.linalg.inv(image.affine) @ [*mm, 1])[:3].astype(int))])

    # Coordinates of nilearn's and the atlas's own space: the left hippocampus lies at negative x.
    assert atlas.labels[round(at(-27, -19, -15))] == "Hippocampus_L"
    assert atlas.labels[round(at(29, -19, -15))] == "Hippocampus_R"
    places = nib.affines.apply_affine(image.affine, np.argwhere(mask))
    for label, figure, side in ((1, 1.0, -1), (2, np.nan, 1)):
        whole = regions.voxel[(regions.region == regions.ids.index(label)) & (regions.share > 0.999)]
        assert len(whole) > 100 and (side * places[whole][:, 0] > 0).all()
        np.testing.assert_allclose(volume[mask][whole], figure, rtol=1e-6)


def test_a_voxel_of_two_regions_has_the_mean_of_their_figures_and_the_bytes_repeat(tmp_path: Path) -> None:
    grid = Grid("two", (2, 1, 1), np.diag([2.0, 2, 2, 1]))
    shares = (np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([0.25, 0.5, 0.1]))
    regions = RegionVoxels((4, 6), ("a", "b"), *shares)
    mask = np.ones((2, 1, 1), dtype=bool)
    for name in ("one.nii.gz", "two.nii.gz"):
        write_map(tmp_path / name, {4: 3.0, 6: 9.0}, regions, grid, mask)
    volume = np.asarray(nib.load(tmp_path / "one.nii.gz").dataobj).ravel()
    np.testing.assert_allclose(volume, [(0.25 * 3 + 0.5 * 9) / 0.75, 9.0])
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_the_final_table_is_what_the_report_reads(tmp_path: Path) -> None:
    from boldforge.launch.report import _read_regions

    write_table(tmp_path / "regions.csv", [RegionError(1, "Precentral_L", 12.5, 0.5, 1.0)])
    assert _read_regions(tmp_path / "regions.csv") == [
        {"name": "Precentral_L", "error": 0.5, "baseline": 1.0, "gain": 0.5}
    ]
