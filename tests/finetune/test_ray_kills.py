"""Sweeps on a real Ray whose driver, workers and own processes are killed; all of them end with the same files."""

import random
import sys
import tempfile
from pathlib import Path

import pytest

SMALL = {
    "clips": 1,
    "folds": 3,
    "ranks": [0, 1, 2, 4],
    "grace": 2,
    "adapter": {"first_stage": 1, "dropout": 0.1},
    "training": {"epochs": 6},
    "baselines": ["site"],
    "concurrency": 2,
}


@pytest.fixture(scope="module")
def kills():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        from finetune_parts import kills

        yield kills
    finally:
        sys.path.remove(folder)
        for name in ("finetune_parts", "finetune_parts.kills"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def undisturbed(kills, cohort, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = SMALL | {"shards": cohort, "backbone": encoder}
    return recipe, kills.undisturbed(recipe | {"out": folder / "out", "driver": "ray"}, folder / "scratch")


@pytest.mark.slow
@pytest.mark.parametrize(
    "driver", [{"driver": "ray", "concurrency": 1}, {"driver": "serial"}], ids=["one CPU", "without Ray"]
)
def test_one_cpu_two_cpus_and_no_ray_give_the_same_table(kills, undisturbed, tmp_path, driver):
    recipe, (files, epochs, _) = undisturbed
    found, begun, _ = kills.undisturbed(recipe | driver | {"out": tmp_path / "out"}, tmp_path / "scratch")
    assert begun == epochs and set(begun.values()) == {1}
    assert found.keys() == files.keys() >= set(kills.FILES)
    # sweep.json also records the settings, the driver among them.
    assert {name for name in files if found[name] != files[name]} == {"sweep.json"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["driver", "worker", "ray", "all"])
def test_killed_it_ends_with_the_same_files_and_leaves_nothing(kills, undisturbed, tmp_path, monkeypatch, kind):
    recipe, wanted = undisturbed
    with tempfile.TemporaryDirectory(prefix="t-") as short:
        monkeypatch.setenv("TMPDIR", short)
        outcome = kills.sweep_under_fire(
            recipe | {"out": tmp_path / "out", "driver": "ray"},
            tmp_path / "scratch",
            wanted,
            (kind,),
            2,
            random.Random(kind),
        )
        assert outcome.same and outcome.complaints == []
        # The second moment may be one at which the sweep has ended.
        assert set(outcome.kills) == {kind} and outcome.kills[kind] in (1, 2)
        assert outcome.left == 0
        assert list(Path(short).iterdir()) == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweep.json", "trials.tsv", "best", "journal.jsonl"}
