"""A search in every outer fold: nobody who is tested was in the search that chose for them; kills change nothing."""

import csv
import json
import math
import random
import shutil

import pytest
from typer.testing import CliRunner

from boldforge.configs import ConfigError, load_config
from boldforge.data_shards import load_manifest
from boldforge.finetune import (
    AttributionConfig,
    FinetuneConfig,
    FinetuneError,
    SweepConfig,
    SweepError,
    attribute_regions,
    finetune,
    rank_sweep,
    read_task,
    sweep,
)
from boldforge.finetune.fold_models import read_folds
from boldforge.finetune.study import open_study
from boldforge.launch.cli import app
from boldforge.launch.report import write_report

SMALL = {
    "clips": 1,
    "folds": 2,
    "outer_folds": 2,
    "ranks": [0, 1],
    "grace": 1,
    "adapter": {"first_stage": 1},
    "training": {"epochs": 2},
    "baselines": ["site", "embedding"],
    "driver": "serial",
}
pytestmark = pytest.mark.usefixtures("few_draws")
FILES = (
    "metrics.json",
    "predictions.tsv",
    "outer/1/sweep.json",
    "outer/2/best/adapter/head.safetensors",
    "folds/1/task.json",
    "folds/2/head.safetensors",
)


def _config(shards, encoder, out, **changes):
    return load_config(SweepConfig, {"shards": shards, "backbone": encoder, "out": out, **SMALL, **changes})


@pytest.fixture(scope="module")
def nested(cohort, encoder, tmp_path_factory):
    out, trained = tmp_path_factory.mktemp("nested") / "out", []
    gather, seen = rank_sweep.gather_seen, []

    def watched(study, subjects, *others):
        trained.append({subject.name for subject in subjects})
        return gather(study, subjects, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_sweep, "gather_seen", watched)
        results = sweep(_config(cohort, encoder, out), lambda done, total: seen.append(done / total))
    return out, results, trained, seen


def test_every_subject_is_tested_once_by_a_search_that_never_saw_it(nested, cohort, encoder, tmp_path):
    out, results, trained, seen = nested
    folds = open_study(_config(cohort, encoder, tmp_path)).folds
    assert trained == [set(fold.train) | set(fold.validation) for fold in folds]
    assert results["figures"]["n"] == 22 == sum(fold["n_test"] for fold in results["folds"])
    with (out / "predictions.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert len({row["subject"] for row in rows}) == len(rows) == 22 and {row["fold"] for row in rows} == {"1", "2"}
    assert seen == sorted(seen) and seen[-1] == 1
    names = {run.subject for run in load_manifest(cohort).runs}
    for path in out.rglob("*"):
        if path.suffix in {".json", ".tsv", ".jsonl"}:
            assert not [name for name in names if name in path.read_text()], path
    assert not list(out.rglob("tested.json"))


def test_the_pooled_figures_are_those_of_the_winners_beside_baselines(nested, cohort, encoder, tmp_path):
    out, results, *_ = nested
    assert json.loads((out / "metrics.json").read_text()) == results
    for fold in results["folds"]:
        alone = json.loads((out / "outer" / str(fold["fold"]) / "sweep.json").read_text())
        assert fold["figures"] == alone["figures"] and fold["chosen"] == alone["best"]["name"]
    right = sum(round(fold["figures"]["accuracy"] * fold["n_test"]) for fold in results["folds"])
    assert results["figures"]["accuracy"] == pytest.approx(right / 22)
    assert set(results["baselines"]) == {"site", "embedding"} and results["measured_by"].startswith("2-fold nested")
    assert {"p", "p_within_sites"} == set(results["permutation"]) and len(results["sites"]) == 2
    assert results["verdict"]
    page = write_report([out], tmp_path / "report.html").read_text()
    assert results["folds"][0]["chosen"] in page and results["verdict"].split(":")[0] in page
    assert "outer fold 2" in page and "mean of the outer folds" in page


def _rows(path):
    with path.open() as stream:
        return {row["subject"]: row for row in csv.DictReader(stream, delimiter="\t")}


def test_a_subject_has_one_pseudonym_in_all_files(nested):
    out, *_ = nested
    pooled, of_folds = _rows(out / "predictions.tsv"), {}
    for fold in ("1", "2"):
        rows = _rows(out / "outer" / fold / "best" / "predictions.tsv")
        assert not rows.keys() & of_folds.keys()
        of_folds |= {name: (fold, row["score"], row["label"], row["site"]) for name, row in rows.items()}
        assert set(read_task(out / "folds" / fold)["figures"]["test"]) == rows.keys()
    assert of_folds == {name: (row["fold"], row["score"], row["label"], row["site"]) for name, row in pooled.items()}


def _attribute(model, **changes):
    quick = {"methods": ["integrated-gradients"], "clips": 1, "steps": 2, "permutations": 99, "resamples": 100}
    return attribute_regions(load_config(AttributionConfig, {"model": model, **quick, **changes}))


def test_each_folds_winner_is_asked_about_its_own_test_subjects(nested, tmp_path):
    out, results, *_ = nested
    for fold in results["folds"]:
        kept, winner = out / "folds" / str(fold["fold"]), out / "outer" / str(fold["fold"]) / "best" / "adapter"
        assert (kept / "head.safetensors").read_bytes() == (winner / "head.safetensors").read_bytes()
        assert read_task(kept)["figures"]["figures"] == fold["figures"]
        assert read_task(winner)["figures"]["outer_fold"] == fold["fold"], "by which a release refuses it"
    found = _attribute(out, out=tmp_path / "attribution")
    assert (found["n_subjects"], found["n_folds"]) == (22, 2)
    pooled = _rows(out / "predictions.tsv")
    rows = _rows(tmp_path / "attribution" / "integrated-gradients-subjects.tsv")
    assert {name: row["fold"] for name, row in rows.items()} == {name: row["fold"] for name, row in pooled.items()}
    for name, row in rows.items():
        # One clip, so the score is the logit of the probability.
        assert 1 / (1 + math.exp(-float(row["score"]))) == pytest.approx(float(pooled[name]["score"]), abs=2e-6)


@pytest.mark.slow
def test_where_not_all_folds_are_tested_the_tested_are_attributed(cohort, encoder, tmp_path):
    out = tmp_path / "out"
    changes = {"folds": 3, "outer_folds": 2, "ranks": [0], "training": {"epochs": 1}, "baselines": []}
    results = sweep(_config(cohort, encoder, out, **changes))
    assert _attribute(out)["n_subjects"] == results["figures"]["n"] < 22


def test_a_finished_one_without_fold_models_gets_them(nested, cohort, encoder, monkeypatch):
    out, results, *_ = nested
    kept = {path.name: path.read_bytes() for path in (out / "folds" / "2").iterdir()}
    shutil.rmtree(out / "folds")
    with pytest.raises(FinetuneError, match=r"folds/1: no such folder.*; sweep again with this boldforge\.$"):
        read_folds(out, load_manifest(cohort).content_hash)
    monkeypatch.setattr(rank_sweep, "drive", None)
    assert sweep(_config(cohort, encoder, out)) == results
    assert {path.name: path.read_bytes() for path in (out / "folds" / "2").iterdir()} == kept


def test_a_finished_one_is_given_again_and_another_recipe_is_refused(nested, cohort, encoder, monkeypatch):
    out, results, *_ = nested
    monkeypatch.setattr(rank_sweep, "drive", None)
    assert sweep(_config(cohort, encoder, out)) == results
    with pytest.raises(SweepError, match=r"holds a sweep with other settings \(seed\)"):
        sweep(_config(cohort, encoder, out, seed=1))
    with pytest.raises(ConfigError, match="holds a sweep"):
        finetune(load_config(FinetuneConfig, {"shards": cohort, "backbone": encoder, "out": out}))


def test_a_finished_one_without_its_searches_says_what_is_missing(nested, cohort, encoder, tmp_path):
    out = shutil.copytree(nested[0], tmp_path / "copied")
    shutil.rmtree(out / "outer" / "2")
    with pytest.raises(SweepError, match=r"holds a finished sweep, but outer/2/sweep.json is missing; put it back"):
        sweep(_config(cohort, encoder, out))


def test_the_command_prints_what_each_search_chose_and_the_pooled_figures(nested, cohort, encoder, tmp_path):
    out, results, *_ = nested
    recipe = tmp_path / "nested.yaml"
    recipe.write_text(json.dumps({"shards": str(cohort), "backbone": str(encoder), "out": str(out), **SMALL}))
    done = CliRunner().invoke(app, ["sweep", "--config", str(recipe)], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for fold in results["folds"]:
        assert f"fold {fold['fold']}: {fold['chosen']}, validation AUC" in done.output
    assert "2-fold nested cross-validation" in done.output and "site alone" in done.output
    assert " ".join(results["verdict"].split()) in " ".join(done.output.split())


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_files(nested, cohort, encoder, tmp_path, sweep_and_die):
    whole, generator, out = nested[0], random.Random(0), tmp_path / "out"
    config, kills = _config(cohort, encoder, out), 0
    while not sweep_and_die(config, generator.randint(1, 40) if kills < 12 else -1):
        kills += 1
    assert kills > 4
    for name in FILES:
        there, here = ((folder / name).read_bytes().replace(str(folder).encode(), b"OUT") for folder in (whole, out))
        assert here == there, name


@pytest.mark.slow
def test_the_result_is_the_same_on_ray(nested, cohort, encoder, tmp_path):
    results = sweep(_config(cohort, encoder, tmp_path / "out", driver="ray", concurrency=2))
    assert {**results, "settings": 0} == {**nested[1], "settings": 0}
    assert (tmp_path / "out" / "predictions.tsv").read_bytes() == (nested[0] / "predictions.tsv").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outer_folds": 4}, "outer_folds is 4, but folds deals 2"),
        ({"baselines": ["sites"]}, "'sites' is not a baseline"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        _config("shards", "encoder", "out", **changes)
