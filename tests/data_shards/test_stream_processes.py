"""Worker processes (fork and spawn), threads and torchdata's StatefulDataLoader: the same global steps always."""

import multiprocessing
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from boldforge.data_shards import ClipStream, ShardError

SEED = 3
# Forking a process that has threads is what the test is about; from Python 3.12 that warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with torch 2.13
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores, on purpose
]


def clips_of(batch):
    return list(zip(batch.run.tolist(), batch.start.tolist(), strict=True))


def global_steps(manifest, n_steps, batch_size, world_size, num_workers, context, first=0):
    """Return, for every step, the clips of all ranks; each rank has a DataLoader of its own."""
    steps = [[] for _ in range(n_steps)]
    # The stream ends with the last step asked for: workers that are stopped while they send a batch may abort.
    clips = ClipStream(manifest, 8, batch_size, SEED).clips_per_epoch
    epochs, rest = divmod((first + n_steps) * batch_size, clips)
    for rank in range(world_size):
        stream = ClipStream(manifest, 8, batch_size, SEED, rank=rank, world_size=world_size, epochs=epochs + (rest > 0))
        stream.load_state_dict({**stream.state_dict(), "step": first, "sample": first * batch_size})
        loader = DataLoader(
            stream, batch_size=None, num_workers=num_workers, multiprocessing_context=context if num_workers else None
        )
        for number, batch in enumerate(loader):
            assert batch.step == first + number
            if number < n_steps:
                steps[number] += clips_of(batch)
    return steps


def expected(manifest, n_steps, batch_size, first=0):
    stream = ClipStream(manifest, 8, batch_size, SEED)
    return [
        [tuple(stream.clip(step * batch_size + slot)[:2]) for slot in range(batch_size)]
        for step in range(first, first + n_steps)
    ]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_forked_workers_give_the_global_steps(real_shards, num_workers):
    found = global_steps(real_shards, 5, 5, 2, num_workers, "fork", first=7)
    assert found == expected(real_shards, 5, 5, first=7)


def test_spawned_workers_give_the_global_steps(real_shards):
    found = global_steps(real_shards, 4, 3, 1, 2, "spawn", first=3)
    assert found == expected(real_shards, 4, 3, first=3)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("num_workers", range(5))
def test_every_number_of_ranks_and_forked_workers_gives_the_global_steps(real_shards, world_size, num_workers):
    for batch_size in (world_size, 11):  # divisible and not
        found = global_steps(real_shards, 6, batch_size, world_size, num_workers, "fork")
        assert found == expected(real_shards, 6, batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 4), (2, 3), (3, 2), (5, 1)])
def test_spawned_workers_at_several_ranks_give_the_global_steps(real_shards, world_size, num_workers):
    found = global_steps(real_shards, 5, 7, world_size, num_workers, "spawn")
    assert found == expected(real_shards, 5, 7)


def test_a_finite_stream_ends_in_order_with_worker_processes(real_shards):
    stream = ClipStream(real_shards, 8, 4, SEED, epochs=2, padding="epoch")
    found = [batch.step for batch in DataLoader(stream, batch_size=None, num_workers=3, multiprocessing_context="fork")]
    assert found == list(range(2 * -(-stream.clips_per_epoch // 4)))


def test_threads_inside_worker_processes(real_shards):
    stream = ClipStream(real_shards, 8, 2, SEED, num_workers=2)
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [clips_of(batch) for batch in islice(loader, 6)] == expected(real_shards, 6, 2)


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_stateful_dataloader_goes_on_behind_the_last_batch(real_shards, num_workers):
    def loader():
        stream = ClipStream(real_shards, 8, 2, SEED)
        context = "fork" if num_workers else None
        return StatefulDataLoader(stream, batch_size=None, num_workers=num_workers, multiprocessing_context=context)

    wanted = expected(real_shards, 9, 2)
    for taken in (1, 4):
        first = loader()
        found = [clips_of(batch) for batch in islice(first, taken)]
        state = first.state_dict()
        second = loader()
        second.load_state_dict(state)
        found += [clips_of(batch) for batch in islice(second, 2)]
        third = loader()  # a state of a resumed loader is as good
        third.load_state_dict(second.state_dict())
        found += [clips_of(batch) for batch in islice(third, 9 - taken - 2)]
        assert found == wanted


def test_a_batch_knows_the_state_behind_it_for_any_number_of_workers(real_shards):
    stream = ClipStream(real_shards, 8, 3, SEED)
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork")
    third = list(islice(loader, 3))[-1]
    resumed = ClipStream(real_shards, 8, 3, SEED, rank=1, world_size=2)
    resumed.load_state_dict(stream.state_after(third))
    assert clips_of(next(iter(resumed))) == expected(real_shards, 1, 3, first=3)[0][1:]


def test_a_state_of_one_worker_is_refused_by_another_number(real_shards):
    stream = ClipStream(real_shards, 8, 3, SEED)
    stream.load_state_dict({**stream.state_dict(), "step": 4, "sample": 12, "lanes": 2})
    with pytest.raises(ShardError, match=r"one of 2 worker processes' and 1 are running; save `stream.state_after"):
        next(iter(stream))


def _first_batch(stream, queue):
    batch = stream.batch(1)
    queue.put((clips_of(batch), int(batch.q.sum())))


def test_a_stream_that_has_read_works_in_a_spawned_process(real_shards):
    stream = ClipStream(real_shards, 8, 2, SEED)
    batch = stream.batch(1)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_first_batch, args=(stream, queue))
    process.start()
    assert queue.get(timeout=120) == (clips_of(batch), int(torch.sum(batch.q)))
    process.join()
