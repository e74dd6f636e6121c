"""Write what a pretraining run leaves behind: the summary, per-region errors, examples to look at, exported weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import yaml

from boldforge.configs import load_config
from boldforge.data_shards import Atlas, Manifest, atlas_on_grid, load_atlas
from boldforge.pretrain.config import PretrainConfig
from boldforge.pretrain.datasets import identity, open_datasets, split_record
from boldforge.pretrain.evaluate import HeldoutError
from boldforge.pretrain.export import write_export
from boldforge.pretrain.region_errors import region_errors, write_map, write_table
from boldforge.pretrain.regions import RegionTokens
from boldforge.pretrain.run import Run
from boldforge.pretrain.run_folder import newest_checkpoint
from boldforge.pretrain.tokens import scatter_patches
from boldforge.pretrain.training_state import read_weights


def finish_run(run: Run) -> None:
    """Write the summary, the per-region errors, a reconstruction to look at and the exported weights."""
    measured = run.measure()
    example = _reconstruct_examples(run)
    if run.rank == 0:
        out = run.config.out
        _write_regions(run, measured, out)
        np.savez_compressed(out / "reconstruction.npz", **example)  # type: ignore[arg-type]  # its stub takes no arrays by name
        summary = {
            "steps": run.config.steps,
            "ranks": run.world_size,
            "zero_stage": run.config.zero_stage,
            "parameters": sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in run.engine.parameters()),
            "tokens_per_clip": run.token_grid.stages[0].n_tokens * run.config.model.frames,
            "hidden_tokens_per_clip": run.sampler.n_hidden,
            "heldout_clips": len(run.heldout.clips),
            "heldout_error": measured.error,
            "heldout_baseline": measured.baseline,
            "simulated": any(manifest.simulated for manifest in run.manifests),
        }
        checkpoint = newest_checkpoint(out / "checkpoints")
        assert checkpoint is not None, "the loop ends with a checkpoint"
        export_checkpoint(out, out / "export", checkpoint)
        # Last: whoever finds a summary finds everything else too.
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    dist.barrier()


def data_recipe(config: PretrainConfig, manifests: Sequence[Manifest], atlas: Atlas) -> dict[str, Any]:
    """Everything another data set must share, or a reader must know, to use the weights; goes into ``config.json``."""
    # The same label in two datasets is two people.
    n_subjects = sum(len(np.unique(manifest.index["subject"])) for manifest in manifests)
    return {
        **manifests[0].recipe.model_dump(mode="json"),
        "clip_length": config.model.frames,
        "atlas": atlas.name,
        "atlas_sha256": atlas.sha256,
        **identity(config.shards, manifests),
        "mask_sha256": manifests[0].mask_sha256,
        "n_runs": sum(manifest.n_runs for manifest in manifests),
        "n_subjects": n_subjects,
        "n_frames": sum(manifest.n_frames for manifest in manifests),
        "simulated": any(manifest.simulated for manifest in manifests),
    }


def export_checkpoint(run_dir: str | Path, out: str | Path, checkpoint: Path) -> Path:
    """Turn a committed checkpoint of a pretraining run into an export.

    Parameters
    ----------
    run_dir
        The run folder (its ``config.yaml`` names recipe and data).
    out
        Folder to write.
    checkpoint
        A folder that `boldforge.pretrain.run_folder.newest_checkpoint` returned.
    """
    content = yaml.safe_load((Path(run_dir) / "config.yaml").read_text())
    config = load_config(PretrainConfig, split_record(content)[0])
    manifests = open_datasets(config.shards, config.shard_cache)
    training = config.model_dump(mode="json", exclude={"shards", "shard_cache", "out", "model"})
    step = json.loads((checkpoint / "checkpoint.json").read_text())["step"]
    description = {
        "model": config.model.model_dump(mode="json"),
        "data": data_recipe(config, manifests, load_atlas(config.mask.atlas, config.mask.labels)),
        "training": {**training, "step": step},
    }
    return write_export(read_weights(checkpoint), description, Path(out))


def _reconstruct_examples(run: Run) -> dict[str, np.ndarray]:
    """Reconstruct the middle frame of the first held-out clip of up to four runs; arrays for ``reconstruction.npz``."""
    run.engine.eval()
    first = {clip[:2]: number for number, clip in reversed(list(enumerate(run.heldout.clips)))}
    frame, V, to_volume = run.config.model.frames // 2, run.token_grid.n_voxels, run.token_grid.to_volume
    originals, predictions, hidden, names, keys = [], [], [], [], []
    for (dataset, source), number in sorted(first.items())[:4]:
        clip = run.heldout.read(number)
        mask_BL, counted_BLP, patches_BLP = run.heldout.reconstruct(run.predict, clip, run.patch_voxels)
        predicted_BTV = scatter_patches(patches_BLP.float(), run.patch_voxels, V).cpu()
        hidden_BTV = scatter_patches(counted_BLP.float(), run.patch_voxels, V).cpu()
        originals.append(to_volume(clip.values_TV[frame].numpy()))
        predictions.append(to_volume(predicted_BTV[0, frame].numpy()))
        hidden.append(to_volume(hidden_BTV[0, frame].numpy(), fill=0.0) > 0)
        spatial_S = mask_BL.view(-1, run.config.model.frames)[:, frame].cpu().numpy()
        names.append(json.dumps(_hidden_regions(run.regions, spatial_S)))
        keys.append(run.manifests[dataset].runs[source].key)
    run.engine.train()
    return {
        "original": np.stack(originals),
        "reconstructed": np.stack(predictions),
        "hidden": np.stack(hidden),
        "hidden_regions": np.array(names),
        "run": np.array(keys),
        "labels": np.where(run.token_grid.mask, atlas_on_grid(run.atlas, run.manifest.grid), 0).astype(np.int16),
        "affine": np.asarray(run.manifest.grid.affine, dtype=np.float64),
    }


def _hidden_regions(regions: RegionTokens, spatial_S: np.ndarray) -> list[str]:
    """Names of the regions of which every token is hidden."""
    whole = (regions.member & spatial_S[:, None]).sum(axis=0) == regions.member.sum(axis=0)
    return [name for name, is_whole in zip(regions.names, whole, strict=True) if is_whole]


def _write_regions(run: Run, measured: HeldoutError, out: Path) -> None:
    """Write the held-out error of every region as a table and as brain maps."""
    rows = region_errors(measured, run.region_voxels)
    write_table(out / "regions.csv", rows)
    maps = {
        "region_error.nii.gz": {row.region: row.error for row in rows},
        "region_error_ratio.nii.gz": {row.region: row.error / row.baseline for row in rows if row.baseline > 0},
    }
    for name, values in maps.items():
        write_map(out / name, values, run.region_voxels, run.manifest.grid, run.token_grid.mask)
