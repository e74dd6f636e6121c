import csv
import json

import nibabel as nib
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from boldforge.data_shards import (
    AtlasError,
    DataRecipe,
    ShardReader,
    SimulationConfig,
    SimulationError,
    atlas_on_grid,
    build_shards,
    check_headers,
    find_runs,
    load_atlas,
    simulate_cohort,
)
from boldforge.data_shards.layout_adhd200 import PHENOTYPE_COLUMNS
from boldforge.data_shards.simulate import DEFAULT_REGIONS, PHENOTYPE_FILE, Site


def small(**changes):
    return SimulationConfig(**{"n_subjects": 6, "n_frames": 16, **changes})


def region_deviations(manifest):
    """Temporal standard deviation per region and run, and the labels."""
    atlas = load_atlas()
    labels = atlas_on_grid(atlas, manifest.grid)[manifest.brain_mask()]
    reader = ShardReader(manifest)
    rows = []
    for index, run in enumerate(manifest.runs):
        clip = reader.read(index, 0, run.n_frames)
        deviation = (clip.q * clip.scale).std(axis=0)
        sums = np.bincount(labels, deviation, minlength=171) / np.maximum(np.bincount(labels, minlength=171), 1)
        rows.append(sums[sorted(atlas.labels)])
    return np.array(rows), np.array([run.phenotype["diagnosis"] for run in manifest.runs])


def separation(tmp_path, effect):
    simulate_cohort(tmp_path / "cohort", SimulationConfig(n_subjects=24, n_frames=24, effect=effect, seed=5))
    recipe = DataRecipe(grid="mni4mm", tr=2.0)
    x, y = region_deviations(build_shards(find_runs(tmp_path / "cohort"), tmp_path / "shards", recipe).manifest)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    return roc_auc_score(y, cross_val_predict(model, x, y, cv=folds, method="decision_function"))


def test_a_planted_effect_can_be_found(tmp_path):
    assert separation(tmp_path, effect=1.0) > 0.9


def test_without_an_effect_the_groups_do_not_differ(tmp_path):
    # Eight false alarms in ten thousand at 24 subjects lie beyond 0.9; the seed is fixed.
    assert 0.2 < separation(tmp_path, effect=0.0) < 0.8


def volumes(folder):
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(folder.rglob("*.nii.gz"))}


def diagnoses(folder):
    return {run.path.name: run.phenotype["diagnosis"] for run in find_runs(folder).runs}


def test_effect_zero_makes_files_that_do_not_depend_on_the_group(tmp_path):
    one = simulate_cohort(tmp_path / "one", small(effect=0.0, balance=0.2))
    two = simulate_cohort(tmp_path / "two", small(effect=0.0, balance=0.8))
    assert diagnoses(one) != diagnoses(two)
    for name, values in volumes(one).items():
        np.testing.assert_array_equal(values, volumes(two)[name])


def test_the_difference_is_planted_in_the_named_regions_of_patients_only(tmp_path):
    region = "Cingulate_Mid_L"
    without = simulate_cohort(tmp_path / "without", small(effect=0.0, noise=0.0, regions=(region,)))
    planted = simulate_cohort(tmp_path / "with", small(effect=1.0, noise=0.0, regions=(region,)))
    from boldforge.data_shards.simulate import ATHENA_GRID

    atlas = load_atlas()
    inside = atlas_on_grid(atlas, ATHENA_GRID) == atlas.ids([region])[0]
    before, after, patient = volumes(without), volumes(planted), diagnoses(planted)
    for name in before:
        np.testing.assert_array_equal(before[name][~inside], after[name][~inside])
        ratio = after[name][inside].std() / before[name][inside].std()
        assert ratio == pytest.approx(2.0 if patient[name] else 1.0, rel=0.02)


def test_the_folder_is_an_athena_folder_that_says_it_is_simulated(tmp_path):
    out = simulate_cohort(tmp_path / "cohort", small())
    with (out / PHENOTYPE_FILE).open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert tuple(rows[0]) == PHENOTYPE_COLUMNS
    assert len(rows) == 6
    found = find_runs(out)
    assert found.layout == "adhd200"
    assert not found.skipped
    assert all(run.simulated for run in found.runs)
    assert [run.site for run in found.runs] == ["NYU", "Peking", "KKI"] * 2
    assert [run.tr for run in found.runs] == [2.0, 2.0, 2.5] * 2
    about = json.loads((out / "simulation.json").read_text())
    assert about["notice"].startswith("SIMULATED")
    assert about["regions"] == list(DEFAULT_REGIONS)
    manifest = build_shards(found, tmp_path / "shards", DataRecipe(grid="mni4mm", tr=2.0)).manifest
    assert manifest.simulated


def test_simulated_files_stay_simulated_however_they_are_found(tmp_path):
    out = simulate_cohort(tmp_path / "above/cohort", small(n_subjects=2))
    paths = sorted(out.rglob("*.nii.gz"))
    rows = [f"{path.relative_to(tmp_path)}\tP{number}\n" for number, path in enumerate(paths)]
    (tmp_path / "runs.tsv").write_text("path\tsubject\n" + "".join(rows))
    (tmp_path / "bids").mkdir()
    paths[0].rename(tmp_path / "bids/sub-1_space-MNI152_bold.nii.gz")
    (tmp_path / paths[0].relative_to(tmp_path)).symlink_to(tmp_path / "bids/sub-1_space-MNI152_bold.nii.gz")
    recipe = DataRecipe(grid="mni4mm", tr=2.0)
    for source, layout, count in ((out.parent, "adhd200", 2), (tmp_path, "table", 2), (tmp_path / "bids", "bids", 1)):
        found = find_runs(source, root=tmp_path)
        assert (found.layout, len(found.runs)) == (layout, count)
        assert all(run.simulated for run in check_headers(found).runs)
        manifest = build_shards(found, tmp_path / f"shards-{layout}", recipe).manifest
        assert all(run.simulated for run in manifest.runs)


def test_files_look_like_athena_residuals(tmp_path):
    out = simulate_cohort(tmp_path / "cohort", small(n_subjects=2))
    path = next(out.rglob("sfnwmrda*_session_1_rest_1.nii.gz"))
    image = nib.load(path)
    assert image.shape == (49, 58, 47, 16)
    np.testing.assert_array_equal(image.affine, [[-4, 0, 0, 96], [0, 4, 0, -132], [0, 0, 4, -70], [0, 0, 0, 1]])
    data = np.asarray(image.dataobj, dtype=float)
    assert np.abs(data.mean(axis=3)).max() < 0.5  # mean removed, in whole units
    assert data.min() < 0 < data.max()


def test_regions_of_a_network_go_together(tmp_path):
    out = simulate_cohort(tmp_path / "cohort", small(n_subjects=2, n_frames=200, noise=0.2))
    from boldforge.data_shards.simulate import ATHENA_GRID

    labels, atlas = atlas_on_grid(load_atlas(), ATHENA_GRID), load_atlas()
    data = next(iter(volumes(out).values()))
    calcarine, cuneus, precentral = (
        data[labels == number].mean(axis=0) for number in atlas.ids(["Calcarine_L", "Cuneus_R", "Precentral_L"])
    )
    assert np.corrcoef(calcarine, cuneus)[0, 1] > np.corrcoef(calcarine, precentral)[0, 1] + 0.2


def test_same_seed_same_bytes_and_groups_balanced_in_every_site(tmp_path):
    one = simulate_cohort(tmp_path / "one", small(n_subjects=12))
    two = simulate_cohort(tmp_path / "two", small(n_subjects=12))
    other = simulate_cohort(tmp_path / "other", small(n_subjects=12, seed=1))
    names = sorted(path.relative_to(one) for path in one.rglob("*.*"))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert any((one / name).read_bytes() != (other / name).read_bytes() for name in names)
    for site in ("NYU", "Peking", "KKI"):
        group = [run.phenotype["diagnosis"] for run in find_runs(one).runs if run.site == site]
        assert sum(group) == len(group) / 2


def test_mistakes_are_explained_and_real_scans_are_never_overwritten(tmp_path, write_bold):
    with pytest.raises(AtlasError, match="no region named Nowhere_L"):
        simulate_cohort(tmp_path / "a", small(regions=("Nowhere_L",)))
    with pytest.raises(SimulationError, match="Unknown site 'Mars'"):
        simulate_cohort(tmp_path / "a", small(sites=(Site(name="Mars", tr=2.0),)))
    path = write_bold("real/sub-01_bold.nii.gz")
    with pytest.raises(SimulationError, match="not simulated"):
        simulate_cohort(path.parent, small())
    assert path.exists()


def test_a_second_simulation_replaces_the_first_and_says_so(tmp_path, caplog):
    simulate_cohort(tmp_path, small(n_subjects=4))
    assert not caplog.records
    seen = []
    simulate_cohort(tmp_path, small(n_subjects=2), on_progress=lambda *done: seen.append(done))
    assert len(find_runs(tmp_path).runs) == 2
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert "the 4 scans of an earlier simulation are replaced" in caplog.text


def test_a_real_phenotype_table_is_never_replaced(tmp_path):
    (tmp_path / PHENOTYPE_FILE).write_text("ScanDir ID\tDX\n1000\t1\n")
    with pytest.raises(SimulationError, match="that was not simulated, which would be replaced"):
        simulate_cohort(tmp_path, small())
    assert (tmp_path / PHENOTYPE_FILE).read_text().endswith("1000\t1\n")


def test_scans_put_beside_a_simulation_are_never_removed(tmp_path, write_bold):
    simulate_cohort(tmp_path / "cohort", small())
    mine = write_bold("cohort/sub-mine_task-rest_space-MNI152_bold.nii.gz")
    before = sorted((tmp_path / "cohort").rglob("*"))
    with pytest.raises(SimulationError, match="sub-mine"):
        simulate_cohort(tmp_path / "cohort", small())
    assert sorted((tmp_path / "cohort").rglob("*")) == before
    next((tmp_path / "cohort").rglob("sfnwmrda*")).write_bytes(b"")  # as a kill leaves it
    mine.unlink()
    simulate_cohort(tmp_path / "cohort", small())
