"""A sweep that is killed and started again, at any moment and any number of times, ends with the same files."""

import json
import random
from collections import Counter

import pytest

from boldforge.configs import load_config
from boldforge.finetune import SweepConfig, SweepError, sweep
from tests.finetune.small_sweeps import FILES, SMALL, read_swept

SWEEP = SMALL | {
    "ranks": [0, 1, 2],
    "adapter": {"first_stage": 1, "dropout": 0.1},
    "training": {"epochs": 3},
    "baselines": ["site"],
}
MOST_KILLS = 8
pytestmark = pytest.mark.usefixtures("few_draws")


def _config(cohort, encoder, out, **changes):
    return load_config(SweepConfig, {"shards": cohort, "backbone": encoder, "out": out, **SWEEP, **changes})


@pytest.fixture(scope="module")
def undisturbed(cohort, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    sweep(_config(cohort, encoder, out))
    return read_swept(out)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_steps_it_ends_the_same(cohort, encoder, tmp_path, undisturbed, seed, sweep_and_die):
    generator, log, out = random.Random(seed), tmp_path / "log", tmp_path / "out"
    config = _config(cohort, encoder, out)
    kills = 0
    while not sweep_and_die(config, generator.randint(1, 22) if kills < MOST_KILLS else -1, log):
        kills += 1
    assert kills > 2
    for name in FILES:
        assert (out / name).read_bytes().replace(str(out).encode(), b"OUT") == undisturbed[name], name
    assert {path.name for path in out.iterdir()} == {"sweep.json", "trials.tsv", "best", "journal.jsonl"}
    # One trial lives at a time, so a kill costs at most one epoch.
    started = Counter(log.read_text().split("\n")[:-1])
    assert sum(started.values()) - len(started) <= kills
    assert sorted(started) == sorted({f"{r} {e}" for r, n in _epochs(undisturbed).items() for e in range(1, n + 1)})


def _epochs(files):
    results = json.loads(files["sweep.json"])
    trained = {trial["rank"]: trial["epochs"] for trial in results["trials"]}
    return trained | {"chosen": results["best"]["best_epoch"]}


def test_the_journal_says_what_was_decided(undisturbed):
    records = [json.loads(line)["record"] for line in undisturbed["journal.jsonl"].splitlines()]
    points = next(record["points"] for record in records if "propose" in record)
    assert points == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    decisions = [record for record in records if "decide" in record]
    assert [(record["epoch"], len(record["stays"])) for record in decisions] == [(1, 2), (2, 1)]
    assert records[-1] == {"finished": True}


def test_another_recipe_does_not_go_on_from_an_unfinished_sweep(cohort, encoder, tmp_path, sweep_and_die):
    out = tmp_path / "out"
    assert not sweep_and_die(_config(cohort, encoder, out), 20, tmp_path / "log")
    with pytest.raises(SweepError, match=r"unfinished sweep with other settings \(seed\)"):
        sweep(_config(cohort, encoder, out, seed=1))
    # Who does the work is not part of the recipe.
    sweep(_config(cohort, encoder, out, concurrency=4))


@pytest.mark.parametrize("what", ["state", "best"])
def test_a_trial_whose_files_are_damaged_is_trained_again(cohort, encoder, tmp_path, undisturbed, what, sweep_and_die):
    out, log = tmp_path / "out", tmp_path / "log"
    config, step = _config(cohort, encoder, out), 30
    while not (out / "trials" / "0001").is_dir():
        assert not sweep_and_die(config, step, log)
    damaged = sorted((out / "trials").glob(f"*/{what}-*"))
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    assert damaged
    sweep(config)
    assert (out / "trials.tsv").read_bytes() == undisturbed["trials.tsv"]
