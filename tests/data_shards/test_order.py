"""The order of clips: every clip once per epoch, a pure function of hash, seed and index; mixtures and their shares."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.data_shards import ShardError
from boldforge.data_shards.mixture import Mixture
from boldforge.data_shards.order import ClipOrder
from boldforge.data_shards.permutation import permute

HASH = "9a" * 32


def order_of(lengths, clip_length, seed=0, **choice):
    table = np.array([(run, 3, 3 + length) for run, length in enumerate(lengths)], dtype=np.int64)
    return ClipOrder("made", HASH, table, clip_length, seed, **choice)


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permutation_visits_everything_once(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutation_is_not_the_identity_and_depends_on_the_key():
    orders = {tuple(permute(i, 50, key) for i in range(50)) for key in range(20)}
    assert len(orders) == 20
    assert tuple(range(50)) not in orders


def test_permutation_sends_an_index_anywhere_equally_often():
    # 0 over 4000 keys to 20 places: 200 expected, chi-square with 19 degrees of freedom exceeds 44 once in 1000.
    counts = np.bincount([permute(0, 20, key) for key in range(4000)], minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 44


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    clip_length=st.integers(1, 25),
    seed=st.integers(0, 2**63),
    clips_per_run=st.none() | st.integers(1, 4),
    offsets=st.sampled_from(["spare", "full", "none"]),
)
def test_every_clip_once_per_epoch_inside_its_run_and_none_overlaps(lengths, clip_length, seed, clips_per_run, offsets):
    if max(lengths) < clip_length:
        with pytest.raises(ShardError, match=f"no run has {clip_length} frames in a row"):
            order_of(lengths, clip_length, seed)
        return
    order = order_of(lengths, clip_length, seed, clips_per_run=clips_per_run, offsets=offsets)
    n = order.clips_per_epoch
    for epoch in range(2):
        clips = [order.clip(epoch * n + position) for position in range(n)]
        frames = Counter((clip.run, frame) for clip in clips for frame in range(clip.start, clip.stop))
        assert set(frames.values()) == {1}
        assert all(clip.stop - clip.start == clip_length for clip in clips)
        assert all(clip.start >= 3 and clip.stop <= 3 + lengths[clip.run] for clip in clips)
        per_run = Counter(clip.run for clip in clips)
        for run, length in enumerate(lengths):
            fitting = length // clip_length
            if offsets == "full" and fitting > 1:
                fitting = (length + 1) // clip_length - 1
            assert per_run[run] == (fitting if clips_per_run is None else min(fitting, clips_per_run))


def test_offsets_reach_every_place():
    starts = {name: Counter() for name in ("none", "spare", "full")}
    for name, found in starts.items():
        order = order_of([21], 5, offsets=name)
        for sample in range(400):
            found[(order.clip(sample).start - 3) % 5] += 1
    assert set(starts["none"]) == {0}
    assert set(starts["spare"]) == {0, 1}
    assert set(starts["full"]) == {0, 1, 2, 3, 4}


def test_clips_per_run_draws_other_clips_in_every_epoch():
    order = order_of([40, 40], 4, clips_per_run=3)
    assert order.clips_per_epoch == 6
    seen = {(clip.run, clip.start) for clip in map(order.clip, range(6 * 30))}
    assert seen == {(run, 3 + 4 * place) for run in range(2) for place in range(10)}


@pytest.mark.parametrize(("other", "seed"), [(HASH, 1), ("ab" * 32, 0)])
def test_the_order_depends_on_the_seed_and_the_manifest(other, seed):
    table = np.array([(0, 0, 200)], dtype=np.int64)
    one, two = ClipOrder("a", HASH, table, 4, 0), ClipOrder("a", other, table, 4, seed)
    assert [one.clip(i) for i in range(50)] != [two.clip(i) for i in range(50)]
    assert [one.clip(i) for i in range(50)] != [one.clip(i + 50) for i in range(50)]


def test_the_order_of_a_release_stays_its_order():
    # A resumed run on a newer release goes on in the same order only while these stay as they are.
    order = order_of([30, 17, 44], 5, seed=11)
    found = [(clip.run, clip.start) for clip in map(order.clip, range(8))]
    assert found == [(1, 14), (0, 18), (0, 3), (2, 21), (2, 41), (2, 16), (2, 26), (0, 23)]


def test_nonsense_is_refused():
    with pytest.raises(ShardError, match="must be at least 1"):
        order_of([10], 0)
    with pytest.raises(ShardError, match="must be at least 1"):
        order_of([10], 2, clips_per_run=0)
    with pytest.raises(ValueError, match="outside"):
        permute(5, 5, 0)


@settings(max_examples=40)
@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6),
    key=st.integers(0, 2**64 - 1),
    block=st.integers(0, 1000),
)
def test_a_mixture_deals_exact_shares_and_every_sample_of_a_dataset_once(weights, key, block):
    mixture = Mixture(weights, key)
    dealt = [mixture.place(sample) for sample in range(1024 * block, 1024 * (block + 1))]
    for dataset, count in enumerate(mixture.counts):
        own = sorted(sample for which, sample in dealt if which == dataset)
        assert own == list(range(block * count, (block + 1) * count))
    assert sum(mixture.counts) == 1024
    for count, weight in zip(mixture.counts, weights, strict=True):
        assert abs(count - 1024 * weight / sum(weights)) <= len(weights)


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], []])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ShardError, match="positive numbers"):
        Mixture(weights, 0)
