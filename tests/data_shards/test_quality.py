import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nilearn.maskers import NiftiMasker

from boldforge.data_shards import (
    DataRecipe,
    ShardError,
    ShardReader,
    build_shards,
    carpet,
    find_runs,
    load_manifest,
    prepare_run,
    quality,
)
from boldforge.data_shards.carpet import draw_carpet, tissues_of
from boldforge.data_shards.quality import (
    DVARS_EDGES,
    FLAG_Z,
    LEAST_RUNS,
    RULES,
    RunQuality,
    flag_outliers,
    measure_quality,
    measure_run,
    run_image,
)


@pytest.fixture(scope="module")
def with_mean(tmp_path_factory, real_runs):
    """The two real runs, normalised so that their mean images survive."""
    out = tmp_path_factory.mktemp("global")
    return build_shards(real_runs, out, DataRecipe(grid="mni4mm", tr=2.0, normalisation="global-z")).manifest


def dense(manifest, number):
    """Values of a run as float64 [T, V], and which voxels carry signal."""
    run = manifest.runs[number]
    q, scale, mean = ShardReader(manifest).read(number, 0, run.n_frames)
    return mean + q.astype(np.float64) * scale, scale > 0


def test_a_runs_moments_are_those_of_the_dense_values(real_shards, monkeypatch):
    monkeypatch.setattr(quality, "_BLOCK_BYTES", 7 * real_shards.frame_bytes)  # of 90 and 64 frames: never whole blocks
    for number in range(2):
        values, covered = dense(real_shards, number)
        moments = measure_run(ShardReader(real_shards), number)
        np.testing.assert_array_equal(moments.covered, covered)
        np.testing.assert_allclose(moments.mean[covered], values.mean(axis=0)[covered], atol=1e-4)
        np.testing.assert_allclose(moments.variance[covered], values.var(axis=0)[covered], rtol=1e-4)
        change = np.square(np.diff(values, axis=0)).mean(axis=0)
        np.testing.assert_allclose(moments.change[covered], change[covered], rtol=1e-4)


def test_dvars_is_that_of_a_dense_volume_read_by_nilearn(real_shards, tmp_path):
    values, covered = dense(real_shards, 1)
    mask = real_shards.brain_mask()
    volume = np.zeros((*mask.shape, len(values)), dtype=np.float32)
    volume[mask] = values.T
    inside = mask.copy()
    inside[mask] = covered
    affine = real_shards.grid.affine
    masker = NiftiMasker(nib.Nifti1Image(inside.astype(np.uint8), affine), standardize=None)
    series = masker.fit_transform(nib.Nifti1Image(volume, affine)).astype(np.float64)
    expected = np.sqrt(np.square(np.diff(series, axis=0)).mean(axis=1)) / np.sqrt(series.var(axis=0).mean())
    np.testing.assert_allclose(measure_run(ShardReader(real_shards), 1).dvars, expected, rtol=1e-4)


def test_tsnr_is_that_of_the_values_before_normalisation(with_mean, real_runs):
    measured = {run.key: run for run in measure_quality(with_mean).runs}
    for run in real_runs.runs:
        recipe = DataRecipe(grid="mni4mm", tr=2.0, normalisation="min-max")
        prepared = prepare_run(run, recipe)
        low, span = prepared.normalisation.mean, prepared.normalisation.std
        source = low + span * prepared.values_TV[:, prepared.covered].astype(np.float64)
        expected = np.median(source.mean(axis=0) / source.std(axis=0))
        assert measured[run.key].tsnr == pytest.approx(expected, rel=1e-3)


def test_percent_signal_change_gives_the_same_tsnr(with_mean, real_runs, tmp_path):
    recipe = DataRecipe(grid="mni4mm", tr=2.0, normalisation="percent-signal-change")
    percent = measure_quality(build_shards(real_runs, tmp_path / "psc", recipe).manifest)
    expected = measure_quality(with_mean)
    assert percent.image_kind == "deviation"
    for one, other in zip(percent.runs, expected.runs, strict=True):
        assert one.tsnr == pytest.approx(other.tsnr, rel=0.01)
        assert one.dvars > 0


@pytest.mark.parametrize(("normalisation", "kind"), [("residual-z", "deviation"), ("voxel-z", "change")])
def test_where_the_mean_was_removed_tsnr_is_undefined_and_another_image_is_taken(
    real_runs, tmp_path, normalisation, kind
):
    recipe = DataRecipe(grid="mni4mm", tr=2.0, normalisation=normalisation)
    measured = measure_quality(build_shards(real_runs, tmp_path / "shards", recipe).manifest)
    assert measured.image_kind == kind
    assert all(np.isnan(run.tsnr) for run in measured.runs)
    assert np.nanstd(measured.image_V) > 0.05, "the image shows something"


def test_residual_data_have_no_tsnr_whatever_the_normalisation(tmp_path, write_bold):
    path = write_bold()
    image = nib.load(path)
    values = np.asarray(image.dataobj).astype(np.float32)
    values -= values.mean(axis=-1, keepdims=True)
    header = image.header.copy()
    header.set_data_dtype(np.float32)
    nib.save(nib.Nifti1Image(values, image.affine, header), path)
    recipe = DataRecipe(grid="mni4mm", tr=2.0, normalisation="global-z")
    measured = measure_quality(build_shards(find_runs(tmp_path), tmp_path / "shards", recipe).manifest)
    assert np.isnan(measured.runs[0].tsnr)
    assert measured.image_kind == "deviation"


def test_the_datasets_images_are_averages_over_the_runs_that_cover_a_voxel(with_mean):
    measured = measure_quality(with_mean)
    assert measured.image_kind == "mean"
    images, masks = [], []
    for number, run in enumerate(with_mean.runs):
        values, covered = dense(with_mean, number)
        image = run.normalisation.mean + run.normalisation.std * values.mean(axis=0)
        images.append(np.where(covered, image / np.median(image[covered]), np.nan))
        masks.append(covered)
    anywhere = np.any(masks, axis=0)
    np.testing.assert_allclose(measured.image_V[anywhere], np.nanmean(np.array(images)[:, anywhere], axis=0), rtol=1e-4)
    assert np.isnan(measured.image_V[~anywhere]).all() and (~anywhere).any()
    np.testing.assert_array_equal(measured.share_V, np.mean(masks, axis=0))
    for run, covered in zip(measured.runs, masks, strict=True):
        assert run.coverage == covered.mean()


def test_every_frames_dvars_is_counted_once_and_progress_counts_frames(real_shards):
    seen = []
    measured = measure_quality(real_shards, lambda done, total: seen.append((done, total)))
    assert measured.dvars_counts.sum() == real_shards.n_frames - real_shards.n_runs
    dvars = np.concatenate([measure_run(ShardReader(real_shards), number).dvars for number in range(2)])
    np.testing.assert_array_equal(measured.dvars_counts, np.histogram(dvars, DVARS_EDGES)[0])
    assert seen[0] == (0, 154) and seen[-1] == (154, 154)
    assert seen == sorted(seen)


def test_memory_does_not_grow_with_the_length_of_a_run(real_shards, monkeypatch):
    blocks = []
    read = ShardReader.read

    def watched(self, number, start, length, out=None):
        blocks.append(length)
        return read(self, number, start, length, out)

    monkeypatch.setattr(ShardReader, "read", watched)
    monkeypatch.setattr(quality, "_BLOCK_BYTES", 5 * real_shards.frame_bytes)
    measure_quality(real_shards)
    assert max(blocks) == 5 and sum(blocks) == real_shards.n_frames


def test_the_number_of_threads_changes_no_bit(with_mean):
    one, *others = (measure_quality(with_mean, workers=workers) for workers in (1, 2, 5, None))
    for other in others:
        assert repr((other.runs, other.flags)) == repr((one.runs, one.flags))
        for name in ("image_V", "share_V", "dvars_counts"):
            assert getattr(other, name).tobytes() == getattr(one, name).tobytes()


def test_a_damaged_run_is_named(real_shards, tmp_path):
    import shutil

    copy = shutil.copytree(real_shards.folder, tmp_path / "copy")
    run = real_shards.runs[1]
    with (copy / real_shards.shards[run.shard].file).open("r+b") as file:
        file.seek(run.offset + 3 * real_shards.frame_bytes)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ShardError, match=f"run {run.key} does not match its checksum"):
        measure_quality(load_manifest(copy))


def rows(**measures):
    """Twelve runs that are alike up to small differences, but for what is given of the last one."""
    plain = {"tsnr": 60.0, "tsnr_db": 92.0, "dvars": 1.0, "spikes": 0.02, "coverage": 0.97, "frames": 200}
    made = []
    for number in range(12):
        figures = {name: value * (1 + 0.002 * (number % 5)) for name, value in plain.items()}
        figures |= measures if number == 11 else {}
        made.append(
            RunQuality(
                number=number, key=f"r{number}", subject="s", site=None, simulated=False, source_tr=2.0, **figures
            )
        )
    return made


@pytest.mark.parametrize(
    ("measure", "bad", "fine"),
    [
        ("tsnr", 30.0, 120.0),
        ("tsnr_db", 80.0, 99.0),
        ("dvars", 1.5, 1.1),
        ("dvars", 0.6, 0.9),
        ("spikes", 0.2, 0.0),
        ("coverage", 0.8, 1.0),
        ("frames", 100, 400),
    ],
)
def test_only_what_is_far_on_the_bad_side_is_flagged(measure, bad, fine):
    (flag,) = flag_outliers(rows(**{measure: bad}))
    assert (flag.number, flag.measure, flag.value) == (11, measure, bad)
    assert abs(flag.z) > FLAG_Z
    assert flag_outliers(rows(**{measure: fine})) == ()


def test_a_flags_z_is_the_textbooks():
    values = np.array([50.0, 52.0, 41.0, 60.0, 57.0, 48.0, 3.0])
    runs = [row._replace(tsnr=value) for row, value in zip(rows(), values, strict=False)]
    (flag,) = flag_outliers(runs)
    deviation = np.median(np.abs(values - np.median(values)))
    assert flag.z == pytest.approx((3 - 50) / (1.4826 * deviation))
    assert 1.4826 * deviation > RULES["tsnr"].least * 50, "the rule's least spread is not what decides here"


def test_too_few_runs_or_undefined_figures_flag_nothing():
    assert flag_outliers(rows(dvars=9.0)[-LEAST_RUNS + 1 :]) == ()
    undefined = [row._replace(tsnr=np.nan) for row in rows()]
    assert flag_outliers(undefined) == ()
    assert flag_outliers([]) == ()


@given(st.lists(st.floats(0.1, 5.0), min_size=5, max_size=20), st.randoms())
def test_flags_do_not_depend_on_the_order_of_the_runs(values, random):
    runs = [rows()[0]._replace(number=number, dvars=value) for number, value in enumerate(values)]
    shuffled = runs.copy()
    random.shuffle(shuffled)
    assert flag_outliers(runs) == flag_outliers(shuffled)


def test_a_planted_outlier_is_flagged_and_no_other(tmp_path, write_bold):
    for number in range(7):
        path = write_bold(f"sub-{number}_task-rest_space-MNI152_bold.nii.gz", frames=30, seed=number)
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    values[:, :, 8:] = 0  # the top of the head lay outside the field of view
    values[..., [5, 11, 12, 20]] += (300 * (values[..., :1] > 0)).astype(np.int16)  # and the head moved four times
    nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    recipe = DataRecipe(grid="mni4mm", tr=2.0)
    measured = measure_quality(build_shards(find_runs(tmp_path), tmp_path / "shards", recipe).manifest)
    assert {flag.number for flag in measured.flags} == {6}
    assert {"coverage", "spikes"} <= {flag.measure for flag in measured.flags}


def test_a_carpet_is_z_scores_of_whole_tissues_in_time(real_shards, monkeypatch):
    tissue_V = tissues_of(real_shards)
    moments = measure_run(ShardReader(real_shards), 0)
    drawn = draw_carpet(ShardReader(real_shards), 0, moments, tissue_V)
    assert drawn.frames_per_column == 1 and drawn.values.shape[1] == 90
    assert [name for name, _ in drawn.tissues] == list(carpet.TISSUES)
    assert sum(count for _, count in drawn.tissues) == len(drawn.values) <= carpet.ROWS + 4 * 24
    np.testing.assert_allclose(drawn.values.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(drawn.values.std(axis=1), 1, atol=1e-3)
    first = np.flatnonzero((tissue_V == 0) & moments.covered)[0]
    values, _ = dense(real_shards, 0)
    series = values[:, first]
    np.testing.assert_allclose(drawn.values[0], (series - series.mean()) / series.std(), atol=1e-3)
    monkeypatch.setattr(carpet, "COLUMNS", 40)
    thin = draw_carpet(ShardReader(real_shards), 0, moments, tissue_V)
    assert thin.frames_per_column == 3 and thin.values.shape[1] == 30
    np.testing.assert_allclose(thin.values, drawn.values.reshape(len(drawn.values), 30, 3).mean(axis=2), atol=1e-4)


def test_tissues_lie_where_anatomy_has_them(real_shards):
    tissue_V = tissues_of(real_shards)
    index = np.argwhere(real_shards.brain_mask())
    mm = index @ real_shards.grid.affine[:3, :3].T + real_shards.grid.affine[:3, 3]
    centre = {name: mm[tissue_V == number].mean(axis=0) for number, name in enumerate(carpet.TISSUES)}
    assert centre["cerebellum"][2] < -20 and centre["cerebellum"][1] < -45
    assert centre["cortex"][2] > centre["deep grey"][2] > centre["cerebellum"][2]
    assert all(abs(place[0]) < 5 for place in centre.values())


def test_a_single_frame_has_no_dvars_and_is_no_error(real_shards):
    moments = measure_run(ShardReader(real_shards), 0)
    figures = quality._dvars_figures(moments.dvars[:0])
    assert np.isnan(figures["dvars"]) and np.isnan(figures["spikes"])
    image = run_image(moments, real_shards.runs[0].normalisation, "deviation")
    assert np.nanmedian(image) == pytest.approx(1)
