"""benchmarks/masking.py: cells are kept, and figures are those of a case that can be done by hand."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from boldforge.configs import load_config
from boldforge.data_shards import Segments
from boldforge.finetune.metrics import auc
from boldforge.pretrain import MaskConfig, MaskSampler, ModelConfig, build_model, gather_patches

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Iterator[None]:
    before, there = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path[:] = before
    for name in set(sys.modules) - there:
        if name.split(".")[0] == "masking_parts":
            sys.modules.pop(name)


def test_a_cell_is_made_once_for_the_same_settings(tmp_path: Path) -> None:
    from masking_parts.cells import kept

    made = []

    def make() -> dict[str, object]:
        made.append(len(made))
        return {"figure": len(made)}

    for settings, expected in (({"steps": (1, 2)}, 1), ({"steps": (1, 2)}, 1), ({"steps": (1, 3)}, 2)):
        assert kept(tmp_path / "cell.json", settings, make)["figure"] == expected
    assert made == [0, 1]
    (tmp_path / "other.partial").write_text('{"settings"')  # what a kill leaves is never read
    assert kept(tmp_path / "other.json", {}, make)["figure"] == 3


def test_ratios_and_their_differences_are_pooled_over_clips_and_seeds() -> None:
    from masking_parts.intervals import error_ratios

    clips = [[0, 0], [0, 4], [1, 0], [1, 4]]
    baseline = {"random": [10.0, 20.0, 30.0, 40.0]}
    halves = [{"clips": clips, "baseline": baseline, "error": {"random": [5.0, 10.0, 15.0, 20.0]}} for _ in range(3)]
    wholes = [{"clips": clips, "baseline": baseline, "error": baseline} for _ in range(3)]
    assert error_ratios(halves, "random") == pytest.approx((0.5, 0.5, 0.5))
    assert error_ratios(halves, "random", wholes) == pytest.approx((-0.5, -0.5, -0.5))
    mixed = [halves[0], wholes[0], wholes[1]]
    value, low, high = error_ratios(mixed, "random")
    assert value == pytest.approx(2.5 / 3) and low == pytest.approx(0.5) and high == pytest.approx(1)


def test_aucs_are_the_mean_over_seeds_with_subjects_paired() -> None:
    from masking_parts.intervals import aucs

    labels = [0, 0, 0, 1, 1, 1]
    perfect = {"labels": labels, "scores": {"mean": [[0.1, 0.2, 0.3, 0.7, 0.8, 0.9]]}}
    blind = {"labels": labels, "scores": {"mean": [[0.5] * 6]}}
    assert aucs([perfect, perfect], "mean") == (1, 1, 1)
    assert aucs([perfect, blind], "mean")[0] == pytest.approx(0.75)
    assert aucs([perfect, blind], "mean", [perfect, perfect])[0] == pytest.approx(-0.25)
    assert aucs([perfect], "mean", [perfect]) == (0, 0, 0)
    drawn = np.random.default_rng(0).integers(0, 4, (3, 11)).astype(float)  # with ties
    marks = [0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1]
    value, low, high = aucs([{"labels": marks, "scores": {"mean": drawn.tolist()}}], "mean")
    assert value == pytest.approx(np.mean([auc(np.array(marks), row) for row in drawn]))
    assert low < value < high


def test_every_token_of_a_hidden_window_hears_from_visible_ones_beside_it() -> None:
    """With scans in one direction alone there are tokens that hear from nothing beside them."""
    from masking_parts.cells import RECIPE

    reached = {}
    for bidirectional in (False, True):
        config = load_config(ModelConfig, {**RECIPE["model"], "bidirectional": bidirectional})
        torch.manual_seed(0)
        model = build_model(config, np.ones((24, 24, 24), bool), 4.0, np.diag([4.0, 4, 4, 1]))
        grid, frames = model.token_grid, config.frames
        mask_BL = MaskSampler(grid, MaskConfig(strategy="window", ratio=0.5), None, config.window).sample([(0,)])
        values_BTV = torch.randn(1, frames, grid.n_voxels, requires_grad=True)
        rebuilt_BLP = model(values_BTV, mask_BL)
        place_L3 = torch.from_numpy(grid.stages[0].coordinates).repeat_interleave(frames, 0)
        shares = []
        for token in mask_BL[0].nonzero()[::40, 0]:
            (slope_BTV,) = torch.autograd.grad(rebuilt_BLP[0, token].sum(), values_BTV, retain_graph=True)
            heard_L = gather_patches(slope_BTV, model.patch_voxels)[0].abs().sum(1) > 0
            assert not heard_L[mask_BL[0]].any()
            distance_L = (place_L3 - place_L3[token]).abs().amax(1)
            nearest_L = ~mask_BL[0] & (distance_L == distance_L[~mask_BL[0]].min())
            shares.append(float(heard_L[nearest_L].float().mean()))
        reached[bidirectional] = min(shares)
    assert reached == {False: 0, True: 1}


def test_the_recipe_is_chosen_on_frames_that_are_neither_trained_on_nor_reported(monkeypatch) -> None:
    from masking_parts import reconstruction

    parts = {0.25: ([[0, 0, 48], [1, 0, 67]], [[0, 48, 64], [1, 67, 90]]), 0.5: ([[0, 0, 32], [1, 0, 45]], [])}
    monkeypatch.setattr(
        reconstruction,
        "split_segments",
        lambda _, holdout: tuple(Segments(np.array(p)) for p in parts[holdout.fraction]),
    )
    chosen, reported = reconstruction.choice_frames(None), reconstruction.held_frames(None)  # type: ignore[arg-type]
    assert chosen.table.tolist() == [[0, 32, 48], [1, 45, 67]]
    assert reported.table.tolist() == [[0, 48, 64], [1, 67, 90]]


@pytest.mark.slow
def test_quick_fills_every_cell(tmp_path: Path) -> None:
    root = FOLDER.parent
    figures = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/masking.py", "--quick", "--out", str(tmp_path), "--json", str(figures)]
    subprocess.run(command, cwd=root, check=True, timeout=300)
    rows = {row["figure"]: row for row in json.loads(figures.read_text())["rows"]}
    strategies = ("random", "window", "region", "group")
    wanted = {f"error: trained {a}, tested {b}" for a in strategies for b in strategies}
    wanted |= {
        f"SIMULATED AUC: {a}, {pool}" for a in ("untrained", *strategies) for pool in ("multiscale", "tokens_std")
    }
    assert wanted <= set(rows)
    assert all(math.isfinite(x) for row in rows.values() for x in (row["value"], *row["interval"]))
    assert all(
        row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows.values() if "error" in row["figure"]
    )
