"""A pretrained encoder, an adapter and run folders, small enough to be made in a second."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from boldforge.data_shards import atlas_on_grid, brain_mask, get_grid, load_atlas
from boldforge.finetune import AdapterConfig, AdhdDiagnosis, Classifier, load_backbone, save_adapter
from boldforge.pretrain import ModelConfig, PretrainConfig, build_model, write_export

FRAMES = 4
FIGURES = {
    "accuracy": 0.75,
    "balanced_accuracy": 0.75,
    "auc": 0.8125,
    "sensitivity": 0.5,
    "specificity": 1.0,
    "n": 8,
    "n_positive": 4,
}
PARTS = {
    "train": {"n": 24, "n_positive": 12},
    "validation": {"n": 8, "n_positive": 4},
    "test": {"n": 8, "n_positive": 4},
}
MODEL = ModelConfig(
    patch_mm=48,
    frames=FRAMES,
    embed_dim=8,
    depths=(2, 2),
    decoder_depths=(1,),
    d_state=4,
    mlp_ratio=2.0,
    backend="torch",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def boldforge():
    """Run the real command in a process of its own."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "boldforge.launch.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)

    return run


@pytest.fixture(scope="session")
def pretraining(tmp_path_factory) -> Path:
    """A pretraining run folder as a finished run leaves it, with an untrained model."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    out.mkdir()
    grid = get_grid("mni4mm")
    mask = brain_mask(grid)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build_model(MODEL, mask, grid.voxel_size, grid.affine)
    config = PretrainConfig(shards=out / "shards", out=out, model=MODEL, steps=20)
    data = {
        "grid": "mni4mm",
        "tr": 2.0,
        "normalisation": "residual-z",
        "dtype": "int16",
        "clip_length": FRAMES,
        "atlas": "aal3",
        "atlas_sha256": "ab" * 32,
        "manifest_hash": "cd" * 32,
        "n_runs": 2,
        "n_subjects": 2,
        "n_frames": 154,
        "simulated": False,
    }
    training = config.model_dump(mode="json", exclude={"shards", "out", "model"}) | {"step": 20}
    described = {"model": MODEL.model_dump(mode="json"), "data": data, "training": training}
    write_export(model.state_dict(), described, out / "export")
    (out / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json") | {"manifest_hash": "cd" * 32}))
    lines = ["step,loss,lr,grad_norm,frames_per_second,heldout_error,heldout_baseline"]
    for step in range(1, 21):
        held = f"{1.1 - step / 50},1.0" if step % 10 == 0 else ","
        lines.append(f"{step},{1.2 - step / 40},0.001,0.5,8.0,{held}")
    (out / "metrics.csv").write_text("\n".join(lines) + "\n")
    summary = {
        "steps": 20,
        "ranks": 2,
        "zero_stage": 2,
        "parameters": 12345,
        "heldout_clips": 4,
        "heldout_error": 0.7,
        "heldout_baseline": 1.0,
        "simulated": False,
    }
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "regions.csv").write_text("region,name,voxels_measured,error,baseline\n1,Precentral_L,10,0.5,1.0\n")
    _write_reconstruction(out / "reconstruction.npz", mask, grid)
    return out


def _write_reconstruction(path: Path, mask: np.ndarray, grid) -> None:
    generator = np.random.default_rng(0)
    labels = np.where(mask, atlas_on_grid(load_atlas(), grid), 0).astype(np.int16)
    frames = np.where(mask, generator.standard_normal((2, *mask.shape)), np.nan).astype(np.float32)
    np.savez_compressed(
        path,
        original=frames,
        reconstructed=frames * np.float32(0.5),
        hidden=np.stack([labels == 1, np.isin(labels, (2, 41))]),
        hidden_regions=np.array([json.dumps(["Precentral_L"]), json.dumps(["Precentral_R", "Hippocampus_L"])]),
        run=np.array(["sub-secret01_task-rest", "sub-secret02_task-rest"]),
        labels=labels,
        affine=np.asarray(grid.affine),
    )


@pytest.fixture(scope="session")
def adapter(pretraining, tmp_path_factory) -> Path:
    """An adapter for the run's encoder, trained on nothing, with the figures of a simulated cohort."""
    classifier = Classifier(load_backbone(pretraining / "export"), AdhdDiagnosis(), AdapterConfig(rank=2))
    figures = {
        "figures": FIGURES,
        "measured_by": "test subjects held out of a sweep, scored once",
        "simulated": True,
        "subjects": PARTS,
    }
    return save_adapter(classifier, tmp_path_factory.mktemp("best") / "adapter", figures)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory) -> Path:
    """A sweep's folder as the report reads it."""
    trials = [
        {
            "rank": rank,
            "trainable_parameters": 1000 * rank,
            "total_parameters": 50_000,
            "epochs": 6 if rank == 2 else 3,
            "stopped_early": rank != 2,
            "best_epoch": 3,
            "validation_auc": 0.9 if rank == 2 else 0.7,
            "validation_loss": 0.6,
        }
        for rank in (2, 4)
    ]
    results = {
        "task": "adhd",
        "simulated": True,
        "measured_by": "test subjects held out of a sweep, scored once",
        "figures": FIGURES,
        "intervals": {"auc": [0.6, 1.0]},
        "subjects": PARTS,
        "sentence": "Rank 2 was best.",
        "best": trials[0],
        "trials": trials,
        "roc": {"fpr": [0.0, 0.0, 0.5, 1.0], "tpr": [0.0, 0.5, 1.0, 1.0]},
        "selected_by": "validation auc, ties to the lower rank",
    }
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.json").write_text(json.dumps(results))
    return folder
