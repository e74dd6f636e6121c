from functools import partial

import numpy as np
import pytest

from boldforge.finetune import AdhdDiagnosis, get_task, summary
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
