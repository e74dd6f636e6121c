"""Damaged shards: found, named and counted, raised or skipped, and the same at any number of ranks; never returned."""

import errno
import os
import resource
import shutil
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice

import pytest
import torch

from boldforge.data_shards import ClipStream, Segment, ShardError, ShardReader, load_manifest
from boldforge.data_shards.reader import OpenFilesError

SEED = 7


def damaged(manifest, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(manifest.folder, folder)
    shard = folder / manifest.shards[0].file
    shard.write_bytes(damage(bytearray(shard.read_bytes())))
    return load_manifest(folder)


def flip_at(position):
    def flip(data):
        data[position] ^= 1
        return bytes(data)

    return flip


def in_frame(manifest, run, frame):
    return flip_at(manifest.runs[run].offset + frame * manifest.frame_bytes + 4321)


@pytest.mark.parametrize(
    ("which", "what"), [("offset", "frame 0"), ("scale_offset", "scales"), ("hashes_offset", "list of frame hashes")]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_flipped_bit_is_named_and_never_returned(real_shards, tmp_path, which, what, num_workers):
    manifest = damaged(real_shards, tmp_path, flip_at(getattr(real_shards.runs[1], which) + 123))
    good, bad = [Segment(0, 0, 64)], [Segment(1, 0, 8)]
    assert next(iter(ClipStream(manifest, 8, 1, SEED, good))).step == 0
    words = rf"shard-000000.tar: run {manifest.runs[1].key} does not match its checksum \(its {what}\)"
    with pytest.raises(ShardError, match=words):
        next(iter(ClipStream(manifest, 8, 1, SEED, bad, num_workers=num_workers)))


def test_damage_that_appears_after_the_first_read_is_found_too(real_shards, tmp_path):
    manifest = damaged(real_shards, tmp_path, bytes)
    reader = ShardReader(manifest)
    reader.read(1, 3, 2)
    with (manifest.folder / manifest.shards[0].file).open("r+b") as file:
        file.seek(manifest.runs[1].offset + 4 * manifest.frame_bytes)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 128]))
    with pytest.raises(ShardError, match="frame 4"):
        reader.read(1, 3, 2)


def epoch_under_skip(manifest, batch_size, world_size, num_workers):
    """Return {step: [(run, start) or None]} and what was skipped, over all ranks."""
    steps, skipped = {}, set()
    for rank in range(world_size):
        stream = ClipStream(manifest, 8, batch_size, SEED, None, rank, world_size, num_workers, epochs=1, damage="skip")
        for batch in stream:
            places = zip(batch.valid.tolist(), batch.run.tolist(), batch.start.tolist(), strict=True)
            steps.setdefault(batch.step, []).extend((run, start) if valid else None for valid, run, start in places)
            assert not batch.q[~batch.valid].any() and not batch.signal()[~batch.valid].any()
        assert all(count == 1 for count in stream.skipped.values())
        skipped |= {(clip.run, clip.start, clip.reason) for clip in stream.skipped}
    return steps, skipped


def test_skipping_leaves_the_same_places_empty_at_any_number_of_ranks_and_threads(real_shards, tmp_path, caplog):
    manifest = damaged(real_shards, tmp_path, in_frame(real_shards, 1, 30))
    wanted, skipped = epoch_under_skip(manifest, 4, 1, 0)
    assert len(skipped) == 1
    (run, start, reason) = next(iter(skipped))
    assert run == 1 and start <= 30 < start + 8
    assert f"run {manifest.runs[1].key}" in reason and "frame 30" in reason
    assert "skipped a clip" in caplog.text and manifest.runs[1].key in caplog.text
    whole = ClipStream(real_shards, 8, 4, SEED)
    for step, places in wanted.items():
        clips = [tuple(whole.clip(4 * step + slot)[:2]) for slot in range(4)]
        assert [place or clip for place, clip in zip(places, clips, strict=True)][: len(places)] == clips
    for world_size, num_workers in [(1, 2), (2, 0), (3, 1), (4, 2)]:
        assert epoch_under_skip(manifest, 4, world_size, num_workers) == (wanted, skipped)


@pytest.mark.parametrize("lost", ["cut", "missing"])
def test_a_cut_or_missing_shard_is_found_at_open_or_skipped_whole(real_shards, tmp_path, lost):
    manifest = damaged(real_shards, tmp_path, lambda data: bytes(data[:-512]))
    shard = manifest.folder / manifest.shards[0].file
    if lost == "missing":
        shard.unlink()
    words = "is missing" if lost == "missing" else r"has \d+ bytes, expected \d+"
    with pytest.raises(ShardError, match=rf"shard-000000.tar: the shard {words}"):
        ClipStream(manifest, 8, 4, SEED)
    stream = ClipStream(manifest, 8, 4, SEED, damage="skip", epochs=1)
    batches = list(stream)
    assert not torch.cat([batch.valid for batch in batches]).any()
    assert sum(stream.skipped.values()) == stream.clips_per_epoch


def test_resuming_behind_a_skipped_clip_changes_nothing(real_shards, tmp_path):
    manifest = damaged(real_shards, tmp_path, in_frame(real_shards, 0, 20))
    straight = [batch.start.tolist() for batch in islice(ClipStream(manifest, 8, 2, SEED, damage="skip"), 12)]
    assert any(-1 in starts for starts in straight)
    first = ClipStream(manifest, 8, 2, SEED, damage="skip")
    found = [batch.start.tolist() for batch in islice(first, 5)]
    second = ClipStream(manifest, 8, 2, SEED, damage="skip", num_workers=2)
    second.load_state_dict(first.state_dict())
    assert found + [batch.start.tolist() for batch in islice(second, 7)] == straight


def test_a_disk_that_fails_is_damage_like_any_other(real_shards, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    stream = ClipStream(real_shards, 8, 2, SEED, damage="skip")
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fails)
        assert not stream.batch(0).valid.any()
        with pytest.raises(ShardError, match="which the disk does not give: Input/output error"):
            ClipStream(real_shards, 8, 2, SEED).batch(0)
    assert stream.batch(0).valid.all()


@contextmanager
def no_file_left_to_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as opened:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with suppress(OSError):
            while True:
                opened.enter_context(open(os.devnull))
        yield


def test_a_sound_clip_is_not_skipped_where_too_many_files_are_open(real_shards):
    manifest = load_manifest(real_shards.folder)
    stream = ClipStream(manifest, 20, 2, SEED, damage="skip")
    assert len(manifest.runs) == 2  # so that the tables are open
    with no_file_left_to_open(), pytest.raises(OpenFilesError, match="too many files are open already"):
        stream.batch(0)
    assert stream.batch(0).valid.all()


def test_a_reader_closes_its_own_files_before_it_gives_up(real_shards, tmp_path):
    reader = ShardReader(load_manifest(real_shards.folder))
    wanted = reader.read(0, 0, 3).q.copy()
    with no_file_left_to_open():
        os.close(reader._open(real_shards.folder / real_shards.shards[0].file))
    assert (reader.read(0, 0, 3).q == wanted).all()
