import json
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boldforge.data_shards import ClipStream, Holdout, Segment, ShardError, ShardReader, load_manifest, split_segments
from boldforge.data_shards.permutation import permute

SEED = 7


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("q", "scale", "mean", "run", "start"))


def global_batch(manifest, step, world_size, num_workers=0, batch_size=4):
    shares = []
    for rank in range(world_size):
        stream = ClipStream(manifest, 8, batch_size, SEED, rank=rank, world_size=world_size, num_workers=num_workers)
        shares.append(next(islice(stream, step, None)))
    assert all(share.step == step for share in shares)
    return {
        name: torch.cat([getattr(share, name) for share in shares]) for name in ("q", "scale", "mean", "run", "start")
    }


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permutation_visits_everything_once(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutation_is_not_the_identity_and_depends_on_the_key():
    orders = {tuple(permute(i, 50, key) for i in range(50)) for key in range(20)}
    assert len(orders) == 20
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_ranks_and_workers_do_not_change_the_global_batch(real_shards, world_size, num_workers):
    wanted = ClipStream(real_shards, 8, 4, SEED).batch(5)
    found = global_batch(real_shards, 5, world_size, num_workers)
    for name, value in found.items():
        assert torch.equal(value, getattr(wanted, name)), name


def test_every_clip_once_per_epoch_and_none_overlaps(real_shards):
    stream = ClipStream(real_shards, 8, 3, SEED)
    n = stream.clips_per_epoch
    assert n == sum(run.n_frames // 8 for run in real_shards.runs)
    for epoch in range(2):
        frames = Counter()
        for sample in range(epoch * n, (epoch + 1) * n):
            clip = stream.clip(sample)
            frames.update((clip.run, frame) for frame in range(clip.start, clip.stop))
        assert set(frames.values()) == {1}
        assert len(frames) == 8 * n
    assert [stream.clip(i) for i in range(n)] != [stream.clip(i + n) for i in range(n)]


def test_the_order_depends_on_the_seed(real_shards):
    one, two = ClipStream(real_shards, 8, 3, 1), ClipStream(real_shards, 8, 3, 2)
    assert [one.clip(i) for i in range(9)] != [two.clip(i) for i in range(9)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_continues_with_the_next_step(real_shards, num_workers):
    straight = list(islice(ClipStream(real_shards, 8, 4, SEED), 6))
    first = ClipStream(real_shards, 8, 4, SEED, num_workers=num_workers)
    list(islice(first, 3))
    state = json.loads(json.dumps(first.state_dict()))
    resumed = ClipStream(real_shards, 8, 4, SEED)
    resumed.load_state_dict(state)
    assert len(json.dumps(state)) < 400
    for wanted, found in zip(straight[3:], islice(resumed, 3), strict=True):
        assert wanted.step == found.step
        assert same(wanted, found)


@pytest.mark.parametrize("change", ["seed", "manifest_hash", "clip_length", "batch_size", "segments"])
def test_a_state_of_another_stream_is_refused(real_shards, change):
    stream = ClipStream(real_shards, 8, 4, SEED)
    with pytest.raises(ShardError, match=change):
        stream.load_state_dict({**stream.state_dict(), change: "other"})


def test_dequantise_gives_what_the_reader_stores(real_shards):
    batch = ClipStream(real_shards, 8, 2, SEED).batch(0)
    clip = ShardReader(real_shards).read(int(batch.run[1]), int(batch.start[1]), 8)
    values = batch.dequantise()
    np.testing.assert_allclose(values[1].numpy(), clip.mean + clip.q.astype(np.float32) * clip.scale, rtol=1e-6)
    assert values.shape == (2, 8, real_shards.n_voxels)
    assert (values.transpose(1, 2)[~batch.signal()] == 0).all()
    assert batch.dequantise(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_too_long_clips_and_too_many_ranks_are_explained(real_shards):
    with pytest.raises(ShardError, match=r"91 frames in a row.*the longest stretch is 90"):
        ClipStream(real_shards, 91, 1, SEED)
    with pytest.raises(ShardError, match="2 clips cannot be split over 3 ranks"):
        ClipStream(real_shards, 8, 2, SEED, world_size=3)


def test_short_runs_are_passed_over(real_shards):
    stream = ClipStream(real_shards, 80, 1, SEED)
    assert {stream.clip(i).run for i in range(5)} == {int(np.argmax([run.n_frames for run in real_shards.runs]))}


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


def test_a_stream_stays_inside_its_segments(real_shards):
    stream = ClipStream(real_shards, 5, 2, SEED, segments=[Segment(0, 10, 23), Segment(1, 40, 47)])
    for sample in range(3 * stream.clips_per_epoch):
        run, start, stop = stream.clip(sample)
        assert stop - start == 5
        assert (start >= 10 and stop <= 23) if run == 0 else (start >= 40 and stop <= 47)


def damaged(manifest, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(manifest.folder, folder)
    shard = folder / manifest.shards[0].file
    data = bytearray(shard.read_bytes())
    shard.write_bytes(damage(data))
    return load_manifest(folder)


@pytest.mark.parametrize("which", ["offset", "scale_offset"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_flipped_bit_is_named_and_never_returned(real_shards, tmp_path, which, num_workers):
    position = getattr(real_shards.runs[1], which) + 12_345

    def flip(data):
        data[position] ^= 1
        return bytes(data)

    manifest = damaged(real_shards, tmp_path, flip)
    good, bad = ClipStream(manifest, 8, 1, SEED, segments=[Segment(0, 0, 64)]), [Segment(1, 0, 64)]
    assert next(iter(good)).step == 0
    with pytest.raises(ShardError, match=rf"shard-000000.tar: run {manifest.runs[1].key} does not match its checksum"):
        next(iter(ClipStream(manifest, 8, 1, SEED, segments=bad, num_workers=num_workers)))


def test_a_cut_or_missing_shard_is_found_at_open(real_shards, tmp_path):
    manifest = damaged(real_shards, tmp_path, lambda data: bytes(data[:-512]))
    with pytest.raises(ShardError, match=r"shard-000000.tar: the shard has \d+ bytes, expected \d+"):
        ShardReader(manifest)
    (manifest.folder / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match="is missing"):
        ShardReader(manifest)


def test_reading_outside_a_run_is_refused(real_shards):
    with pytest.raises(IndexError):
        ShardReader(real_shards).read(0, real_shards.runs[0].n_frames - 3, 4)
