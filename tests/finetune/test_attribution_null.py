import numpy as np
import pytest

from boldforge.finetune.attribution_null import associate, contrast, slope_intervals
from boldforge.finetune.attribution_results import _LEVEL_OF_FOLDS

FOLDS = np.repeat([1, 2, 3], 10)
LABELS = np.tile([0.0, 1.0], 15)


def test_of_two_classes_the_slope_is_the_difference_of_their_means():
    values = np.random.default_rng(0).standard_normal((30, 4)) + 100.0 * FOLDS[:, None]
    found = associate(values, LABELS, FOLDS, 99, 0)
    plain = values[LABELS == 1].mean(axis=0) - values[LABELS == 0].mean(axis=0)
    np.testing.assert_allclose(found.slope, plain, atol=1e-9)
    np.testing.assert_allclose(contrast(LABELS, FOLDS) @ values, plain, atol=1e-9)
    low, high = slope_intervals(values, LABELS, FOLDS, 500, 0)
    assert (low < plain).all() and (plain < high).all() and (high - low < 3).all()


def test_uneven_folds_are_a_regression_on_the_label_and_a_column_per_fold():
    rng = np.random.default_rng(1)
    folds = np.repeat([1, 2, 3], [4, 9, 12])
    label, values = rng.uniform(7, 18, 25), rng.standard_normal((25, 3))
    design = np.column_stack([label, folds[:, None] == np.unique(folds)])
    wanted = np.linalg.lstsq(design, values, rcond=None)[0][0]
    np.testing.assert_allclose(associate(values, label, folds, 9, 0).slope, wanted, atol=1e-9)
    # A bootstrap that draws everybody once is the estimate itself; its middle lies near it.
    np.testing.assert_allclose(slope_intervals(values, label, folds, 4000, 0).mean(axis=0), wanted, atol=0.03)


def test_a_planted_region_is_found_and_the_smallest_p_is_one_in_all_draws():
    values = np.random.default_rng(2).standard_normal((30, 50))
    values[:, 7] += 5 * LABELS
    found = associate(values, LABELS, FOLDS, 199, 3)
    assert np.argmax(found.correlation) == 7
    assert found.p[7] == 1 / 200 and (np.delete(found.p, 7) > 0.05).all()
    again = associate(values, LABELS, FOLDS, 199, 3)
    assert again.p.tobytes() == found.p.tobytes(), "same seed, same bits"


def test_labels_stay_in_their_fold():
    # One subject per fold and label: a fold's own offset must not matter, however large.
    folds, label = np.repeat(np.arange(8), 2), np.tile([0.0, 1.0], 8)
    values = 1e6 * folds[:, None] + 1.0 * label[:, None]
    found = associate(values, label, folds, 2000, 0)
    assert found.correlation[0] == pytest.approx(1)
    # 2 of 2^8 assignments are as extreme: all as they are, and all exchanged.
    assert found.p[0] == pytest.approx(2 / 2**8, abs=0.006)


def test_nothing_varies_or_nobody_differs():
    values = np.column_stack([np.full(30, 0.3), np.arange(30.0)])
    found = associate(values, LABELS, FOLDS, 50, 0)
    assert found.correlation[0] == 0 and found.p[0] == 1 and np.isfinite(found.p).all()
    same = associate(values, np.ones(30), FOLDS, 50, 0)
    assert (same.slope == 0).all() and (same.p == 1).all()
    assert np.isnan(slope_intervals(values, np.ones(30), FOLDS, 50, 0)).all()


def test_without_an_effect_some_region_is_below_005_in_about_one_cohort_of_twenty():
    """The whole procedure on noise: linear models trained on the other folds, attributions of the test subjects."""
    n, regions, cohorts, wrong, naive = 40, 20, 200, 0, 0
    folds = np.arange(n) % 4
    for cohort in range(cohorts):
        rng = np.random.default_rng([9, cohort])
        scans, label = 1 + rng.standard_normal((n, regions)), rng.permutation(np.tile([0.0, 1.0], n // 2))
        attributed = np.empty_like(scans)
        for fold in range(4):
            train = folds != fold
            centred = scans[train] - scans[train].mean(axis=0)
            weights = np.linalg.solve(centred.T @ centred + 5 * np.eye(regions), centred.T @ (label[train] - 0.5))
            attributed[folds == fold] = scans[folds == fold] * weights
        wrong += associate(attributed, label, folds, 199, cohort).p.min() < 0.05
        mean, deviation = attributed.mean(axis=0), attributed.std(axis=0, ddof=1)
        naive += np.abs(mean / deviation * np.sqrt(n)).max() > 3.3  # 5 % family-wise over 20 regions
    # 200 cohorts at 5 %: 10 expected, standard deviation 3.1.
    assert 2 <= wrong <= 20
    assert naive > 100, "a test against zero calls noise an effect: every model has weights"


def _lowest_p(n, folds, regions, seed):
    """Of one cohort without an effect, whose regions have much in common: ridge models, each fold's about its own."""
    rng = np.random.default_rng([11, seed])
    common, loading = rng.standard_normal((n, 8)), rng.standard_normal((8, regions))
    scans = 1 + 0.15 * (common @ loading / np.sqrt(8) + rng.standard_normal((n, regions)))
    label = rng.permutation(np.tile([0.0, 1.0], n // 2))
    fold = np.empty(n, dtype=int)
    for value in (0, 1):
        fold[label == value] = np.arange((label == value).sum()) % folds
    attributed = np.empty_like(scans)
    for number in range(folds):
        train = fold != number
        x, y = scans[train] - scans[train].mean(axis=0), label[train] - label[train].mean()
        weights = x.T @ np.linalg.solve(x @ x.T + 0.2 * np.eye(len(x)), y)
        attributed[fold == number] = scans[fold == number] * weights
    return associate(attributed, label, fold, 499, seed).p.min()


def test_folds_that_trained_on_each_other_need_the_stricter_level():
    """Every pair of folds is used twice, as training and as test subjects of each other: p is too small."""
    lowest = np.array([_lowest_p(24, 4, 60, seed) for seed in range(200)])
    assert (lowest <= 0.05).mean() > 0.07, "if p were right by itself, the stricter level could go"
    assert (lowest <= _LEVEL_OF_FOLDS).mean() < 0.05
