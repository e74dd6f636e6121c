"""A sweep whose trials train as one batched model: the table of solo trials, and the same files after any kills."""

import csv
import json
import random
import shutil
import tempfile
from collections import Counter

import pytest

from boldforge.configs import ConfigError, load_config
from boldforge.finetune import SweepConfig, SweepError, fit, sweep
from boldforge.finetune.sweep_rungs import Trial, batched
from boldforge.finetune.trial import read_curve
from tests.finetune.small_sweeps import SMALL, read_swept

SWEEP = SMALL | {
    "ranks": [0, 1, 2, 4],
    "adapter": {"first_stage": 1, "dropout": 0.1},
    "training": {"epochs": 3},
    "baselines": [],
    "batch_trials": 3,
}
MOST_KILLS = 8
pytestmark = pytest.mark.usefixtures("few_draws")


def _config(cohort, encoder, out, **changes):
    return load_config(SweepConfig, {"shards": cohort, "backbone": encoder, "out": out, **SWEEP, **changes})


def _table(out):
    with (out / "trials.tsv").open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


@pytest.fixture(scope="module")
def undisturbed(cohort, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    sweep(_config(cohort, encoder, out))
    return out


def test_the_table_is_that_of_trials_alone(cohort, encoder, tmp_path, undisturbed):
    alone = tmp_path / "alone"
    results = sweep(_config(cohort, encoder, alone, batch_trials=1))
    mine, wanted = _table(undisturbed), _table(alone)
    assert [row.keys() for row in mine] == [row.keys() for row in wanted] and len(mine) == 4
    for row, other in zip(mine, wanted, strict=True):
        for name, value in row.items():
            try:
                assert float(value) == pytest.approx(float(other[name]), rel=1e-4)
            except ValueError:
                assert value == other[name], name
    mine = json.loads((undisturbed / "sweep.json").read_text())
    assert mine["best"]["trial"] == results["best"]["trial"]
    assert mine["figures"] == pytest.approx(results["figures"], rel=1e-4)
    assert mine["settings"]["batch_trials"] == 3 and "batch_trials" not in results["settings"]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_steps_it_ends_the_same(cohort, encoder, tmp_path, undisturbed, seed, sweep_and_die):
    generator, log, out = random.Random(seed), tmp_path / "log", tmp_path / "out"
    config = _config(cohort, encoder, out)
    kills = 0
    while not sweep_and_die(config, generator.randint(1, 40) if kills < MOST_KILLS else -1, log):
        kills += 1
    assert kills > 2
    assert read_swept(out) == read_swept(undisturbed)
    assert {path.name for path in out.iterdir()} == {"sweep.json", "trials.tsv", "best", "journal.jsonl"}
    # A kill costs every trial that was training at most one epoch.
    started = Counter(log.read_text().split("\n")[:-1])
    assert all(sum(n - 1 for name, n in started.items() if name.split()[0] == rank) <= kills for rank in "124")
    assert sum(started.values()) - len(started) <= 3 * kills


def test_a_lost_state_is_one_sentence(cohort, encoder, tmp_path, sweep_and_die):
    out, log = tmp_path / "out", tmp_path / "log"
    config, step = _config(cohort, encoder, out, grace=3), 20
    while not read_curve(out / "trials" / "0003"):
        assert not sweep_and_die(config, step, log)
        step += 4
    for path in (out / "trials").glob("0002/state-*"):
        path.write_bytes(b"")
    message = r"state-000[12].safetensors: is missing or damaged.*; remove .*out and run the"
    with pytest.raises(SweepError, match=message):
        sweep(config)


@pytest.mark.slow
def test_on_ray_the_files_are_the_same(cohort, encoder, tmp_path, undisturbed, monkeypatch):
    # Short, because sockets live below it.
    session = tempfile.mkdtemp(prefix="t-")
    monkeypatch.setattr(tempfile, "tempdir", session)
    seen = []
    sweep(_config(cohort, encoder, tmp_path / "out", driver="ray"), lambda done, total: seen.append((done, total)))
    shutil.rmtree(session)
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (undisturbed / "journal.jsonl").read_bytes()
    assert (tmp_path / "out" / "trials.tsv").read_bytes() == (undisturbed / "trials.tsv").read_bytes()
    assert seen[-1][0] == seen[-1][1]


def test_a_trial_that_diverges_leaves_its_group(cohort, encoder, tmp_path, monkeypatch):
    end_epoch = fit.Fit.end_epoch

    def explode(fitting, loss, embed):
        burst = fitting.classifier.adapter.rank == 2 and fitting._number == 2
        return end_epoch(fitting, float("nan") if burst else loss, embed)

    monkeypatch.setattr(fit.Fit, "end_epoch", explode)
    sweep(_config(cohort, encoder, tmp_path, ranks=[1, 2, 4], grace=3))
    assert [(row["rank"], row["diverged"], row["epochs"]) for row in _table(tmp_path)] == [
        ("1", "False", "3"),
        ("2", "True", "1"),
        ("4", "False", "3"),
    ]


def test_groups_follow_from_the_trials_alone():
    trials = [Trial(number, {"rank": rank}) for number, rank in ((0, 4), (2, 0), (3, 1), (5, 2), (7, 8), (9, 0))]

    def numbers(together):
        return [[trial.number for trial in segment.trials] for segment in batched(trials, 2, together)]

    assert numbers(1) == [[0], [2], [3], [5], [7], [9]]
    assert numbers(3) == [[0, 3, 5], [2], [7], [9]]
    assert numbers(64) == [[0, 3, 5, 7], [2], [9]]


def test_groups_are_of_one_inner_fold():
    trials = [Trial(number, {"rank": rank}) for number, rank in enumerate((4, 0, 1, 2))]
    found = [([trial.number for trial in each.trials], each.inner) for each in batched(trials, 2, 2, (1, 2))]
    assert found == [([0, 2], 1), ([0, 2], 2), ([1], 1), ([1], 2), ([3], 1), ([3], 2)]


def test_dora_is_refused(cohort, encoder, tmp_path):
    with pytest.raises(ConfigError, match=r"batch_trials batches plain LoRA, but adapter\.dora is set"):
        _config(cohort, encoder, tmp_path, adapter={"dora": True})
