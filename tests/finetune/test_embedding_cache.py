"""Embeddings of a frozen backbone: computed once per key, checked, bounded, and the same sweep with or without."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from boldforge.configs import load_config
from boldforge.finetune import SweepConfig, SweepError, embedded, sweep
from boldforge.finetune.embedded import EmbeddedClips
from boldforge.finetune.embedding_cache import EmbeddingCache, Embeddings
from boldforge.finetune.sweep_clips import gather_seen

KEY = {"weights": "w", "shards": "s", "pool": "mean", "clips": [(0, 3), (1, 3)]}
VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


class Counted:
    """Computes `VALUES`, and counts."""

    calls = 0

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return VALUES


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "cache", 10**6)


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir())


def test_a_key_is_computed_once_and_mapped_read_only(cache, tmp_path):
    compute = Counted()
    for number in range(3):
        found = cache.get(KEY, compute, tmp_path / f"{number}.npy").load()
        np.testing.assert_array_equal(found, VALUES)
        assert isinstance(found, np.memmap) and not found.flags.writeable
    assert compute.calls == 1
    # One file, however many sweeps read it.
    assert len({(tmp_path / f"{number}.npy").stat().st_ino for number in range(3)}) == 1


@pytest.mark.parametrize("name", ["weights", "shards", "pool", "clips"])
def test_another_key_is_computed_anew(cache, tmp_path, name):
    compute = Counted()
    cache.get(KEY, compute, tmp_path / "x.npy")
    cache.get(KEY | {name: "other"}, compute, tmp_path / "x.npy")
    assert compute.calls == 2 and len(_entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "entry", "other key", "not json"])
def test_a_damaged_entry_is_computed_again_and_told(cache, tmp_path, caplog, damage):
    compute = Counted()
    cache.get(KEY, compute, tmp_path / "x.npy")
    entry = _entries(tmp_path / "cache")[0]
    values, described = entry / "embeddings.npy", entry / "entry.json"
    values.chmod(0o644)
    content = values.read_bytes()
    if damage == "flip":
        values.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        values.write_bytes(content[:-1])
    elif damage == "remove":
        values.unlink()
    elif damage == "entry":
        described.unlink()
    elif damage == "other key":
        described.write_text(json.dumps(json.loads(described.read_text()) | {"key": {}}))
    else:
        described.write_text("{")
    with caplog.at_level(logging.WARNING):
        found = cache.get(KEY, compute, tmp_path / "y.npy")
    np.testing.assert_array_equal(found.load(), VALUES)
    assert compute.calls == 2
    assert f"{entry}: is damaged or incomplete; its embeddings are computed again." in caplog.text
    cache.get(KEY, compute, tmp_path / "z.npy")
    assert compute.calls == 2


def test_what_was_not_used_for_longest_goes_and_what_is_in_use_stays(tmp_path):
    EmbeddingCache(tmp_path / "one", 10**6).get({"number": 0}, Counted(), tmp_path / "x.npy")
    size = sum(path.stat().st_size for path in _entries(tmp_path / "one")[0].iterdir())
    cache = EmbeddingCache(tmp_path / "cache", 3 * size)
    compute = Counted()
    for number in range(3):
        cache.get({"number": number}, compute, tmp_path / f"{number}.npy")
    cache.get({"number": 0}, compute, tmp_path / "0.npy")
    assert compute.calls == 3
    for number in (3, 4):
        cache.get({"number": number}, compute, tmp_path / f"{number}.npy")
    kept = {json.loads((entry / "entry.json").read_text())["key"]["number"] for entry in _entries(tmp_path / "cache")}
    assert kept == {0, 3, 4}
    np.testing.assert_array_equal(np.load(tmp_path / "1.npy"), VALUES)


def test_an_entry_larger_than_the_bound_serves_its_sweep_and_is_not_kept(tmp_path):
    found = EmbeddingCache(tmp_path / "cache", 10).get(KEY, Counted(), tmp_path / "x.npy")
    np.testing.assert_array_equal(found.load(), VALUES)
    assert _entries(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["thesis", "0" * 32])
def test_what_the_cache_did_not_make_is_never_removed(tmp_path, name):
    """A folder that was put there later: its name does not make it an entry."""
    cache = EmbeddingCache(tmp_path / "cache", 10)
    mine = tmp_path / "cache" / name / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"years of work")
    os.utime(mine.parent, (1, 1))
    cache.get(KEY, Counted(), tmp_path / "x.npy")
    assert _entries(tmp_path / "cache") == [mine.parent] and mine.read_bytes() == b"years of work"


@pytest.mark.parametrize("name", ["bigmodel/model.safetensors", "notes.txt"])
def test_a_folder_of_other_things_is_no_cache(cohort, encoder, tmp_path, name):
    mine = tmp_path / "models" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"0")
    first = name.split("/")[0]
    with pytest.raises(SweepError, match=f"models: holds {first}, which is none of an embedding cache's .*; let cache"):
        _sweep(cohort, encoder, tmp_path / "out", cache=tmp_path / "models", cache_gb=0)
    assert [path for path in (tmp_path / "models").rglob("*") if path.is_file()] == [mine]


def test_a_sweep_does_not_disturb_another_that_is_keeping_something(tmp_path, monkeypatch):
    one, other = (EmbeddingCache(tmp_path / "cache", 1) for _ in range(2))
    save = np.save

    def interrupted(path, values):
        save(path, values)
        monkeypatch.setattr(np, "save", save)
        other.get({"number": 1}, Counted(), tmp_path / "other.npy")

    monkeypatch.setattr(np, "save", interrupted)
    found = one.get({"number": 0}, Counted(), tmp_path / "one.npy")
    np.testing.assert_array_equal(found.load(), VALUES)
    np.testing.assert_array_equal(np.load(tmp_path / "other.npy"), VALUES)


def test_nothing_of_a_computation_that_fails_is_left(cache, tmp_path):
    def fail():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        cache.get(KEY, fail, tmp_path / "x.npy")
    assert _entries(tmp_path / "cache") == [] and not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_embeddings_that_are_not_those_written_are_not_loaded(tmp_path, content):
    path = tmp_path / "x.npy"
    if content is not None:
        path.write_bytes(content)
    assert Embeddings(path, "0").load() is None
    with pytest.raises(SweepError, match=r"x\.npy: is missing or damaged; run the same command again"):
        EmbeddedClips(Embeddings(path, "0"), 1).load(np.zeros(1), np.zeros(1))


HEADS = {
    "clips": 2,
    "folds": 3,
    "ranks": [0],
    "grace": 1,
    "space": {"head_lr": [1e-3, 1e-2], "weight_decay": [0.0, 0.1]},
    "training": {"epochs": 3},
    "baselines": [],
    "driver": "serial",
}
pytestmark = pytest.mark.usefixtures("few_draws")


def _sweep(cohort, encoder, out, **changes):
    return sweep(load_config(SweepConfig, {"shards": cohort, "backbone": encoder, "out": out, **HEADS, **changes}))


def test_a_second_sweep_over_heads_embeds_nothing_and_finds_the_same(cohort, encoder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = _sweep(cohort, encoder, tmp_path / "a", cache=cache)
    assert len(first["trials"]) == 4 and len({trial["head_lr"] for trial in first["trials"]}) == 2
    assert len(_entries(cache)) == 2
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"sweep.json", "trials.tsv", "best", "journal.jsonl"}
    monkeypatch.setattr(embedded, "_embed", None)
    second = _sweep(cohort, encoder, tmp_path / "b", cache=cache)
    assert {**second, "settings": 0} == {**first, "settings": 0}
    for entry in _entries(cache):
        assert not {"label", "labels"} & json.loads((entry / "entry.json").read_text())["key"].keys()


def test_other_weights_another_pooling_or_other_clips_are_embedded_anew(cohort, write_encoder, tmp_path):
    cache = tmp_path / "cache"
    for number, (seed, changes) in enumerate([(0, {}), (1, {}), (0, {"pool": "mean"}), (0, {"clips": 1})]):
        _sweep(cohort, write_encoder(seed), tmp_path / str(number), cache=cache, **changes)
        assert len(_entries(cache)) == 2 * (number + 1)


def test_trials_learn_the_same_from_kept_embeddings_as_from_their_own(cohort, encoder, tmp_path, monkeypatch):
    """Beside a trial that adapts layers; the curves differ by rounding, as batches are cut differently."""
    changes = {"ranks": [0, 1], "space": {}, "adapter": {"first_stage": 1}, "grace": 3}
    kept = _sweep(cohort, encoder, tmp_path / "kept", **changes)

    def without(study, subjects, kinds, *others):
        return replace(gather_seen(study, subjects, kinds, *others), embedded=None)

    monkeypatch.setattr("boldforge.finetune.rank_sweep.gather_seen", without)
    own = _sweep(cohort, encoder, tmp_path / "own", **changes)
    for mine, theirs in zip(kept["trials"], own["trials"], strict=True):
        assert mine["total_parameters"] == theirs["total_parameters"]
        assert mine["train_loss_by_epoch"] == pytest.approx(theirs["train_loss_by_epoch"], rel=1e-5)
        assert mine["validation_auc_by_epoch"] == pytest.approx(theirs["validation_auc_by_epoch"], abs=1e-6)
    assert kept["trials"][1] == own["trials"][1]
    assert kept["figures"]["auc"] == pytest.approx(own["figures"]["auc"], abs=1e-6)
