"""The frozen encoder's embeddings as a plain model, and with the sites taken out of them."""

import importlib.util

import numpy as np
import pytest
import torch

from boldforge.configs import ConfigError, load_config
from boldforge.data_shards import ShardReader
from boldforge.finetune import AdhdDiagnosis, FinetuneConfig, FinetuneError, baselines, finetune
from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.baselines import baseline_scores
from boldforge.finetune.beside import Beside
from boldforge.finetune.cohort import plan_clips
from boldforge.finetune.study import open_study

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("neuroHarmonize", "neuroCombat", "statsmodels")),
    reason="boldforge[harmonise] is not installed",
)
TRAIN, VALIDATION, TEST = list(range(0, 12)), list(range(12, 16)), list(range(16, 22))


def _config(cohort, out, **changes):
    settings = {"shards": cohort, "out": out, "clips": 3, "folds": 2, "training": {"epochs": 1}}
    return load_config(FinetuneConfig, settings | changes)


@pytest.fixture(scope="module")
def study(cohort, encoder, tmp_path_factory):
    return open_study(_config(cohort, tmp_path_factory.mktemp("study"), backbone=encoder))


@pytest.fixture(scope="module")
def by_hand(study):
    """Every clip alone through the whole encoder, then the mean over a subject's clips."""
    backbone, reader, rows = study.backbone(), ShardReader(study.manifest), study.cohort.subjects
    found = [[] for _ in rows]
    for number, run, start in plan_clips(study.manifest, rows, 3, 4):
        clip = reader.read(run, start, 4)
        with torch.no_grad():
            values_BTV = torch.from_numpy(clip.mean + clip.q * clip.scale)[None]
            found[number].append(backbone.embed(values_BTV)[0].numpy())
    assert {len(clips) for clips in found} == {3}
    return np.array([np.mean(clips, axis=0) for clips in found])


@pytest.mark.parametrize("adapter", [{"kind": "full"}, {"rank": 2, "first_stage": 1}, {"kind": "prompts"}, {"rank": 0}])
def test_a_subject_is_the_mean_of_its_clips_before_any_adapter(study, by_hand, adapter, tmp_path):
    adapter = study.lifted(AdapterConfig(**adapter))
    clips = study.gather(study.cohort.subjects, tmp_path, adapter=adapter)
    beside = Beside(study, ["embedding", "site"])
    beside.read(lambda: None, lambda: (clips, adapter))
    np.testing.assert_allclose(beside._features["embedding"], by_hand, rtol=1e-4, atol=1e-5)


def test_nothing_is_embedded_where_nobody_asked(study):
    beside = Beside(study, ["site", "demographics"])
    beside.read(lambda: None, lambda: pytest.fail("clips were asked for"))
    assert set(beside._features) == {"site", "demographics"}


def _with_offset(study, rows):
    """Give every embedding of one site an offset of twenty deviations."""
    sites = [subject.site for subject in study.cohort.subjects]
    return rows + 20 * rows.std(axis=0) * (np.array(sites) == "NYU")[:, None], sites


@needs_packages
def test_a_site_s_offset_is_gone_from_people_who_were_not_fitted(study, by_hand):
    """Of a model asked for the site itself, harmonising leaves next to nothing."""
    rows, sites = _with_offset(study, by_hand)
    at_nyu = np.array(sites) == "NYU"
    tested = at_nyu[TEST]
    plain, harmonised = (
        baseline_scores(name, AdhdDiagnosis(), rows, at_nyu.astype(float), TRAIN, VALIDATION, TEST, sites)[1]
        for name in ("embedding", "embedding+combat")
    )
    assert plain[tested].min() > plain[~tested].max()
    assert abs(np.diff([harmonised[part].mean() for part in (tested, ~tested)])[0]) < 0.2 * np.ptp(plain)
    fitted = baselines.ComBat(rows[TRAIN], [sites[i] for i in TRAIN])
    found = fitted.apply(rows[TEST], [sites[i] for i in TEST])
    before, after = (np.abs(x[tested].mean(axis=0) - x[~tested].mean(axis=0)) for x in (rows[TEST], found))
    assert before.mean() > 15 * by_hand.std(axis=0).mean() and after.mean() < 2 * by_hand.std(axis=0).mean()


@needs_packages
def test_test_subjects_change_no_parameter(study, by_hand, monkeypatch):
    rows, sites = _with_offset(study, by_hand)
    spoilt = rows.copy()
    spoilt[TEST] = 1e6 * np.random.default_rng(1).standard_normal(spoilt[TEST].shape)
    elsewhere, other = [*sites[:16], *("NYU" for _ in TEST)], rows.copy()
    other[TRAIN[0]] += 1
    fits, combat = [], baselines.ComBat
    monkeypatch.setattr(baselines, "ComBat", lambda *given: fits.append(combat(*given)) or fits[-1])
    labels = [subject.label for subject in study.cohort.subjects]
    checked = [
        baseline_scores("embedding+combat", AdhdDiagnosis(), values, labels, TRAIN, VALIDATION, TEST, places)[0]
        for values, places in ((rows, sites), (spoilt, sites), (rows, elsewhere), (other, sites))
    ]
    first, *same, changed = [_numbers(fit) for fit in fits]
    assert first.size > 3 * rows.shape[1] and not np.array_equal(first, changed)
    for numbers, scores in zip(same, checked[1:3], strict=True):
        assert np.array_equal(numbers, first) and np.array_equal(scores, checked[0])


def _numbers(fit):
    """Return all numbers that a fitted ComBat holds, one after the other."""
    found = [np.asarray(fit._model[key], dtype=float).ravel() for key in ("gamma_star", "delta_star", "var_pooled")]
    return np.concatenate([*found, np.asarray(fit._model["stand_mean"], dtype=float).ravel()])


def test_a_network_trained_from_nothing_has_no_embedding_to_offer(cohort, tmp_path):
    scratch = {"kind": "resnet-rnn", "clip_length": 4}
    with pytest.raises(ConfigError, match=r"baseline 'embedding\+combat' reads .* resnet-rnn is trained from nothing"):
        _config(cohort, tmp_path / "out", backbone=scratch, adapter={"kind": "full"}, baselines=["embedding+combat"])
    assert not (tmp_path / "out").exists()


def test_a_site_of_which_nothing_is_known_is_refused(cohort, encoder, tmp_path):
    changes = {"protocol": "leave-one-site-out", "baselines": ["embedding", "embedding+combat"]}
    with pytest.raises(FinetuneError, match=r"'embedding\+combat' harmonises sites, but protocol leave-one-site-out"):
        finetune(_config(cohort, tmp_path, backbone=encoder, **changes))
