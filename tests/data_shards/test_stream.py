"""Streaming: one global order at any number of ranks and threads, resumed anywhere, with every clip once per epoch."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.data_shards import ClipStream, Segment, ShardError, ShardReader

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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_ranks_and_workers_do_not_change_the_global_batch(real_shards, world_size, num_workers):
    wanted = ClipStream(real_shards, 8, 4, SEED).batch(5)
    found = global_batch(real_shards, 5, world_size, num_workers)
    for name, value in found.items():
        assert torch.equal(value, getattr(wanted, name)), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_continues_with_the_next_step(real_shards, num_workers):
    straight = list(islice(ClipStream(real_shards, 8, 4, SEED), 6))
    first = ClipStream(real_shards, 8, 4, SEED, num_workers=num_workers)
    list(islice(first, 3))
    resumed = ClipStream(real_shards, 8, 4, SEED)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for wanted, found in zip(straight[3:], islice(resumed, 3), strict=True):
        assert wanted.step == found.step
        assert same(wanted, found)


def clips_of(batch):
    return [clip for clip in zip(batch.run.tolist(), batch.start.tolist(), strict=True) if clip[0] >= 0]


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 8), st.integers(8, 11), st.integers(0, 2), st.integers(1, 2)), min_size=2, max_size=3
    ),
    padding=st.sampled_from(["none", "epoch"]),
    who=st.integers(0, 7),
)
def test_any_ranks_workers_and_batch_size_go_on_with_exactly_the_remaining_samples(real_shards, parts, padding, who):
    """Each part has other ranks, batch size and threads; together they give the one order, nothing twice or lost."""
    state, found = None, []
    for world_size, batch_size, num_workers, steps in parts:
        streams = [
            ClipStream(real_shards, 8, batch_size, SEED, None, rank, world_size, num_workers, padding=padding)
            for rank in range(world_size)
        ]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        running = [iter(stream) for stream in streams]
        for _ in range(steps):
            found += [clip for share in running for clip in clips_of(next(share))]
        states = [json.dumps(stream.state_dict()) for stream in streams]
        assert len(set(states)) == 1
        state = json.loads(states[who % world_size])
    wanted = ClipStream(real_shards, 8, 8, SEED)
    assert found == [tuple(wanted.clip(i)[:2]) for i in range(len(found))]


def test_a_padded_epoch_ends_with_places_that_count_nowhere(real_shards):
    stream = ClipStream(real_shards, 8, 4, SEED, epochs=2, padding="epoch")
    batches = list(stream)
    n = stream.clips_per_epoch
    assert n % 4 and len(batches) == 2 * -(-n // 4)
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        clips = [clip for batch in epoch for clip in clips_of(batch)]
        assert len(clips) == len(set(clips)) == n
        assert [int(batch.valid.sum()) for batch in epoch] == [4] * (len(epoch) - 1) + [n % 4]
        last = epoch[-1]
        assert not last.signal()[~last.valid].any() and not last.q[~last.valid].any()
        assert not last.dequantise()[~last.valid].any()
    assert [stream.batch(step).until for step in range(len(batches))] == [batch.until for batch in batches]


def test_without_padding_only_the_very_last_batch_is_filled(real_shards):
    stream = ClipStream(real_shards, 8, 4, SEED, epochs=3, num_workers=2)
    batches = list(stream)
    n = 3 * stream.clips_per_epoch
    assert sum(int(batch.valid.sum()) for batch in batches) == n
    assert all(bool(batch.valid.all()) for batch in batches[:-1])
    assert not list(stream)


def test_the_state_is_under_200_bytes(real_shards):
    stream = ClipStream(real_shards, 8, 4, 2**63, rank=1, world_size=3, clips_per_run=2, padding="epoch")
    stream.load_state_dict({**stream.state_dict(), "step": 10**9, "sample": 10**11})
    assert len(json.dumps(stream.state_dict())) < 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": SEED + 1}, "the seed: seed is 7, here 8"),
        ({"clip_length": 9}, "the clip length: clip_length is 8, here 9"),
        ({"segments": [Segment(0, 0, 40)]}, "the choice of clips"),
        ({"clips_per_run": 2}, "the choice of clips"),
        ({"offsets": "full"}, "the choice of clips"),
    ],
)
def test_a_state_of_another_stream_is_refused(real_shards, change, words):
    mine = {"clip_length": 8, "batch_size": 4, "seed": SEED}
    state = ClipStream(real_shards, **mine).state_dict()
    with pytest.raises(ShardError, match=words):
        ClipStream(real_shards, **{**mine, **change}).load_state_dict(state)
    stream = ClipStream(real_shards, **mine)
    with pytest.raises(ShardError, match="differs in the dataset"):
        stream.load_state_dict({**state, "manifest": "0" * 16})
    with pytest.raises(ShardError, match="no place to go on from"):
        stream.load_state_dict({**state, "step": None})
    stream.load_state_dict(state)
    assert stream.state_dict() == state


def test_dequantise_gives_what_the_reader_stores(real_shards):
    batch = ClipStream(real_shards, 8, 2, SEED).batch(0)
    clip = ShardReader(real_shards).read(int(batch.run[1]), int(batch.start[1]), 8)
    values = batch.dequantise()
    np.testing.assert_allclose(
        values[1].numpy(), clip.mean + clip.q.astype(np.float32) * clip.scale, rtol=1e-6, atol=1e-6
    )
    assert values.shape == (2, 8, real_shards.n_voxels)
    assert (values.transpose(1, 2)[~batch.signal()] == 0).all()
    assert batch.dequantise(dtype=torch.bfloat16).dtype == torch.bfloat16


def check_device_path(manifest, device, pin_memory):
    mask = manifest.brain_mask()
    batch = ClipStream(manifest, 8, 3, SEED, pin_memory=pin_memory).batch(2)
    assert batch.q.is_pinned() == batch.scale.is_pinned() == batch.mean.is_pinned() == pin_memory
    there = batch.to(device)
    assert there.q.dtype == getattr(torch, manifest.recipe.dtype)  # integers travel
    cubes = there.dense(mask, device)
    assert cubes.device.type == torch.device(device).type
    assert cubes.shape == (3, 8, *mask.shape)
    wanted = np.zeros((3, 8, *mask.shape), dtype=np.float32)
    wanted[:, :, mask] = batch.mean.numpy()[:, None] + batch.q.numpy() * batch.scale.numpy()[:, None]
    np.testing.assert_allclose(cubes.cpu().numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_dense_cubes_on_the_cpu(real_shards):
    check_device_path(real_shards, "cpu", pin_memory=False)
    assert real_shards.dtype == np.int16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_integers_travel_pinned_and_become_cubes_on_the_gpu(real_shards):
    check_device_path(real_shards, "cuda", pin_memory=True)
    batch = ClipStream(real_shards, 8, 2, SEED).batch(0).pin_memory()
    assert batch.q.is_pinned()
    assert torch.equal(batch.dequantise("cuda").cpu(), batch.dequantise())


def test_too_long_clips_and_too_many_ranks_are_explained(real_shards):
    with pytest.raises(ShardError, match=r"91 frames in a row.*the longest stretch is 90"):
        ClipStream(real_shards, 91, 1, SEED)
    with pytest.raises(ShardError, match="2 clips cannot be split over 3 ranks"):
        ClipStream(real_shards, 8, 2, SEED, world_size=3)


def test_short_runs_are_passed_over(real_shards):
    stream = ClipStream(real_shards, 80, 1, SEED)
    assert {stream.clip(i).run for i in range(5)} == {int(np.argmax([run.n_frames for run in real_shards.runs]))}


def test_a_stream_stays_inside_its_segments(real_shards):
    stream = ClipStream(real_shards, 5, 2, SEED, segments=[Segment(0, 10, 23), Segment(1, 40, 47)])
    for sample in range(3 * stream.clips_per_epoch):
        run, start, stop = stream.clip(sample)
        assert stop - start == 5
        assert (start >= 10 and stop <= 23) if run == 0 else (start >= 40 and stop <= 47)


def test_reading_outside_a_run_is_refused(real_shards):
    with pytest.raises(IndexError):
        ShardReader(real_shards).read(0, real_shards.runs[0].n_frames - 3, 4)


@pytest.mark.parametrize("segment", [Segment(-1, 0, 40), Segment(2, 0, 40), Segment(0, -1, 40), Segment(0, 0, 10**6)])
def test_segments_outside_the_dataset_are_refused(real_shards, segment):
    with pytest.raises(ShardError, match="are not in the dataset, which has 2 runs"):
        ClipStream(real_shards, 20, 2, 0, segments=[Segment(0, 0, 40), segment])


@pytest.mark.parametrize("argument", ["offsets", "padding", "damage"])
def test_a_choice_that_is_not_there_is_refused(real_shards, argument):
    with pytest.raises(ShardError, match=f"{argument} must be one of .*found 'some'"):
        ClipStream(real_shards, 20, batch_size=2, seed=0, **{argument: "some"})


def test_a_path_is_not_an_open_dataset(real_shards):
    with pytest.raises(ShardError, match="pass load_manifest"):
        ClipStream(str(real_shards.folder), 20, batch_size=2, seed=0)
