import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score

from boldforge.finetune.metrics import auc, binary_metrics, roc_points


def test_a_case_worked_by_hand():
    figures = binary_metrics([0, 0, 0, 1, 1], [0.1, 0.6, 0.4, 0.5, 0.3])
    assert figures["sensitivity"] == pytest.approx(1 / 2)
    assert figures["specificity"] == pytest.approx(2 / 3)
    assert figures["balanced_accuracy"] == pytest.approx(7 / 12)
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["auc"] == pytest.approx(3 / 6)  # of 6 pairs: 0.5 beats 0.1 and 0.4, 0.3 beats 0.1
    assert (figures["n"], figures["n_positive"]) == (5, 2)


def test_agrees_with_sklearn_on_unbalanced_scores_with_ties():
    generator = np.random.default_rng(3)
    labels = (generator.random(57) < 0.3).astype(int)
    scores = np.round(np.clip(generator.normal(0.4 + 0.2 * labels, 0.25), 0, 1), 1)
    figures = binary_metrics(labels, scores)
    called = (scores >= 0.5).astype(int)
    assert figures["auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, called))
    assert figures["sensitivity"] == pytest.approx(recall_score(labels, called))
    assert figures["specificity"] == pytest.approx(recall_score(labels, called, pos_label=0))
    roc = roc_points(labels, scores)
    assert np.trapezoid(roc["tpr"], roc["fpr"]) == pytest.approx(figures["auc"])
    assert (roc["fpr"][0], roc["tpr"][0], roc["fpr"][-1], roc["tpr"][-1]) == (0, 0, 1, 1)


def test_an_absent_class_gives_none_not_a_wrong_number():
    figures = binary_metrics([1, 1], [0.2, 0.8])
    assert figures["auc"] is None and figures["specificity"] is None and figures["balanced_accuracy"] is None
    assert figures["sensitivity"] == 0.5


@pytest.mark.parametrize(
    ("labels", "scores"), [([], []), ([0, 1], [0.5]), ([0, 2], [0.1, 0.2]), ([0, 1], [0.1, float("nan")])]
)
def test_nonsense_is_refused(labels, scores):
    with pytest.raises(ValueError, match="must be"):
        binary_metrics(labels, scores)


def test_the_mean_of_roc_curves_has_the_mean_of_their_areas():
    generator = np.random.default_rng(4)
    labels = (np.arange(31) % 3 == 0).astype(int)
    scores = np.round(generator.normal(0.3 * labels[:, None], 0.5, size=(31, 7)), 1)
    areas = [binary_metrics(labels, column)["auc"] for column in scores.T]
    roc = roc_points(labels, scores)
    assert np.trapezoid(roc["tpr"], roc["fpr"]) == pytest.approx(np.mean(areas)) == pytest.approx(auc(labels, scores))
    assert roc["tpr"][0] == 0 and roc["tpr"][-1] == 1 and (np.diff(roc["tpr"]) >= 0).all()
    assert roc_points(labels, scores[:, :1]) == roc_points(labels, scores[:, 0])
