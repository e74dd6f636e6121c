import csv
import json
import shutil
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from boldforge.configs import BoldForgeError, ConfigError, folder_lock, load_config
from boldforge.data_shards import load_manifest
from boldforge.finetune import (
    AdapterConfig,
    SweepConfig,
    SweepError,
    fit,
    load_classifier,
    nested_sweep,
    rank_sweep,
    sweep,
)
from boldforge.finetune import trial as trial_module
from boldforge.finetune.serial_driver import run_serially
from boldforge.finetune.study import open_study
from boldforge.finetune.sweep_results import TrialResult, choose
from boldforge.finetune.sweep_rungs import Trial

SMALL = {
    "clips": 3,
    "folds": 3,
    "ranks": [2, 4],
    "grace": 2,
    "adapter": {"first_stage": 1},
    "training": {"epochs": 8},
    "baselines": [],
}


pytestmark = pytest.mark.usefixtures("few_draws")
# The shortest sweep there is, in this process.
BRIEF = {"driver": "serial", "training": {"epochs": 1}}


def _config(shards, encoder, out, **changes):
    return load_config(SweepConfig, {"shards": shards, "backbone": encoder, "out": out, **SMALL, **changes})


def _processes_of(folder: str) -> list[str]:
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [command for command in commands if folder in command]


@pytest.fixture(scope="module")
def ray_folder():
    """Where Ray keeps its session; its processes carry the name. Short, because sockets live below it."""
    folder, before = tempfile.mkdtemp(prefix="t-"), tempfile.tempdir
    tempfile.tempdir = folder
    yield folder
    tempfile.tempdir = before
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shards(build_cohort):
    return build_cohort(subjects=60, effect=2.0, seed=0)


@pytest.fixture(scope="module")
def planted(shards, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    seen = []
    config = _config(shards, encoder, out, driver="serial")
    results = sweep(config, lambda done, total: seen.append((done, total)))
    return out, results, seen


@pytest.fixture(scope="module")
def on_ray(shards, encoder, tmp_path_factory, ray_folder):
    out = tmp_path_factory.mktemp("sweep")
    return out, sweep(_config(shards, encoder, out))


def test_a_planted_effect_is_found(planted):
    _, results, _ = planted
    assert results["best"]["validation_auc"] > 0.8
    assert results["figures"]["auc"] > 0.8
    assert results["figures"]["n"] == results["subjects"]["test"]["n"] == 20
    assert f"rank {results['best']['rank']} had the highest validation AUC" in results["sentence"]
    assert results["sentence"].endswith("The subjects are simulated.")


@pytest.mark.parametrize(
    ("seeds", "reach"), [([0], 0.4), pytest.param([1, 2, 3, 4], 0.2, marks=pytest.mark.slow)], ids=["one", "four"]
)
def test_without_an_effect_the_test_is_at_chance(build_cohort, encoder, tmp_path, seeds, reach):
    """The AUC of a coin on 20 test subjects has a standard deviation of 0.13, the mean of four one of 0.07."""
    aucs = []
    for seed in seeds:
        shards = build_cohort(subjects=60, effect=0, seed=seed)
        aucs.append(sweep(_config(shards, encoder, tmp_path / str(seed), **BRIEF))["figures"]["auc"])
    assert abs(sum(aucs) / len(aucs) - 0.5) <= reach


def test_the_best_is_the_one_with_the_highest_validation_auc(planted):
    _, results, _ = planted
    assert [trial["rank"] for trial in results["trials"]] == [2, 4]
    for trial in results["trials"]:
        curve = trial["validation_auc_by_epoch"]
        assert trial["validation_auc"] == max(curve) == curve[trial["best_epoch"] - 1]
        assert trial["stopped_early"] == (len(curve) < 8)
    assert results["best"]["validation_auc"] == max(trial["validation_auc"] for trial in results["trials"])


def test_the_chosen_one_is_trained_anew_on_all_but_the_test_subjects(planted, shards, encoder, tmp_path, monkeypatch):
    trained = []

    class Watched(fit.Fit):
        def __init__(self, classifier, train, validation, config, seed, **others):
            trained.append((len(train.labels), validation and len(validation.labels), classifier.adapter.rank))
            super().__init__(classifier, train, validation, config, seed, **others)

    monkeypatch.setattr(trial_module, "Fit", Watched)
    results = sweep(_config(shards, encoder, tmp_path, driver="serial"))
    assert trained[-1] == (40, None, results["best"]["rank"])
    assert {(n, m) for n, m, _ in trained[:-1]} == {(20, 20)}
    epochs = results["best"]["best_epoch"]
    length = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    assert f"trained anew on these and the training subjects for {length} and tested once" in results["sentence"]
    # The weights that are kept are those, and not the ones that were compared.
    assert results["figures"] == planted[1]["figures"]


def test_files_agree_and_hold_no_real_name(planted, encoder, shards):
    out, results, _ = planted
    assert json.loads((out / "sweep.json").read_text()) == results
    with (out / "trials.tsv").open() as stream:
        assert [int(row["rank"]) for row in csv.DictReader(stream, delimiter="\t")] == [2, 4]
    assert json.loads((out / "best" / "metrics.json").read_text())["figures"] == results["figures"]
    assert len((out / "best" / "predictions.tsv").read_text().splitlines()) == 21
    classifier = load_classifier(encoder, out / "best" / "adapter")
    assert classifier.adapter.rank == results["best"]["rank"]
    assert classifier.trainable == results["best"]["trainable_parameters"]
    found = {path.name for path in out.iterdir()}
    assert found == {"sweep.json", "trials.tsv", "best", "journal.jsonl"}
    names = {run.subject for run in load_manifest(shards).runs}
    for path in out.rglob("*"):
        if path.suffix in {".json", ".tsv"}:
            assert not [name for name in names if name in path.read_text()], path


@pytest.mark.slow
def test_ray_leaves_no_process_and_no_file_behind(on_ray, ray_folder):
    assert _processes_of(ray_folder) == []
    assert list(Path(ray_folder).iterdir()) == []


def test_progress_only_grows_and_ends_full(planted):
    _, _, seen = planted
    assert all(later[0] >= earlier[0] for earlier, later in pairwise(seen))
    assert seen[-1][0] == seen[-1][1]


def test_trials_see_no_test_subject(shards, encoder, tmp_path, monkeypatch):
    looked = []

    def look(spec, rounds, folder, on_epoch):
        labels = np.load(spec.clips / "labels.npy")
        assert len(labels) == 40 == len(set(spec.train) | set(spec.validation))
        assert not (spec.clips.parent / "unseen").exists()
        looked.append(spec)
        run_serially(spec, rounds, folder, on_epoch)

    monkeypatch.setattr(rank_sweep, "run_serially", look)
    sweep(_config(shards, encoder, tmp_path, **BRIEF))
    assert len(looked) == 1


@pytest.mark.slow
def test_the_files_are_the_same_on_ray_and_without(planted, on_ray):
    (here, without_ray, _), (out, with_ray) = planted, on_ray
    assert (here / "trials.tsv").read_bytes() == (out / "trials.tsv").read_bytes()
    for path in ("metrics.json", "predictions.tsv", "adapter/adapter_model.safetensors", "adapter/head.safetensors"):
        assert (here / "best" / path).read_bytes() == (out / "best" / path).read_bytes(), path
    assert (here / "journal.jsonl").read_text() == (out / "journal.jsonl").read_text()
    assert {**without_ray, "settings": 0} == {**with_ray, "settings": 0}


def test_the_same_command_on_a_finished_sweep_gives_what_is_there(planted, shards, encoder, monkeypatch):
    out, results, _ = planted
    monkeypatch.setattr(rank_sweep, "drive", None)
    before = (out / "sweep.json").stat().st_mtime_ns
    assert sweep(_config(shards, encoder, out, driver="serial")) == results
    assert (out / "sweep.json").stat().st_mtime_ns == before
    with pytest.raises(SweepError, match=r"holds a sweep with other settings \(clips\); remove the folder, or choose"):
        sweep(_config(shards, encoder, out, clips=1))
    assert (out / "sweep.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("gone", ["best", "best/adapter", "trials.tsv"])
def test_a_finished_sweep_that_is_no_longer_whole_says_what_is_missing(planted, shards, encoder, tmp_path, gone):
    out = shutil.copytree(planted[0], tmp_path / "copied")
    path = out / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SweepError, match=f"a finished sweep, but {gone}.* is missing; put it back, or remove sweep.js"):
        sweep(_config(shards, encoder, out, driver="serial"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_a_tie_goes_to_the_lower_rank():
    tied = [
        TrialResult(Trial(number, {"rank": rank}), ({"epoch": 1, "auc": 0.75, "improved": True},))
        for number, rank in enumerate([8, 0, 2])
    ]
    assert choose(tied, "auc").trial.values == {"rank": 0}


def test_an_encoder_pretrained_on_the_same_shards_is_told(planted, shards, write_encoder, tmp_path):
    _, results, _ = planted
    assert results["pretrained_on_these_shards"] is False and "was pretrained on" not in results["sentence"]
    encoder = write_encoder(manifest_hash=load_manifest(shards).content_hash)
    results = sweep(_config(shards, encoder, tmp_path, **BRIEF))
    assert results["pretrained_on_these_shards"] is True
    assert "pretrained on these same shards, so it has seen those subjects' scans" in results["sentence"]
    for path, key in (("metrics.json", None), ("adapter/task.json", "figures")):
        content = json.loads((tmp_path / "best" / path).read_text())
        assert (content[key] if key else content)["pretrained_on_these_shards"] is True


def test_two_runs_never_share_a_folder(shards, encoder, tmp_path):
    with folder_lock(tmp_path, "fine-tuning"), pytest.raises(BoldForgeError, match="process is fine-tuning in it"):
        sweep(_config(shards, encoder, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("driver", ["serial", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_failing_trial_ends_the_sweep_with_its_own_message(
    shards, encoder, tmp_path, monkeypatch, ray_folder, driver
):
    drive = rank_sweep.drive

    def lose_the_clips(config, spec, *others):
        shutil.rmtree(spec.clips)
        drive(config, spec, *others)

    monkeypatch.setattr(rank_sweep, "drive", lose_the_clips)
    with pytest.raises(SweepError, match=r"The trial at rank [24] failed: .*No such file.*x\.npy"):
        sweep(_config(shards, encoder, tmp_path, driver=driver))
    # What is needed to go on stays, and nothing else.
    assert {path.name for path in tmp_path.iterdir()} == {"journal.jsonl", "trials"}
    assert _processes_of(ray_folder) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus": 64}, "gpus is 64 per trial, but Ray sees 1 here; set gpus=0"),
        ({"cpus": 3}, "cpus is 3 per trial, but Ray sees 2 here; set cpus lower"),
    ],
)
def test_more_than_there_is_is_an_error_not_a_wait(shards, encoder, tmp_path, monkeypatch, asked, message):
    """On a Ray that only says what it has; test_ray_cluster.py asks a real one."""
    import ray

    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    with pytest.raises(SweepError, match=message):
        sweep(_config(shards, encoder, tmp_path, **asked))


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda")])
def test_trials_train_where_gpus_says_even_if_a_gpu_is_there(shards, encoder, tmp_path, monkeypatch, gpus, device):
    """Without a share of a GPU a trial must leave it alone; a machine without CUDA could not follow a spec to one."""
    seen = []

    def look(config, spec, *others):
        seen.append(spec.device)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            drive(config, replace(spec, device="cpu") if gpus else spec, *others)

    drive = rank_sweep.drive
    monkeypatch.setattr(rank_sweep, "drive", look)
    monkeypatch.setattr(nested_sweep, "_check_gpus", lambda config: None)
    sweep(_config(shards, encoder, tmp_path, gpus=gpus, ranks=[0], **BRIEF))
    assert seen == [device]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(shards, encoder, tmp_path):
    with pytest.raises(SweepError, match=r"There is no GPU here, but gpus is 0\.5; set gpus=0"):
        sweep(_config(shards, encoder, tmp_path / "out", gpus=0.5, driver="serial"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda")])
def test_clips_are_read_and_tested_where_gpus_says(cohort, encoder, tmp_path, monkeypatch, gpus, device):
    """A sweep that goes on where no GPU is must not give other bits."""
    study = open_study(_config(cohort, encoder, tmp_path, gpus=gpus))
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, place: moved.append(place.type) or module)
    study.backbone()
    study.classifier(AdapterConfig(rank=0))
    assert moved == [device, device]


@pytest.mark.parametrize(("section", "key"), [("adapter", "rank"), ("training", "patience")])
def test_a_key_that_a_sweep_does_not_read_is_refused_and_not_recorded(planted, section, key):
    with pytest.raises(ConfigError, match=rf"{section}\.{key} has no meaning; remove it and set"):
        load_config(SweepConfig, "sweep/demo.yaml", [f"{section}.{key}=3"])
    settings = planted[1]["settings"]
    assert settings[section] and key not in settings[section]
    load_config(SweepConfig, settings)


@pytest.mark.parametrize("ranks", [[2, 2], [-1], []])
def test_ranks_that_make_no_sense_are_refused(ranks):
    with pytest.raises(ConfigError, match="ranks"):
        _config("shards", "encoder", "out", ranks=ranks)


@pytest.mark.parametrize("task", ["states", "retrieval", "reidentify"])
def test_tasks_whose_rows_are_parts_of_subjects_are_refused_where_the_recipe_is_read(task):
    with pytest.raises(ConfigError, match=rf"task '{task}' are parts.*use boldforge finetune --task {task}"):
        _config("shards", "encoder", "out", task=task)
