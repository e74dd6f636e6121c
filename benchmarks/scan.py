"""How long the shifted scan takes on this machine beside its peers, one row each: python benchmarks/scan.py.

One unit of work is one token of one inner channel, (t,d). The CPU runs one thread and counts processor time, a GPU
counts its own clock. Peers get their sequences laid out in order for nothing, the shifted scan finds its tokens by the
index. The allocator is as it comes: about half of the plain loop's time goes into fresh pages for all its decays.

- plain loop: mamba-ssm's reference formula, all decays and inputs at once, then one step after another (CPU);
- parallel scan: tokens 1, 2, 4, … apart are combined, all at once (CPU);
- mamba-ssm: its compiled CUDA scan, where it imports.

The floor of a pass is what no implementation on this machine goes below: moving its inputs and outputs once, at the
speed of a copy measured here, or its exponentials (one per state), at the speed of torch's exp2 on the CPU and of the
special-function units on a GPU; the larger of the two counts. The instructions of the GPU kernels come from
kernels/resources.json, where the compiler's output was counted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import figures as common
from scan_parts.clock import peak_bytes, seconds
from scan_parts.peers import grid_to_grid, mamba_ssm, parallel_scan, plain_loop
from torch import Tensor

from boldforge.kernels import ScanIndex, available_backends, shifted_conv, shifted_scan, window_index

RESOURCES = Path(__file__).parents[1] / "kernels/resources.json"
STATES = 16
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMIT_S, LARGE = 20.0, 10_000_000
"""On the CPU: a peer that would take more seconds for a run is not run; a shape of more (t,d) is large."""
LONGEST_BACKWARD = 1 << 13
"""Tokens of a sequence whose peers' backward still fits into 16 GB."""


@dataclass(frozen=True)
class Shape:
    """One workload: ``clips`` token grids cut into windows, D inner ``channels``."""

    name: str
    clips: int
    grid: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    channels: int

    @property
    def length(self) -> int:
        """Tokens of a full window."""
        return math.prod(min(g, w) for g, w in zip(self.grid, self.window, strict=True))

    @property
    def units(self) -> int:
        """Tokens times channels."""
        return self.clips * math.prod(self.grid) * self.channels

    def index(self) -> ScanIndex:
        """Return the path of one clip."""
        return window_index(self.grid, self.window, self.shift)

    def in_order(self) -> ScanIndex:
        """Return the path on which the tokens of a window lie next to each other, as the peers have them."""
        tokens = math.prod(self.grid)
        return window_index((tokens,), (self.length,), (0,))


CUBE, HALF = (4, 4, 4, 4), (2, 2, 2, 2)
GATE = Shape("64 windows", 1, (16, 16, 16, 4), CUBE, (0, 0, 0, 0), 72)
SEQUENCES = Shape("2560 sequences of 256", 8, (81920,), (256,), (0,), 128)
STAGE_1 = Shape("stage 1", 8, (16, 16, 16, 20), CUBE, HALF, 72)
SHAPES = (
    GATE,
    STAGE_1,
    Shape("stage 2", 8, (8, 8, 8, 20), CUBE, HALF, 144),
    Shape("stage 3", 8, (4, 4, 4, 20), CUBE, HALF, 288),
    Shape("stage 4", 8, (2, 2, 2, 20), CUBE, HALF, 576),
    SEQUENCES,
    Shape("8 sequences of 2048", 8, (2048,), (2048,), (0,), 1024),
    Shape("1 sequence of 81920", 1, (81920,), (81920,), (0,), 72),
)
QUICK = ("64 windows", "stage 3", "stage 4")


def scan_inputs(shape: Shape, dtype: torch.dtype, device: str, clips: int | None = None) -> dict[str, Tensor]:
    """Return random arguments of the scan; rates, skip and bias are float32 as in the model."""
    generator = torch.Generator().manual_seed(0)
    rows = (clips or shape.clips, math.prod(shape.grid))
    shapes = dict.fromkeys(("u", "dt", "z"), (*rows, shape.channels)) | dict.fromkeys(("B", "C"), (*rows, STATES))
    inputs = {name: torch.randn(size, generator=generator).to(dtype) for name, size in shapes.items()}
    inputs |= {name: torch.randn(shape.channels, generator=generator) for name in ("D", "dt_bias")}
    inputs["A"] = -torch.arange(1.0, STATES + 1).repeat(shape.channels, 1)
    return {name: value.to(device) for name, value in inputs.items()}


@dataclass(frozen=True)
class Floor:
    """What this machine can do at best."""

    bytes_per_s: float
    exponentials_per_s: float

    def at_best(self, other: Floor) -> Floor:
        """Return the better of two measurements: other work on the machine only ever slows one down."""
        return Floor(max(self.bytes_per_s, other.bytes_per_s), max(self.exponentials_per_s, other.exponentials_per_s))

    @staticmethod
    def measure(device: str) -> Floor:
        """Copy 256 MiB, and take exponentials of numbers that stay in the cache."""
        source = torch.zeros(1 << 26, device=device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 1.0)
        if device == "cuda":
            # 16 exponentials per clock and multiprocessor on every generation since Volta.
            card = torch.cuda.get_device_properties(0)
            return Floor(copied, 16.0 * card.multi_processor_count * card.clock_rate * 1e3)
        some = torch.rand(1 << 14)
        target = torch.empty_like(some)
        spent = seconds(lambda: [torch.exp2(some, out=target) for _ in range(100)], device, 0.5)
        return Floor(copied, 100 * some.numel() / spent)

    def of(self, kind: str, shape: Shape, dtype: torch.dtype) -> float:
        """Return the floor of one pass in seconds."""
        size = dtype.itemsize
        rows = {"forward": 4, "backward": 7, "conv forward": 2, "conv backward": 3}[kind]
        weights = {"forward": 2, "backward": 4}.get(kind, 0) * STATES / shape.channels
        exponentials = {"forward": STATES, "backward": STATES}.get(kind, 1)
        return shape.units * max((rows + weights) * size / self.bytes_per_s, exponentials / self.exponentials_per_s)


# Peers.


# States [Q, M, D, N] at once: what is fastest for each on the CPU (the loop wants long steps, the scan a warm cache).
PEERS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "plain loop": (plain_loop, 1 << 24),
    "parallel scan": (parallel_scan, 1 << 19),
}


def peers_here(device: str) -> dict[str, tuple[Callable[..., Tensor], int]]:
    """Return the peers that run on this device, each with how many states it takes at a time."""
    if device == "cpu":
        return PEERS
    return {} if available_backends()["mamba_ssm"] else {"mamba-ssm": (mamba_ssm, 1 << 62)}


def sequences(
    shape: Shape, inputs: dict[str, Tensor], at_once: int, channels_first: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield the arguments of as many sequences as a peer takes at a time; every sequence has the full length."""
    many = max(1, at_once // (shape.length * shape.channels * STATES))
    rows = {name: value.view(-1, shape.length, value.shape[-1]) for name, value in inputs.items() if value.ndim == 3}
    rows = {name: value.mT.contiguous() if channels_first else value for name, value in rows.items()}
    for first in range(0, len(rows["u"]), many):
        yield inputs | {name: value[first : first + many] for name, value in rows.items()}


def with_backward(function: Callable[..., Tensor], parts: list[dict[str, Tensor]]) -> list[tuple[Tensor, ...]]:
    """Run forward and backward part by part, so that only one part's graph exists at a time."""
    found = []
    for part in parts:
        leaves = {name: value.detach().requires_grad_() for name, value in part.items()}
        y = function(**leaves)
        found.append(torch.autograd.grad(y, tuple(leaves.values()), torch.ones_like(y)))
    return found


# Rows of the table.


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of the exact values."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def errors(shape: Shape, inputs: dict[str, Tensor], backends: list[str]) -> dict[tuple[str, str], float]:
    """Return, by backend and pass, the norm-relative error of one clip against float64; of the worst gradient."""
    index, names = shape.index(), list(inputs)
    exact, found = {}, {}
    for backend in ("", *backends):
        kind = None if backend else torch.float64
        leaves = [inputs[name].detach().to(kind, copy=True).requires_grad_() for name in names]
        y = shifted_scan(**dict(zip(names, leaves, strict=True)), index=index, backend=backend or "torch")
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        if not backend:
            exact = {"y": y.detach(), "gradients": gradients}
            continue
        found[backend, "forward"] = relative_error(y.detach(), exact["y"])
        found[backend, "backward"] = max(map(relative_error, gradients, exact["gradients"]))
    return found


def our_rows(shape: Shape, kind: str, device: str, floor: Floor, budget: float) -> Iterator[dict[str, object]]:
    """Yield the rows of every backend of ours that runs on this device."""
    dtype = TYPES[kind]
    usable = [name for name in ("triton" if device == "cuda" else "cpu", "torch") if not available_backends()[name]]
    wrong = errors(shape, scan_inputs(shape, dtype, device, clips=1), usable)
    inputs, index = scan_inputs(shape, dtype, device), shape.index()
    generator = torch.Generator().manual_seed(1)
    taps, bias = (
        torch.randn(size, generator=generator).to(device) for size in ((shape.channels, 4), (shape.channels,))
    )
    for backend in usable:
        # The torch backend computes in float32 whatever it is given; on large shapes one type is enough.
        if backend == "torch" and device == "cpu" and kind != "fp32" and shape.units > LARGE:
            for name in ("forward", "backward", "conv forward", "conv backward"):
                yield {"shape": shape.name, "type": kind, "pass": name, "backend": backend, "ns_per_td": None}
            continue
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        x, w, b = (value.detach().requires_grad_() for value in (inputs["u"], taps, bias))
        y = shifted_scan(**leaves, index=index, backend=backend)
        conv = shifted_conv(x, w, b, index, backend=backend)
        dout = torch.ones_like(y)
        passes: dict[str, Callable[[], object]] = {
            "forward": partial(shifted_scan, **inputs, index=index, backend=backend),
            "backward": partial(torch.autograd.grad, y, tuple(leaves.values()), dout, retain_graph=True),
            "conv forward": partial(shifted_conv, inputs["u"], taps, bias, index, backend=backend),
            "conv backward": partial(torch.autograd.grad, conv, (x, w, b), dout, retain_graph=True),
        }
        for name, work in passes.items():
            row = {"shape": shape.name, "type": kind, "pass": name, "backend": backend}
            spent = seconds(work, device, budget)
            # The profiler of the CPU notes every allocation: a loop over 81,920 steps has too many.
            memory = (
                None if backend == "torch" and shape.length > 4096 and device == "cpu" else peak_bytes(work, device)
            )
            least = floor.of(name, shape, dtype)
            yield row | {
                "ns_per_td": spent / shape.units * 1e9,
                "share_of_floor": least / spent,
                "peak_bytes": memory,
                "error": wrong.get((backend, name)),
            }


def peer_rows(shape: Shape, kind: str, device: str, floor: Floor, budget: float) -> Iterator[dict[str, object]]:
    """Yield the rows of every peer; its backward is what both passes take less the forward."""
    inputs = scan_inputs(shape, TYPES[kind], device)
    for peer, (function, at_once) in peers_here(device).items():
        forward = 0.0
        for name, work in (("forward", _forward_only), ("backward", with_backward)):
            row = {"shape": shape.name, "type": kind, "pass": name, "backend": peer}
            missing = row | dict.fromkeys(("ns_per_td", "share_of_floor", "peak_bytes", "error"))
            # On the CPU the peers compute in float32 whatever they are given: one type is enough. Their backward keeps
            # every state there ever was: none where the forward took too long, or where those would not fit.
            too_large = name == "backward" and (forward == 0.0 or shape.length > LONGEST_BACKWARD)
            if device == "cpu" and (kind != "fp32" or too_large):
                yield missing
                continue
            parts = list(sequences(shape, inputs, at_once, channels_first=peer == "mamba-ssm"))
            if device == "cpu":
                began = time.process_time()
                work(function, parts[:1])
                if (time.process_time() - began) * len(parts) > LIMIT_S:
                    yield missing
                    continue
            spent = seconds(partial(work, function, parts), device, budget) - forward
            forward = forward or spent
            yield row | {
                "ns_per_td": spent / shape.units * 1e9,
                "share_of_floor": floor.of(name, shape, TYPES[kind]) / spent,
                "peak_bytes": peak_bytes(partial(work, function, parts[:1]), device),
                "error": _peer_error(shape, function, parts[0]) if name == "forward" else None,
            }


@torch.no_grad()
def _forward_only(function: Callable[..., Tensor], parts: list[dict[str, Tensor]]) -> list[Tensor]:
    return [function(**part) for part in parts]


def _peer_error(shape: Shape, function: Callable[..., Tensor], part: dict[str, Tensor]) -> float:
    """Return the error of a peer on its first sequences, against the torch backend in float64."""
    y = function(**part)
    if function is mamba_ssm:
        y = y.mT
        part = {name: value.mT if value.ndim == 3 else value for name, value in part.items()}
    exact = {name: value.double().contiguous() for name, value in part.items()}
    index = window_index((shape.length,), (shape.length,), (0,))
    return relative_error(y, shifted_scan(**exact, index=index, backend="torch"))


def with_ratios(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Add to every row of ours how many times longer each peer took for the same."""
    times = {(row["shape"], row["type"], row["pass"], row["backend"]): row["ns_per_td"] for row in rows}
    peers = sorted({str(row["backend"]) for row in rows} - {"cpu", "triton", "torch"})
    for row in rows:
        if row["backend"] in peers or str(row["pass"]).startswith("conv"):
            continue
        for peer in peers:
            theirs, ours = times.get((row["shape"], row["type"], row["pass"], peer)), row["ns_per_td"]
            row[f"times_{peer}"] = None if theirs is None or ours is None else theirs / ours  # type: ignore[operator]
    return rows


# Figures.


def thread_gain(shape: Shape, runs: int = 10) -> float:
    """Return how many times faster two threads run the forward pass than one, by the clock on the wall."""
    inputs, index, best = scan_inputs(shape, torch.float32, "cpu"), shape.index(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            shifted_scan(**inputs, index=index)
            times.append(time.perf_counter() - began)
        best.append(min(times))
    torch.set_num_threads(1)
    return best[0] / best[1]


def figure(name: str, value: object, unit: str, goal: float | None = None, better: str = "lower") -> dict[str, object]:
    """Return one figure as it goes into the JSON file."""
    assert isinstance(value, float | int), name
    return {"figure": name, "value": round(value, 2), "unit": unit, "goal": goal, "better": better}


def row_of(rows: list[dict[str, object]], shape: Shape, kind: str, pass_: str, *backends: str) -> dict[str, object]:
    """Return the row of the first of these backends that there is one of."""
    found = {
        row["backend"]: row for row in rows if (row["shape"], row["type"], row["pass"]) == (shape.name, kind, pass_)
    }
    return next(found[backend] for backend in backends if backend in found)


def cpu_figures(rows: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Yield the figures of 64 windows in float32 on one thread."""
    forward, backward = (row_of(rows, GATE, "fp32", name, "cpu", "torch") for name in ("forward", "backward"))
    yield figure("cpu_forward_ns", forward["ns_per_td"], "ns per (t,d)", 7)
    yield figure("cpu_backward_over_forward", _sum([backward]) / _sum([forward]), "ratio", 4)
    yield figure("cpu_vs_plain_loop", forward["times_plain loop"], "ratio", 12, "higher")
    yield figure("cpu_vs_parallel_scan", forward["times_parallel scan"], "ratio", None, "higher")
    yield figure("cpu_two_threads_over_one", thread_gain(GATE), "ratio", 1.7, "higher")


def gpu_figures(rows: list[dict[str, object]], budget: float) -> Iterator[dict[str, object]]:
    """Yield the figures of bf16: 256-token sequences at a width of 128, and the first stage from grid to grid."""
    ours = [row_of(rows, SEQUENCES, "bf16", name, "triton", "torch") for name in ("forward", "backward")]
    yield figure("gpu_forward_ps", _sum(ours[:1]) * 1e3, "ps per (t,d)", 5.3)
    yield figure("gpu_forward_backward_ps", _sum(ours) * 1e3, "ps per (t,d)", 16)
    if "mamba-ssm" not in peers_here("cuda"):
        return
    theirs = [row_of(rows, SEQUENCES, "bf16", name, "mamba-ssm") for name in ("forward", "backward")]
    yield figure("gpu_vs_mamba_ssm_forward", _sum(theirs[:1]) / _sum(ours[:1]), "ratio", 3, "higher")
    yield figure("gpu_vs_mamba_ssm_forward_backward", _sum(theirs) / _sum(ours), "ratio", 4, "higher")
    inputs = scan_inputs(STAGE_1, torch.bfloat16, "cuda")
    with torch.no_grad():
        old = seconds(
            partial(grid_to_grid, mamba_ssm, STAGE_1.grid, STAGE_1.window, STAGE_1.shift, inputs), "cuda", budget
        )
        new = seconds(partial(shifted_scan, **inputs, index=STAGE_1.index()), "cuda", budget)
    yield figure("gpu_grid_to_grid_vs_mamba_ssm", old / new, "ratio", 6, "higher")


def _sum(rows: list[dict[str, object]]) -> float:
    return sum(float(str(row["ns_per_td"])) for row in rows)


def compiled_figures() -> Iterator[dict[str, object]]:
    """Yield lane-instructions per (t,d) of the bf16 kernels for sm_90, and all bytes spilled there."""
    kernels = {kernel["variant"]: kernel for kernel in json.loads(RESOURCES.read_text())["sm_90"]}
    wanted = {
        "forward": ("scan_forward", 151),
        "forward_flat": ("scan_forward_flat", 200),
        "backward": ("scan_backward", 545),
    }
    for name, (kernel, goal) in wanted.items():
        count = kernels[f"{kernel} bf16 N=16"]["lane_instructions"]
        yield figure(f"sm90_{name}_instructions", count, "per (t,d)", goal)
    yield figure("sm90_spills", sum(kernel["spilled_bytes"] for kernel in kernels.values()), "bytes", 0)


# Output.


def machine(device: str, floor: Floor) -> str:
    """Return the processor or GPU, the version of torch, and the two floors measured."""
    rates = f"copy {floor.bytes_per_s / 1e9:.1f} GB/s, {floor.exponentials_per_s / 1e9:.1f} G exponentials/s"
    return f"{common.machine(device)}; {rates}"


def line_of(row: dict[str, object], unit: str) -> str:
    """Return a row of the table as text."""

    def number(key: str, form: str, scale: float = 1.0) -> str:
        value = row.get(key)
        text = "–" if value is None else format(float(str(value)) * scale, form)
        return text.rjust(int(form.lstrip("0").split(".")[0] or 0))

    head = f"{row['shape']:<24}{row['type']:<6}{row['pass']:<15}{row['backend']:<15}"
    if row["ns_per_td"] is None:
        return f"{head}  not run"
    scale = 1e3 if unit == "ps" else 1.0
    peers = "  ".join(f"{key[6:]} {number(key, '.1f')}×" for key in row if key.startswith("times_") and row[key])
    return (
        f"{head}{number('ns_per_td', '9.2f', scale)} {number('share_of_floor', '7.0%')}"
        f"{number('peak_bytes', '10.1f', 1e-6)} {number('error', '9.1e')}  {peers}"
    )


def run(shapes: tuple[Shape, ...], device: str, floor: Floor, budget: float) -> list[dict[str, object]]:
    """Measure every shape and type, printing rows as they come, and return them with the ratios to the peers."""
    unit, rows = "ps" if device == "cuda" else "ns", []
    head = f"{'shape':<24}{'type':<6}{'pass':<15}{'backend':<15}"
    print(f"{head}{unit + '/(t,d)':>9} {'floor':>7}{'MB':>10} {'error':>9}  peers took")
    for shape in shapes:
        for kind in TYPES:
            found = [
                *peer_rows(shape, kind, device, floor, budget),
                *our_rows(shape, kind, device, floor, budget),
            ]
            with_ratios(found)
            for row in found:
                print(line_of(row, unit), flush=True)
            rows += found
    return rows


def main() -> None:
    """Measure, print the table and the figures, and write both as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table and the figures to this file")
    parser.add_argument("--quick", action="store_true", help="small shapes, fewer runs (under two minutes)")
    parser.add_argument("--shape", action="append", choices=[shape.name for shape in SHAPES], help="only this shape")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; use --device cpu.")
    torch.set_num_threads(1)
    names = chosen.shape or (QUICK if chosen.quick else [shape.name for shape in SHAPES])
    shapes = tuple(shape for shape in SHAPES if shape.name in names)
    budget = 0.3 if chosen.quick else 2.0
    floor = Floor.measure(chosen.device)
    print(machine(chosen.device, floor))
    rows = run(shapes, chosen.device, floor, budget)
    figures = list(compiled_figures())
    if chosen.device == "cpu" and GATE in shapes:
        figures += cpu_figures(rows)
    if chosen.device == "cuda" and SEQUENCES in shapes:
        figures += gpu_figures(rows, budget)
    print()
    for row in figures:
        print(common.line_of(row))
    common.write(chosen.json, figures, machine(chosen.device, floor), table=rows)


if __name__ == "__main__":
    main()
