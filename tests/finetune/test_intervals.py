import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, ttest_1samp

from boldforge.finetune import AdhdDiagnosis, get_task
from boldforge.finetune.evaluation import bootstrap_intervals
from boldforge.finetune.intervals import (
    auc_interval,
    cluster_intervals,
    mean_auc_interval,
    mean_share_interval,
    score_intervals,
    share_interval,
)
from boldforge.finetune.metrics import binary_metrics, multiclass_metrics
from boldforge.finetune.summary import Blocks, Scores, summarise
from boldforge.finetune.tasks.states import TaskState


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_s_interval_is_scipy_s(counts):
    right, n = counts
    interval = binomtest(right, n).proportion_ci(method="wilson")
    assert share_interval(right / n, n) == pytest.approx([interval.low, interval.high], abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=4))
def test_the_interval_of_a_mean_of_shares_lies_around_it_within_the_widest(rows):
    shares, sizes = zip(*rows, strict=True)
    low, high = mean_share_interval(shares, sizes)
    assert -1e-9 <= low <= np.mean(shares) <= high <= 1 + 1e-9
    if len(rows) == 1:
        assert [low, high] == pytest.approx(share_interval(shares[0], sizes[0]))


@given(st.floats(0, 1), st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5))
def test_the_interval_of_a_mean_of_aucs_holds_every_area_within_two_errors(auc, sizes):
    def error(theta):
        variances = []
        for m, n in sizes:
            q = (m + n) / 2 - 1
            spread = 1 + q * (1 - theta) / (2 - theta) + q * theta / (1 + theta)
            variances.append(theta * (1 - theta) * spread / (m * n))
        return np.sqrt(np.sum(variances)) / len(sizes)

    low, high = mean_auc_interval(auc, sizes)
    assert 0 <= low <= auc <= high <= 1
    for theta in np.linspace(0, 1, 101)[1:-1]:
        if min(abs(theta - low), abs(theta - high)) > 1e-9:
            assert (low <= theta <= high) == (abs(theta - auc) <= 1.959964 * error(theta))
    if len(sizes) == 1:
        assert [low, high] == auc_interval(auc, *sizes[0])


@pytest.mark.parametrize(("n_positive", "n_negative"), [(10, 10), (10, 40), (25, 15), (40, 40)])
@pytest.mark.parametrize("auc", [0.5, 0.7, 0.9])
def test_the_interval_of_an_auc_covers_the_truth_as_often_as_it_says(auc, n_positive, n_negative):
    """Scores of both classes are normal, with the means as far apart as makes that area."""
    generator, draws = np.random.default_rng(0), 4000
    positive = generator.normal(np.sqrt(2) * norm.ppf(auc), size=(draws, n_positive))
    negative = generator.normal(size=(draws, n_negative))
    right = (positive[:, :, None] > negative[:, None, :]).sum(axis=(1, 2))
    hits = 0
    for count, times in zip(*np.unique(right, return_counts=True), strict=True):
        low, high = auc_interval(count / (n_positive * n_negative), n_positive, n_negative)
        hits += times * (low <= auc <= high)
    assert 0.93 < hits / draws < 0.985


def test_seven_subjects_told_apart_without_error_do_not_make_certainty():
    labels = [0, 0, 0, 0, 1, 1, 1]
    model = Scores.empty(AdhdDiagnosis(), 1, 7)
    model.put(0, range(7), 0.1 + 0.5 * np.array(labels), 0.5)
    assert model.figures(labels)["auc"] == 1.0
    assert bootstrap_intervals(labels, np.array(labels), binary_metrics, 0, draws=50)["auc"] == [1.0, 1.0]
    found = model.intervals(labels, 0)
    assert found["auc"] == auc_interval(1.0, 3, 4) and 0.4 < found["auc"][0] < 0.7
    assert found["sensitivity"] == share_interval(1.0, 3) and found["specificity"] == share_interval(1.0, 4)
    assert found["accuracy"] == share_interval(1.0, 7)
    assert found["sensitivity"][0] < found["balanced_accuracy"][0] < found["accuracy"][0]
    assert found["brier"][0] < found["brier"][1] < 0.25, "no share: over resampled subjects"


def test_one_that_was_wrong_is_not_surer_than_none():
    labels = np.array([0] * 10 + [1] * 10)
    scores = labels + 0.01 * np.arange(20)
    wrong = scores.copy()
    wrong[10] = -1
    lows = []
    for score in (scores, wrong):
        figures = binary_metrics(labels, score)
        found = score_intervals(bootstrap_intervals(labels, score, binary_metrics, 0, draws=50), figures, labels)
        lows.append([found[name][0] for name in ("auc", "accuracy", "balanced_accuracy", "sensitivity")])
    assert (np.array(lows[0]) > lows[1]).all()


def test_blocks_count_as_their_people_whether_told_without_error_or_not():
    people = [f"p{i // 8}" for i in range(40)]
    labels = np.arange(40) % 2
    for scores, collapsed in ((labels * 1.0, True), (np.where(np.arange(40) < 7, 0.5, labels), False)):
        spread = cluster_intervals(lambda rows, s=scores: binary_metrics(labels[rows], s[rows]), people)
        found = score_intervals(spread, binary_metrics(labels, scores), labels, people)
        assert found["auc"] == (auc_interval(1.0, 5, 5) if collapsed else spread["auc"])
        assert found["accuracy"] == (share_interval(1.0, 5) if collapsed else spread["accuracy"])


def test_leaving_one_out_at_a_time_is_the_t_interval_of_people_s_own_figures():
    generator = np.random.default_rng(0)
    own = generator.normal(size=7)
    values, people = np.repeat(own, 3) + np.tile([-1.0, 0.0, 1.0], 7), np.repeat(np.arange(7), 3).astype(str)
    found = cluster_intervals(lambda rows: {"mean": float(values[rows].mean()), "n": len(rows)}, people.tolist())
    interval = ttest_1samp(own, 0).confidence_interval(0.95)
    assert found == {"mean": pytest.approx([interval.low, interval.high])}


@pytest.mark.parametrize("people", [5, 8, 20])
def test_an_interval_over_few_people_covers_the_truth_as_often_as_it_says(people):
    """Twenty blocks each, of people who differ in how well they are told."""
    clusters, hits = np.repeat(np.arange(people), 20).astype(str).tolist(), 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        skill = np.clip(0.45 + 0.1 * generator.normal(size=people), 0.05, 0.95)
        right = generator.random(20 * people) < np.repeat(skill, 20)
        low, high = cluster_intervals(lambda rows, r=right: {"accuracy": float(r[rows].mean())}, clusters)["accuracy"]
        hits += low <= 0.45 <= high
    assert 184 <= hits <= 199


def test_four_people_are_too_few_for_an_interval_and_this_is_said():
    labels, people = np.arange(48) % 3, np.repeat(np.arange(4), 12).astype(str).tolist()
    task, generator = TaskState(("a", "b", "c")), np.random.default_rng(0)
    model = Scores.empty(task, 1, 48)
    blocks = Blocks(people, people)
    for told in (0.0, 3.0):
        model.put(0, range(48), told * np.eye(3)[labels] + generator.normal(size=(48, 3)), 0.5)
        found = summarise(model, {"regions": model}, labels.tolist(), ["KKI"] * 48, 0, blocks)
        assert found["intervals"] == {} == found["baselines"]["regions"]["intervals"]
        assert found["baselines"]["regions"]["model_minus_baseline"]["interval"] is None
        assert "4 people are too few for an interval" in found["verdict"]
        assert ("not shown to be better than chance" in found["verdict"]) == (told == 0.0)
    assert "better than chance in these people (p < 0.001)" in found["verdict"]


def test_three_classes_and_a_number_without_error():
    labels = np.arange(12) % 3
    scores = np.eye(3)[labels]
    figures = multiclass_metrics(labels, scores)
    found = score_intervals(bootstrap_intervals(labels, scores, multiclass_metrics, 0, draws=50), figures, labels)
    assert found["auc"] == pytest.approx(auc_interval(1.0, 4, 8)) and found["accuracy"] == share_interval(1.0, 12)
    assert found["balanced_accuracy"][0] < 1
    age = get_task("age")
    exact = score_intervals({"r2": [1.0, 1.0]}, age.metrics([1.0, 2.0], [1.0, 2.0]), [1.0, 2.0])
    assert exact == {"r2": [1.0, 1.0]}, "a number's figures keep the bootstrap's"
