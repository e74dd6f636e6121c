"""What two numbers do: a hidden token is foretold from the mean of its frame and from its nearest visible tokens.

The two coefficients are fitted on training frames by least squares, one pair for each strategy's masks. An encoder that
does no better has learned to smooth, and one that does worse has not learned that.
"""

from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from boldforge.configs import load_config
from boldforge.data_shards import Holdout, ShardReader, load_manifest, split_segments
from boldforge.pretrain import HeldoutClips, ModelConfig, build_model
from boldforge.pretrain.evaluate import HeldoutClip
from boldforge.pretrain.tokens import TokenGrid
from masking_parts.cells import RECIPE, STRATEGIES, Cell
from masking_parts.reconstruction import HOLDOUT, MASKS_PER_CLIP, Numbered, samplers

NEAREST = 6
Normal = tuple[np.ndarray, np.ndarray, float]
"""Sums over hidden voxels: of products of the two regressors [2, 2], of regressors and value [2], of squared values."""


def foretell(shards: Path, masks: int = MASKS_PER_CLIP, limit: int = 10_000) -> Cell:
    """Fit on training clips and measure on held-out clips and masks, as `reconstruction.reconstruct` does."""
    manifest = load_manifest(shards)
    config = load_config(ModelConfig, RECIPE["model"])
    model = build_model(config, manifest.brain_mask(), manifest.grid.voxel_size, manifest.grid.affine)
    parts = split_segments(manifest, Holdout.model_validate(HOLDOUT))
    found: Cell = {"error": {}, "coefficients": {}}
    for name, sampler in samplers(manifest, model).items():
        sums: list[list[list[Normal]]] = []
        for segments in parts:
            each = [
                HeldoutClips([ShardReader(manifest)], [segments], Numbered(sampler, number), config.frames, limit)
                for number in range(masks)
            ]
            sums.append(
                [[_sums(clips, place, model.token_grid) for clips in each] for place in range(len(each[0].clips))]
            )
        fitted, held = sums
        products, moments = (sum(mask[part] for clip in fitted for mask in clip) for part in (0, 1))
        b = np.linalg.solve(products, moments)
        errors = [[yy - 2 * b @ xy + b @ xx @ b for xx, xy, yy in clip] for clip in held]
        found["error"][name] = np.sum(errors, axis=1).tolist()
        found["coefficients"][name] = b.tolist()
        found["clips"] = [list(clip[1:]) for clip in each[0].clips]
    assert set(found["error"]) == set(STRATEGIES)
    return found


def _sums(clips: HeldoutClips, place: int, grid: TokenGrid) -> Normal:
    clip: HeldoutClip = clips.read(place)
    _, run, start = clips.clips[place]
    hidden_ST = clips._sampler.sample([(1, run, start)])[0].numpy().reshape(-1, grid.frames)
    values_TV, signal_V = clip.values_TV.double().numpy(), clip.signal_V.numpy()
    padded_TV = np.pad(values_TV * signal_V, ((0, 0), (0, 1)))
    patches_TSP = padded_TV[:, grid.patch_voxels]
    count_S = np.pad(signal_V, (0, 1))[grid.patch_voxels].sum(axis=1)
    total_ST, square_ST = patches_TSP.sum(axis=2).T, np.square(patches_TSP).sum(axis=2).T
    mean_ST = total_ST / np.maximum(count_S, 1)[:, None]
    covered_ST = np.broadcast_to(count_S[:, None] > 0, hidden_ST.shape)
    visible, wanted = covered_ST & ~hidden_ST, covered_ST & hidden_ST
    at = [np.column_stack([grid.stages[0].coordinates[s], t]) for s, t in (visible.nonzero(), wanted.nonzero())]
    nearest = cKDTree(at[0]).query(at[1], NEAREST)[1]
    frame = np.array([mean_ST[visible[:, t], t].mean() for t in range(grid.frames)])
    x = np.column_stack([frame[at[1][:, 3]], mean_ST[visible][nearest].mean(axis=1)])
    weight = count_S[wanted.nonzero()[0]]
    return x.T * weight @ x, x.T @ total_ST[wanted], float(square_ST[wanted].sum())
