"""Take a pretrained model to another grid than the one it was trained on."""

import dataclasses

import numpy as np
import torch

from boldforge.data_shards import Grid, brain_mask, get_grid, mask_hash
from boldforge.pretrain.export import ExportError, Pretrained, build_model


def move_to_grid(pretrained: Pretrained, grid: Grid, mask: np.ndarray | None = None) -> Pretrained:
    """Return the model with the same weights on the tokens of another grid.

    Places are told apart in millimetres, so another field of view needs nothing else. Where the voxels are of another
    size, patches are averaged or repeated onto the voxels of the grid of training, where the weights live.

    Parameters
    ----------
    pretrained
        What `load_pretrained` returns; of ``position: mm``.
    grid
        Voxels of the new data, axes to the right, to the front and up. A patch must be a whole number of them.
    mask
        bool [X, Y, Z], the brain there; the grid's own unless given.

    Returns
    -------
    Pretrained
        ``config["data"]`` names the new grid and mask, and ``config["model"]`` the points of the weights' patches.

    Raises
    ------
    ExportError
        If the model has a learned position for each token of its own grid.
    ConfigError
        If the patches do not fit the grid.
    """
    config, own = pretrained.model.config, get_grid(pretrained.config["data"]["grid"])
    if config.position != "mm":
        raise ExportError(
            f"the model was pretrained on grid {own.name} with a learned position for each of its patches "
            f"(model.position: learned), so it cannot read grid {grid.name}; shard on {own.name}, or use a model that "
            "was pretrained with model.position=mm."
        )
    config = config.model_copy(update={"patch_points": config.patch_points or config.patch_size(own.voxel_size)[0]})
    mask = brain_mask(grid) if mask is None else mask
    model = build_model(config, mask, grid.voxel_size, grid.affine)
    weights = pretrained.model.state_dict()
    weights["brain_mask_bits"] = torch.from_numpy(np.packbits(mask.reshape(-1)))
    model.load_state_dict(weights)
    data = {**pretrained.config["data"], "grid": grid.name, "mask_sha256": mask_hash(mask)}
    described = {**pretrained.config, "model": config.model_dump(mode="json"), "data": data}
    return dataclasses.replace(pretrained, model=model.eval(), config=described)
