import csv
import json
import shutil
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from boldforge.configs import BoldForgeError, ConfigError, folder_lock, load_config
from boldforge.data_shards import ShardReader, brain_mask, get_grid, load_manifest
from boldforge.finetune import (
    AdapterConfig,
    AdhdDiagnosis,
    Classifier,
    FinetuneConfig,
    FinetuneError,
    TrainingConfig,
    finetune,
    load_backbone,
    load_classifier,
)
from boldforge.finetune.cohort import ClipSet, find_cohort, gather_clips
from boldforge.finetune.fit import fit
from boldforge.finetune.results import pseudonym_key, pseudonyms
from boldforge.finetune.study import Study, open_study
from boldforge.finetune.tasks.columns import SUBJECT_BASELINES

SMALL = {"clips": 3, "folds": 3, "training": {"epochs": 6}, "adapter": {"rank": 2, "first_stage": 1}}


def _config(cohort, encoder, out, **changes):
    return load_config(FinetuneConfig, {"shards": cohort, "backbone": encoder, "out": out, **SMALL, **changes})


@pytest.fixture(scope="module")
def finished(cohort, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune")
    seen = []
    results = finetune(_config(cohort, encoder, out), lambda done, total: seen.append((done, total)))
    return out, results, seen


def test_a_planted_effect_is_found_and_every_subject_is_tested_once(finished, cohort):
    out, results, _ = finished
    assert results["figures"]["auc"] > 0.8
    assert results["simulated"] is True
    assert results["subjects"] == {"n": 22, "n_positive": 11}
    assert results["n_unlabelled"] == 2
    assert sum(fold["n_test"] for fold in results["folds"]) == 22
    assert json.loads((out / "metrics.json").read_text()) == results


def test_results_are_given_again_and_never_replaced_by_others(finished, cohort, encoder, tmp_path):
    out, results, _ = finished
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    moved = shutil.copytree(encoder, tmp_path / "moved")
    assert finetune(_config(cohort, moved, out), lambda done, total: pytest.fail("nothing is to be done")) == results
    with pytest.raises(FinetuneError, match=r"holds a fine-tuning with other settings \(clips, seed\); remove the"):
        finetune(_config(cohort, encoder, out, clips=2, seed=1))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_what_computed_them_is_recorded_and_another_number_of_threads_is_no_other_setting(finished, cohort, encoder):
    out, results, _ = finished
    here = {"torch": torch.__version__, "device": "cuda" if torch.cuda.is_available() else "cpu", "cpu_threads": 1}
    assert results["computed_with"] == here
    torch.set_num_threads(2)
    try:
        assert finetune(_config(cohort, encoder, out)) == results
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("gone", ["folds", "folds/2", "adapter", "predictions.tsv"])
def test_results_that_are_no_longer_whole_are_not_replaced_either(finished, cohort, encoder, tmp_path, gone):
    out = shutil.copytree(finished[0], tmp_path / "copied")
    path = out / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FinetuneError, match=r"holds a fine-tuning with other settings \(seed\); remove the folder"):
        finetune(_config(cohort, encoder, out, seed=1))
    with pytest.raises(FinetuneError, match=f"a finished fine-tuning, but {gone}.* is missing; put it back, or remove"):
        finetune(_config(cohort, encoder, out))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_what_another_process_finished_meanwhile_is_not_replaced(finished, cohort, encoder, tmp_path, monkeypatch):
    @contextmanager
    def claim_out(study, doing):
        shutil.copytree(finished[0], study.config.out, dirs_exist_ok=True)
        yield tmp_path

    monkeypatch.setattr(Study, "claim_out", claim_out)
    assert finetune(_config(cohort, encoder, tmp_path / "out")) == finished[1]
    assert (tmp_path / "out" / "folds").is_dir()


@pytest.mark.parametrize(
    ("name", "holds"), [("metrics.csv", "a pretraining run"), ("journal.jsonl", "a sweep"), ("manifest.json", "shards")]
)
def test_a_folder_of_something_else_is_refused(cohort, encoder, tmp_path, name, holds):
    (tmp_path / name).write_text("of another")
    with pytest.raises(ConfigError, match=f"holds {holds} .*, so a fine-tuning is not written there; choose another"):
        finetune(_config(cohort, encoder, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_result_stands_beside_plain_models_with_intervals_and_a_verdict(finished):
    _, results, _ = finished
    low, high = results["intervals"]["auc"]
    assert low <= results["figures"]["auc"] <= high
    assert set(results["baselines"]) == set(SUBJECT_BASELINES)
    site, image = results["baselines"]["site"], results["baselines"]["image"]
    assert [name for name, entry in results["baselines"].items() if entry["blind"]] == ["mean-image"]
    assert results["baselines"]["mean-image"]["says"].endswith("logistic regression, the same for everybody here")
    assert abs(site["figures"]["auc"] - 0.5) < 0.25, "diagnosis was dealt evenly over the sites"
    assert image["figures"]["auc"] > 0.8, "the planted effect is one of amplitude"
    assert results["permutation"]["p"] < 0.05 and results["permutation"]["p_within_sites"] < 0.05
    assert sum(row["n"] for row in results["calibration"]) == sum(row["n"] for row in results["sites"]) == 22
    assert (
        results["verdict"].startswith(f"AUC {results['figures']['auc']:.2f}")
        and "better than chance" in results["verdict"]
    )


def test_leave_one_site_out_with_repetitions(cohort, encoder, tmp_path):
    changes = {"protocol": "leave-one-site-out", "repeats": 2, "baselines": ["connectivity-svm"]}
    results = finetune(_config(cohort, encoder, tmp_path, adapter={"rank": 0}, training={"epochs": 4}, **changes))
    assert [(fold["repeat"], fold["fold"]) for fold in results["folds"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert results["measured_by"] == "leave-one-site-out, 2 repetitions"
    assert results["figures"]["n"] == 22 and set(results["baselines"]) == {"connectivity-svm"}


def test_a_baseline_that_does_not_exist_is_named(cohort, encoder, tmp_path):
    with pytest.raises(BoldForgeError, match="'lda' is not a baseline; expected some of site"):
        _config(cohort, encoder, tmp_path, baselines=["lda"])


def test_predictions_carry_pseudonyms_and_no_real_name_is_written_anywhere(finished, cohort):
    out, results, _ = finished
    with (out / "predictions.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["subject"] for row in rows] == [f"sub-{i:04d}" for i in range(1, 23)]
    hits = sum((float(row["score"]) >= float(row["threshold"])) == (row["label"] == "1") for row in rows)
    assert hits / 22 == pytest.approx(results["figures"]["accuracy"])
    names = {run.subject for run in load_manifest(cohort).runs}
    for path in out.rglob("*"):
        if path.suffix in {".json", ".tsv"}:
            assert not [name for name in names if name in path.read_text()], path


def test_pseudonyms_cannot_be_told_from_the_names_and_the_seed(finished, cohort, build_cohort):
    """Whoever has the list of subjects and all that was written knows everything but the key."""
    out, results, _ = finished
    manifest = load_manifest(cohort)
    names = [subject.name for subject in find_cohort(manifest, AdhdDiagnosis(), 4).subjects]
    key = pseudonym_key(manifest)
    order = list(pseudonyms(names, key))
    assert order == list(pseudonyms(names[::-1], pseudonym_key(load_manifest(cohort)))), "a killed run keeps them"
    drawn = np.random.default_rng([results["settings"]["seed"], len(names)]).permutation(len(names))
    assert order not in (names, [names[i] for i in drawn])
    other = pseudonym_key(load_manifest(build_cohort(subjects=4, effect=0.0, seed=9, frames=4)))
    assert order != list(pseudonyms(names, other)), "the scans decide, and nothing else that is known"
    with (out / "predictions.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    for path in out.rglob("*.json"):
        assert key.hex() not in path.read_text()
    for number in ("1", "2", "3"):
        about = json.loads((out / "folds" / number / "task.json").read_text())["figures"]
        assert about["test"] == [row["subject"] for row in rows if row["fold"] == number], "positions would be names"


def test_only_results_are_left_in_the_folder(finished):
    out, _, _ = finished
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "task.json"}
    folders = ("adapter", "folds/1", "folds/2", "folds/3")
    assert found == {"metrics.json", "predictions.tsv"} | {f"{kept}/{name}" for kept in folders for name in adapter}


def test_the_adapter_can_be_loaded_and_predicts(finished, encoder):
    out, results, _ = finished
    classifier = load_classifier(encoder, out / "adapter")
    n_voxels = int(brain_mask(get_grid("mni4mm")).sum())
    score = classifier.predict(torch.randn(1, 4, n_voxels, generator=torch.Generator().manual_seed(1)))
    assert score.shape == (1,) and 0 <= score.item() <= 1
    task = json.loads((out / "adapter" / "task.json").read_text())
    assert task["figures"]["figures"] == results["figures"]
    assert task["figures"]["simulated"] is True


def test_progress_only_grows_and_ends_full(finished):
    _, _, seen = finished
    assert all(later[0] >= earlier[0] for earlier, later in pairwise(seen))
    assert {total for _, total in seen} == {seen[-1][0]}


def test_the_same_seed_gives_the_same_bits(finished, cohort, encoder, tmp_path):
    out, _, _ = finished
    finetune(_config(cohort, encoder, tmp_path))
    for name in (
        "predictions.tsv",
        "adapter/head.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/task.json",
    ):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_freezing_the_first_stage_gives_the_same_probe(finished, cohort, encoder, tmp_path):
    """What lies below the first adapted stage is computed once; for a probe it must not matter where that is."""
    probes = [
        finetune(
            _config(cohort, encoder, tmp_path / str(stage), adapter={"rank": 0, "first_stage": stage}, baselines=[])
        )
        for stage in (0, 1)
    ]
    assert probes[0]["folds"] == probes[1]["folds"]


def test_shards_of_another_recipe_are_refused_with_the_command_that_mends_it(cohort, write_encoder, tmp_path):
    other = write_encoder(tr=0.8, normalisation="global-z")
    with pytest.raises(FinetuneError) as caught:
        finetune(_config(cohort, other, tmp_path))
    message = str(caught.value)
    assert "tr 2.0 instead of 0.8" in message and "normalisation residual-z instead of global-z" in message
    assert "boldforge shard FOLDER --out OTHER --grid mni4mm --tr 0.8 --normalisation global-z" in message


def test_shards_of_another_brain_mask_are_refused(cohort, write_encoder, tmp_path):
    other = write_encoder(mask_sha256="ab" * 32)
    with pytest.raises(FinetuneError, match=r"the brain mask .* is not the one .* pretrained on \(abababababab…\)"):
        finetune(_config(cohort, other, tmp_path))


def test_an_encoder_pretrained_on_the_same_shards_is_told(finished, cohort, write_encoder, tmp_path, caplog):
    assert finished[1]["pretrained_on_these_shards"] is False
    encoder = write_encoder(manifest_hash=load_manifest(cohort).content_hash)
    results = finetune(_config(cohort, encoder, tmp_path, training={"epochs": 1}, baselines=["site"]))
    task = json.loads((tmp_path / "adapter" / "task.json").read_text())
    assert results["pretrained_on_these_shards"] is task["figures"]["pretrained_on_these_shards"] is True
    assert "it has seen the test subjects' scans" in caplog.text


def test_a_cohort_without_labels_is_refused(build_cohort, encoder, tmp_path):
    shards = build_cohort(subjects=3, effect=0, unlabelled=3)
    with pytest.raises(FinetuneError, match=r"none of the 3 subjects .* 3 have no label"):
        finetune(_config(shards, encoder, tmp_path))


def test_two_runs_never_share_a_folder(cohort, encoder, tmp_path):
    in_use = pytest.raises(BoldForgeError, match="process is running a sweep in it")
    with folder_lock(tmp_path, "running a sweep"), in_use:
        finetune(_config(cohort, encoder, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(cohort, encoder, tmp_path):
    """The clips of a killed run may be many gigabytes; the next run in its folder cannot use them."""
    study = open_study(_config(cohort, encoder, tmp_path))
    with study.claim_out("fine-tuning") as scratch:
        (scratch / "x.npy").write_bytes(b"clips")
        left = shutil.copytree(scratch, f"{scratch}-killed")
    assert Path(left).is_dir()
    with study.claim_out("fine-tuning") as scratch:
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == [scratch]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence_and_no_crash(cohort, encoder, tmp_path):
    manifest = load_manifest(cohort)
    subjects = find_cohort(manifest, AdhdDiagnosis(), clip_length=4).subjects[:2]
    (tmp_path / "x.npy").symlink_to("/dev/full")
    with pytest.raises(FinetuneError, match="the disk is full; make room for the clips"):
        gather_clips(load_backbone(encoder), 0, ShardReader(manifest), subjects, 2, tmp_path)


def test_a_loss_that_is_no_number_says_what_to_lower(encoder):
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2, first_stage=1))
    x = np.zeros((4, 8 * 4, 16), dtype=np.float32)
    clips = ClipSet(x, np.zeros((4, 8), dtype=np.float32), np.arange(4), np.arange(4), np.array([0, 1, 0, 1]))
    x[2] = np.nan
    with pytest.raises(FinetuneError, match=r"training loss is nan in epoch 1; set training\.lr below 0\.001"):
        list(fit(classifier, clips, None, TrainingConfig(), 2, seed=0))


def test_clips_are_spread_over_a_subjects_runs_and_short_runs_are_left_out(cohort, encoder, tmp_path):
    manifest = load_manifest(cohort)
    short = manifest.runs[0].model_copy(update={"n_frames": 3})
    shortened = manifest.model_copy(update={"runs": (short, *manifest.runs[1:])})
    found = find_cohort(shortened, AdhdDiagnosis(), clip_length=4)
    assert (len(found.subjects), found.n_unlabelled, found.n_too_short) == (22, 2, 0)
    last = manifest.runs[-1].model_copy(update={"n_frames": 3})
    found = find_cohort(manifest.model_copy(update={"runs": (*manifest.runs[:-1], last)}), AdhdDiagnosis(), 4)
    assert (len(found.subjects), found.n_too_short) == (21, 1)
