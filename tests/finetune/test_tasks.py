import csv

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, mean_absolute_error, r2_score, roc_auc_score

from boldforge.configs import load_config
from boldforge.finetune import FinetuneConfig, finetune, load_classifier
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.metrics import multiclass_metrics, regression_metrics
from boldforge.finetune.tasks import AdhdDiagnosis, get_task


def test_missing_diagnosis_is_none_and_an_unknown_code_is_an_error():
    task = get_task("adhd")
    assert task.label({"diagnosis": 1.0}) == 1
    assert task.label({"diagnosis": 0}) == 0
    assert task.label({"diagnosis": None}) is None
    assert task.label({"age": 9.5}) is None
    with pytest.raises(FinetuneError, match="'diagnosis' holds 3"):
        task.label({"diagnosis": 3})
    with pytest.raises(FinetuneError, match="expected one of: adhd"):
        get_task("horoscope")


def test_both_classes_have_the_same_say_in_the_loss():
    task = AdhdDiagnosis()
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.full((4, 1), 0.0, requires_grad=True)
    task.criterion(labels.tolist())(logits, labels).backward()
    # At even odds the three controls pull down exactly as hard as the one patient pulls up.
    assert logits.grad is not None
    assert logits.grad.sum().item() == pytest.approx(0, abs=1e-7)


def test_a_column_s_classes_are_the_values_that_occur():
    phenotypes = [{"hand": "R"}, {"hand": "L"}, {"hand": None}, {"hand": 2.0}, {}]
    task = get_task("classify:hand", phenotypes)
    assert task.classes == ("2", "L", "R") and task.n_outputs == 3 and task.kind == "multiclass"
    assert [task.label(phenotype) for phenotype in phenotypes] == [2, 1, None, 0, None]
    two = get_task("classify:hand", phenotypes[:3])
    assert two.kind == "binary" and two.label({"hand": "R"}) == 1
    assert get_task("classify:dx", [{"dx": 0}, {"dx": 3.0}]).label({"dx": 3}) == 1
    for name, message in [
        ("classify:foot", "there is no phenotype column 'foot'; the columns are hand."),
        ("regress:Hand", "there is no phenotype column 'Hand'; did you mean 'hand'?"),
        ("age", "there is no phenotype column 'age'"),
        ("classify:", "task is 'classify:', expected one of: adhd"),
        ("regress:", "task is 'regress:'"),
    ]:
        with pytest.raises(FinetuneError, match=message):
            get_task(name, phenotypes)
    with pytest.raises(FinetuneError, match=r"'age' holds 'old', expected a number or nothing.*classify:age"):
        get_task("age").label({"age": "old"})
    assert [get_task("sex").label({"sex": s}) for s in ("F", "M", None)] == [0, 1, None]


def test_a_value_that_is_no_number_is_named_and_what_is_missing_counted():
    phenotypes = [{"age": value} for value in (9.0, None, "abc", None, 12.0, 8.5)]
    with pytest.raises(FinetuneError, match=r"'age' holds no number in 1 of 6 runs \('abc'\), and nothing in 2, "):
        get_task("age", phenotypes)
    assert get_task("age", [row for row in phenotypes if row["age"] != "abc"]).label({"age": 9.0}) == 9.0


def test_a_column_of_measurements_is_not_taken_for_classes():
    measured = [{"iq": float(80 + subject // 2)} for subject in range(16)]
    with pytest.raises(FinetuneError, match=r"'iq' holds 8 different numbers, most .*measurement.*; use regress:iq\."):
        get_task("classify:iq", measured)
    # Four runs each make a measurement no class.
    people = [f"p{subject}" for subject in range(16) for _ in range(4)]
    with pytest.raises(
        FinetuneError, match=r"8 different numbers, most of them in fewer than 4 subjects, .*regress:iq"
    ):
        get_task("classify:iq", [row for row in measured for _ in range(4)], people=people)
    # Subtypes, one of them rare, are classes; so are many codes that occur often.
    assert len(get_task("classify:dx", [{"dx": float(code)} for code in (0, 0, 0, 0, 1, 1, 1, 1, 2, 3)]).classes) == 4
    assert len(get_task("classify:dx", [{"dx": float(subject % 8)} for subject in range(32)]).classes) == 8


def test_figures_of_classes_and_numbers_are_sklearn_s():
    generator = np.random.default_rng(0)
    truth = np.arange(40) % 3
    scores = generator.dirichlet(np.ones(3), 40) + 0.3 * np.eye(3)[truth]
    scores /= scores.sum(axis=1, keepdims=True)
    found = multiclass_metrics(truth, scores)
    assert found["auc"] == pytest.approx(roc_auc_score(truth, scores, multi_class="ovr"))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, scores.argmax(axis=1)))
    assert found["confusion"] == confusion_matrix(truth, scores.argmax(axis=1)).tolist()
    age = generator.normal(30, 5, 40)
    guess = age + generator.normal(0, 3, 40)
    assert regression_metrics(age, guess) == {
        "r2": pytest.approx(r2_score(age, guess)),
        "r": pytest.approx(pearsonr(age, guess).statistic),
        "mae": pytest.approx(mean_absolute_error(age, guess)),
        "n": 40,
    }
    assert regression_metrics([3.0, 3.0], [1.0, 1.0])["r"] is None


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2], [1, 1, 2, 2, 0]])
def test_every_class_pulls_as_hard_as_the_others(labels):
    task = get_task("classify:x", [{"x": name} for name in "abc"])
    logits = torch.zeros(len(labels), 3, requires_grad=True)
    task.criterion(labels)(logits, torch.tensor(labels)).backward()
    torch.testing.assert_close(logits.grad.sum(dim=0), torch.zeros(3), atol=1e-7, rtol=0)


SETTINGS = {"clips": 2, "folds": 3, "training": {"epochs": 8}, "adapter": {"rank": 0}}


def _run(cohort, encoder, out, task, **changes):
    settings = {"shards": cohort, "backbone": encoder, "out": out, "task": task, **SETTINGS, **changes}
    return finetune(load_config(FinetuneConfig, settings))


def test_a_number_is_predicted_in_its_own_unit(cohort, encoder, tmp_path):
    results = _run(cohort, encoder, tmp_path, "age", baselines=["site", "image", "connectivity-svm"])
    assert results["figures"]["r2"] > 0.3 and results["figures"]["mae"] < 4
    assert results["baselines"]["image"]["says"].endswith("ridge regression")
    assert results["baselines"]["site"]["figures"]["r2"] < 0.3
    assert results["verdict"].startswith("R² ") and results["roc"] is None
    classifier = load_classifier(encoder, tmp_path / "adapter")
    assert classifier.head.unit[1].item() == pytest.approx(results["subjects"]["mean"], rel=1e-5)
    with (tmp_path / "predictions.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    error = np.mean([abs(float(row["label"]) - float(row["score"])) for row in rows])
    assert error == pytest.approx(results["figures"]["mae"], abs=1e-5) and {row["threshold"] for row in rows} == {""}


def test_several_classes_that_mean_nothing_are_at_chance(cohort, encoder, tmp_path):
    results = _run(cohort, encoder, tmp_path, "classify:group", baselines=["site", "connectivity-svm"])
    low, high = results["intervals"]["auc"]
    assert low < 0.5 < high and results["verdict"].endswith("not shown to be better than chance.")
    assert np.array(results["figures"]["confusion"]).sum() == results["figures"]["n"] == 24
    with (tmp_path / "predictions.tsv").open() as stream:
        row = next(csv.DictReader(stream, delimiter="\t"))
    assert sum(float(row[f"score_g{i}"]) for i in range(3)) == pytest.approx(1, abs=1e-4)
    assert load_classifier(encoder, tmp_path / "adapter").task.classes == ("g0", "g1", "g2")


def test_one_class_is_no_question(cohort, encoder, tmp_path):
    with pytest.raises(FinetuneError, match=r"'same' holds 1 different value, .* classes; name another column\."):
        _run(cohort, encoder, tmp_path, "classify:same")
    with pytest.raises(FinetuneError, match=r"have the same value 12 in column constant \(0 have none\)"):
        _run(cohort, encoder, tmp_path, "regress:constant")
