"""Datasets at an address: read through a bounded cache that several processes share, also without a connection."""

import fcntl
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest

from boldforge.data_shards import ClipStream, RemoteError, ShardError, ShardReader, block_cache, open_remote, remote
from boldforge.data_shards.block_cache import BlockCache, CacheError

SEED = 2
BLOCK = 2**18


@pytest.fixture
def server(real_shards, serve):
    with serve(real_shards.folder) as server:
        yield server


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def in_memory(real_shards):
    """The dataset on fsspec's memory:// file system."""
    system = fsspec.filesystem("memory")
    for path in real_shards.folder.iterdir():
        system.pipe_file(f"/{real_shards.content_hash[:8]}/{path.name}", path.read_bytes())
    yield f"memory://{real_shards.content_hash[:8]}", system
    system.rm(f"/{real_shards.content_hash[:8]}", recursive=True)


def equal_streams(local, other, n_steps=6, num_workers=0):
    pairs = zip(ClipStream(local, 8, 3, SEED), ClipStream(other, 8, 3, SEED, num_workers=num_workers), strict=False)
    return all(
        (a.q == b.q).all() and (a.scale == b.scale).all() and (a.mean == b.mean).all() and (a.start == b.start).all()
        for a, b in islice(pairs, n_steps)
    )


def test_a_stream_from_memory_is_the_local_stream(real_shards, in_memory, tmp_path):
    url, _ = in_memory
    manifest = open_remote(url, tmp_path, block_bytes=BLOCK)
    assert manifest.content_hash == real_shards.content_hash
    assert (manifest.brain_mask() == real_shards.brain_mask()).all()
    assert [run.key for run in manifest.runs] == [run.key for run in real_shards.runs]
    assert equal_streams(real_shards, manifest, num_workers=2)


def test_over_http_only_what_is_read_is_fetched_and_only_once(real_shards, server, tmp_path):
    manifest = open_remote(server.url, tmp_path, block_bytes=BLOCK)
    reader = ShardReader(manifest)
    run = manifest.runs[1]
    server.asked.clear()
    clip = reader.read(1, 10, 4)
    assert (clip.q == ShardReader(real_shards).read(1, 10, 4).q).all()
    frames = 4 * manifest.frame_bytes
    asked = [asked for path, asked in server.asked if path.endswith(".tar")]
    assert (
        len(asked) == len(set(asked)) <= frames // BLOCK + 2 + 3 + 2
    )  # clip, scales, hashes: each cut by block borders
    first = run.offset + 10 * manifest.frame_bytes
    assert f"bytes={first // BLOCK * BLOCK}-{first // BLOCK * BLOCK + BLOCK - 1}" in asked
    server.asked.clear()
    assert (ShardReader(manifest).read(1, 11, 2).q == clip.q[1:3]).all()
    assert server.asked == []


def test_the_cache_serves_without_a_connection(real_shards, server, tmp_path):
    manifest = open_remote(server.url, tmp_path, block_bytes=BLOCK)
    list(ClipStream(manifest, 8, 3, SEED, epochs=1, offsets="none"))
    server.shutdown()
    server.server_close()
    again = open_remote(server.url, tmp_path, block_bytes=BLOCK)
    wanted = list(ClipStream(real_shards, 8, 3, SEED, epochs=1, offsets="none"))
    found = list(ClipStream(again, 8, 3, SEED, epochs=1, offsets="none"))
    assert len(found) == len(wanted) and all((a.q == b.q).all() for a, b in zip(found, wanted, strict=True))
    with pytest.raises(RemoteError, match=rf"{server.url}/manifest.json: cannot be fetched .*check the address"):
        open_remote(server.url, tmp_path / "empty")


def test_without_a_connection_what_the_cache_lacks_is_one_sentence(server, tmp_path):
    manifest = open_remote(server.url, tmp_path, block_bytes=BLOCK)
    wanted = ShardReader(manifest).read(1, 10, 4).q
    server.shutdown()
    server.server_close()
    reader = ShardReader(open_remote(server.url, tmp_path, block_bytes=BLOCK))
    assert (reader.read(1, 11, 2).q == wanted[1:3]).all()
    with pytest.raises(RemoteError) as caught:
        reader.read(0, 40, 2)
    said = str(caught.value)
    assert said.startswith(f"{server.url}/shard-000000.tar: cannot be fetched (")
    assert said.endswith("; check the address and the connection.") and "\n" not in said


def test_a_failing_connection_is_tried_again_and_never_skipped(server, tmp_path):
    manifest = open_remote(server.url, tmp_path, block_bytes=BLOCK)
    server.failures += [1, 1]
    stream = ClipStream(manifest, 8, 2, SEED, damage="skip")
    assert bool(stream.batch(0).valid.all())
    server.failures += [1] * 50
    with pytest.raises(RemoteError, match=r"shard-000000.tar: cannot be fetched"):
        for step in range(5):
            stream.batch(step)
    server.failures.clear()
    assert bool(stream.batch(4).valid.all())
    assert not stream.skipped


def test_a_server_without_ranges_is_still_read_right(real_shards, server, tmp_path):
    server.knows_ranges = False
    assert equal_streams(real_shards, open_remote(server.url, tmp_path), n_steps=2)


def test_a_damaged_block_in_the_cache_is_fetched_again_and_one_at_the_address_is_named(
    in_memory, real_shards, tmp_path
):
    url, system = in_memory
    manifest = open_remote(url, tmp_path, block_bytes=BLOCK)
    wanted = ShardReader(manifest).read(0, 5, 3).q
    for path in (tmp_path / "blocks").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert (ShardReader(manifest).read(0, 5, 3).q == wanted).all()
    name = f"/{real_shards.content_hash[:8]}/{real_shards.shards[0].file}"
    data = bytearray(system.cat_file(name))
    data[real_shards.runs[1].offset + 20 * manifest.frame_bytes + 7] ^= 1
    system.pipe_file(name, bytes(data))
    with pytest.raises(ShardError, match=rf"{url}/shard-000000.tar: run {real_shards.runs[1].key} .*frame 20"):
        ShardReader(manifest).read(1, 19, 2)
    system.pipe_file(name, bytes(data[: len(data) // 4]))
    with pytest.raises(ShardError, match=r"the shard is cut|is missing"):
        ShardReader(open_remote(url, tmp_path / "new")).read(1, 50, 2)
    system.rm(name)
    stream = ClipStream(open_remote(url, tmp_path / "third"), 8, 2, SEED, damage="skip")
    assert not stream.batch(0).valid.any()


def test_another_dataset_at_the_same_address_is_noticed(in_memory, tmp_path):
    url, system = in_memory
    before = open_remote(url, tmp_path).content_hash
    folder = url.removeprefix("memory:/")
    text = system.cat_file(f"{folder}/manifest.json")
    system.pipe_file(f"{folder}/manifest.json", text.replace(b'"mni4mm"', b'"mni2mm"', 1))
    with pytest.raises(ShardError, match="does not match its content hash"):
        open_remote(url, tmp_path)
    system.pipe_file(f"{folder}/manifest.json", text)
    assert open_remote(url, tmp_path).content_hash == before


@pytest.mark.parametrize("url", ["pipe://x", "ftp://x/y", "s3://a::http://b", "/tmp/x"])
def test_only_known_kinds_of_addresses_are_opened(url, tmp_path):
    with pytest.raises(RemoteError, match="expected an address that starts with one of s3, gs"):
        open_remote(url, tmp_path)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://alice:S3CRET@host/x", "http://host: "),
        ("ftp://u:S3CRET@h/x", "ftp://h: "),
        ("https://S3CRET@host:80/x", "https://host: "),
        ("https://host/x?X-Amz-Signature=S3CRET", "https://host: "),
        ("https://host/x#S3CRET", "https://host: "),
        ("http://alice:a/S3CRET@host/x", "http://…: "),
        ("http://alice:a@S3CRET/b@host/x", "http://…: "),
        ("http://alice:a?S3CRET@host/x", "http://…: "),
        ("abfs://u:S3CRET@account/x", "abfs://account: "),
        ("s3://a::http://u:S3CRET@b", "s3://…: "),
        ("simplecache::http://u:S3CRET@b/x", "…://b: "),
    ],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(url, shown, tmp_path):
    with pytest.raises(RemoteError, match=r"in its environment variables.*~/\.netrc with FSSPEC_HTTP=") as caught:
        open_remote(url, tmp_path / "cache")
    assert str(caught.value).startswith(shown) and "S3CRET" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "place", ["a?b#c@d", "u:p@host/x", "hf://datasets/a/b@main/c", "abfs://box@account/x", "http://[fe80:1]:80/x"]
)
def test_a_place_without_a_secret_is_not_refused(place):
    assert remote.why_refused(place) is None


def made(start, stop):
    return bytes((place * 7 + (place >> 8)) % 251 for place in range(start, stop))


def test_the_cache_never_exceeds_its_bound_and_keeps_what_was_used_last(tmp_path):
    cache = BlockCache(tmp_path, max_bytes=16 * 1000, block_bytes=1000)
    size, asked = 100_500, []

    def fetch(start, stop):
        asked.append(start // 1000)
        return made(start, stop)

    random = np.random.default_rng(0)
    buffer = bytearray(1500)
    for turn in range(300):
        offset = int(random.integers(0, size - 1500))
        cache.fill("a" * 64, size, offset, memoryview(buffer), fetch)
        assert buffer == made(offset, offset + 1500)
        cache.fill("a" * 64, size, 0, memoryview(buffer)[:10], fetch)
        assert cache.used_bytes() <= cache.max_bytes
        if turn == 0:
            asked.clear()
    assert 0 not in asked  # used in every turn, so never removed
    assert len(asked) > len(set(asked))  # others were
    cache.fill("a" * 64, size, size - 3, memoryview(buffer)[:3], fetch)
    assert buffer[:3] == made(size - 3, size)


def test_a_half_written_block_of_a_killed_process_is_no_block_and_is_removed_in_time(tmp_path):
    cache = BlockCache(tmp_path, max_bytes=8 * 1000, block_bytes=1000)
    buffer = bytearray(1000)
    cache.fill("b" * 64, 50_000, 0, memoryview(buffer), made)
    (block,) = (tmp_path / "blocks").iterdir()
    block.write_bytes(block.read_bytes()[:400])
    left = tmp_path / "blocks" / f".{block.name}.123-dead"
    left.write_bytes(b"x" * 700)
    os.utime(left, (0, 0))
    cache.fill("b" * 64, 50_000, 0, memoryview(buffer), made)
    assert buffer == made(0, 1000)
    for number in range(20):
        cache.fill("b" * 64, 50_000, 1000 * number, memoryview(buffer), made)
    assert not left.exists()
    assert cache.used_bytes() <= 8000


def _read_all(folder, log, seed):
    cache = BlockCache(Path(folder), max_bytes=12 * 1000, block_bytes=1000)

    def fetch(start, stop):
        with open(log, "a") as file:
            file.write(f"{start}\n")
        return made(start, stop)

    buffer = bytearray(2000)
    for offset in np.random.default_rng(seed).integers(0, 28_000, 150):
        cache.fill("c" * 64, 30_000, int(offset), memoryview(buffer), fetch)
        if buffer != made(int(offset), int(offset) + 2000) or cache.used_bytes() > 12_000:
            os._exit(1)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_several_processes_share_one_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_read_all, args=(tmp_path / "c", tmp_path / "log", seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]


def test_processes_that_miss_the_same_block_fetch_it_once(tmp_path):
    cache = BlockCache(tmp_path, max_bytes=8 * 1000, block_bytes=1000)
    asked = []

    def slow(start, stop):
        asked.append(start)
        time.sleep(0.05)
        return made(start, stop)

    buffers = [bytearray(10) for _ in range(4)]
    threads = [
        threading.Thread(target=cache.fill, args=("d" * 64, 5000, 0, memoryview(buffer), slow)) for buffer in buffers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [0]
    assert all(buffer == made(0, 10) for buffer in buffers)


def test_a_cache_that_cannot_be_is_explained(tmp_path):
    with pytest.raises(CacheError, match="too small; give it at least"):
        BlockCache(tmp_path, max_bytes=10, block_bytes=1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="the cache cannot be made"):
        BlockCache(tmp_path / "file", max_bytes=10**6, block_bytes=1000)
    assert block_cache.BLOCK_BYTES * 8 < remote.CACHE_BYTES


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_read_over_http_after_their_parent_has(real_shards, server, tmp_path):
    from torch.utils.data import DataLoader

    manifest = open_remote(server.url, tmp_path, block_bytes=BLOCK)
    stream = ClipStream(manifest, 8, 3, SEED)
    stream.batch(0)
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for found, wanted in zip(islice(loader, 4), ClipStream(real_shards, 8, 3, SEED), strict=False):
        assert (found.q == wanted.q).all()


def test_processes_that_open_a_dataset_at_once_all_get_it(in_memory, tmp_path):
    n_ranks = 8
    for attempt in range(3):
        together = threading.Barrier(n_ranks)

        def rank(number, cache=tmp_path / str(attempt), together=together):
            together.wait()
            return open_remote(in_memory[0], cache).brain_mask().sum()

        with ThreadPoolExecutor(n_ranks) as pool:
            assert len(set(pool.map(rank, range(n_ranks)))) == 1


def test_a_page_in_place_of_the_manifest_does_not_spoil_the_cache(in_memory, tmp_path, monkeypatch):
    url, system = in_memory
    wanted = open_remote(url, tmp_path).content_hash
    system.pipe_file(f"{url.removeprefix('memory:/')}/manifest.json", b"<html>Log in to this network.</html>")
    with pytest.raises(ShardError, match="not a valid manifest"):
        open_remote(url, tmp_path)
    monkeypatch.setattr(remote.RemoteShards, "_filesystem", lambda self: 1 / 0)
    assert open_remote(url, tmp_path).content_hash == wanted


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_while_a_block_is_fetched_does_not_keep_its_lock(tmp_path):
    cache = BlockCache(tmp_path, 8 * BLOCK, BLOCK)
    waits, goes_on = os.pipe()
    with cache.locked("stripe-1"):
        child = os.fork()
        if child == 0:
            os.read(waits, 1)
            os._exit(0)
    try:
        with (tmp_path / "locks" / "stripe-1").open("ab") as file:
            assert fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None, "or it raises BlockingIOError"
    finally:
        os.write(goes_on, b".")
        os.waitpid(child, 0)
        os.close(waits)
        os.close(goes_on)
