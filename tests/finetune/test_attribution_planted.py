"""Where a difference was planted, by the simulation's own word, attribution must point."""

import numpy as np
import pytest
import torch

from boldforge.configs import load_config
from boldforge.data_shards import (
    DataRecipe,
    ShardReader,
    SimulationConfig,
    build_shards,
    find_runs,
    load_atlas,
    load_groups,
    load_manifest,
    simulate_cohort,
)
from boldforge.finetune import AttributionConfig, FinetuneConfig, attribute_regions, finetune
from boldforge.finetune.attribution import Parts, integrated_gradients, occlusion
from boldforge.finetune.attribution_null import associate
from boldforge.pretrain import ModelConfig, region_voxels

PLANTED = {"Cerebellum_Crus1_L", "Cerebellum_Crus1_R", "Precuneus_L", "Precuneus_R"}
FOLDS = 3


def _attributed(folder, effect):
    """Attribute the folds' models of a plain classifier: a ridge regression on every region's amplitude."""
    sites = ({"name": "NYU", "tr": 2.0},)
    config = SimulationConfig(n_subjects=18, n_frames=16, effect=effect, sites=sites, regions=tuple(sorted(PLANTED)))
    simulate_cohort(folder / "athena", config)
    build_shards(find_runs(folder / "athena").runs, folder / "shards", DataRecipe(grid="mni4mm", tr=2.0))
    manifest, atlas = load_manifest(folder / "shards"), load_atlas("aal3")
    reader = ShardReader(manifest)
    clips = [reader.read(run, 0, manifest.runs[run].n_frames) for run in range(len(manifest.runs))]
    scans = torch.stack([torch.from_numpy(clip.mean + clip.q * clip.scale) for clip in clips]).double()
    label = np.array([float(run.phenotype["diagnosis"]) for run in manifest.runs])
    fold = np.empty(len(label), dtype=int)
    for value in (0, 1):
        fold[label == value] = np.arange((label == value).sum()) % FOLDS
    regions = region_voxels(atlas, manifest.grid, manifest.brain_mask())
    parts = Parts(regions, load_groups(atlas), manifest.n_voxels)
    share_RV = parts.shares(range(len(regions.ids))).double()

    def amplitude(values_BTV):
        """Standard deviation over time, then its mean over each region."""
        deviation_BV = (values_BTV.var(dim=1, unbiased=False) + 1e-8).sqrt()
        return deviation_BV @ (share_RV / share_RV.sum(dim=1, keepdim=True)).T

    with torch.no_grad():
        amplitude_NR = amplitude(scans)
    gradients, falls = np.empty((len(label), len(parts))), np.empty((len(label), len(parts)))
    for number in range(FOLDS):
        train = fold != number
        x = amplitude_NR[train] - amplitude_NR[train].mean(dim=0)
        y = torch.from_numpy(label[train] - label[train].mean())
        weights_R = x.T @ torch.linalg.solve(x @ x.T + 10 * torch.eye(len(x)), y)

        def score(values_BTV, weights_R=weights_R):
            return amplitude(values_BTV) @ weights_R

        for subject in np.flatnonzero(fold == number):
            clip, flat_V = scans[subject : subject + 1], scans[subject].mean(dim=0)
            parts_R = parts.sums(integrated_gradients(score, clip, flat_V, steps=4, batch_size=4)[0])
            gradients[subject] = parts_R
            falls[subject] = occlusion(score, clip, flat_V, parts, 16, score(clip).numpy())[0]
    n = len(regions.ids)
    return [(associate(rows[:, :n], label, fold, 999, 0), regions.names) for rows in (gradients, falls)]


@pytest.mark.slow
def test_on_a_planted_effect_the_planted_regions_rank_first(tmp_path):
    found, names = _attributed(tmp_path, 2.0)[0]
    assert {names[i] for i in np.argsort(-np.abs(found.slope))[:4]} == PLANTED


@pytest.fixture(scope="module")
def adapted(write_encoder, tmp_path_factory):
    """A fine-tuning, LoRA and head on an encoder of ours, of SIMULATED subjects who differ in four regions."""
    folder = tmp_path_factory.mktemp("adapted")
    config = SimulationConfig(n_subjects=24, effect=2.0, sites=({"name": "NYU", "tr": 2.0},), regions=sorted(PLANTED))
    simulate_cohort(folder / "athena", config)
    recipe = DataRecipe(grid="mni4mm", tr=2.0, normalisation="residual-z", dtype="int16")
    build_shards(find_runs(folder / "athena").runs, folder / "shards", recipe)
    model = ModelConfig(patch_mm=24, frames=8, embed_dim=16, depths=(1,), decoder_depths=(), d_state=4, mlp_ratio=2.0)
    settings = {"shards": folder / "shards", "backbone": write_encoder(model=model), "out": folder / "run"}
    # What is read at each place by itself: an average over the brain could not tell one region from another.
    settings |= {"pool": "tokens_std", "clips": 4, "folds": 4, "baselines": [], "adapter": {"rank": 4, "dropout": 0.1}}
    results = finetune(load_config(FinetuneConfig, settings | {"training": {"epochs": 6, "batch_size": 8}}))
    return folder / "run", results


@pytest.mark.slow
def test_of_an_adapted_encoder_of_ours_the_planted_regions_rank_first_too(adapted):
    run, results = adapted
    assert results["figures"]["auc"] > 0.95, "of a model that has not learned it, nothing can be asked"
    asked = {"model": run, "clips": 1, "steps": 16, "permutations": 999, "methods": ["integrated-gradients"]}
    table = attribute_regions(load_config(AttributionConfig, asked))["methods"]["integrated-gradients"]["table"]
    assert {row["name"] for row in table[:4]} == PLANTED
