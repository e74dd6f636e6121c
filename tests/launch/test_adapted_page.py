"""What the report says of a fine-tuning must be true of its task."""

import html
import json
import re

import numpy as np
import pytest

from boldforge.finetune import get_task, summary
from boldforge.finetune.metrics import roc_points
from boldforge.finetune.summary import Scores, summarise
from boldforge.finetune.tasks import describe_labels
from boldforge.launch.figure_names import show_interval, show_number, true_minus
from boldforge.launch.report import write_report

SITES = ["KKI"] * 6 + ["NYU"] * 12


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """Write a fine-tuning of 18 subjects of two sites as the product of a task, and read its report."""
    for name, given in (("bootstrap_intervals", 40), ("permutation_test", 20), ("compare", 20)):
        whole = getattr(summary, name)
        monkeypatch.setattr(summary, name, lambda *a, _w=whole, _n=given, **k: _w(*a, **(k | {"draws": _n})))

    def write(name, simulated=True):
        task = get_task(name, classes=("low", "mid", "high"))
        generator = np.random.default_rng(0)
        labels = (np.arange(18) % max(len(task.classes), 2) if task.classes else 10 + np.arange(18.0)).tolist()
        model = Scores.empty(task, 1, 18)
        noise = generator.dirichlet(np.ones(3), 18) if task.n_scores > 1 else generator.random(18)
        model.put(0, range(18), noise if task.classes else 20 * noise, 0.5)
        found = summarise(model, {"demographics": model}, labels, SITES, 0)
        results = {
            "task": name,
            "simulated": simulated,
            "measured_by": "3-fold cross-validation over subjects",
            **found,
            "roc": roc_points(labels, model.mean()) if task.kind == "binary" else None,
            "folds": [{"fold": 1, "n_test": 18, "figures": found["figures"], "best_epoch": 2}],
            "subjects": describe_labels(task, labels),
        }
        (tmp_path / "metrics.json").write_text(json.dumps(results))
        page = write_report([tmp_path], tmp_path / "report.html").read_text().split("</style>", 1)[1]
        return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split()), results

    return write


def test_two_classes_are_named_and_which_is_positive(page_of):
    text, results = page_of("adhd")
    assert "Task adhd: ADHD or control, by column diagnosis. Positive is ADHD: sensitivity is the share of ADHD" in text
    assert "On 18 simulated test subjects, 9 of them ADHD" in text and "planted in named regions" in text
    assert "moves the accuracy by 5.6 percentage points" in text
    auc, ends = results["figures"]["auc"], results["intervals"]["auc"]
    assert f"{auc:.2f} AUC {ends[0]:.2f} to {ends[1]:.2f}" in text and "Brier score" in text
    assert "site, age and sex, logistic regression" in text and "well calibrated" in text
    kki, nyu = results["sites"]
    assert "as if both classes were as frequent" in text and "Of the 18 here 50 % are ADHD" in text
    assert "Brier score (both classes weighed equally)" in text and "would have a Brier score of 0.250" in text
    assert "the intervals treat the fold models as given" in text
    assert f"KKI 6 3 {kki['auc']:.2f}" in text and f"NYU 12 6 {nyu['auc']:.2f}" in text


def test_a_number_is_told_from_classes(page_of):
    text, results = page_of("age")
    assert "Task age: the number in column age (mean 18.50, standard deviation 5.19)." in text
    assert "moves the accuracy" not in text and "planted in named regions" not in text
    assert "for any other question the right answer is chance" in text
    low, high = (f"{end:.2f}".replace("-", "\u2212") for end in results["intervals"]["r2"])
    assert f"{results['figures']['mae']:.2f} mean absolute error, years" in text and f"R² {low} to {high}" in text
    assert "site and sex, ridge regression" in text, "age is not told from age"
    assert not re.search(r"(?<!\w)-\d", text), "a minus is no hyphen"
    assert f"NYU 12 {show_number(results['sites'][1]['r2'], 2)}" in text and "called" not in text


def test_of_people_nothing_is_called_planted(page_of):
    text, _ = page_of("sex", simulated=False)
    assert "Positive is male" in text and "site and age, logistic" in text
    assert "planted" not in text and "simulat" not in text


def test_three_classes_have_a_confusion_matrix(page_of):
    text, results = page_of("classify:level")
    assert "Task classify:level: which of 3 classes (low, mid, high), by column level." in text
    assert "truth called low called mid called high" in text
    for name, row in zip(("low", "mid", "high"), results["figures"]["confusion"], strict=True):
        assert f"{name} {' '.join(map(str, row))}" in text
    assert "Positive is" not in text and "Of the first repetition" not in text


def test_numbers_and_intervals_are_written_with_a_minus():
    assert show_number(-0.4785, 2) == "\u22120.48" and show_number(None) == show_number(float("nan")) == "–"
    assert show_interval([-2.03, 0.33]) == "\u22122.03 to 0.33" and show_interval(None) == ""
    assert (
        true_minus("R² -0.48 (-2 to 1), 3-fold, sub-01, x -1")
        == "R² \u22120.48 (\u22122 to 1), 3-fold, sub-01, x \u22121"
    )
