"""SIMULATED cohorts: what a frozen encoder knows of a planted regional difference, beside one that is untrained.

A logistic regression reads the frozen encoder. Folds keep subjects apart and are nested: the regularisation is chosen
on validation subjects, the test subjects of a fold are scored once. Plain baselines are read in the same folds.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from boldforge.configs import load_config
from boldforge.data_shards import (
    DataRecipe,
    Manifest,
    ShardReader,
    SimulationConfig,
    build_shards,
    find_runs,
    load_manifest,
    simulate_cohort,
)
from boldforge.finetune import AdhdDiagnosis, NeuroStormBackbone, subject_folds
from boldforge.finetune.backbone import Pool
from boldforge.finetune.baselines import baseline_scores, subject_features
from boldforge.finetune.cohort import Subject, find_cohort
from boldforge.pretrain import ModelConfig, Pretrained, build_model
from masking_parts.cells import RECIPE, Cell

POOLS: tuple[Pool, ...] = ("multiscale", "tokens_std")
BASELINES = ("site", "connectivity", "image")
FOLDS, REPEATS = 5, 3
HOLDOUT = {"by": "subject", "fraction": 0.1, "seed": 0}


def make_cohort(folder: Path, simulation: SimulationConfig) -> Path:
    """Simulate a cohort and shard it, unless that has been done; return the folder of shards."""
    shards = folder / "shards"
    if not (shards / "manifest.json").is_file():
        simulate_cohort(folder / "scans", simulation)
        build_shards(find_runs(folder / "scans").runs, shards, DataRecipe(grid="mni4mm", tr=2.0))
    return shards


def subjects_of(manifest: Manifest) -> tuple[Subject, ...]:
    """Return the labelled subjects of a cohort, all of them SIMULATED."""
    cohort = find_cohort(manifest, AdhdDiagnosis(), RECIPE["model"]["frames"])
    assert cohort.simulated, f"{manifest.folder} holds people; this part is about SIMULATED cohorts"
    return cohort.subjects


def untrained(shards: Path, seed: int) -> Pretrained:
    """Return the network that pretraining starts from with this seed."""
    manifest = load_manifest(shards)
    torch.manual_seed(seed)
    grid, config = manifest.grid, load_config(ModelConfig, RECIPE["model"])
    model = build_model(config, manifest.brain_mask(), grid.voxel_size, grid.affine)
    return Pretrained(model.eval(), {"data": manifest.recipe.model_dump(mode="json")}, "")


@torch.no_grad()
def probe(shards: Path, pretrained: Pretrained, clips: int) -> Cell:
    """Embed every subject, the mean over evenly spaced clips, and read the diagnosis off it by every pooling.

    Returns
    -------
    dict
        ``scores``: for each pooling one row per repeat, one score per subject; ``labels``.
    """
    manifest = load_manifest(shards)
    reader, frames = ShardReader(manifest), pretrained.model.config.frames
    backbones = [NeuroStormBackbone(pretrained, pool) for pool in POOLS]
    rows: list[list[np.ndarray]] = []
    for subject in subjects_of(manifest):
        last = manifest.runs[subject.runs[0]].n_frames - frames
        starts = np.unique(np.linspace(0, last, clips).round().astype(int)).tolist()
        parts = [reader.read(subject.runs[0], start, frames) for start in starts]
        values_BTV = torch.from_numpy(np.stack([part.mean + part.q * part.scale for part in parts])).float()
        rows.append([backbone.embed(values_BTV).mean(dim=0).double().numpy() for backbone in backbones])
    return _scores(manifest, {pool: np.stack(each) for pool, each in zip(POOLS, zip(*rows, strict=True), strict=True)})


def baselines(shards: Path) -> Cell:
    """Read the diagnosis off the plain features in the same folds; as `probe` returns it."""
    manifest = load_manifest(shards)
    return _scores(manifest, subject_features(ShardReader(manifest), subjects_of(manifest), BASELINES))


def _scores(manifest: Manifest, features: Mapping[str, np.ndarray]) -> Cell:
    subjects = subjects_of(manifest)
    names, labels = [subject.name for subject in subjects], [int(subject.label) for subject in subjects]
    sites, place = [subject.site for subject in subjects], {name: number for number, name in enumerate(names)}
    scores = {}
    for kind, rows in features.items():
        repeats = []
        for repeat in range(REPEATS):
            row = np.zeros(len(names))
            for fold in subject_folds(names, labels, sites, FOLDS, seed=repeat):
                parts = [[place[name] for name in part] for part in (fold.train, fold.validation, fold.test)]
                model = kind if kind in BASELINES else "connectivity"  # the same logistic regression
                row[parts[2]] = baseline_scores(model, AdhdDiagnosis(), rows, labels, *parts)[1]
            repeats.append(row.tolist())
        scores[kind] = repeats
    return {"scores": scores, "labels": labels}
