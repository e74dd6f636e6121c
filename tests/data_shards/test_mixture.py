"""Mixtures of datasets in one stream: exact shares, each dataset's clips once per its own epoch, resumable."""

from collections import Counter
from itertools import islice

import pytest
import torch

from boldforge.data_shards import ClipStream, DataRecipe, Segment, ShardError, ShardReader, Source, build_shards

SEED = 5


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory, real_runs):
    """The second real run alone, as a dataset of its own."""
    return build_shards(real_runs.runs[1:], tmp_path_factory.mktemp("other"), DataRecipe(grid="mni4mm")).manifest


def test_clips_come_from_each_dataset_in_its_share_and_order(real_shards, other_shards):
    sources = [Source(real_shards, weight=3), Source(other_shards, weight=1)]
    stream = ClipStream(sources, 8, 16, SEED)
    batches = [stream.batch(step) for step in range(64)]  # 1024 samples: one whole block
    dataset = torch.cat([batch.dataset for batch in batches])
    assert Counter(dataset.tolist()) == {0: 768, 1: 256}
    for number, manifest in enumerate([real_shards, other_shards]):
        alone = ClipStream(manifest, 8, 16, SEED)
        found = [
            (int(run), int(start))
            for batch in batches
            for run, start, which in zip(batch.run, batch.start, batch.dataset, strict=True)
            if which == number
        ]
        assert sorted(found) == sorted(tuple(alone.clip(i)[:2]) for i in range(len(found)))
    batch = batches[3]
    for place in range(16):
        manifest = [real_shards, other_shards][int(batch.dataset[place])]
        clip = ShardReader(manifest).read(int(batch.run[place]), int(batch.start[place]), 8)
        assert (batch.q[place].numpy() == clip.q).all() and (batch.scale[place].numpy() == clip.scale).all()


def test_a_mixture_is_the_same_at_any_number_of_ranks_and_resumes(real_shards, other_shards):
    sources = [Source(real_shards, segments=[Segment(0, 0, 40)]), Source(other_shards)]

    def run(rank, world_size, steps, state=None):
        stream = ClipStream(sources, 8, 6, SEED, None, rank, world_size)
        if state is not None:
            stream.load_state_dict(state)
        clips = [
            list(zip(b.dataset.tolist(), b.run.tolist(), b.start.tolist(), strict=True)) for b in islice(stream, steps)
        ]
        return clips, stream.state_dict()

    wanted, _ = run(0, 1, 8)
    first = [run(rank, 4, 3) for rank in range(4)]
    found = [[clip for share in first for clip in share[0][step]] for step in range(3)]
    second = [run(rank, 3, 5, first[2][1]) for rank in range(3)]
    found += [[clip for share in second for clip in share[0][step]] for step in range(5)]
    assert found == wanted
    with pytest.raises(ShardError, match="differs in the dataset"):
        ClipStream(sources[::-1], 8, 6, SEED).load_state_dict(first[0][1])


def test_without_weights_each_dataset_has_the_share_of_its_clips(real_shards, other_shards):
    stream = ClipStream([Source(real_shards), Source(other_shards)], 8, 64, SEED)
    shares = torch.cat([stream.batch(step).dataset for step in range(16)]).double().mean()
    n = [ClipStream(manifest, 8, 1, SEED).clips_per_epoch for manifest in (real_shards, other_shards)]
    assert stream.clips_per_epoch == sum(n)
    assert shares == pytest.approx(n[1] / sum(n), abs=1 / 1024)


def test_datasets_that_cannot_share_a_batch_are_refused(real_shards, other_shards, tmp_path, real_runs):
    eight = build_shards(real_runs.runs[:1], tmp_path / "int8", DataRecipe(grid="mni4mm", dtype="int8")).manifest
    with pytest.raises(ShardError, match="their dtype is int16 and int8; build both with one recipe"):
        ClipStream([Source(real_shards), Source(eight)], 8, 4, SEED)
    with pytest.raises(ShardError, match="give all of them one, or none"):
        ClipStream([Source(real_shards, weight=1), Source(other_shards)], 8, 4, SEED)
    with pytest.raises(ShardError, match="no epochs of its own"):
        ClipStream([Source(real_shards), Source(other_shards)], 8, 4, SEED, epochs=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"confounds": ("motion-6", "wm-csf")}, "confounds is none and motion-6, wm-csf"),
        ({"high_pass": 0.01}, "high_pass is none and 0.01"),
        ({"low_pass": 0.1}, "low_pass is none and 0.1"),
        ({"detrend": True}, "detrend is False and True"),
        ({"scrub_fd": 0.5}, "scrub_fd is none and 0.5"),
        ({"antialias": True}, "antialias is False and True"),
        ({"time_filter": "sinc"}, "time_filter is gaussian and sinc"),
        ({"normalisation": "voxel-z"}, "normalisation is residual-z and voxel-z"),
        ({"tr": 0.8}, "tr is 2.0 and 0.8"),
    ],
)
def test_datasets_that_were_cleaned_in_other_ways_are_refused(real_shards, change, words):
    other = real_shards.placed_in(real_shards.folder)
    other = other.model_copy(update={"recipe": DataRecipe(grid="mni4mm", **change)}).placed_in(real_shards.folder)
    with pytest.raises(ShardError, match=f"cannot be mixed: their {words}; build both with one recipe"):
        ClipStream([Source(real_shards), Source(other)], 8, 4, SEED)
