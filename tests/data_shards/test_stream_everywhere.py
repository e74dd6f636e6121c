"""Every number of ranks (1 to 8) and workers (0 to 4): the same global steps, from the state of any other number.

What a DataLoader's worker process does is done here by hand, from a pickled copy of the stream and the worker's number,
so that all of them can be tried; `test_stream_processes` has the real DataLoaders.
"""

import json
import multiprocessing
import pickle
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import _utils

from boldforge.data_shards import ClipStream, DataRecipe, Segment, Source, build_shards

SEED = 11
KINDS = ["plain", "padded", "drawn", "mixture", "weighted mixture"]


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory, real_runs):
    """The second real run alone, as a dataset of its own."""
    return build_shards(real_runs.runs[1:], tmp_path_factory.mktemp("other"), DataRecipe(grid="mni4mm")).manifest


def arguments(kind, one, other):
    """Return the dataset or the mixture, and the options, of a kind of stream."""
    weights = (5, 2) if kind == "weighted mixture" else (None, None)
    mixed = [Source(one, [Segment(0, 3, 80), Segment(1, 0, 60)], weights[0]), Source(other, weight=weights[1])]
    options = {"padded": {"padding": "epoch"}, "drawn": {"clips_per_run": 3, "offsets": "full"}}.get(kind, {})
    return (mixed if "mixture" in kind else one), options


def share(stream, worker, num_workers, steps):
    """Return the batches that a rank's worker process makes, of the next `steps` that the loader hands out."""
    stream = pickle.loads(pickle.dumps(stream))
    count = len(range(worker, steps, max(1, num_workers)))
    if num_workers:
        info = _utils.worker.WorkerInfo(id=worker, num_workers=num_workers, seed=0, dataset=stream)
        _utils.worker._worker_info = info
    try:
        return list(islice(iter(stream), count))
    finally:
        _utils.worker._worker_info = None


def loaded(stream, num_workers, steps):
    """Return the batches of a rank in the order in which its loader hands them out."""
    workers = [share(stream, worker, num_workers, steps) for worker in range(max(1, num_workers))]
    return [workers[step % len(workers)][step // len(workers)] for step in range(steps)]


def clips_of(batch):
    places = zip(batch.dataset.tolist(), batch.run.tolist(), batch.start.tolist(), strict=True)
    return [place for place in places if place[1] >= 0]


def expected(data, options, samples):
    stream = ClipStream(data, 8, 1, SEED, **{name: value for name, value in options.items() if name != "padding"})
    places = (stream._place(sample) for sample in range(samples))
    return [(dataset, clip.run, clip.start) for dataset, clip in places]


def global_steps(data, options, batch_size, world_size, num_workers, steps):
    ranks = [
        loaded(ClipStream(data, 8, batch_size, SEED, None, rank, world_size, **options), num_workers, steps)
        for rank in range(world_size)
    ]
    return [[clip for rank in ranks for clip in clips_of(rank[step])] for step in range(steps)]


def all_counts(data, options, queue=None):
    """Try every count; return those whose steps are not those of one rank without workers."""
    wrong = []
    for batch_size in (8, 11):  # divisible by some of the counts, and by none
        wanted = global_steps(data, options, batch_size, 1, 0, 4)
        wrong += [
            (batch_size, world_size, num_workers)
            for world_size in range(1, 9)
            for num_workers in range(5)
            if global_steps(data, options, batch_size, world_size, num_workers, 4) != wanted
        ]
    if queue is not None:
        queue.put(wrong)
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_ranks_and_workers_gives_the_same_global_steps(real_shards, other_shards, kind):
    assert all_counts(*arguments(kind, real_shards, other_shards)) == []


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["padded", "weighted mixture"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_they_do_so_in_a_forked_and_in_a_spawned_process(real_shards, other_shards, kind, start_method):
    context = multiprocessing.get_context(start_method)
    queue = context.Queue()
    process = context.Process(target=all_counts, args=(*arguments(kind, real_shards, other_shards), queue))
    process.start()
    assert queue.get(timeout=300) == []
    process.join()


@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(8, 13), st.integers(1, 3)), min_size=2, max_size=3
    ),
    kind=st.sampled_from(KINDS),
    who=st.integers(0, 7),
)
def test_a_state_at_any_batch_goes_on_at_any_other_count(real_shards, other_shards, parts, kind, who):
    """Ranks, workers and batch size change at every state; together the parts give the one order, once each."""
    data, options = arguments(kind, real_shards, other_shards)
    state, found = None, []
    for world_size, num_workers, batch_size, steps in parts:
        ranks, states = [], []
        for rank in range(world_size):
            stream = ClipStream(data, 8, batch_size, SEED, None, rank, world_size, **options)
            if state is not None:
                stream.load_state_dict(state)
            ranks.append(loaded(stream, num_workers, steps))
            states.append(json.dumps(stream.state_after(ranks[-1][-1])))
        found += [clip for step in range(steps) for rank in ranks for clip in clips_of(rank[step])]
        assert len(set(states)) == 1 and len(states[0]) < 200
        state = json.loads(states[who % world_size])
    assert found == expected(data, options, len(found))
