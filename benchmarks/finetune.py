"""What a sweep and an adapter cost, and what a sweep survives.

    python benchmarks/finetune.py [--quick] [--part NAME] [--kills N] [--log FILE] [--device cuda] [--json FILE]

Cohorts are noise with a planted difference, encoders are untrained: only time, memory and identity are measured here.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common.figures import Row, line_of, machine, row, write
from finetune_parts import adapters, batched, heads, kills, survival

PARTS = ("cache", "batched", "lora", "kills", "kills_serial")


def cache(scratch: Path, quick: bool, n_kills: int, seed: int) -> list[Row]:
    """Head sweeps over a frozen encoder with its embeddings kept, against trials that compute them themselves.

    Both are whole sweeps with the serial driver: opening, embedding, training, choosing and testing. Without the cache
    every trial embeds its clips once, not once per epoch. ``…_later_sweeps`` finds the embeddings of an earlier one.
    Fewer trials run without the cache, as each takes minutes, so what a sweep does once (opening, training the winner
    anew, the test) is shared by fewer of them, and the speedup comes out higher than at equal numbers.
    """
    found = heads.measure(
        scratch, subjects=16 if quick else 40, clips=1 if quick else 2, trials=(1, 4) if quick else (4, 32)
    )
    rows = [row("head_sweep_cache_speedup", found["with"] / found["without"], "times", 10)]
    rows.append(row("head_sweep_cache_speedup_later_sweeps", found["again"] / found["without"], "times"))
    for name, called in (("with", "cache"), ("again", "cache_filled"), ("without", "no_cache")):
        rows.append(row(f"head_trials_per_hour_{called}", 3600 * found[name], "trials/h"))
    return rows


def batched_ranks(scratch: Path, quick: bool, n_kills: int, seed: int, device: str) -> list[Row]:
    """LoRA ranks and seeds trained as one batched model, against the same trials one after the other.

    Both begin with loading the encoder. Pairs are measured in turns in one process, and the median of their ratios is
    given, by the clock and by processor time; ``…_differ_by`` is how far the validation losses lie apart, relatively.
    """
    sizes = batched.SIZES["quick" if quick and device == "cpu" else device]
    found = batched.measure(scratch, sizes, device, pairs=1 if quick else 3)
    rows, n = [], len(sizes.trials)
    for clock, suffix, goal in (("wall", "", 4 if device == "cuda" else None), ("processor", "_processor_time", None)):
        ratio = median(getattr(alone, clock) / getattr(together, clock) for alone, together in found)
        rows.append(row(f"batched_ranks_speedup{suffix}", ratio, "times", goal))
    for place, name in enumerate(("alone", "batched")):
        rows.append(row(f"trials_per_hour_{name}", 3600 * n / median(pair[place].wall for pair in found), "trials/h"))
    apart = max(abs(a / b - 1) for pair in found for a, b in zip(pair[0].losses, pair[1].losses, strict=True))
    return [*rows, row("batched_ranks_differ_by", apart, "", None, "lower")]


def lora(scratch: Path, quick: bool, n_kills: int, seed: int) -> list[Row]:
    """One training step at the NeuroSTORM size (5 M parameters, 20 frames of the 2 mm grid), on one thread.

    LoRA of rank 4 on all linear layers of the blocks against full fine-tuning, both of the whole encoder. The step is
    the processor time of forward, backward and AdamW; memory is the process's peak beyond what it held with its weights
    loaded. Each is the median over processes, whose kinds take turns. ``…_first_stage_1`` adapts the stages above the
    first, whose tokens a fine-tuning with that setting computes once per clip and not once per step.
    """
    kinds = {"full": ("full", 0), "lora": ("lora", 0), "lora_first_stage_1": ("lora", 1)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    rounds, steps, at_a_time = (1, 1, len(kinds)) if quick else (3, 3, 1)
    with ThreadPoolExecutor(at_a_time) as pool:
        for _ in range(rounds):
            measured = pool.map(lambda kind: adapters.measure(kind[0], steps, kind[1]), kinds.values())
            for name, figures in zip(kinds, measured, strict=True):
                found[name].append(figures)
    middle = {
        name: {key: median(each[key] for each in measured) for key in measured[0]} for name, measured in found.items()
    }
    rows = []
    for key, unit, goal in (("step_seconds", "s", 0.75), ("memory_mb", "MiB", 0.8)):
        for name in ("lora", "lora_first_stage_1"):
            ratio = middle[name][key] / middle["full"][key]
            figure = name.replace("lora", f"lora_{key.split('_')[0]}_ratio", 1)
            rows.append(row(figure, ratio, "of full", goal, "lower"))
        rows += [row(f"{name}_{key}", middle[name][key], unit, None, "lower") for name in kinds]
    return rows


def killed(scratch: Path, quick: bool, n_kills: int, seed: int, log: Path | None = None) -> list[Row]:
    """Sweeps on Ray killed at random moments, and whether they end as one that nobody disturbed.

    Killed are the driver, a worker, Ray's own processes, or all at once. A kill counts as survived if the sweep it fell
    into ended with the same files, had trained the same epochs, and began no more of them again than one per kill and
    trial that can be training at a time.
    """
    return _kill("ray", scratch, kills.KINDS, quick, n_kills, seed, log)


def killed_serially(scratch: Path, quick: bool, n_kills: int, seed: int, log: Path | None = None) -> list[Row]:
    """Measure the same of the driver that trains one trial after the other, without Ray."""
    return _kill("serial", scratch, ("driver",), quick, n_kills, seed, log)


def _kill(
    driver: str, scratch: Path, kinds: tuple[str, ...], quick: bool, n_kills: int, seed: int, log: Path | None
) -> list[Row]:
    survived, redone, counts = survival.count(driver, scratch, kinds, n_kills, seed, log, quick)
    suffix = "" if driver == "ray" else "_serial"
    rows = [row(f"sweep_kills_survived{suffix}", survived, f"of {counts.total()}", counts.total())]
    rows.append(row(f"sweep_epochs_redone{suffix}", redone / counts.total(), "per kill", None, "lower"))
    return rows + [row(f"sweep_kills{suffix}: {kind}", n, "kills") for kind, n in sorted(counts.items())]


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller cohorts, one kill; those under Ray only if named")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--kills", type=int, help="kills per driver; by default 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills, to count in pieces")
    parser.add_argument("--log", type=Path, help="file of the sweeps counted; the same command goes on from it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the part batched")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    n_kills = chosen.kills or (1 if chosen.quick else 50)
    measures = {"cache": cache, "batched": partial(batched_ranks, device=chosen.device), "lora": lora}
    measures |= {"kills": partial(killed, log=chosen.log), "kills_serial": partial(killed_serially, log=chosen.log)}
    # Ray starts three times for a single kill, which alone takes most of a minute.
    parts = chosen.part or [part for part in PARTS if not (chosen.quick and part == "kills")]
    rows: list[Row] = []
    print(machine(chosen.device))
    for part in parts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="boldforge-finetune-", ignore_cleanup_errors=True) as folder:
            found = measures[part](Path(folder), chosen.quick, n_kills, chosen.seed)
        for each in found:
            print(line_of(each), flush=True)
        print(f"  ({part}: {time.perf_counter() - start:.0f} s)", flush=True)
        rows += found
    write(chosen.json, rows, machine(chosen.device))


if __name__ == "__main__":
    main()
