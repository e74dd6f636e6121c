"""A plain sweep's winner beside plain models, which read the test subjects after the choice as it does."""

import json
from contextlib import closing

import numpy as np
import pytest
from typer.testing import CliRunner

from boldforge.configs import load_config
from boldforge.data_shards import load_manifest
from boldforge.finetune import SweepConfig, SweepError, rank_sweep, study, sweep
from boldforge.finetune.baselines import baseline_scores
from boldforge.finetune.evaluation import best_threshold
from boldforge.finetune.study import open_study
from boldforge.finetune.sweep_journal import Journal
from boldforge.finetune.tasks.columns import SUBJECT_BASELINES
from boldforge.launch.cli import app
from boldforge.launch.model_card import render_card
from boldforge.launch.report import write_report
from tests.finetune.small_sweeps import SMALL

NAMES = ["site", "image", "embedding"]
pytestmark = pytest.mark.usefixtures("few_draws")


def _config(shards, encoder, out, **changes):
    return load_config(SweepConfig, {"shards": shards, "backbone": encoder, "out": out, **SMALL, **changes})


@pytest.fixture(scope="module")
def done(cohort, encoder, tmp_path_factory):
    out, order = tmp_path_factory.mktemp("sweep") / "out", []
    drive, read = rank_sweep.drive, study.subject_features

    def driving(*arguments):
        drive(*arguments)
        order.append("chosen")

    def reading(*arguments):
        order.append("everybody read")
        return read(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_sweep, "drive", driving)
        patch.setattr(study, "subject_features", reading)
        results = sweep(_config(cohort, encoder, out, baselines=NAMES))
    return out, results, order


def test_baselines_read_the_test_subjects_after_the_choice(done):
    assert done[2] == ["chosen", "everybody read"]


def test_they_are_fitted_on_all_but_the_test_and_stand_beside_the_winner(done, cohort, encoder, tmp_path):
    _, results, _ = done
    opened = open_study(_config(cohort, encoder, tmp_path))
    fold = opened.folds[0]
    train, validation, test = (opened.positions(part) for part in (fold.train, fold.validation, fold.test))
    labels = np.array([subject.label for subject in opened.cohort.subjects])
    features = opened.features(["image", "site"], lambda: None)
    assert list(results["baselines"]) == NAMES
    for name in ("image", "site"):
        entry = results["baselines"][name]
        checked, tested = baseline_scores(name, opened.task, features[name], labels, train, validation, test, anew=True)
        wanted = opened.task.metrics(labels[test], tested, best_threshold(labels[validation], checked))
        assert entry["figures"] == wanted
        difference = results["figures"]["auc"] - wanted["auc"]
        assert entry["model_minus_baseline"]["difference"] == pytest.approx(difference)
        assert {"interval", "p"} <= entry["model_minus_baseline"].keys() and len(entry["intervals"]["auc"]) == 2
    assert results["verdict"] and {"p", "p_within_sites"} == set(results["permutation"]) and len(results["sites"]) == 2


def test_the_report_the_card_and_the_command_show_them(done, cohort, encoder, tmp_path):
    out, results, _ = done
    assert json.loads((out / "sweep.json").read_text()) == results
    page = " ".join(write_report([out], tmp_path / "report.html").read_text().split())
    assert "Beside plain models" in page and "site alone, logistic regression" in page
    assert "Fitted on the same training and validation subjects, tested on the same" in page
    task = json.loads((out / "best" / "adapter" / "task.json").read_text())
    keys = ("grid", "clip_length", "tr", "normalisation", "n_runs", "n_subjects", "manifest_hash", "atlas", "simulated")
    model = {"embed_dim": 8, "depths": [2], "window": [2], "d_state": 4, "patch_mm": 48}
    config = {"data": dict.fromkeys((*keys, "atlas_sha256"), "4"), "model": model, "probe": {"shape": [1, 4, 5]}}
    config["boldforge_version"] = "0"
    card = " ".join(render_card(config, {}, task).split())
    assert "fitted on the same training and validation subjects and tested on the same: | plain model" in card
    assert results["sentence"] in card and f"**{results['verdict']}**" in card
    recipe = tmp_path / "sweep.yaml"
    settings = {"shards": str(cohort), "backbone": str(encoder), "out": str(out), "baselines": NAMES}
    recipe.write_text(json.dumps(SMALL | settings))
    said = CliRunner().invoke(app, ["sweep", "--config", str(recipe)], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert said.exit_code == 0 and "site alone" in said.output and results["verdict"] in " ".join(said.output.split())
    names = {run.subject for run in load_manifest(cohort).runs}
    assert not [name for name in names for path in out.rglob("*.json") if name in path.read_text()]


def test_what_is_compared_with_is_part_of_the_sweep(done, cohort, encoder):
    out, results, _ = done
    assert results["settings"]["baselines"] == NAMES
    with pytest.raises(SweepError, match=r"other settings \(baselines\)"):
        sweep(_config(cohort, encoder, out))


def test_the_tasks_own_baselines_are_taken_where_none_are_named(cohort, encoder, tmp_path):
    config = _config(cohort, encoder, tmp_path, ranks=[0])
    assert "baselines" not in config.settings(), "sweeps begun before there were any go on"
    assert set(sweep(config)["baselines"]) == set(SUBJECT_BASELINES)


def test_a_sweep_of_before_is_given_again_and_shown(cohort, encoder, tmp_path):
    out = tmp_path / "out"
    results = sweep(_config(cohort, encoder, out, ranks=[0], baselines=[]))
    new = {"rows", "chance", "permutation", "calibration", "sites", "baselines", "verdict"}
    before = {name: value for name, value in results.items() if name not in new}
    del before["settings"]["baselines"]
    (out / "sweep.json").write_text(json.dumps(before))
    with closing(Journal(out / "journal.jsonl")) as journal:
        records = list(journal.records)
        del records[0]["sweep"]["baselines"]
        journal.clear()
        for record in records:
            journal.append(record)
    assert sweep(_config(cohort, encoder, out, ranks=[0])) == before
    assert results["sentence"].split(";")[0] in write_report([out], tmp_path / "r.html").read_text()
