"""Trials that train once in each of several inner folds: the mean decides, and kills and drivers change nothing."""

import csv
import json
import random
import shutil
import tempfile
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.configs import ConfigError, load_config
from boldforge.finetune import SweepConfig, SweepError, fit, nested_sweep, rank_sweep, sweep
from boldforge.finetune.baselines import baseline_scores_over
from boldforge.finetune.evaluation import best_threshold
from boldforge.finetune.folds import inner_folds
from boldforge.finetune.merged_curves import merge_curves
from boldforge.finetune.study import open_study
from boldforge.finetune.sweep_journal import read_journal
from tests.finetune.small_sweeps import SMALL, read_swept

SWEEP = SMALL | {
    "inner_folds": 2,
    "adapter": {"first_stage": 1, "dropout": 0.1},
    # So fast that the inner folds differ in their own best epochs.
    "training": {"epochs": 3, "lr": 0.05, "head_lr": 0.25},
    "baselines": ["site"],
}
pytestmark = pytest.mark.usefixtures("few_draws")
BATCHED = {"ranks": [0, 1, 2, 4], "batch_trials": 3}


def _config(shards, encoder, out, **changes):
    return load_config(SweepConfig, {"shards": shards, "backbone": encoder, "out": out, **SWEEP, **changes})


def _sweep_and_keep(config, kept, on_progress=None):
    """Sweep, and copy what the trials have recorded before it is tidied up; return results and the trials' specs."""
    write, drive, told = rank_sweep.write_results, rank_sweep.drive, []

    def copy_first(*arguments):
        shutil.copytree(config.out / "trials", kept)
        return write(*arguments)

    def look(config, spec, *others):
        told.append(spec)
        drive(config, spec, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_sweep, "write_results", copy_first)
        patch.setattr(rank_sweep, "drive", look)
        return sweep(config, on_progress), told


@pytest.fixture(scope="module")
def swept(cohort, encoder, tmp_path_factory):
    out, kept, seen = tmp_path_factory.mktemp("sweep") / "out", tmp_path_factory.mktemp("kept") / "trials", []
    config = _config(cohort, encoder, out)
    results, told = _sweep_and_keep(config, kept, lambda done, total: seen.append((done, total)))
    return out, results, kept, told[0], seen


def _line(epoch, figure, loss):
    sizes = {"trainable_parameters": 3, "total_parameters": 9}
    return {"epoch": epoch, "train_loss": loss / 2, "validation_loss": loss, "auc": figure, "improved": True} | sizes


@st.composite
def curves(draw):
    """Curves of a few inner folds; coarse numbers, so that ties occur and every mean is exact."""
    folds, epochs = draw(st.integers(2, 4)), draw(st.integers(0, 6))
    eighths = st.integers(0, 8).map(lambda n: n / 8)
    found = []
    for _ in range(folds):
        length = draw(st.one_of(st.just(epochs), st.integers(0, epochs)))
        curve = [_line(epoch, draw(eighths), draw(eighths)) for epoch in range(1, length + 1)]
        if length < epochs:
            curve.append({"epoch": length + 1, "diverged": "nan", "trainable_parameters": 3, "total_parameters": 9})
        found.append(tuple(curve))
    return found


@given(curves())
@settings(deadline=None)
def test_the_curve_of_a_trial_is_the_mean_of_its_inner_folds(folds):
    merged = merge_curves(folds, "auc")
    length = min(sum("diverged" not in line for line in curve) for curve in folds)
    broken = any("diverged" in line for curve in folds for line in curve)
    assert len(merged) == length + broken and [line["epoch"] for line in merged] == list(range(1, len(merged) + 1))
    assert ["diverged" in line for line in merged] == [False] * length + [True] * broken
    best = None
    for epoch, line in enumerate(merged[:length]):
        figure, loss = (
            sum(Fraction(curve[epoch][name]) for curve in folds) / len(folds) for name in ("auc", "validation_loss")
        )
        assert line["auc"] == pytest.approx(float(figure)) and line["validation_loss"] == pytest.approx(float(loss))
        better = best is None or figure > best[0] or (figure == best[0] and loss < best[1])
        assert line["improved"] == better
        best = (figure, loss) if better else best
        assert line["auc_by_fold"] == [curve[epoch]["auc"] for curve in folds]


def test_the_order_of_the_inner_folds_does_not_make_one_epoch_better():
    figures = [(0.1, 0.7, 0.3), (0.7, 0.3, 0.1), (0.3, 0.1, 0.7)]
    assert len({sum(each) for each in figures}) > 1, "else these say nothing"
    folds = [tuple(_line(epoch, each[fold], 0.5) for epoch, each in enumerate(figures, 1)) for fold in range(3)]
    assert [line["improved"] for line in merge_curves(folds, "auc")] == [True, False, False]


def _recorded(kept, trial):
    return [read_journal(kept / f"{trial:04d}" / str(fold) / "epochs.jsonl") for fold in (1, 2)]


def test_table_and_choice_follow_from_what_the_inner_folds_recorded(swept):
    out, results, kept, *_ = swept
    standing = []
    for row in results["trials"]:
        one, two = _recorded(kept, row["trial"])
        assert len(one) == len(two) == row["epochs"]
        means = [
            ((a["auc"] + b["auc"]) / 2, -(a["validation_loss"] + b["validation_loss"]) / 2)
            for a, b in zip(one, two, strict=True)
        ]
        best = max(range(len(means)), key=lambda epoch: (means[epoch], -epoch))
        assert row["best_epoch"] == best + 1 and row["inner_folds"] == 2 and row["validation_subjects"] == 14
        assert [row["validation_auc"], -row["validation_loss"]] == pytest.approx(means[best])
        assert row["validation_auc_by_epoch"] == pytest.approx([figure for figure, _ in means])
        assert row["validation_auc_by_fold"] == [one[best]["auc"], two[best]["auc"]]
        low, high = row["validation_auc_interval"]
        assert low < row["validation_auc"] < high
        standing.append((means[best][0], -row["rank"]))
    assert results["best"]["rank"] == -max(standing)[1]
    with (out / "trials.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [(row["inner_folds"], row["validation_subjects"]) for row in rows] == [("2", "14")] * 2
    decisions = [record for record in read_journal(out / "journal.jsonl") if "decide" in record]
    first = [row["validation_auc_by_epoch"][0] for row in results["trials"]]
    assert [figure for _, figure in decisions[0]["standing"]] == pytest.approx(first)


def test_the_threshold_is_that_of_all_who_validated_at_the_chosen_epoch(swept, cohort, encoder, tmp_path):
    """Both inner folds trained once more, by the loop that a cross-validation uses."""
    _, results, kept, *_ = swept
    study, best = open_study(_config(cohort, encoder, tmp_path)), results["best"]
    own = [max(line["epoch"] for line in curve if line["improved"]) for curve in _recorded(kept, best["trial"])]
    assert own != [best["best_epoch"]] * 2, "else their own best weights would do"
    label_of = {subject.name: subject.label for subject in study.cohort.subjects}
    labels, scores = [], []
    for number, part in enumerate(inner_folds(study.folds[0], 2)):
        names = sorted(part.train + part.validation)
        clips = study.gather([study.cohort.subjects[i] for i in study.positions(names)], tmp_path / str(number))
        train, checked = (clips.select([names.index(name) for name in of]) for of in (part.train, part.validation))
        classifier = study.classifier(study.config.adapter.model_copy(update={"rank": best["rank"]}))
        for _ in fit.fit(classifier, train, checked, study.config.training, best["best_epoch"], study.config.seed):
            pass
        labels += [label_of[name] for name in part.validation]
        scores += fit.predict_subjects(classifier, checked, 8).tolist()
    assert len(study.folds[0].test) + len(scores) == 22
    assert results["threshold"] == pytest.approx(best_threshold(labels, scores), abs=1e-5)
    assert results["threshold"] != pytest.approx(best_threshold(labels[:7], scores[:7]), abs=1e-3)


def test_nobody_who_is_tested_can_be_reached_and_all_others_validate_once(swept, cohort, encoder, tmp_path):
    _, results, _, spec, _ = swept
    fold = open_study(_config(cohort, encoder, tmp_path)).folds[0]
    seen = len(fold.train) + len(fold.validation)
    assert len(spec.inner) == 2 and (spec.train, spec.validation) == (spec.inner[0].train, spec.inner[0].validation)
    for split in spec.inner:
        assert sorted(split.train + split.validation) == list(range(seen))
    assert sorted(place for split in spec.inner for place in split.validation) == list(range(seen))
    assert results["subjects"] == {
        "train": {"n": 14, "n_positive": 7},
        "validation": {"n": 14, "n_positive": 7},
        "test": {"n": 8, "n_positive": 4},
    }


def test_baselines_choose_over_the_same_inner_folds(swept, cohort, encoder, tmp_path):
    study = open_study(_config(cohort, encoder, tmp_path))
    fold, labels = study.folds[0], np.array([subject.label for subject in study.cohort.subjects])
    splits = [(study.positions(part.train), study.positions(part.validation)) for part in inner_folds(fold, 2)]
    rows = study.features(["site"], lambda: None)["site"]
    test, validating = study.positions(fold.test), [i for _, validation in splits for i in validation]
    checked, tested = baseline_scores_over("site", study.task, rows, labels, splits, test)
    wanted = study.task.metrics(labels[test], tested, best_threshold(labels[validating], checked))
    assert swept[1]["baselines"]["site"]["figures"] == wanted


def test_every_file_says_how_many_inner_folds_chose(swept):
    out, results, *_ = swept
    said = "the mean of 2 inner folds, in which 14 subjects validated once each); trained anew on these for"
    assert said in results["sentence"] and results["settings"]["inner_folds"] == 2
    for path in ("sweep.json", "best/metrics.json"):
        content = json.loads((out / path).read_text())
        assert content["inner_folds"] == 2 and "chose by the mean of 2 inner folds" in content["measured_by"]
    task = json.loads((out / "best/adapter/task.json").read_text())
    assert task["figures"]["inner_folds"] == 2


def test_progress_counts_every_inner_fold(cohort, encoder, tmp_path):
    seen = []
    config = _config(cohort, encoder, tmp_path, grace=3, ranks=[1])
    sweep(config, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1
    # 14 clips read, then 7 trained on in three epochs of either inner fold; training anew is not counted. 22 subjects
    # are read for the baselines.
    assert [done for done, _ in seen[14:20]] == [21, 28, 35, 42, 49, 56] and seen[-1] == (78, 78)


def test_one_inner_fold_leaves_no_trace(cohort, encoder, tmp_path):
    config = _config(cohort, encoder, tmp_path / "out", inner_folds=1, training={"epochs": 1})
    results, (spec,) = _sweep_and_keep(config, tmp_path / "kept")
    for name in ("sweep.json", "journal.jsonl", "best/metrics.json"):
        assert "inner_folds" not in (tmp_path / "out" / name).read_text(), name
    assert spec.inner == ()
    assert results["subjects"]["train"]["n"] + results["subjects"]["validation"]["n"] == 14
    assert {path.parent.name for path in (tmp_path / "kept").rglob("epochs.jsonl")} == {"0000", "0001", "chosen"}
    (line,) = read_journal(tmp_path / "kept" / "0001" / "epochs.jsonl")
    assert "scores" not in line


def test_a_trial_that_diverges_in_one_inner_fold_has_diverged(cohort, encoder, tmp_path, monkeypatch):
    end_epoch = fit.Fit.end_epoch

    def explode(fitting, loss, embed):
        second = fitting.validation is not None and fitting.train.rows[0] != 0
        burst = fitting.classifier.adapter.rank == 1 and fitting._number == 2 and second
        return end_epoch(fitting, float("nan") if burst else loss, embed)

    monkeypatch.setattr(fit.Fit, "end_epoch", explode)
    results, _ = _sweep_and_keep(_config(cohort, encoder, tmp_path / "out", grace=3), tmp_path / "kept")
    assert [(row["diverged"], row["epochs"]) for row in results["trials"]] == [(False, 3), (True, 1)]
    # The other inner fold went on to the rung, whichever came first.
    assert [len(curve) for curve in _recorded(tmp_path / "kept", 1)] == [3, 2]
    assert results["best"]["rank"] == 0


def _killed_again_and_again(config, seed, sweep_and_die, log, most_kills, most_steps):
    generator, kills = random.Random(seed), 0
    while not sweep_and_die(config, generator.randint(1, most_steps) if kills < most_kills else -1, log):
        kills += 1
    assert kills > 1
    return kills


@pytest.mark.parametrize(
    ("seed", "most_kills"), [(0, 2), *(pytest.param(seed, 16, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_killed_at_random_steps_it_ends_the_same(cohort, encoder, tmp_path, swept, seed, most_kills, sweep_and_die):
    out, log = tmp_path / "out", tmp_path / "log"
    config = _config(cohort, encoder, out)
    kills = _killed_again_and_again(config, seed, sweep_and_die, log, most_kills, 60 if most_kills < 10 else 22)
    assert read_swept(out) == read_swept(swept[0])
    assert {path.name for path in out.iterdir()} == {"sweep.json", "trials.tsv", "best", "journal.jsonl"}
    # One trial trains in one inner fold at a time, so a kill costs at most one epoch.
    wanted = 2 * sum(row["epochs"] for row in swept[1]["trials"]) + swept[1]["best"]["best_epoch"]
    assert wanted <= len(log.read_text().splitlines()) <= wanted + kills


@pytest.fixture
def ray_folder(monkeypatch):
    # Short, because sockets live below it.
    session = tempfile.mkdtemp(prefix="t-")
    monkeypatch.setattr(tempfile, "tempdir", session)
    yield
    shutil.rmtree(session)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, BATCHED], ids=["alone", "batched"])
def test_on_ray_the_files_are_the_same(cohort, encoder, tmp_path, ray_folder, changes):
    seen = []
    sweep(_config(cohort, encoder, tmp_path / "serial", **changes))
    config = _config(cohort, encoder, tmp_path / "ray", driver="ray", concurrency=2, **changes)
    sweep(config, lambda done, total: seen.append((done, total)))
    here, there = read_swept(tmp_path / "serial"), read_swept(tmp_path / "ray")
    assert here.pop("sweep.json") == there.pop("sweep.json").replace(b'"driver": "ray"', b'"driver": "serial"')
    assert here == there
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


@pytest.mark.slow
def test_batched_trials_give_the_table_of_trials_alone_and_survive_kills(cohort, encoder, tmp_path, sweep_and_die):
    alone, whole, out, log = (tmp_path / name for name in ("alone", "whole", "out", "log"))
    wanted = sweep(_config(cohort, encoder, alone, **BATCHED | {"batch_trials": 1}))
    results = sweep(_config(cohort, encoder, whole, **BATCHED))
    for row, other in zip(results["trials"], wanted["trials"], strict=True):
        assert row["validation_auc_by_fold"] == pytest.approx(other["validation_auc_by_fold"], rel=1e-4)
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)
    assert results["best"]["trial"] == wanted["best"]["trial"]
    assert results["threshold"] == pytest.approx(wanted["threshold"], rel=1e-4)
    _killed_again_and_again(_config(cohort, encoder, out, **BATCHED), 0, sweep_and_die, log, 8, 60)
    assert read_swept(out) == read_swept(whole)


def test_in_a_nested_sweep_every_search_has_inner_folds_of_its_own(cohort, encoder, tmp_path, monkeypatch):
    told, drive = [], rank_sweep.drive

    def look(config, spec, *others):
        told.append((spec, len(np.load(spec.clips / "labels.npy"))))
        drive(config, spec, *others)

    monkeypatch.setattr(rank_sweep, "drive", look)
    config = _config(cohort, encoder, tmp_path, outer_folds=2, ranks=[0], training={"epochs": 1})
    results = nested_sweep.sweep(config)
    assert results["inner_folds"] == 2 and "a search over 2 inner folds in each fold" in results["measured_by"]
    for fold, (spec, n_seen) in zip(results["folds"], told, strict=True):
        assert fold["n_validation"] == fold["n_train"] == n_seen == 22 - fold["n_test"]
        assert sorted(place for split in spec.inner for place in split.validation) == list(range(n_seen))
    with pytest.raises(SweepError, match=r"holds a sweep with other settings \(inner_folds\)"):
        sweep(config.model_copy(update={"inner_folds": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_folds": 3}, "inner_folds is 3, but beside the part that tests folds deals 2; set inner_folds lower"),
        ({"folds": 2}, "inner_folds is 2, but beside the part that tests folds deals 1"),
        ({"inner_folds": 0}, "inner_folds"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        _config("shards", "encoder", "out", **changes)


def test_a_recipe_with_inner_folds_is_recorded_so_that_it_can_be_read_again():
    config = load_config(SweepConfig, "sweep/adhd-nested.yaml")
    assert config.inner_folds == config.folds - 1 == 4 and load_config(SweepConfig, config.settings()) == config
