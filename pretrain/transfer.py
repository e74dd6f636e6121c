"""Take a pretrained model to another grid than the one it was trained on."""

import dataclasses

import numpy as np
import torch

from boldforge.data_shards import Grid, brain_mask, get_grid, mask_hash
from boldforge.pretrain.export import ExportError, Pretrained, build_model
from boldforge.pretrain.model import NeuroStorm
from boldforge.pretrain.patch_lattice import PatchLattice

_TRAINED = "lattice.trained_SQ"


def move_to_grid(pretrained: Pretrained, grid: Grid, mask: np.ndarray | None = None) -> Pretrained:
    """Return the model with the same weights on the tokens of another grid.

    Places are told apart in millimetres, so another field of view needs nothing else. Where the voxels are of another
    size, patches are averaged or repeated onto the voxels of the grid of training, where the weights live. What the
    model then writes is averaged over the brain of its training alone, and 0 where a voxel meets none of it.

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
    weights.pop(_TRAINED, None)
    if isinstance(model.lattice, PatchLattice):
        weights[_TRAINED] = torch.from_numpy(_trained_at(pretrained.model, _cells(model)))
    model.load_state_dict(weights)
    data = {**pretrained.config["data"], "grid": grid.name, "mask_sha256": mask_hash(mask)}
    described = {**pretrained.config, "model": config.model_dump(mode="json"), "data": data}
    return dataclasses.replace(pretrained, model=model.eval(), config=described)


def _cells(model: NeuroStorm) -> np.ndarray:
    """Return the centres, in mm, of the cells where the weights of each token live: float [S, Q, 3]."""
    points = model.config.patch_points
    assert points is not None, "set by `move_to_grid`"
    along = (np.arange(points) + 0.5) / points - 0.5
    within_Q3 = np.stack(np.meshgrid(along, along, along, indexing="ij"), axis=-1).reshape(-1, 3)
    return model.token_grid.centres(0)[:, None] + model.config.patch_mm * within_Q3


def _trained_at(model: NeuroStorm, places_SQ3: np.ndarray) -> np.ndarray:
    """Say at which places, in mm, a loss has seen what the model writes: float [S, Q, 3] to bool [S, Q]."""
    grid, stage = model.token_grid, model.token_grid.stages[0]
    trained = grid.patch_voxels < grid.n_voxels
    if model.lattice is not None:
        trained = model.lattice.trained_SQ.cpu().numpy()
    points = round(trained.shape[1] ** (1 / 3))
    # In patches from the corner of the box of tokens; a wall belongs to what lies behind it.
    away_SQ3 = (places_SQ3 - grid.centres(0)[0]) / model.config.patch_mm + stage.coordinates[0] + 0.5 + 1e-6
    token_SQ3 = np.floor(away_SQ3).astype(int)
    cell_SQ = np.floor((away_SQ3 - token_SQ3) * points).astype(int) @ (points**2, points, 1)
    inside_SQ = ((token_SQ3 >= 0) & (token_SQ3 < stage.grid)).all(axis=-1)
    number_SQ = stage.numbers[tuple(np.moveaxis(np.where(inside_SQ[..., None], token_SQ3, 0), -1, 0))]
    # The last row is for places without a token.
    number_SQ = np.where(inside_SQ, number_SQ, stage.n_tokens)
    return np.vstack([trained, np.zeros_like(trained[:1])])[number_SQ, cell_SQ]
