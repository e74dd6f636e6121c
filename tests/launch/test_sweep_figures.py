"""A sweep's figures in the report: the rank against the AUC with intervals, and parallel coordinates."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boldforge.finetune.intervals import auc_interval
from boldforge.launch.model_card import count_subjects
from boldforge.launch.nested_figures import nested_parallel_figure, nested_rank_figure
from boldforge.launch.report import write_report
from boldforge.launch.sweep_figures import parallel_figure, rank_figure, say, searched

LAYERS = [["in_proj"], ["in_proj", "fc1"]]


def _results(n=6, **space):
    trials = [
        {
            "trial": number,
            "rank": (0, 2, 8)[number % 3],
            "alpha": 4.0 * (number + 1),
            "targets": LAYERS[number % 2],
            "lr": 1e-3 * 10 ** (number % 2),
            "validation_auc": 0.5 + 0.05 * number,
            "validation_auc_interval": auc_interval(0.5 + 0.05 * number, 10, 12),
            "validation_loss": 0.6,
            "trainable_parameters": 10,
            "epochs": 3,
            "stopped_early": False,
            "diverged": False,
        }
        for number in range(n)
    ]
    tested = {"figures": {"auc": 0.6, "n": 20, "n_positive": 9}, "intervals": {"auc": [0.4, 0.8]}}
    return tested | {"trials": trials, "best": trials[-1], "settings": {"space": space}}


def _texts(svg):
    return [re.sub("<[^>]+>", "", text).strip() for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S)]


@given(auc=st.floats(0, 1), n_positive=st.integers(2, 300), n_negative=st.integers(2, 300))
def test_the_interval_of_an_auc_lies_around_it_and_narrows_with_subjects(auc, n_positive, n_negative):
    low, high = auc_interval(auc, n_positive, n_negative)
    assert 0 <= low <= auc <= high <= 1 and high - low > 0
    assert auc_interval(1 - auc, n_positive, n_negative) == pytest.approx([1 - high, 1 - low], abs=1e-6)
    narrow = auc_interval(auc, 4 * n_positive, 4 * n_negative)
    assert narrow[1] - narrow[0] < high - low


def test_the_interval_is_the_one_published():
    """Coin's AUC with 10 and 10: θ(1−θ)(1 + N(1−θ)/(2−θ) + Nθ/(1+θ)) / 100 at the ends, N = 9."""
    low, high = auc_interval(0.5, 10, 10)
    for end in (low, high):
        variance = end * (1 - end) * (1 + 9 * (1 - end) / (2 - end) + 9 * end / (1 + end)) / 100
        assert abs(end - 0.5) / variance**0.5 == pytest.approx(1.959964, abs=1e-5)
    assert 0.25 < low < 0.28


def test_only_what_was_searched_is_an_axis():
    assert list(searched(_results())) == ["rank"]
    assert list(searched(_results(lr=[1], alpha=[1], targets=LAYERS))) == ["rank", "alpha", "targets", "lr"]


def test_the_rank_curve_shows_every_rank_the_test_and_chance():
    results = _results()
    texts = _texts(rank_figure(results["trials"], "auc", "AUC", results))
    assert {"0", "2", "8"} <= set(texts)
    assert {"LoRA rank (0: the head alone)", "chance", "test, the chosen one"} <= set(texts)


@pytest.mark.parametrize("broken", ["diverged", "no interval"])
def test_a_trial_without_a_figure_or_an_interval_is_no_error(broken):
    results = _results(lr=[1])
    if broken == "diverged":
        results["trials"][1] |= {"validation_auc": None, "validation_auc_interval": None, "diverged": True}
    else:
        for trial in results["trials"]:
            del trial["validation_auc_interval"]
    assert "<svg" in rank_figure(results["trials"], "auc", "AUC", results)
    drawn = parallel_figure(results["trials"], searched(results), "auc", "AUC", results["best"])
    assert {"rank", "step size", "validation AUC", "the chosen one"} <= set(_texts(drawn))


def test_parallel_coordinates_need_two_axes():
    results = _results()
    assert parallel_figure(results["trials"], searched(results), "auc", "AUC", results["best"]) == ""


def test_the_report_shows_the_table_and_both_figures(tmp_path):
    more = {"simulated": True, "measured_by": "once", "sentence": "Said.", "selected_by": "validation auc", "roc": None}
    more["subjects"] = {name: {"n": 20} for name in ("train", "validation", "test")}
    (tmp_path / "sweep.json").write_text(json.dumps(_results(lr=[1], targets=LAYERS) | more))
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert page.count("<svg") == 2
    assert "20 subjects trained, 20 validated, 20 tested." in page and "inner folds" not in page
    assert re.search(r"<th>LoRA rank.*layers.*step size.*trainable", page)
    assert f'<td class="n">{say(LAYERS[1])}</td>' in page and '<td class="n">0.01</td>' in page


def test_the_report_and_the_card_say_who_validated_in_inner_folds(tmp_path):
    more = {"simulated": True, "measured_by": "once", "sentence": "Said.", "selected_by": "validation auc", "roc": None}
    parts = {"train": {"n": 44}, "validation": {"n": 33}, "test": {"n": 11}}
    more |= {"subjects": parts, "inner_folds": 3}
    (tmp_path / "sweep.json").write_text(json.dumps(_results() | more))
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "Of 44 subjects 33 validated, once each in 3 inner folds, and trained in the others; 11 tested." in page
    assert "on the validation subjects, the mean of 3 inner folds" in page
    assert count_subjects(parts, 3) == 55 and count_subjects(parts) == 88


def test_labels_that_would_lie_over_each_other_are_left_out_but_never_the_ends():
    trials = [{"rank": rank, "validation_auc": 0.6, "validation_auc_interval": [0.5, 0.7]} for rank in (7, 8, 44, 46)]
    results = {"trials": trials, "best": trials[0], "figures": {"auc": 0.5}, "intervals": {"auc": [0.3, 0.7]}}
    drawn = rank_figure(trials, "auc", "AUC", results)
    assert all(f">{rank}<" in drawn for rank in (7, 8, 46)) and ">44<" not in drawn


def _nested(folds=3):
    searches = {}
    for number in range(1, folds + 1):
        search = _results(6 - number % 2, lr=[1], targets=LAYERS)
        search["trials"][1] |= {"validation_auc": None, "validation_auc_interval": None, "diverged": True}
        searches[number] = search
    return searches


@pytest.mark.parametrize("folds", [2, 3, 8])
def test_a_nested_sweep_has_a_line_for_every_outer_fold_and_every_trial(folds):
    searches = _nested(folds)
    pooled = {"figures": {"auc": 0.7}, "intervals": {"auc": [0.5, 0.8]}}
    texts = _texts(nested_rank_figure(searches, "auc", "AUC", pooled))
    named = {f"outer fold {number}" for number in range(1, folds + 1)}
    assert named | {"0", "2", "8", "chance", "mean of the outer folds"} <= set(texts)
    drawn = nested_parallel_figure(searches, searched(searches[1]), "auc", "AUC")
    assert named | {"rank", "step size", "validation AUC"} <= set(_texts(drawn))
    assert nested_parallel_figure(searches, {"rank": "rank"}, "auc", "AUC") == ""
    one, more = (
        nested_parallel_figure(dict(list(searches.items())[:n]), searched(searches[1]), "auc", "AUC") for n in (1, 2)
    )
    # A line for every trial of the second fold, and one in the legend.
    assert more.count("<path") - one.count("<path") >= len(searches[2]["trials"])


def test_the_report_of_a_nested_sweep_shows_both_figures_or_where_the_searches_are_gone_none(tmp_path):
    more = {"simulated": True, "measured_by": "nested", "roc": None, "permutation": {"p": 0.1}, "verdict": "Said."}
    settings = {"space": {"lr": [1], "targets": LAYERS}, "outer_folds": 3}
    folds = [
        {"fold": number, "chosen": "rank 2", "n_test": 7, "figures": {"auc": 0.6}, "best_epoch": 3}
        for number in (1, 2, 3)
    ]
    pooled = {"figures": {"auc": 0.6, "n": 20, "n_positive": 9}, "intervals": {"auc": [0.4, 0.8]}, "settings": settings}
    (tmp_path / "metrics.json").write_text(json.dumps(pooled | more | {"folds": folds}))
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert page.count("<svg") == 0 and "Adapter sweep" in page
    for number, search in _nested().items():
        (tmp_path / "outer" / str(number)).mkdir(parents=True)
        (tmp_path / "outer" / str(number) / "sweep.json").write_text(json.dumps(search))
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert page.count("<svg") == 2 and "outer fold 3" in page and "thick ones were chosen" in page
