"""What a dataset survives: builds and readers killed at any moment, and bytes, files and headers that are damaged."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from boldforge.data_shards import (
    ClipStream,
    DataRecipe,
    Manifest,
    Run,
    ShardError,
    ShardReader,
    build_shards,
    load_manifest,
    verify_shards,
)
from data_parts.peers import REAL, empty

RECIPE = DataRecipe(grid="mni4mm", tr=2.0, dtype="int8")
_FORK = multiprocessing.get_context("fork")


def short_runs(folder: Path, n_runs: int, n_frames: int) -> list[Run]:
    """Write short pieces of the real runs, one subject each."""
    images = [nib.load(path) for path in sorted(REAL.glob("*_bold.nii.gz"))]
    runs = []
    for number in range(n_runs):
        image = images[number % len(images)]
        start = number // len(images) * n_frames
        piece = nib.Nifti1Image(np.asarray(image.dataobj[..., start : start + n_frames]), image.affine)
        piece.header.set_xyzt_units("mm", "sec")
        piece.header["pixdim"][4] = 2.0
        path = folder / f"sub-{number:02d}_bold.nii"
        nib.save(piece, path)
        runs.append(Run(f"{number:02d}", None, None, 2.0, path))
    return runs


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a dataset, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_after(work: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> bool:
    """Run something in a process, kill it after a while, and return whether it was still running."""
    process = _FORK.Process(target=work, args=arguments)
    process.start()
    process.join(seconds)
    running = process.is_alive()
    if running and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return running


def kill_builds(scratch: Path, n_kills: int, chance: random.Random) -> int:
    """Kill builds at random moments; return how often the next one ended byte-identical to one left alone."""
    runs = short_runs(empty(scratch / "in"), 6, 10)
    start = time.perf_counter()
    build_shards(runs, scratch / "whole", RECIPE)
    duration = time.perf_counter() - start
    wanted = files_of(scratch / "whole")
    survived = kills = 0
    while kills < n_kills:
        out = empty(scratch / "out")
        if not kill_after(_build, (runs, out), chance.uniform(0, duration)):
            continue
        kills += 1
        half_written = (out / "manifest.json").exists() and files_of(out) != wanted
        if not (out / "manifest.json").exists():
            build_shards(runs, out, RECIPE)
        survived += files_of(out) == wanted and not half_written
    return survived


def _build(runs: list[Run], out: Path) -> None:
    build_shards(runs, out, RECIPE)


def kill_readers(manifest: Manifest, scratch: Path, n_kills: int, chance: random.Random) -> int:
    """Kill a job that reads at random moments, each part with other threads and batch size.

    Returns how many kills left a log of samples that is exactly the beginning of the one global order.
    """
    log = empty(scratch / "reading") / "log.json"
    order = ClipStream(manifest, 5, 1, 0)
    survived = kills = 0
    while kills < n_kills:
        batch_size, num_workers = chance.randint(1, 7), chance.randint(0, 3)
        kills += kill_after(_consume, (manifest, log, batch_size, num_workers), chance.uniform(0.02, 0.25))
        done = json.loads(log.read_text())["done"] if log.exists() else []
        survived += done == [list(order.clip(sample)[:2]) for sample in range(len(done))]
    return survived if len(done) > n_kills else 0


def _consume(manifest: Manifest, log: Path, batch_size: int, num_workers: int) -> None:
    """Go on from the log and read for ever; what was read and the stream's state are committed together."""
    stream = ClipStream(manifest, 5, batch_size, 0, num_workers=num_workers)
    done = []
    if log.exists():
        committed = json.loads(log.read_text())
        stream.load_state_dict(committed["state"])
        done = committed["done"]
    for batch in stream:
        done += [list(clip) for clip in zip(batch.run.tolist(), batch.start.tolist(), strict=True)]
        partial = log.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"state": stream.state_dict(), "done": done}))
        partial.replace(log)


def inject_faults(manifest: Manifest, scratch: Path, n_faults: int, chance: random.Random) -> dict[str, int]:
    """Damage a copy of a dataset in one place at a time; return how many faults of each kind were missed.

    A fault is missed if `verify_shards` says nothing of it, or a clip with other values than before is returned.
    """
    folder = scratch / "faults"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(manifest.folder, folder)
    manifest = load_manifest(folder)
    paths = [folder / shard.file for shard in manifest.shards]
    whole = {path: path.read_bytes() for path in paths}
    truth = [ShardReader(manifest).read(number, 0, run.n_frames) for number, run in enumerate(manifest.runs)]
    missed = dict.fromkeys(_FAULTS, 0)
    for number in range(n_faults):
        kind = list(_FAULTS)[number % len(_FAULTS)]
        touched = _FAULTS[kind](paths, whole, chance)
        missed[kind] += not verify_shards(folder) or _returns_other_values(manifest, truth)
        for path in touched:
            path.write_bytes(whole[path])
    return missed


def _returns_other_values(manifest: Manifest, truth: list[Any]) -> bool:
    try:
        reader = ShardReader(manifest, look=False)
    except ShardError:
        return False
    for number, wanted in enumerate(truth):
        try:
            found = reader.read(number, 0, len(wanted.q))
        except ShardError:
            continue
        if any((mine != theirs).any() for mine, theirs in zip(found, wanted, strict=True)):
            return True
    return False


def _flip(path: Path, place: int, bit: int) -> list[Path]:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    return [path]


def _flip_anywhere(paths: list[Path], whole: dict[Path, bytes], chance: random.Random) -> list[Path]:
    path = chance.choice(paths)
    return _flip(path, chance.randrange(len(whole[path])), chance.randrange(8))


def _flip_tar_header(paths: list[Path], whole: dict[Path, bytes], chance: random.Random) -> list[Path]:
    path = chance.choice(paths)
    headers, place = [], whole[path].find(b"ustar")
    while place >= 0:
        headers.append(place - 257)
        place = whole[path].find(b"ustar", place + 1)
    return _flip(path, chance.choice(headers) + chance.randrange(512), chance.randrange(8))


def _cut(paths: list[Path], whole: dict[Path, bytes], chance: random.Random) -> list[Path]:
    path = chance.choice(paths)
    os.truncate(path, chance.randrange(len(whole[path])))
    return [path]


def _remove(paths: list[Path], whole: dict[Path, bytes], chance: random.Random) -> list[Path]:
    path = chance.choice(paths)
    path.unlink()
    return [path]


def _swap(paths: list[Path], whole: dict[Path, bytes], chance: random.Random) -> list[Path]:
    one, two = chance.sample(paths, 2)
    one.write_bytes(whole[two])
    two.write_bytes(whole[one])
    return [one, two]


# More bit flips than others: there are more places for them. Swapped shards may have the same size.
_FAULTS: dict[str, Callable[[list[Path], dict[Path, bytes], random.Random], list[Path]]] = {
    "bit flip": _flip_anywhere,
    "tar header": _flip_tar_header,
    "cut": _cut,
    "missing": _remove,
    "swapped": _swap,
}
