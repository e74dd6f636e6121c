from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from nilearn.connectome import ConnectivityMeasure
from nilearn.maskers import NiftiLabelsMasker

from boldforge.data_shards import ShardReader, atlas_on_grid, load_atlas, load_manifest
from boldforge.finetune import baselines
from boldforge.finetune.baselines import BASELINES, baseline_scores, baseline_scores_over, subject_features, tells_apart
from boldforge.finetune.cohort import find_cohort
from boldforge.finetune.metrics import auc
from boldforge.finetune.tasks import AdhdDiagnosis, get_task

READ = ("site", "demographics", "connectivity", "regions", "image")


@pytest.fixture(scope="module")
def read(cohort):
    manifest = load_manifest(cohort)
    subjects = find_cohort(manifest, AdhdDiagnosis(), 4).subjects
    return manifest, subjects, subject_features(ShardReader(manifest), subjects, READ)


def test_connectivity_is_nilearn_s(read):
    manifest, subjects, features = read
    run = manifest.runs[subjects[0].runs[0]]
    clip = ShardReader(manifest).read(subjects[0].runs[0], 0, run.n_frames)
    volume = np.zeros((*manifest.grid.shape, run.n_frames), dtype=np.float32)
    volume[manifest.brain_mask()] = (clip.mean + clip.q * clip.scale).T
    labels = atlas_on_grid(load_atlas(), manifest.grid) * manifest.brain_mask()
    masker = NiftiLabelsMasker(
        nib.Nifti1Image(labels.astype(np.int16), manifest.grid.affine), standardize=None, resampling_target=None
    )
    courses = masker.fit_transform(nib.Nifti1Image(volume, manifest.grid.affine))
    measure = ConnectivityMeasure(kind="correlation", standardize=False, cov_estimator=_plain_covariance())
    correlation = measure.fit_transform([courses])[0]
    expected = np.arctanh(np.clip(correlation[np.triu_indices(len(correlation), k=1)], -0.999999, 0.999999))
    np.testing.assert_allclose(features["connectivity"][0], expected, atol=1e-3)


def _plain_covariance():
    from sklearn.covariance import EmpiricalCovariance

    return EmpiricalCovariance()


def test_the_image_is_mean_and_deviation_whatever_the_length_of_a_block(read, monkeypatch):
    manifest, subjects, features = read
    monkeypatch.setattr("boldforge.finetune.baselines._FRAMES_AT_ONCE", 5)
    again = subject_features(ShardReader(manifest), subjects[:2], ("image", "connectivity"))
    np.testing.assert_allclose(again["image"], features["image"][:2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again["connectivity"], features["connectivity"][:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, baseline in BASELINES.items() if baseline.features in READ])
def test_every_baseline_gives_scores_and_test_labels_do_not_matter(read, name):
    _, subjects, features = read
    if BASELINES[name].harmonised:
        pytest.importorskip("neuroHarmonize", reason="boldforge[harmonise] is not installed")
    labels, sites = np.array([subject.label for subject in subjects]), [subject.site for subject in subjects]
    rows = features[BASELINES[name].features]
    parts = np.arange(0, 12), np.arange(12, 17), np.arange(17, 22)
    checked, tested = baseline_scores(name, AdhdDiagnosis(), rows, labels, *parts, sites)
    assert checked.shape == tested.shape == (5,)
    assert ((tested >= 0) & (tested <= 1)).all()
    other = labels.copy()
    other[17:] = 1 - other[17:]
    np.testing.assert_array_equal(baseline_scores(name, AdhdDiagnosis(), rows, other, *parts, sites)[1], tested)


def test_the_planted_effect_is_in_the_image_and_not_in_the_site(read):
    _, subjects, features = read
    labels = np.array([subject.label for subject in subjects])
    parts = np.arange(0, 11), np.arange(11, 16), np.arange(16, 22)
    _, image = baseline_scores("image", AdhdDiagnosis(), features["image"], labels, *parts)
    assert auc(labels[16:], image) == 1.0


@pytest.mark.parametrize(("name", "features"), [("connectivity-svm", 301), ("mean-image", 602)])
@pytest.mark.parametrize("task", ["adhd", "age", "classify:group"])
def test_a_model_in_the_span_of_the_training_rows_is_the_model_of_all_features(name, features, task, monkeypatch):
    task, generator = get_task(task, classes=("a", "b", "c")), np.random.default_rng(1)
    rows = generator.standard_normal((41, features)) * generator.uniform(0.1, 9, features)
    labels = np.arange(41) % (2 if task.kind == "binary" else 3)
    rows[:, :7] += labels[:, None]
    parts = np.arange(0, 23), np.arange(23, 30), np.arange(30, 41)
    # The intercept's penalty in an SVM makes no difference to the comparison: both have it.
    quick = baseline_scores(name, task, rows, labels, *parts)
    monkeypatch.setattr(baselines, "_turned", tuple)
    plain = baseline_scores(name, task, rows, labels, *parts)
    for one, other in zip(quick, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * max(1, np.abs(other).max()))


def test_the_mean_image_is_read_voxel_by_voxel_and_nothing_else():
    generator = np.random.default_rng(2)
    labels = np.arange(40) % 2
    mean, amplitude = generator.standard_normal((2, 40, 500))
    mean[:, :60] += 2 * labels[:, None]
    parts = np.arange(0, 20), np.arange(20, 30), np.arange(30, 40)
    found = baseline_scores("mean-image", AdhdDiagnosis(), np.hstack([mean, amplitude]), labels, *parts)[1]
    assert auc(labels[30:], found) == 1.0
    other = baseline_scores("mean-image", AdhdDiagnosis(), np.hstack([mean, 99 + amplitude]), labels, *parts)[1]
    np.testing.assert_array_equal(found, other)
    flat = np.zeros_like(mean)
    nothing = baseline_scores("mean-image", AdhdDiagnosis(), np.hstack([flat, mean]), labels, *parts)[1]
    np.testing.assert_allclose(nothing, 0.5)
    assert not tells_apart("mean-image", np.hstack([flat, mean])) and tells_apart("image", np.hstack([flat, mean]))


@pytest.mark.parametrize(
    ("normalisation", "dtype", "kept"),
    [
        ("residual-z", "int16", False),
        ("voxel-z", "int8", False),
        ("residual-z", "int8", False),
        ("global-z", "int8", True),
    ],
)
def test_rounding_of_a_mean_that_normalisation_took_away_is_no_image(build_cohort, normalisation, dtype, kept):
    """Stored as whole numbers a mean of nothing is not quite nothing."""
    reader = ShardReader(load_manifest(build_cohort(subjects=4, effect=2.0, normalisation=normalisation, dtype=dtype)))
    subjects = find_cohort(reader.manifest, AdhdDiagnosis(), 1).subjects
    images = subject_features(reader, subjects, ["image"])["image"]
    means, deviations = np.split(images, 2, axis=1)
    assert (means != 0).any() == kept and (deviations > 0).any()
    assert tells_apart("mean-image", images) == kept
    parts = [replace(subject, starts=(0, 4)) for subject in subjects]
    blocks = subject_features(reader, parts, ["image"], clip_length=4)["image"]
    assert tells_apart("mean-image", blocks), "of a part of a run the mean is not taken away"


def test_missing_ages_and_unseen_sites_are_no_obstacle():
    rows = np.array(
        [["a", "F", 9.0], ["a", "M", np.nan], ["b", "F", 12.0], ["b", "", 8.0], ["new", "M", np.nan], ["a", "F", 10.0]],
        dtype=object,
    )
    checked, tested = baseline_scores(
        "demographics", AdhdDiagnosis(), rows, [0, 1, 0, 1, 1, 0], [0, 1, 2, 3], [1, 2], [4, 5]
    )
    assert np.isfinite(checked).all() and np.isfinite(tested).all()


@pytest.mark.parametrize("task", [AdhdDiagnosis(), get_task("age", [{"age": 9.0}, {"age": 12.0}])], ids=["adhd", "age"])
def test_over_inner_folds_the_strength_has_the_best_mean_and_the_model_is_fitted_anew(task, monkeypatch):
    generator = np.random.default_rng(3)
    labels = np.arange(24) % 2 if task.kind == "binary" else generator.standard_normal(24)
    rows = generator.standard_normal((24, 30)) + 0.4 * labels[:, None]
    splits, test = [(range(6, 18), range(6)), ([*range(6), *range(12, 18)], range(6, 12))], range(18, 24)
    found = baseline_scores_over("connectivity", task, rows, labels, splits, test)
    means, checked, tested = [], [], []
    for strength in baselines._STRENGTHS:
        monkeypatch.setattr(baselines, "_STRENGTHS", (strength,))
        solo = [baseline_scores("connectivity", task, rows, labels, *split, test, anew=True) for split in splits]
        means.append(np.mean([task.headline(labels[list(v)], s) for (_, v), (s, _) in zip(splits, solo, strict=True)]))
        checked.append(np.concatenate([scores for scores, _ in solo]))
        tested.append(solo[0][1])
    best = int(np.argmax(means))
    assert len(set(means)) > 1
    np.testing.assert_allclose(found[0], checked[best])
    np.testing.assert_allclose(found[1], tested[best], rtol=1e-5)
