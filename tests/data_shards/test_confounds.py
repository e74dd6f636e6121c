import nibabel as nib
import numpy as np
import pytest
from nilearn.interfaces.fmriprep import load_confounds
from nilearn.signal import clean as nilearn_clean

from boldforge.data_shards import (
    BuildError,
    ClipStream,
    DataRecipe,
    build_shards,
    find_runs,
    load_manifest,
    prepare_run,
)
from boldforge.data_shards import prepare as prepare_module
from boldforge.data_shards.confounds import ConfoundError, clean, consecutive, read_confounds, regressors, still_frames

MNI = "space-MNI152NLin2009cAsym_res-2"
STEM = "sub-01_task-rest_run-1"
N = 60
MOVED = (0, 9, 12, 30, 31, 57)  # frames with a displacement of 1 mm


@pytest.fixture
def dataset(tmp_path, write_bold):
    """One run as fMRIPrep writes it, its head moving at known frames and its values following the head."""
    rng = np.random.default_rng(0)
    motion = rng.normal(size=(N, 6)) * 0.1
    names = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    table = dict(zip(names, motion.T, strict=True))
    for name in names:
        table[f"{name}_derivative1"] = np.r_[np.nan, np.diff(table[name])]
        table[f"{name}_power2"] = table[name] ** 2
        table[f"{name}_derivative1_power2"] = table[f"{name}_derivative1"] ** 2
    table |= {name: rng.normal(500, 5, N) for name in ("csf", "white_matter", "global_signal")}
    table |= {f"cosine{i:02d}": np.cos(np.pi * (np.arange(N) + 0.5) * (i + 1) / N) for i in range(2)}
    displacement = np.where(np.isin(np.arange(N), MOVED[1:]), 1.0, 0.1)
    table["framewise_displacement"] = np.r_[np.nan, displacement[1:]]
    table["std_dvars"] = np.r_[np.nan, np.ones(N - 1)]
    table["non_steady_state_outlier00"] = np.eye(N)[0]
    folder = tmp_path / "fmriprep/sub-01/func"
    path = write_bold(f"fmriprep/sub-01/func/{STEM}_{MNI}_desc-preproc_bold.nii.gz", frames=N, tr=2.0)
    image = nib.load(path)
    values = np.asarray(image.dataobj) + (200 * motion[:, 0]).round()
    nib.save(nib.Nifti1Image(values.astype(np.int16), image.affine, image.header), path)
    rows = zip(*table.values(), strict=True)
    text = ["\t".join(table)] + ["\t".join("n/a" if np.isnan(x) else f"{x:.10g}" for x in row) for row in rows]
    (folder / f"{STEM}_desc-confounds_timeseries.tsv").write_text("\n".join(text) + "\n")
    (folder / f"{STEM}_desc-confounds_timeseries.json").write_text("{}")
    return tmp_path / "fmriprep"


def the_run(dataset):
    (run,) = find_runs(dataset).runs
    return run


def test_the_confounds_file_is_found_for_any_space(dataset):
    assert the_run(dataset).confounds_path.name == f"{STEM}_desc-confounds_timeseries.tsv"


@pytest.mark.parametrize(
    ("wanted", "strategy", "options"),
    [
        (("motion-6",), ("motion",), {"motion": "basic"}),
        (("motion-24", "wm-csf"), ("motion", "wm_csf"), {"motion": "full", "wm_csf": "basic"}),
        (("motion-6", "global-signal", "cosine"), ("motion", "global_signal", "high_pass"), {"motion": "basic"}),
    ],
)
def test_named_sets_are_nilearns_columns(dataset, wanted, strategy, options):
    run = the_run(dataset)
    theirs, _ = load_confounds(str(run.path), strategy=strategy, demean=False, **options)
    ours = regressors(read_confounds(run.confounds_path, N), wanted)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.sort(ours.sum(axis=0)), np.sort(theirs.to_numpy().sum(axis=0)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("keep", [2, 5, 10])
def test_frames_are_scrubbed_as_nilearn_does(dataset, keep):
    run = the_run(dataset)
    _, theirs = load_confounds(
        str(run.path), strategy=("motion", "scrub"), motion="basic", fd_threshold=0.5, std_dvars_threshold=9, scrub=keep
    )
    ours = still_frames(read_confounds(run.confounds_path, N), 0.5, keep)
    np.testing.assert_array_equal(np.flatnonzero(ours), theirs)


def brain_values(dataset, **options):
    return prepare_run(the_run(dataset), DataRecipe(grid="mni4mm", tr=2.0, normalisation="global-z", **options))


def unscaled(prepared):
    return prepared.values_TV[:, prepared.covered] * prepared.normalisation.std + prepared.normalisation.mean


@pytest.mark.parametrize(
    "options",
    [
        {"confounds": ("motion-6",)},
        {"confounds": ("motion-24", "wm-csf"), "detrend": True, "high_pass": 0.01, "low_pass": 0.1},
        {"detrend": True},
    ],
)
def test_voxels_are_cleaned_as_nilearn_cleans_them(dataset, options, monkeypatch):
    brain_points = prepare_module._brain_points  # nilearn filters voxel by voxel: some hundred will do
    monkeypatch.setattr(prepare_module, "_brain_points", lambda grid: brain_points(grid)[::60])
    raw, cleaned = brain_values(dataset), brain_values(dataset, **options)
    columns = read_confounds(the_run(dataset).confounds_path, N)
    wanted = options.get("confounds")
    filtered = "high_pass" in options
    values = unscaled(raw).astype(np.float64)
    theirs = nilearn_clean(
        values,
        confounds=regressors(columns, wanted) if wanted else None,
        detrend=options.get("detrend", False),
        standardize=None,
        filter="butterworth" if filtered else False,
        high_pass=options.get("high_pass"),
        low_pass=options.get("low_pass"),
        t_r=2.0,
    )
    ours = unscaled(cleaned)
    np.testing.assert_allclose(ours.mean(axis=0), values.mean(axis=0), rtol=1e-5)  # the mean stays
    np.testing.assert_allclose(ours - ours.mean(axis=0), theirs - theirs.mean(axis=0), atol=2e-2)
    if wanted:
        motion = columns["trans_x"]
        before, after = (abs(np.corrcoef(motion, x.mean(axis=1))[0, 1]) for x in (values, ours))
        assert before > 0.9
        assert after < 0.25


@pytest.mark.parametrize("tr", [2.0, 2.7])
def test_no_clip_reaches_over_a_removed_frame(dataset, tmp_path, tr):
    recipe = DataRecipe(grid="mni4mm", tr=tr, scrub_fd=0.5, scrub_keep=5)
    build_shards(find_runs(dataset), tmp_path / "out", recipe)
    manifest = load_manifest(tmp_path / "out")
    # Frames 0, 9, 12, 30, 31 and 57 go, and with them 10 and 11, and 58 and 59.
    kept = [(1, 9), (13, 30), (32, 57)]
    assert [run.key for run in manifest.runs] == [STEM, f"{STEM}_part-2", f"{STEM}_part-3"]
    assert [run.source_start for run in manifest.runs] == [start for start, _ in kept]
    frames = [int((stop - start - 1) * 2.0 / tr + 1e-6) + 1 for start, stop in kept]
    assert [run.n_frames for run in manifest.runs] == frames
    assert {run.subject for run in manifest.runs} == {"01"}
    assert manifest.recipe.scrub_fd == 0.5

    prepared = prepare_run(the_run(dataset), recipe)
    ends = np.cumsum([0, *frames])
    stream = ClipStream(manifest, clip_length=4, batch_size=2, seed=0)
    for batch in (stream.batch(step) for step in range(8)):
        for values, run, start in zip(batch.dequantise(), batch.run, batch.start, strict=True):
            first = ends[run] + start
            assert first + 4 <= ends[run + 1]
            wanted = prepared.values_TV[first : first + 4]
            np.testing.assert_allclose(values.numpy(), wanted, atol=1e-3)


def test_each_stretch_is_resampled_by_itself(dataset):
    run = the_run(dataset)
    one = prepare_run(run, DataRecipe(grid="mni4mm", tr=2.0, normalisation="global-z"))
    two = prepare_run(run, DataRecipe(grid="mni4mm", tr=1.0, normalisation="global-z", scrub_fd=0.5, scrub_keep=5))
    first = two.stretches[1]
    values = two.values_TV[first.start : first.stop : 2] * two.normalisation.std + two.normalisation.mean
    wanted = one.values_TV[13:30] * one.normalisation.std + one.normalisation.mean
    used = one.covered & two.covered
    np.testing.assert_allclose(values[:, used], wanted[:, used], atol=0.05)


def test_a_run_without_what_the_recipe_needs_is_rejected_by_name(dataset, tmp_path, write_bold):
    table = the_run(dataset).confounds_path
    lines = table.read_text().splitlines()
    cases = [
        ({"confounds": ("a_comp_cor_00",)}, lines, "no column 'a_comp_cor_00'"),
        ({"confounds": ("motion-6",)}, lines[:-3], "has 57 rows, the run 60 frames"),
        ({"confounds": ("motion-6",)}, [*lines[:20], lines[20].replace("0.", "x."), *lines[21:]], "no number for"),
        ({"scrub_fd": 0.01}, lines, "head never moved less than 0.01 mm for 5 frames in a row"),
    ]
    for options, text, message in cases:
        table.write_text("\n".join(text) + "\n")
        with pytest.raises(ConfoundError, match=message) as caught:
            prepare_run(the_run(dataset), DataRecipe(grid="mni4mm", **options))
        assert str(caught.value).startswith(str(the_run(dataset).path))
    table.unlink()
    with pytest.raises(BuildError, match=r"needs confounds.*but none were found"):
        build_shards(find_runs(dataset), tmp_path / "out", DataRecipe(grid="mni4mm", confounds=("motion-6",)))


def test_rows_of_kept_frames():
    assert consecutive(np.array([1, 1, 0, 1, 0, 0, 1], dtype=bool)) == [(0, 2), (3, 4), (6, 7)]
    assert consecutive(np.zeros(3, dtype=bool)) == []
    assert consecutive(np.ones(3, dtype=bool)) == [(0, 3)]


def test_a_recipe_without_options_is_what_it_was():
    plain = DataRecipe(grid="mni4mm", tr=2.0)
    assert plain.model_dump(mode="json") == {
        "grid": "mni4mm", "tr": 2.0, "normalisation": "residual-z", "dtype": "int16",
    }  # fmt: skip
    cleaned = DataRecipe(grid="mni4mm", tr=2.0, confounds=("motion-6",), scrub_fd=0.5, detrend=True)
    assert cleaned.model_dump(mode="json") == plain.model_dump(mode="json") | {
        "confounds": ["motion-6"], "scrub_fd": 0.5, "detrend": True,
    }  # fmt: skip
    assert DataRecipe.model_validate_json(cleaned.model_dump_json()) == cleaned
    assert cleaned.as_options() == (
        "--grid mni4mm --tr 2 --normalisation residual-z --confounds motion-6 --detrend --scrub-fd 0.5"
    )
    with pytest.raises(ValueError, match=r"high_pass .* must be below low_pass"):
        DataRecipe(high_pass=0.1, low_pass=0.05)


@pytest.mark.parametrize("name", ["high_pass", "low_pass"])
def test_a_filter_at_or_above_nyquist_is_refused_and_not_lowered(name):
    with pytest.raises(ConfoundError, match=f"{name} is 0.25 Hz, expected less than 0.25 Hz"):
        clean(np.zeros((40, 3), np.float32), None, np.ones(40, bool), 2.0, DataRecipe(**{name: 0.25}))
