"""benchmarks/pretrain.py: its peers are the transcription, its operations are those that torch counts."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

from tests.pretrain.neurostorm_transcription import Shape, Transcription, cut_windows, paste_windows

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = Shape(image=(16, 16, 8, 4), patch=2, dim=6, depths=(2, 2), window=(4, 4, 4, 4))
OURS, PEERS = ("same numbers", "brain tokens", "visible tokens"), ("loop", "loop in parts", "parallel in parts")
aten = torch.ops.aten


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    before, there = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        import pretrain

        yield pretrain
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - there:
            if name.split(".")[0] in ("pretrain", "pretrain_parts", "scan_parts"):
                sys.modules.pop(name)


@pytest.fixture
def step(benchmark: ModuleType) -> ModuleType:
    from pretrain_parts import step

    return step


def setup(step: ModuleType, side: str) -> Any:
    torch.manual_seed(0)
    job = step.Job(side, SMALL.image[3], 1, shape=SMALL)
    return step.our_setup(job) if job.ours else step.peer_setup(job)


@pytest.mark.parametrize("scan", PEERS)
def test_every_peer_computes_what_the_transcription_computes(step: ModuleType, scan: str) -> None:
    torch.manual_seed(0)
    reference, peer = Transcription(SMALL), step.Peer(SMALL).use(scan)
    peer.load_state_dict(reference.state_dict())
    clips = torch.randn(2, *SMALL.image)
    found = {}
    for network in (reference, peer):
        y = network(clips)
        y.square().mean().backward()
        found[network] = y.detach(), {name: p.grad for name, p in network.named_parameters()}
    (wanted, theirs), (y, mine) = found[reference], found[peer]
    assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for name, gradient in theirs.items():
        if gradient is None:  # the mask tokens: nothing is hidden here
            assert mine[name] is None
        else:
            assert (mine[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_windows_that_the_frames_do_not_fill_are_padded_at_the_far_end(step: ModuleType) -> None:
    torch.manual_seed(0)
    block = step.Peer(SMALL).use("loop").layers[0].blocks[0]
    tokens = torch.randn(1, 8, 8, 4, 6, SMALL.dim)
    normed = pad(block.norm1(tokens), (0, 0, 0, 2))
    mixed = block.mamba(cut_windows(normed, block.window))
    wanted = tokens + paste_windows(mixed, block.window, normed.shape)[..., :6, :]
    assert (block(tokens) - wanted - block.mlp(block.norm2(wanted))).abs().max() < 1e-5


@pytest.mark.parametrize("side", [*OURS, *PEERS])
def test_the_operations_are_those_that_torch_counts(step: ModuleType, side: str) -> None:
    made = setup(step, side)
    with FlopCounterMode(display=False) as counter:
        made.loss().backward()
    counts = counter.get_flop_counts()["Global"]
    # The rest of the peers is their scan, some of which they put as batched products, and their convolution.
    assert counts[aten.mm] + counts[aten.addmm] == made.flops.step_matmul
    if side in OURS:
        assert counter.get_total_flops() == made.flops.step_matmul


def test_both_sides_have_the_same_parameters_and_tokens(step: ModuleType) -> None:
    exact, peer = setup(step, "same numbers"), setup(step, "loop")
    assert step.count_parameters(exact.network) == step.count_parameters(peer.network)
    assert exact.tokens == peer.tokens and exact.flops == peer.flops
    brain, visible = setup(step, "brain tokens"), setup(step, "visible tokens")
    assert visible.tokens[0] < brain.tokens[0] < exact.tokens[0]
    assert visible.flops.step < brain.flops.step < exact.flops.step


def test_the_figures_follow_from_the_table(benchmark: ModuleType, step: ModuleType) -> None:
    frames = SMALL.image[3]
    rows = [step.measure(step.Job(side, frames, 1, shape=SMALL)) for side in (*OURS, *PEERS)]
    rows = [{**row, "tokens": list(row["tokens"]), "peak_bytes": 1 + i} for i, row in enumerate(rows)]
    rows.append({**rows[2], "frames": 4 * frames, "frames_per_second": rows[2]["frames_per_second"] / 2})
    found = {row["figure"]: row["value"] for row in benchmark.figures(rows)}
    fastest = min(row["seconds"] for row in rows[3:6])
    assert found["step_vs_neurostorm"] == pytest.approx(fastest / rows[2]["seconds"], rel=1e-3)
    assert found["step_vs_neurostorm_same_numbers"] == pytest.approx(fastest / rows[0]["seconds"], rel=1e-3)
    assert found[f"cost_per_frame_{4 * frames}_over_{frames}_frames"] == pytest.approx(2)
    assert found["tokens_vs_neurostorm"] == pytest.approx(sum(rows[2]["tokens"]) / sum(rows[3]["tokens"]), rel=1e-3)
    assert found["memory_vs_neurostorm"] == pytest.approx(
        3 / (4 + [r["seconds"] for r in rows[3:6]].index(fastest)), rel=1e-3
    )
    assert all(row["frames_per_second"] == pytest.approx(row["frames"] / row["seconds"]) for row in rows[:6])
    assert all(len(benchmark.line_of(row)) > 80 for row in rows)


@pytest.mark.parametrize("side", [*OURS, "loop", "parallel in parts"])
def test_nothing_of_a_side_stays_behind_on_the_cpu(
    step: ModuleType, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device without data an operation refuses what lies on the CPU, as it would on a GPU."""
    # The counts of a step are needed as numbers.
    monkeypatch.setattr(step.Objective, "counts", lambda *_: torch.ones(3, dtype=torch.float64))
    job = step.Job(side, SMALL.image[3], 1, "meta", SMALL)
    made = step.our_setup(job) if job.ours else step.peer_setup(job)
    loss = made.loss()
    loss.backward()
    assert loss.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in (*made.network.parameters(), *made.network.buffers()))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_what_is_measured_holds_what_the_figures_need(
    benchmark: ModuleType, quick: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "available_backends", lambda: {"mamba_ssm": None})
    jobs = benchmark.plan(quick, device)
    first = jobs[0][1]
    assert (first == 20) is not quick
    here = {side for side, frames, _ in jobs if frames == first}
    assert set(OURS) - here == ({"brain tokens"} if quick else set()) and "loop" in here
    assert ("mamba-ssm" in here and set(PEERS) < here) is (device == "cuda")
    assert {frames for side, frames, _ in jobs if side == OURS[-1]} == ({4, 8} if quick else {20, 40, 80})
    # Stand-ins: what is left out does not fit, and the figures are of the rest.
    shared = {"peak_bytes": 1, "parameters": 1, "matmul_flops": 1, "scan_flops": 1, "tokens": [1]}
    rows = [
        {"side": side, "frames": frames, "seconds": 2.0, "frames_per_second": frames / 2, **shared}
        for side, frames, _ in jobs
        if side != "loop in parts"
    ]
    found = {row["figure"]: row["value"] for row in benchmark.figures(rows)}
    assert ("step_vs_neurostorm_brain_tokens" in found) is not quick
    assert (
        found["step_vs_neurostorm"] == found["step_vs_neurostorm_same_numbers"] == 1
        and found[f"cost_per_frame_{rows[-1]['frames']}_over_{first}_frames"] < 1
    )


def test_a_gpu_is_waited_for_before_and_after_a_step(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(step.time, "perf_counter", lambda: (done.append("clock"), float(len(done)))[1])
    assert step._seconds(lambda: done.append("step"), cuda=True) == 3
    assert done == ["waited", "clock", "step", "waited", "clock"]
