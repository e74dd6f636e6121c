"""The figures of data_shards: size, precision, reading and ingest against peers, and what a dataset survives.

    python benchmarks/data.py [--quick] [--part storage|opening|reads|ingest|survival] [--json FILE]

The data are the two real runs of tests/data on the 96³ grid, played forwards and backwards until they are long enough.
"""

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common.figures import Row, line_of, machine, row, write
from data_parts import opening, peers, survival, timing
from ingest import measure, write_long_run

from boldforge.data_shards import append_shards, brain_mask, build_shards, get_grid

CUBE_BYTES = 96**3
PARTS = ("storage", "opening", "reads", "ingest", "survival")


def storage(scratch: Path, quick: bool) -> list[Row]:
    """Bytes per frame of whole tars against int8 cubes, and temporal SNR against one scale per subject."""
    rows = []
    runs = peers.write_long_runs(scratch, 60 if quick else 286)
    for dtype, goal in (("int8", 0.28), ("int16", 0.55)):
        manifest = peers.build(runs, scratch / dtype, dtype)
        # Scales and means are stored once per run: in a short run they weigh more than in one of 286 frames.
        n_bytes = sum(shard.n_bytes for shard in manifest.shards)
        per_run = sum(8 * manifest.n_voxels * (1 - run.n_frames / 286) for run in manifest.runs)
        ratio = (n_bytes - per_run) / (manifest.n_frames * CUBE_BYTES)
        rows.append(row(f"bytes_ratio_{dtype}", ratio, "of int8 cubes", goal, "lower"))
        rows.append(
            row(f"tsnr_db_{dtype}", min(run.tsnr_db for run in manifest.runs), "dB", {"int8": 44, "int16": 80}[dtype])
        )
    whole = peers.build(runs, scratch / "global-z", "int16", "global-z")
    rows.append(row("tsnr_db_int8_one_scale_per_subject", max(peers.one_scale_per_subject(whole)), "dB"))
    return rows


def opened(scratch: Path, quick: bool) -> list[Row]:
    """Milliseconds to open 28.65 million frames and resume far into them."""
    runs = survival.short_runs(peers.empty(scratch / "in"), 1, 4)
    like = build_shards(runs, scratch / "like", survival.RECIPE).manifest
    opening.write_huge(like, peers.empty(scratch / "huge"))
    found = opening.measure_opening(scratch / "huge", 3 if quick else 9)
    return [
        row("opening_frames", found["frames"], "frames"),
        row("opening_ms", found["milliseconds"], "ms", 100, "lower"),
        row("opening_processor_ms", found["processor_milliseconds"], "ms"),
        row("stream_state_bytes", found["bytes"], "bytes", 200, "lower"),
    ]


def reads(scratch: Path, quick: bool) -> list[Row]:
    """Clips of 20 frames per second, warm, checksums on, on one and two processes.

    Ours come with their run's scales by reference, as the peer's with the file's one scale; ``…_with_scales`` also
    copies them into a tensor of the batch's own, as `ClipBatch.dequantise` does when it is called.
    """
    manifest = peers.build(peers.write_long_runs(scratch, 60 if quick else 286), scratch / "ours", "int8")
    ours = partial(peers.read_ours, manifest)
    with_scales = partial(peers.read_ours, manifest, copy_scales=True)
    memcpy = timing.memcpy_bytes_per_second()
    rows = []
    for figure, peer, goal, n_peer in (
        ("read_vs_dense_pt", peers.DensePt, 5, 30),
        ("read_vs_webdataset_npy", peers.WebDatasetNpy, 50, 10),
        ("read_vs_nifti", peers.NiftiSlices, 100, 2),
    ):
        files = peer(peers.empty(scratch / figure))
        files.write(manifest)
        for workers in (1, 2):
            many = 1 if quick or n_peer == 2 else 5
            found = timing.compare(ours, partial(files.read, manifest), 100, n_peer, workers, many)
            name = figure if workers == 1 else f"{figure}_2_workers"
            rows.append(row(name, found["ratio"], "ratio", goal))
            rows.append(row(f"{name}_peer", found["peer"], "clips/s"))
            if n_peer == 30:
                share = found["bytes_per_second"] / memcpy
                rows.append(row(name.replace("read_vs_dense_pt", "read_clips_per_second"), found["ours"], "clips/s"))
                rows.append(row(name.replace("read_vs_dense_pt", "read_bandwidth_share"), share, "of memcpy"))
                copied = timing.compare(with_scales, partial(files.read, manifest), 100, n_peer, workers, many)
                rows.append(row(name.replace("dense_pt", "dense_pt_with_scales"), copied["ratio"], "ratio"))
    rows.append(row("memcpy", memcpy / 1e9, "GB/s"))
    return rows


def ingest(scratch: Path, quick: bool) -> list[Row]:
    """NIfTI to shards against a whole-array load, interpolation and save, on the same gzipped files.

    ``ingest_vs_peer`` is of FSL's 2 mm grid, whose voxel centres are ours, so that we copy where the peer interpolates;
    ``…_interpolated`` is of the same files moved by a third of a voxel, where both interpolate. The peer stores every
    voxel of the cube, keeps no statistics and hashes nothing. What a process does once is done before: imports, and
    the brain mask (over a second).
    """
    n_frames = 40 if quick else 150
    recipe = peers.DataRecipe(grid="mni2mm", tr=2.0, dtype="int8")
    brain_mask(get_grid(recipe.grid))
    rows = []
    for suffix, shift in (("", 0.0), ("_interpolated", 0.7)):
        paths = [
            write_long_run(scratch / f"{i}{suffix}_bold.nii.gz", n_frames, tr=2.0, seed=i, shift=shift)
            for i in range(2)
        ]
        runs = [peers.Run(str(i), None, None, 2.0, path) for i, path in enumerate(paths)]
        for workers in (1, 2):
            ratios, rates = [], []
            for _ in range(1 if quick else 3):
                used = list(range(workers))
                mine = timing.seconds_in_processes(
                    build_shards, [([runs[i]], peers.empty(scratch / f"built{i}"), recipe) for i in used]
                )
                plain = [(paths[i], scratch / f"{i}.pt") for i in used]
                theirs = timing.seconds_in_processes(peers.ingest_plainly, plain)
                ratios.append(theirs / mine)
                rates.append(workers * n_frames / mine)
            name = f"ingest_vs_peer{suffix}" + ("" if workers == 1 else "_2_workers")
            rows.append(row(name, median(ratios), "ratio", 3))
            rows.append(row(f"{name}_ours", median(rates), "frames/s"))
        for path in paths:
            path.unlink()
    path = write_long_run(scratch / "long_bold.nii.gz", 100 if quick else 1200)
    rows.append(row("ingest_peak_memory_mb", measure(path)["peak_mb"], "MiB", 2000, "lower"))
    return rows


def survived(scratch: Path, quick: bool) -> list[Row]:
    """Kills of builds and of reading jobs, and injected faults."""
    chance = random.Random(0)
    n_kills, n_faults = (5, 250) if quick else (50, 10_000)
    runs = survival.short_runs(peers.empty(scratch / "in"), 6, 10)
    build_shards(runs[:2], scratch / "small", survival.RECIPE)
    for more in (runs[2:4], runs[4:]):
        manifest = append_shards(more, scratch / "small").manifest
    kills = survival.kill_builds(scratch / "builds", n_kills, chance)
    kills += survival.kill_readers(manifest, scratch, n_kills, chance)
    missed = survival.inject_faults(manifest, scratch, n_faults, chance)
    rows = [
        row("kills_survived", kills, f"of {2 * n_kills}", 2 * n_kills),
        row("faults_missed", sum(missed.values()), f"of {n_faults}", 0, "lower"),
    ]
    return rows + [
        row(f"faults_missed: {kind}", n, f"of {n_faults // len(missed)}", 0, "lower") for kind, n in missed.items()
    ]


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter runs and fewer faults (under 90 seconds)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    measures = {"storage": storage, "opening": opened, "reads": reads, "ingest": ingest, "survival": survived}
    rows: list[Row] = []
    print(machine())
    for part in chosen.part or PARTS:
        with tempfile.TemporaryDirectory(prefix="boldforge-data-") as folder:
            found = measures[part](Path(folder), chosen.quick)
        for each in found:
            print(line_of(each), flush=True)
        rows += found
    write(chosen.json, rows, machine())


if __name__ == "__main__":
    main()
