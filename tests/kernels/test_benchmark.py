"""benchmarks/scan.py at a tiny size: its peers compute the same, its figures follow from its rows."""

import sys
from pathlib import Path

import pytest
import torch

from boldforge.kernels import available_backends, selective_scan_fn, shifted_scan, window_index
from tests.kernels.conftest import relative_error

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FOLDER))
    try:
        import scan

        yield scan
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("scan", "scan_parts", "scan_parts.clock", "scan_parts.peers"):
            sys.modules.pop(name, None)


@pytest.fixture
def tiny(benchmark, monkeypatch):
    shape = benchmark.Shape("64 windows", 2, (4, 4, 4, 8), (2, 2, 2, 4), (1, 1, 1, 2), 5)
    monkeypatch.setattr(benchmark, "GATE", shape)
    monkeypatch.setattr(benchmark, "SEQUENCES", shape)
    return shape


@pytest.fixture
def rows(benchmark, tiny):
    floor = benchmark.Floor(1e10, 1e10)
    return benchmark.run((tiny,), "cpu", floor, budget=0.0)


def test_the_peers_compute_the_same_scan(benchmark, tiny):
    inputs = benchmark.scan_inputs(tiny, torch.float32, "cpu")
    wanted = shifted_scan(**{k: v.double() for k, v in inputs.items()}, index=tiny.in_order())
    for function, _ in benchmark.PEERS.values():
        parts = benchmark.sequences(tiny, inputs, 1 << 14, channels_first=False)
        found = torch.cat([function(**part) for part in parts]).view(wanted.shape)
        assert relative_error(found, wanted) < 1e-6


def test_the_way_with_tensors_visits_the_same_windows(benchmark, tiny):
    inputs = benchmark.scan_inputs(tiny, torch.float32, "cpu")

    def scan(u, dt, A, B, C, D, z, dt_bias):
        return selective_scan_fn(u, dt, A, B, C, D, z, dt_bias, delta_softplus=True)

    found = benchmark.grid_to_grid(scan, tiny.grid, tiny.window, tiny.shift, inputs)
    wrapped = window_index(tiny.grid, tiny.window, tiny.shift, mode="wrap")
    assert relative_error(found, shifted_scan(**{k: v.double() for k, v in inputs.items()}, index=wrapped)) < 1e-6


def test_there_is_a_row_for_every_type_pass_and_backend(benchmark, rows, tiny):
    ours = ["torch"] if available_backends()["cpu"] else ["cpu", "torch"]
    passes = ("forward", "backward", "conv forward", "conv backward")
    wanted = {(kind, name, backend) for kind in benchmark.TYPES for name in passes for backend in ours}
    peers = {(kind, name, peer) for kind in benchmark.TYPES for name in passes[:2] for peer in benchmark.PEERS}
    assert {(row["type"], row["pass"], row["backend"]) for row in rows} == wanted | peers
    limits = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
    for row in rows:
        if row["backend"] in benchmark.PEERS:
            assert (row["ns_per_td"] is None) == (row["type"] != "fp32")
            continue
        assert row["ns_per_td"] > 0 and row["share_of_floor"] > 0
        assert row["peak_bytes"] >= 0.5 * tiny.units * benchmark.TYPES[row["type"]].itemsize
        if "conv" not in row["pass"]:
            assert 0 < row["error"] < limits[row["type"]]


def test_the_figures_follow_from_the_rows(benchmark, rows):
    figures = {row["figure"]: row["value"] for row in (*benchmark.cpu_figures(rows), *benchmark.compiled_figures())}
    named = {"cpu_forward_ns", "cpu_backward_over_forward", "cpu_vs_plain_loop", "cpu_vs_parallel_scan"}
    named |= {
        "sm90_forward_instructions",
        "sm90_forward_flat_instructions",
        "sm90_backward_instructions",
        "sm90_spills",
    }
    assert named <= set(figures)
    times = {(row["type"], row["pass"], row["backend"]): row["ns_per_td"] for row in rows}
    ours = "torch" if available_backends()["cpu"] else "cpu"
    forward, backward = times["fp32", "forward", ours], times["fp32", "backward", ours]
    assert figures["cpu_forward_ns"] == round(forward, 2)
    assert figures["cpu_backward_over_forward"] == round(backward / forward, 2)
    assert figures["cpu_vs_plain_loop"] == round(times["fp32", "forward", "plain loop"] / forward, 2)


def test_a_peer_that_would_take_too_long_is_said_not_to_have_run(benchmark, tiny, monkeypatch):
    monkeypatch.setattr(benchmark, "LIMIT_S", 0.0)
    rows = list(benchmark.peer_rows(tiny, "fp32", "cpu", benchmark.Floor(1e10, 1e10), 0.0))
    assert [row["ns_per_td"] for row in rows] == [None] * 4
    assert all("not run" in benchmark.line_of(row, "ns") for row in rows)


def test_the_gpu_figures_are_ratios_of_the_rows(benchmark, tiny, monkeypatch):
    """With made-up rows, because the names and the arithmetic do not need the device."""
    times = {("triton", "forward"): 0.005, ("triton", "backward"): 0.015}
    times |= {("mamba-ssm", "forward"): 0.02, ("mamba-ssm", "backward"): 0.06}
    rows = [
        {"shape": tiny.name, "type": "bf16", "pass": name, "backend": backend, "ns_per_td": time}
        for (backend, name), time in times.items()
    ]
    monkeypatch.setattr(benchmark, "peers_here", lambda device: {"mamba-ssm": (benchmark.mamba_ssm, 1)})
    monkeypatch.setattr(benchmark, "scan_inputs", lambda *arguments: {})
    clock = iter([6.0, 2.0])
    monkeypatch.setattr(benchmark, "seconds", lambda *arguments: next(clock))
    figures = {row["figure"]: row["value"] for row in benchmark.gpu_figures(rows, 0.0)}
    assert figures == {
        "gpu_forward_ps": 5.0,
        "gpu_forward_backward_ps": 20.0,
        "gpu_vs_mamba_ssm_forward": 4.0,
        "gpu_vs_mamba_ssm_forward_backward": 4.0,
        "gpu_grid_to_grid_vs_mamba_ssm": 3.0,
    }
