"""Cohorts and encoders that a benchmark makes for itself: noise with a planted difference, untrained weights."""

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from boldforge.data_shards import DataRecipe, Run, brain_mask, build_shards, get_grid, mask_hash
from boldforge.pretrain import ModelConfig, build_model, write_export

# Patches of 48 mm leave a few dozen tokens: the real encoder at a size whose epochs take a tenth of a second.
TINY = ModelConfig(
    patch_mm=48,
    frames=4,
    embed_dim=8,
    depths=(2, 2),
    decoder_depths=(1,),
    d_state=4,
    mlp_ratio=2.0,
    backend="torch",
)


def write_encoder(folder: Path, model: ModelConfig = TINY, grid_name: str = "mni4mm") -> Path:
    """Write an untrained encoder's export."""
    grid = get_grid(grid_name)
    mask = brain_mask(grid)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model(model, mask, grid.voxel_size)
    recipe = {"grid": grid_name, "tr": 2.0, "normalisation": "residual-z", "dtype": "int16"}
    recipe |= {"mask_sha256": mask_hash(mask), "clip_length": model.frames}
    content = {"model": model.model_dump(mode="json"), "data": recipe, "training": {}}
    return write_export(network.state_dict(), content, folder)


def write_cohort(folder: Path, subjects: int, frames: int, grid_name: str = "mni4mm") -> Path:
    """Shard subjects of whom every second one fluctuates more in one block of the brain."""
    grid = get_grid(grid_name)
    mask = brain_mask(grid)
    place = np.argwhere(mask)
    planted = (place[:, 0] < mask.shape[0] * 0.45) & (place[:, 1] > mask.shape[1] * 0.55)
    generator = np.random.default_rng(0)
    runs = []
    for number in range(subjects):
        values_TV = generator.standard_normal((frames, len(place)), dtype=np.float32)
        strength = 0.6 + 0.5 * generator.standard_normal() + 1.5 * (number % 2)
        values_TV[:, planted] += strength * generator.standard_normal((frames, 1), dtype=np.float32)
        volume = np.zeros((*grid.shape, frames), dtype=np.float32)
        volume[mask] = values_TV.T
        image = nib.Nifti1Image(volume, grid.affine)
        image.header.set_zooms((*[grid.voxel_size] * 3, 2))
        image.header.set_xyzt_units("mm", "sec")
        path = folder / f"{number}.nii"
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        phenotype = {"diagnosis": number % 2}
        runs.append(
            Run(f"s{number:03d}", "1", ("KKI", "NYU")[number // 2 % 2], 2.0, path, phenotype=phenotype, simulated=True)
        )
    build_shards(runs, folder / "shards", DataRecipe(grid=grid_name, tr=2.0, normalisation="residual-z", dtype="int16"))
    for run in runs:
        run.path.unlink()
    return folder / "shards"
