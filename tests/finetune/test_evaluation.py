import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from boldforge.finetune.evaluation import (
    best_threshold,
    bootstrap_intervals,
    calibration,
    compare,
    per_site,
    permutation_test,
)
from boldforge.finetune.metrics import auc, binary_metrics


def _cohort(seed, n=60, effect=0.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    scores = 1 / (1 + np.exp(-(generator.normal(size=n) + effect * (labels - 0.5))))
    return labels, scores, np.array(["a", "b", "c"])[generator.integers(3, size=n)].tolist()


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=2, max_size=40))
def test_the_auc_is_sklearn_s_ties_and_all(rows):
    labels, scores = map(np.array, zip(*rows, strict=True))
    if labels.min() == labels.max():
        with pytest.raises(ValueError, match="both classes"):
            auc(labels, scores)
    else:
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    # Scores of a known effect: the AUC of the population is Phi(1 / sqrt 2).
    truth, hits = 0.7602, 0
    for seed in range(60):
        labels, scores, _ = _cohort(seed, n=80, effect=1.0)
        low, high = bootstrap_intervals(labels, scores, binary_metrics, seed, draws=150)["auc"]
        hits += low <= truth <= high
    assert 51 <= hits <= 60


def test_small_cohorts_have_wide_intervals_and_counts_have_none():
    wide = bootstrap_intervals(*_cohort(0, n=10)[:2], binary_metrics, 0, draws=200)
    narrow = bootstrap_intervals(*_cohort(0, n=400)[:2], binary_metrics, 0, draws=200)
    assert np.ptp(wide["auc"]) > 3 * np.ptp(narrow["auc"])
    assert "n" not in wide and wide == bootstrap_intervals(*_cohort(0, n=10)[:2], binary_metrics, 0, draws=200)


def test_chance_has_a_uniform_p_and_an_effect_a_small_one():
    values = [permutation_test(*_cohort(seed), seed, draws=100)["p"] for seed in range(60)]
    assert 0.3 < np.mean(values) < 0.7 and np.mean(np.array(values) < 0.1) < 0.25
    assert permutation_test(*_cohort(1, effect=3.0), 0, draws=200)["p"] == pytest.approx(1 / 201)


def test_a_model_of_sites_is_at_chance_within_them():
    generator = np.random.default_rng(0)
    sites = ["patients"] * 40 + ["controls"] * 40
    labels = np.concatenate([generator.random(40) < 0.9, generator.random(40) < 0.1]).astype(int)
    scores = np.where(np.array(sites) == "patients", 0.9, 0.1)
    result = permutation_test(labels, scores, sites, 0, draws=200)
    assert result["p"] < 0.01 and result["p_within_sites"] == 1.0


def test_comparing_a_model_with_itself_and_with_noise():
    labels, scores, _ = _cohort(0, effect=2.0)
    same = compare(labels, scores, scores * 10 - 3, 0, draws=100)
    assert same == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    noise = np.random.default_rng(5).normal(size=len(labels))
    better = compare(labels, scores, noise, 0, draws=300)
    assert better["difference"] > 0.2 and better["interval"][0] > 0 and better["p"] < 0.01


def test_calibration_and_the_brier_score():
    generator = np.random.default_rng(0)
    scores = generator.random(4000)
    labels = (generator.random(4000) < scores).astype(int)
    for row in calibration(labels, scores):
        assert row["observed"] == pytest.approx(row["predicted"], abs=0.05) and row["n"] == 800
    assert binary_metrics(labels, scores)["brier"] == pytest.approx(1 / 6, abs=0.01)


def test_every_site_has_its_row():
    rows = per_site([0, 1, 1, 0], [0.1, 0.9, 0.2, 0.3], ["b", "b", None, "a"], binary_metrics)
    assert [(row["site"], row["n"], row["auc"]) for row in rows] == [("a", 1, None), ("b", 2, 1.0), (None, 1, None)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), min_size=1, max_size=30))
def test_the_threshold_is_never_worse_than_a_half(rows):
    labels, scores = zip(*rows, strict=True)
    scores = np.array(scores) / 20
    threshold = best_threshold(labels, scores)
    chosen, half = (binary_metrics(labels, scores, t)["balanced_accuracy"] for t in (threshold, 0.5))
    if half is None:
        assert threshold == 0.5
    else:
        assert chosen >= half - 1e-12
        every = [binary_metrics(labels, scores, t)["balanced_accuracy"] for t in np.linspace(0, 1.05, 43)]
        assert chosen >= max(every) - 1e-12


def test_inside_sites_of_one_class_each_there_is_nothing_to_permute():
    scores = np.linspace(0, 1, 12)
    labels = (scores > 0.5).astype(int)
    found = permutation_test(labels, scores, ["a" if label else "b" for label in labels], seed=0, draws=50)
    assert found["p"] < 0.05 and found["p_within_sites"] is None
