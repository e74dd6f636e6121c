"""ComBat takes out what differs between sites, and knows of training subjects only."""

import importlib.util
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from boldforge.configs import load_config
from boldforge.finetune import AdhdDiagnosis, FinetuneConfig, FinetuneError, finetune, harmonise, summary
from boldforge.finetune.baselines import baseline_scores
from boldforge.finetune.beside import plain_models
from boldforge.finetune.harmonise import ComBat
from boldforge.launch.cli import app

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("neuroHarmonize", "neuroCombat", "statsmodels")),
    reason="boldforge[harmonise] is not installed",
)


def _cohort(seed=0, subjects=60):
    """Features of three sites with means and spreads of their own; class 1 is a little higher everywhere."""
    generator = np.random.default_rng(seed)
    sites = [("KKI", "NYU", "OHSU")[number % 3] for number in range(subjects)]
    labels = [float(number // 3 % 2) for number in range(subjects)]
    rows = generator.standard_normal((subjects, 20)) + 0.8 * np.array(labels)[:, None]
    shift = {"KKI": 0.0, "NYU": 6.0, "OHSU": -5.0}
    scale = {"KKI": 1.0, "NYU": 3.0, "OHSU": 0.5}
    return np.array([row * scale[site] + shift[site] for row, site in zip(rows, sites, strict=True)]), sites, labels


@needs_packages
def test_sites_are_alike_afterwards_and_people_still_differ():
    rows, sites, labels = _cohort()
    found = ComBat(rows, sites).apply(rows, sites)
    names = np.array(sites)
    means = [found[names == site].mean() for site in ("KKI", "NYU", "OHSU")]
    spreads = [found[names == site].std() for site in ("KKI", "NYU", "OHSU")]
    assert np.ptp(means) < 0.3 < np.ptp([rows[names == site].mean() for site in ("KKI", "NYU", "OHSU")])
    assert max(spreads) / min(spreads) < 1.3
    truth = np.array(labels)
    assert (found[truth == 1] - found[truth == 0].mean(axis=0)).mean() > 0.3


@needs_packages
def test_test_subjects_cannot_change_the_fit():
    """Other test subjects, or wild values in them, change no bit of training and validation rows and scores."""
    rows, sites, labels = _cohort()
    train, validation, test = list(range(0, 36)), list(range(36, 48)), list(range(48, 60))
    spoilt = rows.copy()
    spoilt[test] = 1e6 * np.random.default_rng(1).standard_normal((len(test), 20))
    other = [*sites[:48], *("OHSU" for _ in test)]
    outcomes = []
    for values, places in ((rows, sites), (spoilt, sites), (rows, other)):
        checked, _ = baseline_scores(
            "connectivity+combat", AdhdDiagnosis(), values, labels, train, validation, test, places
        )
        fitted = ComBat(values[train], [places[i] for i in train])
        outcomes.append((checked, fitted.apply(values[train + validation], [places[i] for i in train + validation])))
    for checked, harmonised in outcomes[1:]:
        assert np.array_equal(checked, outcomes[0][0]) and np.array_equal(harmonised, outcomes[0][1])


@needs_packages
def test_a_row_is_the_same_alone_and_among_others():
    rows, sites, _ = _cohort()
    fitted = ComBat(rows[:40], sites[:40])
    together = fitted.apply(rows[40:], sites[40:])
    for number in range(40, 46):
        np.testing.assert_allclose(fitted.apply(rows[number : number + 1], [sites[number]])[0], together[number - 40])


@needs_packages
def test_what_cannot_be_estimated_stays_as_it_is_and_that_is_said(caplog):
    rows, sites, _ = _cohort()
    rows[:, 3] = 7.0
    fitted = ComBat(rows[:40], sites[:40])
    found = fitted.apply(rows, sites)
    assert (found[:, 3] == 7.0).all() and np.isfinite(found).all()
    unknown = fitted.apply(rows[:2], ["Brown", None])
    assert np.array_equal(unknown, rows[:2])
    caplog.set_level("INFO")
    lonely = ComBat(rows[:4], ["KKI", "KKI", "NYU", "NYU"])
    assert "0 of the 2 sites of these 4 training subjects have 3 of them" in caplog.text
    assert np.array_equal(lonely.apply(rows, sites), rows)


@needs_packages
def test_a_study_shows_both_beside_each_other(cohort, encoder, tmp_path, monkeypatch):
    """Through the command, as a user asks whether harmonising what the encoder reads helps."""
    for name in ("bootstrap_intervals", "permutation_test", "compare"):
        monkeypatch.setattr(summary, name, partial(getattr(summary, name), draws=50))
    arguments = ["finetune", "--task", "adhd", "--data", str(cohort), f"backbone={encoder}", f"out={tmp_path / 'out'}"]
    arguments += ["clips=1", "folds=3", "training.epochs=1", "adapter.kind=probe"]
    arguments += ["baselines=[embedding,embedding+combat,site,image]"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["baselines"]
    assert list(found) == ["embedding", "embedding+combat", "site", "image"]
    for name, baseline in found.items():
        assert ("ComBat" in baseline["says"]) == name.endswith("+combat") and baseline["figures"]["n"] == 22
    assert "frozen encoder's embedding, logistic regression" in done.output
    assert "frozen encoder's embedding with sites harmonised by ComBat, logistic regression" in done.output
    assert found["embedding"]["figures"] != found["embedding+combat"]["figures"]


def _config(cohort, encoder, out, **changes):
    settings = {"shards": cohort, "backbone": encoder, "out": out, "clips": 1, "folds": 2, "training": {"epochs": 1}}
    return load_config(FinetuneConfig, settings | {"adapter": {"kind": "probe"}} | changes)


def test_a_site_that_nothing_is_known_of_cannot_be_harmonised(cohort, encoder, tmp_path):
    with pytest.raises(FinetuneError, match="leave-one-site-out tests a site of which nothing is known"):
        finetune(_config(cohort, encoder, tmp_path, protocol="leave-one-site-out", baselines=["connectivity+combat"]))


@needs_packages
def test_a_row_is_not_called_harmonised_where_nothing_was(cohort, encoder, tmp_path, monkeypatch, caplog):
    for name in ("bootstrap_intervals", "permutation_test", "compare"):
        monkeypatch.setattr(summary, name, partial(getattr(summary, name), draws=20))
    monkeypatch.setattr(harmonise, "_FEWEST", 1000)
    asked = ["site", "embedding", "embedding+combat", "connectivity+combat"]
    results = finetune(_config(cohort, encoder, tmp_path / "out", baselines=asked))
    assert list(results["baselines"]) == ["site", "embedding"]
    warned = [record.getMessage() for record in caplog.records if "armonis" in record.getMessage()]
    assert len(warned) == 1 and "no fold has them: embedding+combat and connectivity+combat left out" in warned[0]


def test_folds_that_cannot_be_harmonised_are_counted_once(monkeypatch, caplog):
    rows = [SimpleNamespace(site=site) for site in ("KKI", "KKI", "KKI", "NYU", "NYU", "NYU", "OHSU")]
    study = SimpleNamespace(cohort=SimpleNamespace(subjects=rows), positions=lambda names: [int(n) for n in names])
    folds = [SimpleNamespace(train=train) for train in ("012345", "0126")]
    assert plain_models(study, ("site", "image+combat"), folds) == ("site", "image+combat")
    (record,) = caplog.records
    assert "1 of 2 folds have them; in the others nothing is harmonised (image+combat)" in record.getMessage()


def test_a_package_that_is_missing_is_named(cohort, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(harmonise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FinetuneError, match=r"needs neuroHarmonize and .*pip install boldforge\[harmonise\]"):
        finetune(_config(cohort, encoder, tmp_path, baselines=["image+combat"]))
