"""The pipeline must find nothing where there is nothing, and say so when a site explains what it found.

Every cohort here is simulated.
"""

import nibabel as nib
import numpy as np
import pytest

from boldforge.configs import load_config
from boldforge.data_shards import DataRecipe, Run, brain_mask, build_shards, get_grid, load_manifest
from boldforge.finetune import AdhdDiagnosis, FinetuneConfig, SweepConfig, finetune, sweep
from boldforge.finetune.cohort import find_cohort

GRID, FRAMES, SUBJECTS = "mni4mm", 8, 36


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Noise for everybody; ``gain`` decides how strongly one block of the brain fluctuates as one."""

    def build(gain, label, site, seed=0, twin=None):
        folder = tmp_path_factory.mktemp("cohort")
        grid = get_grid(GRID)
        mask = brain_mask(grid)
        place = np.argwhere(mask)
        planted = (place[:, 0] < 22) & (place[:, 1] > 26)
        generator = np.random.default_rng(seed)
        runs = []
        for number in range(SUBJECTS):
            values_TV = generator.standard_normal((FRAMES, len(place)), dtype=np.float32)
            # In step, so that it survives averaging over a patch.
            values_TV[:, planted] += gain(number) * generator.standard_normal((FRAMES, 1), dtype=np.float32)
            volume = np.zeros((*grid.shape, FRAMES), dtype=np.float32)
            volume[mask] = values_TV.T
            image = nib.Nifti1Image(volume, grid.affine)
            image.header.set_zooms((4, 4, 4, 2))
            image.header.set_xyzt_units("mm", "sec")
            path = folder / f"{number}.nii"
            image.to_filename(path)
            if number == twin:
                path.write_bytes((folder / "0.nii").read_bytes())
            phenotype = {"diagnosis": label(number)}
            runs.append(Run(f"p{number:02d}", "1", site(number), 2.0, path, phenotype=phenotype, simulated=True))
        build_shards(runs, folder / "shards", DataRecipe(grid=GRID, tr=2.0, normalisation="residual-z", dtype="int16"))
        for run in runs:
            run.path.unlink()
        return folder / "shards"

    return build


def _measure(shards, encoder, out, **changes):
    settings = {"clips": 2, "folds": 3, "adapter": {"rank": 0}, "training": {"epochs": 5}, "baselines": ["site"]}
    return finetune(
        load_config(FinetuneConfig, {"shards": shards, "backbone": encoder, "out": out, **settings, **changes})
    )


@pytest.fixture(scope="module")
def confounded(build):
    """Nine in ten patients at one scanner, which is louder, and nothing that goes with the diagnosis itself."""

    def label(number):
        return int(number % 2) if number % 10 else int(not number % 2)

    return build(
        gain=lambda number: 2.6 if number % 2 else 0.6,
        label=label,
        site=lambda number: "loud" if number % 2 else "quiet",
        seed=3,
    )


@pytest.fixture(scope="module")
def meaningless(build):
    """Labels that were shuffled, at two sites that hold as many of either."""
    shuffled = np.random.default_rng(7).permutation(SUBJECTS // 2)
    return build(
        gain=lambda number: 1 + number / SUBJECTS,
        label=lambda number: int(shuffled[number // 2] % 2),
        site=lambda number: "one" if number % 2 else "other",
        seed=5,
    )


LORA = {"adapter": {"rank": 4, "first_stage": 1}, "training": {"epochs": 5, "lr": 0.003}}


@pytest.mark.parametrize("changes", [{}, pytest.param(LORA, marks=pytest.mark.slow)], ids=["head", "lora"])
def test_a_cohort_in_which_only_the_site_differs_is_called_so(confounded, encoder, tmp_path, changes):
    """The model scores high and must not be believed."""
    results = _measure(confounded, encoder, tmp_path, **changes)
    assert results["figures"]["auc"] > 0.75, "the confound is there to be found"
    assert results["permutation"]["p"] < 0.01 and results["permutation"]["p_within_sites"] >= 0.05
    assert results["verdict"].endswith("site may explain the result.")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [LORA, {"protocol": "leave-one-site-out"}], ids=["lora", "leave-one-site-out"])
def test_nothing_is_found_in_shuffled_labels_by_an_adapter_or_at_a_site_left_out(
    meaningless, encoder, tmp_path, changes
):
    results = _measure(meaningless, encoder, tmp_path, **changes)
    low, high = results["intervals"]["auc"]
    assert low < 0.5 < high and "not shown to be better than chance" in results["verdict"]


@pytest.mark.slow
def test_a_sweep_that_chooses_among_trials_finds_nothing_in_shuffled_labels(meaningless, encoder, tmp_path):
    """The best of several by validation stands high; the test, read once, does not."""
    settings = {"clips": 2, "folds": 3, "ranks": [0, 1, 4], "driver": "serial", "training": {"epochs": 4}}
    settings |= {"shards": meaningless, "backbone": encoder, "out": tmp_path, "baselines": ["site"]}
    results = sweep(load_config(SweepConfig, settings))
    low, high = results["intervals"]["auc"]
    assert low < 0.5 < high and "not shown to be better than chance" in results["verdict"]


def test_labels_that_mean_nothing_give_chance_within_its_interval(build, encoder, tmp_path):
    shuffled = np.random.default_rng(7).permutation(np.arange(SUBJECTS) % 2)
    shards = build(
        gain=lambda number: 1 + number / SUBJECTS, label=lambda number: int(shuffled[number]), site=lambda number: "one"
    )
    found = []
    for seed in range(3):
        results = _measure(shards, encoder, tmp_path / str(seed), seed=seed, baselines=[])
        low, high = results["intervals"]["auc"]
        found.append(results["figures"]["auc"])
        assert low < 0.5 < high and results["verdict"].endswith("not shown to be better than chance.")
    assert 0.3 < np.mean(found) < 0.7


def test_one_person_under_two_names_is_counted_once(build, caplog):
    shards = build(gain=lambda number: 1.0, label=lambda number: number % 2, site=lambda number: "one", twin=5)
    cohort = find_cohort(load_manifest(shards), AdhdDiagnosis(), 4)
    names = [subject.name for subject in cohort.subjects]
    assert cohort.n_duplicates == 1 and "p00" in names and "p05" not in names and len(names) == SUBJECTS - 1
    assert "also another subject's" in caplog.text
