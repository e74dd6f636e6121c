"""How long the shifted scan takes on this CPU, one thread, beside its peers: python benchmarks/scan.py.

One unit of work is one token of one inner channel, (t,d). The plain loop is the textbook form: all decays and inputs
of all tokens at once, then one step after another. The parallel scan combines tokens 1, 2, 4, … apart, all at once.
The instructions of the GPU kernels come from kernels/resources.json, where the compiler's output was counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from boldforge.kernels import shifted_conv, shifted_scan, window_index

RESOURCES = Path(__file__).parents[1] / "kernels/resources.json"
STATES = 16
WINDOW = (4, 4, 4, 4)
# Windows per clip and inner channels of the four stages of a NeuroSTORM encoder at 96³ × 20, one fifth of its windows.
STAGES = {"stage 1": (64, 72), "stage 2": (8, 144), "stage 3": (1, 288)}


def scan_inputs(n_windows: int, channels: int) -> dict[str, Tensor]:
    """Return random arguments of the scan for one clip of 256-token windows, float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(("u", "dt", "z"), (1, n_windows * 256, channels))
    shapes |= dict.fromkeys(("B", "C"), (1, n_windows * 256, STATES)) | {"D": (channels,), "dt_bias": (channels,)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["A"] = -torch.arange(1.0, STATES + 1).repeat(channels, 1)
    return inputs


def windows_of(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, dt_bias: Tensor) -> list[Tensor]:
    """Return u, C and z by window, and the decay of and what enters every state [windows, 256, D, N]."""
    u, dt, B, C, z = (tensor.view(-1, 256, tensor.shape[-1]) for tensor in (u, dt, B, C, z))
    delta = softplus(dt + dt_bias)
    return [u, C, z, torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None, :]]


def parallel_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """Return the same in eight rounds over all tokens instead of 256 steps."""
    u, C, z, decay, h = windows_of(u, dt, A, B, C, z, dt_bias)
    apart = 1
    while apart < 256:
        h = torch.cat([h[:, :apart], torch.addcmul(h[:, apart:], decay[:, apart:], h[:, :-apart])], dim=1)
        decay = torch.cat([decay[:, :apart], decay[:, apart:] * decay[:, :-apart]], dim=1)
        apart *= 2
    return (torch.einsum("wtdn,wtn->wtd", h, C) + u * D) * silu(z)


def one_by_one(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the arguments of every window of 256 tokens on its own."""
    tokens = inputs["u"].shape[1]
    return [
        {name: value[:, i : i + 256] if value.ndim == 3 else value for name, value in inputs.items()}
        for i in range(0, tokens, 256)
    ]


def plain_loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """Return the scan of unshifted windows whose tokens already lie next to each other."""
    u, C, z, decay, entering = windows_of(u, dt, A, B, C, z, dt_bias)
    h = torch.zeros_like(decay[:, 0])
    outputs = []
    for t in range(256):
        h = decay[:, t] * h + entering[:, t]
        outputs.append(torch.einsum("wdn,wn->wd", h, C[:, t]))
    return (torch.stack(outputs, dim=1) + u * D) * silu(z)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the processor time of the shortest of ``repeats`` runs, which other work on the machine disturbs least."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(n_windows: int, channels: int, repeats: int) -> dict[str, float]:
    """Return ns per (t,d) of the scan's and the convolution's forward and backward, and of the plain loop."""
    side = round(n_windows ** (1 / 3)) * 4
    index = window_index((side, side, side, 4), WINDOW, (0, 0, 0, 0))
    inputs = scan_inputs(n_windows, channels)
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    taps, bias = torch.randn(channels, 4, requires_grad=True), torch.zeros(channels, requires_grad=True)
    y, conv = shifted_scan(**leaves, index=index), shifted_conv(leaves["u"], taps, bias, index)
    dout = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    unit = 1e9 / (index.n_tokens * channels)
    with torch.no_grad():
        times = {
            "forward": seconds(lambda: shifted_scan(**inputs, index=index), repeats),
            "torch backend forward": seconds(
                lambda: shifted_scan(**inputs, index=index, backend="torch"), max(2, repeats // 3)
            ),
            # One window after another, which is up to twelve times faster than all at once: it stays in the cache.
            "parallel scan forward": seconds(
                lambda: [parallel_scan(**window) for window in one_by_one(inputs)], max(2, repeats // 6)
            ),
            "plain loop forward": seconds(lambda: plain_loop(**inputs), max(2, repeats // 3)),
            "conv forward": seconds(lambda: shifted_conv(inputs["u"], taps, bias, index), repeats),
        }
    times["backward"] = seconds(
        lambda: torch.autograd.grad(y, tuple(leaves.values()), dout, retain_graph=True), repeats
    )
    times["conv backward"] = seconds(
        lambda: torch.autograd.grad(conv, (leaves["u"], taps, bias), dout, retain_graph=True), repeats
    )
    return {name: value * unit for name, value in times.items()}


def forward_error(n_windows: int, channels: int) -> float:
    """Return the norm of the float32 output's error over the norm of the float64 output."""
    side = round(n_windows ** (1 / 3)) * 4
    index = window_index((side, side, side, 4), WINDOW, (2, 2, 2, 2))
    inputs = scan_inputs(n_windows, channels)
    exact = shifted_scan(**{name: value.double() for name, value in inputs.items()}, index=index)
    return float((shifted_scan(**inputs, index=index) - exact).norm() / exact.norm())


def thread_gain(n_windows: int, channels: int, repeats: int) -> float:
    """Return how many times faster two threads run the forward pass than one, by the clock on the wall."""
    side = round(n_windows ** (1 / 3)) * 4
    index, inputs, best = (
        window_index((side, side, side, 4), WINDOW, (0, 0, 0, 0)),
        scan_inputs(n_windows, channels),
        [],
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            shifted_scan(**inputs, index=index)
            times.append(time.perf_counter() - start)
        best.append(min(times))
    torch.set_num_threads(1)
    return best[0] / best[1]


def compiled_figures() -> dict[str, float]:
    """Return what the compiler makes of the GPU kernels for Hopper: lane instructions per (t,d), and spilled bytes."""
    kernels = {kernel["variant"]: kernel for kernel in json.loads(RESOURCES.read_text())["sm_90"]}
    wanted = {"forward": "scan_forward", "forward_flat": "scan_forward_flat", "backward": "scan_backward"}
    return {
        f"sm90_{figure}_instructions": kernels[f"{name} bf16 N=16"]["lane_instructions"]
        for figure, name in wanted.items()
    } | {"sm90_spills": sum(kernel["spilled_bytes"] for kernel in kernels.values())}


def machine() -> str:
    """Return the processor, its cores and the version of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, one thread used, torch {torch.__version__}"


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="only the first stage, fewer repeats (under a minute)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []

    def add(figure: str, value: float, unit: str, goal: float | None = None, better: str = "lower") -> None:
        rows.append({"figure": figure, "value": round(value, 2), "unit": unit, "goal": goal, "better": better})

    for stage, (n_windows, channels) in STAGES.items():
        if chosen.quick and rows:
            break
        times = measure(n_windows, channels, repeats=5 if chosen.quick else 20)
        if not rows:
            add("cpu_forward_ns", times["forward"], "ns per (t,d)", 7)
            add("cpu_backward_over_forward", times["backward"] / times["forward"], "ratio", 4)
            add("cpu_vs_plain_loop", times["plain loop forward"] / times["forward"], "ratio", 12, "higher")
            add("cpu_vs_parallel_scan", times["parallel scan forward"] / times["forward"], "ratio", None, "higher")
            add("cpu_forward_error_1e-7", forward_error(n_windows, channels) * 1e7, "1e-7", 100)
            add("cpu_two_threads_over_one", thread_gain(n_windows, channels, 10), "ratio", 1.7, "higher")
        for name, value in times.items():
            add(f"{stage}, {n_windows} windows x 256, D={channels}: {name}", value, "ns per (t,d)")

    goals = {"sm90_forward_instructions": 151, "sm90_forward_flat_instructions": 200, "sm90_backward_instructions": 545}
    for figure, value in compiled_figures().items():
        add(figure, value, "bytes" if figure == "sm90_spills" else "per (t,d)", goals.get(figure, 0))

    print(machine())
    for row in rows:
        goal = "" if row["goal"] is None else f"goal {row['goal']:g}"
        print(f"{row['figure']:<62}{row['value']:>9.2f} {row['unit']:<13}{goal}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
