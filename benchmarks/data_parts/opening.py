"""Opening a dataset of 28.65 million frames: its tables are real, its shards are holes of their size."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from boldforge.data_shards import ClipStream, Holdout, Manifest, SplitPlan, load_manifest, split_segments
from boldforge.data_shards.manifest import MANIFEST_FILE
from boldforge.data_shards.tables import RunEntry, ShardEntry, write_tables

RUNS, FRAMES, PER_SHARD = 100_200, 286, 64
STEP = 123_456_789


def write_huge(like: Manifest, folder: Path) -> None:
    """Write a dataset of 100,200 runs whose entries are those of `like`, with other names, lengths and places."""
    first, frame = like.runs[0], like.frame_bytes
    runs = []
    for number in range(RUNS):
        key, place = f"sub-{number // 2:06d}_run-{number % 2}", number % PER_SHARD * (FRAMES * frame + 2**20)
        change = {
            **{"key": key, "subject": key[:10], "shard": number // PER_SHARD},
            "n_frames": FRAMES - number % 2 * 40 + number // 2 % 2 * 40,
            **{"offset": place, "scale_offset": place + 2**19, "hashes_offset": place + 2**18},
        }
        runs.append(RunEntry.model_construct(**{**first.__dict__, **change}))
    size = PER_SHARD * (FRAMES * frame + 2**20)
    shards = [
        ShardEntry(file=f"shard-{number:06d}.tar", n_bytes=size, sha256="0" * 64)
        for number in range(-(-RUNS // PER_SHARD))
    ]
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.truncate(size)
    content = {name: getattr(like, name) for name in Manifest.model_fields}
    content |= {"tables": write_tables(folder, runs, shards), "n_runs": RUNS, "splits": SplitPlan(), "content_hash": ""}
    manifest = Manifest(**{**content, "n_frames": sum(run.n_frames for run in runs)})
    manifest = manifest.model_copy(update={"content_hash": manifest.computed_hash()})
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())


def resume(folder: Path, state: dict[str, Any] | None = None) -> ClipStream:
    """Open the dataset as the fourth of eight ranks, go to a state and ask for its first clip."""
    manifest = load_manifest(folder)
    train, _ = split_segments(manifest, Holdout(by="split"))
    stream = ClipStream(manifest, 20, 64, 1, train, rank=3, world_size=8)
    if state is not None:
        stream.load_state_dict(state)
    stream.clip(stream.state_dict()["sample"])
    return stream


def measure_opening(folder: Path, rounds: int = 9) -> dict[str, float]:
    """Return frames, median milliseconds (clock and processor) to open and resume, and the state's bytes."""
    stream = resume(folder)
    state = {**stream.state_dict(), "step": STEP, "sample": 64 * STEP}
    clock, processor = [], []
    for _ in range(rounds):
        start, used = time.perf_counter(), time.process_time()
        resume(folder, state)
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {
        "frames": stream.manifest.n_frames,
        "milliseconds": 1000 * median(clock),
        "processor_milliseconds": 1000 * median(processor),
        "bytes": len(json.dumps(state)),
    }
