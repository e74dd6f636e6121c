"""Held-out error: what is counted, and what it is compared with."""

from pathlib import Path

import numpy as np
import pytest
import torch

from boldforge.data_shards import Holdout, ShardReader, brain_mask, load_manifest, split_segments
from boldforge.pretrain import (
    HeldoutClips,
    LossConfig,
    MaskConfig,
    MaskSampler,
    ModelConfig,
    TokenGrid,
    build_model,
    gather_patches,
    make_targets,
    reconstruction_loss,
)
from boldforge.pretrain.evaluate import counted_voxels

FRAMES = 4


@pytest.fixture(scope="module")
def parts(real_shards: Path) -> tuple[HeldoutClips, TokenGrid]:
    manifest = load_manifest(real_shards)
    grid = TokenGrid(brain_mask(manifest.grid), (3, 3, 3), FRAMES, 1)
    _, heldout = split_segments(manifest, Holdout(by="frames", fraction=0.25))
    sampler = MaskSampler(grid, MaskConfig(strategy="tube", ratio=0.5))
    return HeldoutClips([ShardReader(manifest)], [heldout], sampler, FRAMES, limit=5), grid


def test_clips_come_from_every_run_and_never_from_training_frames(
    real_shards: Path, parts: tuple[HeldoutClips, TokenGrid]
) -> None:
    heldout, _ = parts
    training = split_segments(load_manifest(real_shards), Holdout(by="frames", fraction=0.25))[0]
    assert {run for _, run, _ in heldout.clips} == {0, 1}
    assert len(heldout.clips) == 5
    for _, run, start in heldout.clips:
        assert start >= training[run].stop


def test_the_baseline_is_the_runs_own_mean_frame(one_rank: None, parts: tuple[HeldoutClips, TokenGrid]) -> None:
    # residual-z has removed every voxel's mean over all frames, so a model that always says zero says the mean frame.
    heldout, grid = parts
    table = torch.from_numpy(grid.patch_voxels)
    measured = heldout.measure(
        lambda values_BTV, mask_BL: torch.zeros_like(gather_patches(values_BTV, table)), table, grid.n_voxels
    )
    assert measured.error == pytest.approx(measured.baseline, rel=1e-6)
    assert measured.baseline > 0
    assert measured.count_V.max() <= 5 * FRAMES


def test_the_truth_scores_zero_on_what_is_hidden(one_rank: None, parts: tuple[HeldoutClips, TokenGrid]) -> None:
    heldout, grid = parts
    table = torch.from_numpy(grid.patch_voxels)

    def truth_where_hidden(values_BTV: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return torch.where(mask_BL.unsqueeze(-1), gather_patches(values_BTV, table), 1e6)

    measured = heldout.measure(truth_where_hidden, table, grid.n_voxels)
    assert measured.error == 0.0


@pytest.mark.parametrize("targets", ["clip", "frame"])
def test_errors_are_in_the_shards_units_whatever_the_model_predicts(
    one_rank: None, real_shards: Path, parts: tuple[HeldoutClips, TokenGrid], targets: str
) -> None:
    values, grid = parts
    manifest = load_manifest(real_shards)
    _, segments = split_segments(manifest, Holdout(by="frames", fraction=0.25))
    sampler = MaskSampler(grid, MaskConfig(strategy="tube", ratio=0.5))
    heldout = HeldoutClips([ShardReader(manifest)], [segments], sampler, FRAMES, 5, LossConfig(targets=targets))
    table = torch.from_numpy(grid.patch_voxels)
    clip = heldout.read(0)
    values_BTV, signal_BV = clip.values_TV.unsqueeze(0), clip.signal_V.unsqueeze(0)
    truth = gather_patches(values_BTV, table)
    target = make_targets(values_BTV, signal_BV, table, targets)
    _, counted, found = heldout.reconstruct(lambda *_: target, clip, table)
    assert counted.sum() > 1000
    torch.testing.assert_close(found[counted], truth[counted], rtol=1e-4, atol=1e-4)

    # Predicting 0 is the patch's own mean; residual-z's mean frame is 0 too, so the baseline is the same.
    measured = heldout.measure(lambda x, _: torch.zeros_like(gather_patches(x, table)), table, grid.n_voxels)
    assert measured.error == pytest.approx(measured.baseline, rel=1e-4)
    plain = values.measure(lambda x, _: torch.zeros_like(gather_patches(x, table)), table, grid.n_voxels)
    assert 0 < measured.baseline < plain.baseline
    np.testing.assert_array_equal(measured.count_V, plain.count_V)


def test_voxels_outside_brain_or_field_of_view_never_count() -> None:
    mask = np.zeros((2, 2, 4), bool)
    mask[0] = True
    grid = TokenGrid(mask, (2, 2, 2), frames=2, n_stages=1)
    table = torch.from_numpy(grid.patch_voxels)
    signal = torch.ones(1, grid.n_voxels, dtype=torch.bool)
    signal[0, 0] = False
    hidden = torch.tensor([[True, True, False, False]])
    counted = counted_voxels(hidden, signal, table)
    assert counted.shape == (1, 4, 8)
    assert counted[0, :2].sum() == 2 * (4 - 1)
    assert not counted[0, 2:].any()
    target = torch.zeros(1, 4, 8)
    wrong_elsewhere = torch.where(counted, 2.0, 1e9)
    assert reconstruction_loss(wrong_elsewhere, target, counted) == 4.0


def test_a_model_in_seconds_is_measured_on_clips_of_any_length(one_rank: None, real_shards: Path) -> None:
    manifest = load_manifest(real_shards)
    mask, affine = brain_mask(manifest.grid), manifest.grid.affine
    config = ModelConfig(
        patch_mm=24,
        frames=4,
        embed_dim=4,
        depths=(1, 1),
        decoder_depths=(1,),
        d_state=2,
        time="seconds",
        merge_time=(True,),
    )
    torch.manual_seed(0)
    model = build_model(config, mask, manifest.grid.voxel_size, affine).eval()
    _, segments = split_segments(manifest, Holdout(by="frames", fraction=0.25))
    for frames in (4, 9):
        grid = TokenGrid(mask, (6, 6, 6), frames, 2, affine)
        sampler = MaskSampler(grid, MaskConfig(strategy="random", ratio=0.5))
        heldout = HeldoutClips([ShardReader(manifest)], [segments], sampler, frames, limit=2)
        table = torch.from_numpy(grid.patch_voxels)
        measured = heldout.measure(lambda x, hidden: model(x, hidden, manifest.recipe.tr), table, grid.n_voxels)
        assert 0 < measured.error < 10 * measured.baseline and measured.count_V.max() <= 2 * frames
