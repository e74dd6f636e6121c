"""Splits: no subject on two sides, and a subject stays where it is."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from boldforge.data_shards import (
    DataRecipe,
    Holdout,
    Segment,
    ShardError,
    append_shards,
    build_shards,
    find_runs,
    load_manifest,
    split_runs,
    split_segments,
    store_splits,
    whole_runs,
)
from boldforge.data_shards.split_plan import SplitPlan
from boldforge.data_shards.splits import Segments
from boldforge.data_shards.tables import name_hash


def hashes(labels):
    return np.array([name_hash(label) for label in labels], dtype=np.uint64)


def test_holdout_by_frames_takes_the_end_of_every_run(real_shards):
    train, held = split_segments(real_shards, Holdout(by="frames", fraction=0.2))
    for a, b, run in zip(train, held, real_shards.runs, strict=True):
        assert (a.start, a.stop, b.stop) == (0, b.start, run.n_frames)
        assert b.stop - b.start == np.ceil(0.2 * run.n_frames)


def test_holdout_by_subject_shares_no_subject(real_shards):
    train, held = split_segments(real_shards, Holdout(by="subject", fraction=0.5, seed=3))
    assert {s.run for s in train} | {s.run for s in held} == {0, 1}
    assert not {real_shards.runs[s.run].subject for s in train} & {real_shards.runs[s.run].subject for s in held}
    assert split_segments(real_shards, Holdout(fraction=0))[1] == ()


def test_held_out_subjects_stay_on_their_side_when_others_are_added(write_bold, tmp_path):
    for number in range(9):
        write_bold(f"data/sub-{number:02d}_task-rest_space-MNI152_bold.nii.gz", frames=4, seed=number)
    runs = find_runs(tmp_path / "data").runs
    sides = []
    build_shards(runs[3:], tmp_path / "out", DataRecipe(grid="mni4mm"))
    append_shards(runs, tmp_path / "out")
    build_shards(runs[3:], tmp_path / "alone", DataRecipe(grid="mni4mm"))
    for seed in range(6):
        for name in ("alone", "out"):
            manifest = load_manifest(tmp_path / name)
            train, held = split_segments(manifest, Holdout(by="subject", fraction=0.45, seed=seed))
            named = [{manifest.runs[segment.run].subject for segment in part} for part in (train, held)]
            assert not named[0] & named[1] and len(named[0] | named[1]) == len(manifest.runs)
            sides.append(named)
        (train, held), (more_train, more_held) = sides[-2:]
        assert train <= more_train and held <= more_held
    assert len({frozenset(held) for _, held in sides[::2]}) > 3  # the seed chooses


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_holdout_that_draws_nobody_or_everybody_says_which_share_would_do(real_shards, fraction):
    holdout = Holdout(by="subject", fraction=fraction)
    with pytest.raises(ShardError, match=r"draws (none|all) of its 2 subjects; set holdout.fraction=") as error:
        split_segments(real_shards, holdout)
    enough = float(str(error.value).split("set holdout.fraction=")[1].split(",")[0])
    assert [len(part) for part in split_segments(real_shards, Holdout(by="subject", fraction=enough))] == [1, 1]


def test_segments_are_a_sequence():
    segments = Segments([Segment(0, 1, 5), Segment(2, 0, 9)])
    assert segments[1] == segments[-1] == Segment(2, 0, 9)
    assert segments == (Segment(0, 1, 5), Segment(2, 0, 9)) and segments[1:] == [Segment(2, 0, 9)]
    assert segments != (Segment(0, 1, 5),)
    assert hash(segments) == hash(Segments(segments))
    assert repr(segments) == "Segments(2, 13 frames)"


@given(
    some=st.sets(st.text(min_size=1, max_size=6), min_size=1, max_size=20),
    more=st.sets(st.text(min_size=1, max_size=6), max_size=20),
    seed=st.integers(0, 2**40),
)
def test_a_subject_keeps_its_split_whoever_else_joins(some, more, seed):
    plan = SplitPlan(fractions={"test": 0.3, "validation": 0.2}, seed=seed)
    alone = dict(zip(sorted(some), plan.assign(hashes(sorted(some))), strict=True))
    together = dict(zip(sorted(some | more), plan.assign(hashes(sorted(some | more))), strict=True))
    assert all(together[subject] == split for subject, split in alone.items())


def test_splits_have_their_fractions_and_the_seed_chooses():
    labels = hashes(f"sub-{i:05d}" for i in range(20_000))
    plan = SplitPlan(fractions={"test": 0.2, "validation": 0.1})
    assert plan.names == ("train", "test", "validation")
    shares = np.bincount(plan.assign(labels), minlength=3) / len(labels)
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.012)  # four standard deviations
    other = SplitPlan(fractions=plan.fractions, seed=1).assign(labels)
    assert 0.4 < (other != plan.assign(labels)).mean() < 0.52  # 1 − Σ share²: independent of the first


def test_given_subjects_are_where_they_were_put():
    plan = SplitPlan(fractions={"test": 0.5}, fixed={"train": ("a", "b"), "external": ("c",)})
    assert [plan.names[i] for i in plan.assign(hashes("abc"))] == ["train", "train", "external"]


def test_a_stored_plan_keeps_people_apart_in_whatever_is_trained_or_held_out(real_shards, tmp_path):
    shutil.copytree(real_shards.folder, tmp_path / "shards")
    one, two = (run.subject for run in real_shards.runs)
    plan = SplitPlan(fractions={}, fixed={"train": (one,), "test": (two,)})
    manifest = store_splits(tmp_path / "shards", plan)
    assert load_manifest(tmp_path / "shards").splits == plan
    assert manifest.content_hash != real_shards.content_hash
    assert split_runs(manifest, "train") == whole_runs(real_shards)[:1]
    assert split_segments(manifest, Holdout(by="split", split="test")) == (
        whole_runs(real_shards)[:1],
        whole_runs(real_shards)[1:],
    )
    train, held = split_segments(manifest, Holdout(by="frames", fraction=0.25))
    assert {segment.run for segment in [*train, *held]} == {0}
    with pytest.raises(ShardError, match="holds one subject only"):
        split_segments(manifest, Holdout(by="subject"))
    assert store_splits(tmp_path / "shards", plan).content_hash == manifest.content_hash
    with pytest.raises(ShardError, match="has a plan of splits already"):
        store_splits(tmp_path / "shards", SplitPlan())


def test_splits_that_are_not_there_or_hold_nobody_are_named(real_shards, tmp_path):
    with pytest.raises(ShardError, match="has no splits, expected one named validation"):
        split_segments(real_shards, Holdout(by="split"))
    shutil.copytree(real_shards.folder, tmp_path / "shards")
    everyone = tuple(run.subject for run in real_shards.runs)
    with pytest.raises(ShardError, match="no subject is in the split test"):
        store_splits(tmp_path / "shards", SplitPlan(fractions={"test": 0.5}, fixed={"train": everyone}))
    assert load_manifest(tmp_path / "shards").splits is None
    manifest = store_splits(tmp_path / "shards", SplitPlan(fractions={}, fixed={"train": everyone}))
    with pytest.raises(ShardError, match="has the splits train, expected one named test"):
        split_runs(manifest, "test")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"fractions": {"test": 0.6, "validation": 0.4}}, "nothing to train on"),
        ({"fractions": {"train": 0.6}}, "give it no fraction"),
        ({"fixed": {"test": ("a",), "train": ("a",)}}, "subject a is in more than one"),
        ({"fractions": {"Test!": 0.1}}, "string_pattern|pattern"),
        ({"fractions": {"test": 1.5}}, "less than 1"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan, words):
    with pytest.raises(ValidationError, match=words):
        SplitPlan(**plan)


def test_adding_subjects_keeps_the_plan(real_runs, tmp_path):
    build_shards(real_runs.runs[:1], tmp_path / "out", DataRecipe(grid="mni4mm"))
    plan = SplitPlan(fractions={}, fixed={"train": (real_runs.runs[0].subject,)}, seed=4)
    store_splits(tmp_path / "out", plan)
    manifest = append_shards(real_runs.runs, tmp_path / "out").manifest
    assert len(manifest.runs) == 2
    assert manifest.splits == plan
