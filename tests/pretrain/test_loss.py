"""The four terms of the loss against plain loops, and what they must not depend on."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.configs import ConfigError, load_config
from boldforge.pretrain import (
    LossConfig,
    Objective,
    PretrainConfig,
    RegionVoxels,
    TokenGrid,
    gather_patches,
    make_targets,
)
from boldforge.pretrain.evaluate import counted_voxels

TERMS = ("voxel", "region", "parcel", "gradient")
T, CLIPS = 4, 5
EVERYTHING = LossConfig(voxel=1.0, region=0.7, parcel=1.3, gradient=0.4)


def make_case(seed: int) -> dict:
    """A brain whose regions overlap on some voxels: a large one, a small one, one voxel, and one never hidden."""
    rng = np.random.default_rng(seed)
    mask = rng.random((5, 6, 3)) < 0.8
    mask[0, 0, 0] = True
    grid = TokenGrid(mask, (2, 2, 2), T, 1)
    V, S = grid.n_voxels, grid.stages[0].n_tokens
    table = torch.from_numpy(grid.patch_voxels)
    last = np.unique(grid.patch_voxels[-1][grid.patch_voxels[-1] < V])
    pairs = {(int(v), 0): rng.uniform(0.1, 0.5) for v in rng.permutation(V)[: V // 2]}
    pairs |= {(int(v), 1): rng.uniform(0.1, 0.5) for v in rng.permutation(V)[:3]}
    pairs |= {(0, 2): 0.02}
    pairs |= {(int(v), 3): 0.9 for v in last}
    order = sorted(pairs)
    voxel, region = (np.array([key[i] for key in order]) for i in (0, 1))
    regions = RegionVoxels((3, 5, 8, 9), ("a", "b", "c", "d"), voxel, region, np.array([pairs[key] for key in order]))
    hidden = torch.from_numpy(rng.random((CLIPS, S, T)) < 0.6)
    hidden[0, 0, :2] = True  # the voxel of region c, in two frames that follow each other
    hidden[:, -1] = False  # region d
    signal = torch.from_numpy(rng.random((CLIPS, V)) < 0.9)
    signal[0, 0] = True
    values = torch.from_numpy(rng.standard_normal((CLIPS, T, V)))
    return {
        "grid": grid,
        "table": table,
        "regions": regions,
        "signal": signal,
        "counted": counted_voxels(hidden.flatten(1), signal, table),
        "values": values,
        "predicted": torch.from_numpy(rng.standard_normal((CLIPS, S * T, 8))),
    }


def slow_terms(case: dict, target: torch.Tensor) -> dict[str, float]:
    """Loop over everything; errors by clip, frame and voxel."""
    table, counted = case["table"], case["counted"].unflatten(1, (-1, T))
    d = (case["predicted"] - target).unflatten(1, (-1, T))
    error, regions = {}, case["regions"]
    for b, s, t, p in product(range(CLIPS), range(len(table)), range(T), range(8)):
        if counted[b, s, t, p]:
            error[b, t, int(table[s, p])] = float(d[b, s, t, p])
    of = [
        {int(v): w for v, r, w in zip(regions.voxel, regions.region, regions.share, strict=True) if r == number}
        for number in range(4)
    ]
    by_region, parcels = [], []
    for members in of:
        inside = [(members[v], e) for (_, _, v), e in error.items() if v in members]
        if inside:
            by_region.append(sum(w * e * e for w, e in inside) / sum(w for w, _ in inside))
        for b, t in product(range(CLIPS), range(T)):
            here = [(w, error[b, t, v]) for v, w in members.items() if (b, t, v) in error]
            if here:
                parcels.append((sum(w * e for w, e in here) / sum(w for w, _ in here)) ** 2)
    changes = [(e - error[b, t - 1, v]) ** 2 for (b, t, v), e in error.items() if (b, t - 1, v) in error]
    return {
        "voxel": np.mean([e * e for e in error.values()]),
        "region": np.mean(by_region),
        "parcel": np.mean(parcels),
        "gradient": np.mean(changes),
    }


@pytest.mark.parametrize("seed", range(4))
def test_every_term_is_what_a_plain_loop_says(seed: int) -> None:
    case = make_case(seed)
    objective = Objective(EVERYTHING, T, case["regions"], case["table"])
    target = gather_patches(case["values"], case["table"])
    found = objective(case["predicted"], target, case["counted"], objective.counts(case["counted"]))
    expected = slow_terms(case, target)
    for name in TERMS:
        assert float(found[name]) == pytest.approx(expected[name], rel=1e-12), name
    weights = {name: getattr(EVERYTHING, name) for name in TERMS}
    assert float(found["loss"]) == pytest.approx(sum(weights[name] * expected[name] for name in TERMS), rel=1e-12)
    single = objective(case["predicted"].float(), target.float(), case["counted"], objective.counts(case["counted"]))
    assert float(single["loss"]) == pytest.approx(float(found["loss"]), rel=1e-5)
    assert single["loss"].dtype == torch.float32


@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, CLIPS - 1)), targets=st.sampled_from(["values", "clip"]))
@settings(max_examples=30, deadline=None)
def test_loss_and_gradient_do_not_depend_on_how_the_step_is_cut(seed: int, cuts: set[int], targets: str) -> None:
    case = make_case(seed)
    objective = Objective(EVERYTHING.model_copy(update={"targets": targets}), T, case["regions"], case["table"])

    def step(bounds: list[int]) -> tuple[list[float], torch.Tensor]:
        predicted = case["predicted"].clone().requires_grad_()
        parts = [slice(start, stop) for start, stop in pairwise(bounds)]
        totals = sum(objective.counts(case["counted"][part]) for part in parts)
        sums = dict.fromkeys(("loss", *TERMS), 0.0)
        for part in parts:
            target = make_targets(case["values"][part], case["signal"][part], case["table"], targets)
            terms = objective(predicted[part], target, case["counted"][part], totals)
            terms["loss"].backward()
            sums = {name: sums[name] + terms[name].item() for name in sums}
        return list(sums.values()), predicted.grad

    whole, gradient = step([0, CLIPS])
    cut, gradient_cut = step([0, *sorted(cuts), CLIPS])
    np.testing.assert_allclose(cut, whole, rtol=1e-12)
    torch.testing.assert_close(gradient_cut, gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("targets", ["values", "clip"])
def test_background_and_voxels_without_signal_are_never_counted(targets: str) -> None:
    case = make_case(0)
    objective = Objective(EVERYTHING.model_copy(update={"targets": targets}), T, case["regions"], case["table"])
    totals = objective.counts(case["counted"])

    def loss(predicted: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        target = make_targets(values, case["signal"], case["table"], targets)
        return objective(predicted, target, case["counted"], totals)["loss"]

    expected = loss(case["predicted"], case["values"])
    poisoned = torch.where(case["counted"], case["predicted"], torch.nan).requires_grad_()
    # What the scanner did not see may hold anything finite; what is visible to the model is no part of its error.
    values = torch.where(case["signal"].unsqueeze(1), case["values"], 1e6)
    found = loss(poisoned, values)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    assert poisoned.grad.isfinite().all() and not poisoned.grad[~case["counted"]].any()


def test_every_region_weighs_the_same_and_one_that_is_not_hidden_nothing() -> None:
    case = make_case(1)
    objective = Objective(LossConfig(voxel=0, region=1), T, case["regions"], case["table"])
    totals = objective.counts(case["counted"])
    assert totals[3:].tolist()[3] == 0 and (totals[3:6] > 0).all()
    wrong = torch.zeros_like(case["predicted"]).unflatten(1, (-1, T))
    at = (case["table"] == 0).nonzero()[0].tolist()
    wrong[:, at[0], :, at[1]] = 3.0  # the one voxel of region c; it may hold a share of the others too
    others = [0, 1]
    found = objective(wrong.flatten(1, 2), torch.zeros_like(case["predicted"]), case["counted"], totals)["loss"]
    held = float(case["counted"].unflatten(1, (-1, T))[:, at[0], :, at[1]].sum())
    part = 0.0
    for region in others:
        share = case["regions"].share[(case["regions"].voxel == 0) & (case["regions"].region == region)].sum()
        part += 9 * held * share / float(totals[3 + region])
    assert float(found) == pytest.approx((9 + part) / 3)


def test_a_step_that_hides_nothing_countable_has_no_loss_and_no_gradient() -> None:
    case = make_case(2)
    objective = Objective(EVERYTHING, T, case["regions"], case["table"])
    nothing = torch.zeros_like(case["counted"])
    predicted = case["predicted"].clone().requires_grad_()
    loss = objective(predicted, torch.zeros_like(predicted), nothing, objective.counts(nothing))["loss"]
    loss.backward()
    assert loss.item() == 0 and not predicted.grad.any()


@pytest.mark.parametrize("targets", ["clip", "frame"])
def test_normalised_targets_have_mean_0_and_deviation_1_over_their_voxels_with_signal(targets: str) -> None:
    case = make_case(3)
    values = 5 + 2 * case["values"]
    values = torch.where(case["signal"].unsqueeze(1), values, 1e3)
    found = make_targets(values, case["signal"], case["table"], targets).unflatten(1, (-1, T))
    for b, s in product(range(CLIPS), range(len(case["table"]))):
        places = [p for p in range(8) if case["table"][s, p] < case["grid"].n_voxels]
        places = [p for p in places if case["signal"][b, case["table"][s, p]]]
        if len(places) < 2:
            continue
        patch = values[b][:, case["table"][s, places]].numpy()
        frames = [slice(None)] if targets == "clip" else [slice(t, t + 1) for t in range(T)]
        for frame in frames:
            x = patch[frame]
            expected = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
            np.testing.assert_allclose(found[b, s, frame][:, places], expected, rtol=1e-9, atol=1e-9)
    same = make_targets(values, case["signal"], case["table"], "values")
    assert torch.equal(same, gather_patches(values, case["table"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"voxel": 0}, "all four weights are 0"),
        ({"background": True, "parcel": 1}, "which loss.parcel never does; set loss.background to false"),
        ({"background": True, "targets": "clip"}, "which loss.targets never does"),
        ({"targets": "frame", "gradient": 1}, "loss.gradient is its error; set loss.targets to clip"),
        ({"region": -1}, "greater than or equal to 0"),
    ],
)
def test_terms_that_do_not_fit_together_are_refused(change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(PretrainConfig, {"shards": "shards", "out": "out", "loss": change})


def test_changes_need_two_frames(tmp_path: Path) -> None:
    content = {"shards": "shards", "out": str(tmp_path), "loss": {"gradient": 1}, "model": {"frames": 1}}
    with pytest.raises(ConfigError, match=r"model\.frames is 1; raise it, or set loss\.gradient to 0"):
        load_config(PretrainConfig, content)
