from functools import partial

import numpy as np
import pytest

from boldforge.finetune import AdhdDiagnosis, get_task, summary
from boldforge.finetune.baselines import baseline_scores
from boldforge.finetune.evaluation import permutation_test
from boldforge.finetune.folds import subject_folds
from boldforge.finetune.metrics import roc_points
from boldforge.finetune.summary import Scores, summarise


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """Intervals and p are not what is tested here."""
    for name in ("bootstrap_intervals", "permutation_test"):
        monkeypatch.setattr(summary, name, partial(getattr(summary, name), draws=20))


@pytest.mark.parametrize("name", ["adhd", "classify:group", "age"])
def test_a_site_s_figures_are_those_of_its_subjects_with_the_folds_own_thresholds(name):
    task = get_task(name, classes=("a", "b", "c"))
    generator = np.random.default_rng(0)
    labels = (np.arange(42) % 2 if name == "adhd" else np.arange(42) % 3).tolist()
    sites = ["KKI" if number < 24 else "NYU" for number in range(42)]
    model = Scores.empty(task, 2, 42)
    for repeat, line in ((0, 0.25), (1, 0.3)):
        scores = 0.2 + 0.1 * np.array(labels) + 0.05 * generator.standard_normal(42)
        if task.n_scores > 1:
            scores = generator.dirichlet(np.ones(3), 42)
        for part in (range(0, 42, 2), range(1, 42, 2)):
            model.put(repeat, part, scores[list(part)], line + 0.01 * part.start)
    alone = summarise(model, {}, labels, ["KKI"] * 42, 0)
    assert alone["sites"] == [{"site": "KKI", **alone["figures"]}]
    several = summarise(model, {}, labels, sites, 0)["sites"]
    assert [row["site"] for row in several] == ["KKI", "NYU"]
    first = Scores(task, model.score[:, :24], model.threshold_RN[:, :24]).figures(labels[:24])
    assert several[0] == {"site": "KKI", **first}


def test_no_score_reaches_a_half_and_every_site_still_has_its_ill_found():
    labels = [0, 1] * 10
    model = Scores.empty(AdhdDiagnosis(), 1, 20)
    model.put(0, range(20), 0.2 + 0.1 * np.array(labels), 0.25)
    for row in summarise(model, {}, labels, ["KKI"] * 10 + ["NYU"] * 10, 0)["sites"]:
        assert (row["sensitivity"], row["specificity"], row["accuracy"]) == (1.0, 1.0, 1.0)


def test_a_margin_has_no_brier_score(monkeypatch):
    monkeypatch.setattr(summary, "compare", partial(summary.compare, draws=20))
    labels = [0, 1] * 10
    model = Scores.empty(AdhdDiagnosis(), 1, 20)
    model.put(0, range(20), np.linspace(0, 1, 20), 0.5)
    beside = summarise(model, {"connectivity": model, "connectivity-svm": model}, labels, ["KKI"] * 20, 0)["baselines"]
    assert beside["connectivity"]["figures"]["brier"] > 0 and "brier" in beside["connectivity"]["intervals"]
    assert (
        beside["connectivity-svm"]["figures"]["brier"] is None
        and "brier" not in beside["connectivity-svm"]["intervals"]
    )
    assert beside["connectivity-svm"]["figures"]["auc"] == beside["connectivity"]["figures"]["auc"]


@pytest.mark.parametrize("name", ["adhd", "classify:group", "age", "states"])
def test_repetitions_are_compared_as_their_figures_are_and_not_as_their_mean_scores(name, monkeypatch):
    """A model that is noisy from one repetition to the next is no better for the noise averaging out."""
    monkeypatch.setattr(summary, "compare", partial(summary.compare, draws=50))
    task = get_task(name, classes=("a", "b", "c"))
    generator = np.random.default_rng(0)
    labels = np.arange(120) % (2 if name == "adhd" else 3)
    shape = (120, 3) if task.n_scores > 1 else (120,)
    told = np.eye(3)[labels] if task.n_scores > 1 else labels - 0.5
    steady, noisy = 0.9 * told + generator.normal(size=shape), Scores.empty(task, 20, 120)
    baseline = Scores.empty(task, 20, 120)
    for repeat in range(20):
        noisy.put(repeat, range(120), 0.6 * told + generator.normal(size=shape), 0.5)
        baseline.put(repeat, range(120), steady, 0.5)
    found = summarise(noisy, {"demographics": baseline}, labels.tolist(), ["KKI"] * 120, 0)
    beside, key = found["baselines"]["demographics"], task.selects_by
    difference = found["figures"][key] - beside["figures"][key]
    assert difference < -0.02 and beside["model_minus_baseline"]["difference"] == pytest.approx(difference)
    assert "every baseline" not in found["verdict"]
    if name == "adhd":
        roc = roc_points(labels, noisy.by_row())
        assert np.trapezoid(roc["tpr"], roc["fpr"]) == pytest.approx(found["figures"]["auc"])
        predicted = [row["predicted"] for row in found["calibration"]]
        assert predicted[0] < np.sort(noisy.score, axis=1)[:, :30].mean(), "groups as far apart as one model's"


def test_a_permutation_s_p_is_that_of_the_printed_figure():
    """Twenty repetitions of next to nothing, whose averaged scores would be told from chance."""
    generator = np.random.default_rng(1)
    labels = np.arange(60) % 2
    model = Scores.empty(AdhdDiagnosis(), 20, 60)
    for repeat in range(20):
        model.put(repeat, range(60), 0.25 * labels + generator.normal(size=60), 0.5)
    found = summarise(model, {}, labels.tolist(), ["KKI"] * 60, 0)
    drawn = [model.figures(generator.permutation(labels))["auc"] for _ in range(200)]
    assert found["permutation"]["p"] == pytest.approx(np.mean(np.array(drawn) >= found["figures"]["auc"]), abs=0.15)


def test_a_figure_that_one_repetition_does_not_have_is_undefined():
    model = Scores.empty(get_task("age"), 2, 6)
    model.put(0, range(6), np.arange(6.0), 0.5)
    model.put(1, range(6), np.ones(6), 0.5)
    assert model.figures(np.arange(6.0))["r"] is None


def _noise(seed, subjects=40, features=40):
    """A balanced cohort of four sites whose correlated features say nothing of the label."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(subjects) < subjects // 2).astype(int)
    generator.shuffle(labels)
    values = generator.normal(size=(subjects, 10)) @ generator.normal(size=(10, features))
    return labels, values + 0.5 * generator.normal(size=values.shape)


def _tested(labels, values, seed):
    """Scores of a logistic regression in the pipeline's own folds."""
    names = [f"s{number:04d}" for number in range(len(labels))]
    sites = [f"S{number % 4}" for number in range(len(labels))]
    place = {name: number for number, name in enumerate(names)}
    model = Scores.empty(AdhdDiagnosis(), 1, len(labels))
    for fold in subject_folds(names, labels.tolist(), sites, 5, seed):
        parts = [[place[name] for name in part] for part in (fold.train, fold.validation, fold.test)]
        model.put(0, parts[2], baseline_scores("regions", model.task, values, labels.tolist(), *parts)[1], 0.5)
    return model, sites


@pytest.mark.slow
def test_folds_of_a_cohort_without_an_effect_are_called_a_find_as_rarely_as_intended(monkeypatch):
    """The whole procedure, 200 times: folds, a model in each, the permutations and the verdict."""
    monkeypatch.setattr(summary, "permutation_test", partial(permutation_test, draws=500))
    called, plainly = 0, 0
    for seed in range(200):
        labels, values = _noise(seed)
        model, sites = _tested(labels, values, seed)
        found = summarise(model, {}, labels.tolist(), sites, seed)
        called += ": better than chance" in found["verdict"]
        plainly += ": better than chance" in summary.verdict(found | {"level": 0.05})
    assert called <= 0.025 * 200 < plainly


def test_what_one_model_may_say_at_the_plain_level_folds_may_not():
    found = {
        "compared_by": "auc",
        "chance": 0.5,
        "rows": "subjects",
        "figures": {"auc": 0.7, "n": 60},
        "intervals": {"auc": [0.55, 0.82]},
        "permutation": {"p": 0.005, "p_within_sites": 0.004},
        "baselines": {},
    }
    beside = {"says": "the other", "figures": {"auc": 0.6}, "intervals": {"auc": [0.45, 0.7]}}
    beside["model_minus_baseline"] = {"interval": [0.01, 0.2], "p": 0.03}
    folds, single = ({**found, "level": level} for level in (0.01, 0.05))
    assert summary.verdict(folds).endswith(": better than chance.")
    nearly = {"permutation": {"p": 0.03, "p_within_sites": 0.03}}
    assert ": not shown to be better than chance (p = 0.030, where" in summary.verdict(folds | nearly)
    assert summary.verdict(single | nearly).endswith(": better than chance.")
    within = {"permutation": {"p": 0.005, "p_within_sites": 0.02}}
    assert summary.verdict(folds | within).endswith("not surely so inside the sites (p = 0.020).")
    unsure = {"permutation": {"p": 0.005, "p_within_sites": 0.2}}
    assert summary.verdict(folds | unsure).endswith("better than chance (p = 0.200): site may explain the result.")
    apart = {"permutation": {"p": 0.005, "p_within_sites": None}}
    assert summary.verdict(folds | apart).endswith("every site has one class: what site explains of it cannot be told.")
    other = {"baselines": {"image": beside}}
    assert summary.verdict(folds | other).endswith("not surely better than the other (AUC 0.60).")
    assert summary.verdict(single | other).endswith("better than chance and than every baseline.")
    # What is the same for everybody cannot win, so it is not among those that were beaten or were not.
    blind = {"baselines": {"mean-image": beside | {"blind": True}}}
    assert summary.verdict(folds | blind).endswith(": better than chance.")
    below = {"figures": {"auc": 0.2, "n": 60}, "intervals": {"auc": [0.1, 0.4]}}
    assert ": below chance." in summary.verdict(folds | below)


def test_folds_have_the_stricter_level_and_of_one_site_both_p_are_one():
    labels = [0, 1] * 10
    model = Scores.empty(AdhdDiagnosis(), 1, 20)
    model.put(0, range(20), np.linspace(0, 1, 20), 0.5)
    found = summarise(model, {}, labels, ["KKI"] * 20, 0)
    assert (
        found["level"] == 0.01 and summarise(model, {}, labels, ["KKI"] * 20, 0, cross_validated=False)["level"] == 0.05
    )
    assert found["permutation"]["p"] == found["permutation"]["p_within_sites"]
