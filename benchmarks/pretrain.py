"""A whole training step beside NeuroSTORM in plain PyTorch: python benchmarks/pretrain.py [--quick] [--json FILE].

Forward, backward and AdamW of the masked autoencoder at NeuroSTORM's size (96³ voxels of 2 mm, 5,173,020 parameters in
the encoder, 7,712,964 in all), one clip of one brain, float32. Clips are in memory, and DeepSpeed has no part. Each
side runs in a process of its own: the time is the shortest step's processor time on one thread (a GPU: the clock on the
wall), the memory is the process's peak over what it had before the network was made, optimiser included.

- same numbers: configs/pretrain/neurostorm.yaml as it is, which computes what the peer computes;
- brain tokens: the same widths and depths on the tokens of the brain alone, restarting at the windows' seams;
- visible tokens: besides, the encoder computes only the half of the tokens that is not hidden; this is BoldForge's own
  way, and what the first figure is of;
- loop: the peer. Dense tokens, pad, roll, partition, the scan token after token over all windows at once, reverse;
- loop in parts, parallel in parts: the same with the scan's states computed again in the backward, as mamba-ssm's
  kernel does, and by a parallel scan; mamba-ssm: its CUDA kernel, where it imports.

All have half of the 4×4×4×4 token windows hidden. The fastest of the peers counts. Operations are counted by the
formula of boldforge.pretrain.flops for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from common import figures as common

from boldforge.kernels import available_backends

STEP = Path(__file__).parent / "pretrain_parts/step.py"
OURS, BRAIN, EXACT = "visible tokens", "brain tokens", "same numbers"
PEERS = ("loop", "loop in parts", "parallel in parts")

Measured = dict[str, object]


def measure(side: str, frames: int, steps: int, device: str) -> Measured | None:
    """Run one side in its own process; None where it does not fit into memory."""
    job = json.dumps({"side": side, "frames": frames, "steps": steps, "device": device})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(STEP), job], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode in (-9, 137) or "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(f"{side}, {frames} frames: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def plan(quick: bool, device: str) -> list[tuple[str, int, int]]:
    """Return what is measured: side, frames, steps. The first number of frames has every side (quick: but one)."""
    frames, steps = ((4, 8), 1) if quick else ((20, 40, 80), 2)
    peers = list(PEERS[:1] if quick and device == "cpu" else PEERS)
    if device == "cuda" and not available_backends()["mamba_ssm"]:
        peers.append("mamba-ssm")
    # Combining the states of 20 frames in log2 M rounds takes minutes on the CPU: there 4 frames show how slow it is.
    apart = {"parallel in parts"} if device == "cpu" else set()
    ours = (EXACT, OURS) if quick else (EXACT, BRAIN, OURS)
    jobs = [(side, frames[0], steps) for side in (*ours, *peers) if side not in apart]
    jobs += [(side, 4, 1) for side in ("loop", *apart) if apart and not quick]
    return jobs + [(OURS, more, steps) for more in frames[1:]]


def line_of(row: Measured) -> str:
    """Return a row of the table as text."""
    frames, tokens = int(str(row["frames"])), row["tokens"]
    assert isinstance(tokens, list)
    per_frame = (float(str(row[name])) / frames / 1e9 for name in ("matmul_flops", "scan_flops"))
    operations = "".join(f"{value:>9.2f}" for value in per_frame)
    return (
        f"{row['side']:<19}{frames:>4}{row['seconds']:>9.2f}{row['frames_per_second']:>10.2f}"
        f"{float(str(row['peak_bytes'])) / 1e6:>10.0f}{sum(tokens) / frames:>10.0f}{operations}{row['parameters']:>12,}"
    )


def figures(rows: list[Measured]) -> list[dict[str, object]]:
    """Return the figures that follow from the table."""
    first = int(str(rows[0]["frames"]))
    at = {str(row["side"]): row for row in rows if row["frames"] == first}
    peers = {side: row for side, row in at.items() if side not in (OURS, BRAIN, EXACT)}
    best = min(peers.values(), key=lambda row: float(str(row["seconds"])))
    ours = at[OURS]

    def ratio(name: str, above: Measured, below: Measured) -> float:
        return _number(above, name) / _number(below, name)

    operations = [_number(row, "matmul_flops") + _number(row, "scan_flops") for row in (best, ours)]
    names = {OURS: "", BRAIN: "_brain_tokens", EXACT: "_same_numbers"}
    sides = [(at[side], name, side == OURS) for side, name in names.items() if side in at]
    found = [
        figure(f"step_vs_neurostorm{name}", ratio("seconds", best, row), "ratio", 6 if own else None, "higher")
        for row, name, own in sides
    ]
    found += [
        figure(f"memory_vs_neurostorm{name}", ratio("peak_bytes", row, best), "ratio", 0.5 if own else None)
        for row, name, own in sides
    ]
    if "loop in parts" in peers:
        found.append(
            figure("memory_vs_neurostorm_recomputing", ratio("peak_bytes", ours, peers["loop in parts"]), "ratio")
        )
    longest = max((row for row in rows if row["side"] == OURS), key=lambda row: int(str(row["frames"])))
    growth = _number(ours, "frames_per_second") / _number(longest, "frames_per_second")
    return [
        *found,
        figure("flops_vs_neurostorm", operations[1] / operations[0], "ratio"),
        figure("tokens_vs_neurostorm", _tokens(ours) / _tokens(best), "ratio"),
        figure("frames_per_second", _number(ours, "frames_per_second"), "frames/s", None, "higher"),
        figure("frames_per_second_neurostorm", _number(best, "frames_per_second"), "frames/s", None, "higher"),
        figure(f"cost_per_frame_{longest['frames']}_over_{first}_frames", growth, "ratio", 1.1),
    ]


def figure(name: str, value: float, unit: str, goal: float | None = None, better: str = "lower") -> dict[str, object]:
    """Return one figure as it goes into the JSON file."""
    return {"figure": name, "value": float(f"{value:.4g}"), "unit": unit, "goal": goal, "better": better}


def _number(row: Measured, name: str) -> float:
    return float(str(row[name]))


def _tokens(row: Measured) -> int:
    tokens = row["tokens"]
    assert isinstance(tokens, list)
    return sum(tokens)


def main() -> None:
    """Measure, print the table and the figures, and write both as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table and the figures to this file")
    parser.add_argument("--quick", action="store_true", help="4 frames instead of 20, one peer, no brain tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; use --device cpu.")
    print(common.machine(chosen.device))
    print(
        f"{'side':<19}{'T':>4}{'s/step':>9}{'frames/s':>10}{'peak MB':>10}{'tok/frame':>10}{'GF prod':>9}"
        f"{'GF scan':>9}{'parameters':>12}"
    )
    rows = []
    for side, frames, steps in plan(chosen.quick, chosen.device):
        row = measure(side, frames, steps, chosen.device)
        print(f"{side:<19}{frames:>4}  does not fit into memory" if row is None else line_of(row), flush=True)
        rows += [] if row is None else [row]
    found = figures(rows)
    print()
    for each in found:
        print(common.line_of(each))
    common.write(chosen.json, found, common.machine(chosen.device), table=rows)


if __name__ == "__main__":
    main()
