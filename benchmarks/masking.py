"""What hiding anatomy is worth: random, window, region and group masks at the same budget of hidden tokens.

    python benchmarks/masking.py [--quick] [--seeds N] [--part NAME] [--data DIR] [--out DIR] [--json FILE]

real: small encoders are pretrained on real runs, one for each strategy and seed, and rebuild held-out frames under the
masks of every strategy. simulated: they are pretrained without labels on SIMULATED cohorts with a planted regional
difference, frozen, and read by a logistic regression; beside them an untrained encoder and plain baselines.
choice: what the recipe was chosen by, on frames that the other parts do not report; only where it is asked for.

Every cell is kept in a file under --out, so the same command goes on from where it was stopped.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from common.figures import Row, machine, write
from masking_parts import neighbours, probe, reconstruction
from masking_parts.cells import RECIPE, STRATEGIES, Cell, kept, pretrain, remove
from masking_parts.intervals import Estimate, aucs, error_ratios

from boldforge.data_shards import DataRecipe, SimulationConfig, build_shards, find_runs, load_manifest
from boldforge.pretrain import load_pretrained

PARTS = ("real", "simulated")
RATES = (2e-3, 4e-3, 1e-3)
"""Learning rates that `choice` compares."""


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    seeds: int = 3
    steps: int = 240
    subjects: int = 60
    frames: int = 32
    """Of a simulated run, at its site's TR."""
    effect: float = 0.5
    clips: int = 16
    """Per subject, read by the probe."""
    masks: int = reconstruction.MASKS_PER_CLIP
    """Per held-out clip of the real runs."""
    limit: int = 10_000
    """Held-out clips, and training clips that two coefficients are fitted on, at most."""


_SIMULATED = ("steps", "subjects", "frames", "effect", "clips")
QUICK = Size(seeds=1, steps=2, subjects=12, frames=12, clips=1, masks=1, limit=2)


def row(figure: str, estimate: Estimate, unit: str, better: str = "lower") -> Row:
    """Return one line of the table."""
    value, low, high = (float(f"{x:.4g}") for x in estimate)
    return {"figure": figure, "value": value, "interval": [low, high], "unit": unit, "goal": None, "better": better}


def choice(out: Path, size: Size, data: Path) -> list[Row]:
    """Compare learning rates, every strategy on its own masks, on frames that `real` does not report."""
    shards, about = _real_shards(out, size, data)
    about["recipe"] = {key: value for key, value in RECIPE.items() if key != "optimizer"}

    def make(rate: float, strategy: str, seed: int, folder: Path) -> Cell:
        run = pretrain(shards, folder, strategy, seed, size.steps, reconstruction.CHOICE, rate)
        held = reconstruction.choice_frames(load_manifest(shards))
        found = reconstruction.reconstruct(shards, run / "export", held, (strategy,), size.masks, size.limit)
        remove(run)
        return found

    rows = []
    for rate in RATES:
        cells = _cells(out, f"choice-{rate:g}", STRATEGIES, [about], partial(make, rate))
        ratios = [error_ratios(cells[name], name) for name in STRATEGIES]
        rows += [
            row(f"choice: rate {rate:g}, {name}", ratio, "") for name, ratio in zip(STRATEGIES, ratios, strict=True)
        ]
        values = [ratio[0] for ratio in ratios]
        rows.append(row(f"choice: rate {rate:g}, mean", (mean(values), min(values), max(values)), "lowest and highest"))
    return rows


def _real_shards(out: Path, size: Size, data: Path) -> tuple[Path, Cell]:
    """Shard the real runs unless that has been done; return the folder, and what a cell on them depends on."""
    shards = out / "shards-real"
    if not (shards / "manifest.json").is_file():
        build_shards(find_runs(data).runs, shards, DataRecipe(grid="mni4mm", tr=2.0))
    measured = {"steps": size.steps, "masks": size.masks, "limit": size.limit}
    return shards, {"recipe": RECIPE, **measured, "manifest": load_manifest(shards).content_hash}


def real(out: Path, size: Size, data: Path) -> list[Row]:
    """Pretrain on real runs and rebuild their held-out frames, [trained with × tested with]."""
    shards, about = _real_shards(out, size, data)

    def make(strategy: str, seed: int, folder: Path) -> Cell:
        run = pretrain(shards, folder, strategy, seed, size.steps, reconstruction.HOLDOUT)
        held = reconstruction.held_frames(load_manifest(shards))
        found = reconstruction.reconstruct(shards, run / "export", held, STRATEGIES, size.masks, size.limit)
        remove(run)
        return found

    cells = _cells(out, "real", STRATEGIES, [about] * size.seeds, make)
    plain = kept(
        out / "cells" / "real-neighbours-0.json", about, partial(neighbours.foretell, shards, size.masks, size.limit)
    )
    plain["baseline"] = cells["random"][0]["baseline"]
    rows = []
    for tested in STRATEGIES:
        rows.append(
            row(f"error: two coefficients, tested {tested}", error_ratios([plain], tested), "of the mean frame's")
        )
    for trained in STRATEGIES:
        for tested in STRATEGIES:
            figure = f"error: trained {trained}, tested {tested}"
            rows.append(row(figure, error_ratios(cells[trained], tested), "of the mean frame's"))
            beside = error_ratios(cells[trained], tested, [plain] * size.seeds)
            rows.append(row(f"difference: trained {trained} − two coefficients, tested {tested}", beside, "of it"))
        if trained != "random":
            for tested in STRATEGIES:
                difference = error_ratios(cells[trained], tested, cells["random"])
                rows.append(row(f"difference: trained {trained} − random, tested {tested}", difference, "of it"))
    return rows


def simulated(out: Path, size: Size, data: Path) -> list[Row]:
    """Pretrain on SIMULATED cohorts without labels and probe the frozen encoder; `data` is not used."""
    about = {"recipe": RECIPE, "pools": probe.POOLS}
    about |= {key: value for key, value in asdict(size).items() if key in _SIMULATED}
    shards: list[Path] = []

    def cohorts() -> Iterator[Cell]:
        for seed in range(size.seeds):
            settings = SimulationConfig(n_subjects=size.subjects, n_frames=size.frames, effect=size.effect, seed=seed)
            shards.append(probe.make_cohort(out / f"SIMULATED-{seed}", settings))
            yield {**about, "manifest": load_manifest(shards[seed]).content_hash}

    def make(strategy: str, seed: int, folder: Path) -> Cell:
        if strategy == "untrained":
            return probe.probe(shards[seed], probe.untrained(shards[seed], seed), size.clips)
        if strategy == "baselines":
            return probe.baselines(shards[seed])
        run = pretrain(shards[seed], folder, strategy, seed, size.steps, probe.HOLDOUT)
        found = probe.probe(shards[seed], load_pretrained(run / "export"), size.clips)
        summary = json.loads((run / "summary.json").read_text())
        remove(run)
        return {**found, "ratio": summary["heldout_error"] / summary["heldout_baseline"]}

    cells = _cells(out, "simulated", ("baselines", "untrained", *STRATEGIES), cohorts(), make)
    rows = []
    for name in STRATEGIES:
        # Whether pretraining learned anything at all: own masks, subjects held out of pretraining.
        learned = [cell["ratio"] for cell in cells[name]]
        estimate = (mean(learned), min(learned), max(learned))
        rows.append(row(f"SIMULATED error: {name}", estimate, "lowest and highest seed"))
    rows += [row(f"SIMULATED AUC: {name}", aucs(cells["baselines"], name), "AUC", "higher") for name in probe.BASELINES]
    for pool in probe.POOLS:
        for name in ("untrained", *STRATEGIES):
            rows.append(row(f"SIMULATED AUC: {name}, {pool}", aucs(cells[name], pool), "AUC", "higher"))
        for name in STRATEGIES:
            difference = aucs(cells[name], pool, cells["untrained"])
            rows.append(row(f"SIMULATED difference: {name} − untrained, {pool}", difference, "AUC", "higher"))
        for name in STRATEGIES[1:]:
            difference = aucs(cells[name], pool, cells["random"])
            rows.append(row(f"SIMULATED difference: {name} − random, {pool}", difference, "AUC", "higher"))
    return rows


def _cells(
    out: Path, part: str, names: Sequence[str], abouts: Iterable[Cell], make: Callable[[str, int, Path], Cell]
) -> dict[str, list[Cell]]:
    """Make or read every cell, seed after seed, so that what there is can be compared early."""
    (out / "cells").mkdir(parents=True, exist_ok=True)
    cells: dict[str, list[Cell]] = {name: [] for name in names}
    for seed, about in enumerate(abouts):
        for name in names:
            cell = f"{part}-{name}-{seed}"
            work = partial(make, name, seed, out / "runs" / cell)
            cells[name].append(kept(out / "cells" / f"{cell}.json", about, work))
    return cells


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, to see that it runs; the figures mean nothing"
    )
    parser.add_argument("--seeds", type=int, help="fewer or more than 3 of each cell")
    parser.add_argument("--part", choices=("choice", *PARTS), action="append", help="only this part; may be repeated")
    parser.add_argument("--data", type=Path, default=Path("tests/data"), help="folder of real runs in MNI space")
    parser.add_argument("--out", type=Path, help="folder of the cells; default runs/masking")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # or training takes every core, which costs these small networks time
    torch.set_num_threads(1)
    size = QUICK if chosen.quick else Size()
    if chosen.seeds:
        size = replace(size, seeds=chosen.seeds)
    out = chosen.out or Path("runs/masking-quick" if chosen.quick else "runs/masking")
    print(machine())
    rows: list[Row] = []
    for part in chosen.part or PARTS:
        found = {"choice": choice, "real": real, "simulated": simulated}[part](out, size, chosen.data)
        for each in found:
            low, high = each["interval"]  # type: ignore[misc]
            print(f"{each['figure']:<62}{each['value']:>8.3f}  [{low:.3f}, {high:.3f}] {each['unit']}", flush=True)
        rows += found
    write(chosen.json, rows, machine())


if __name__ == "__main__":
    main()
