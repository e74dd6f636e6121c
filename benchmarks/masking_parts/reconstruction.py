"""Held-out frames of real runs, rebuilt under every strategy's masks by an encoder that was trained with one of them.

The error is the mean squared error on hidden brain voxels, over that of predicting the run's mean frame at the same
voxels: below 1 is better than knowing nothing but the mean.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from boldforge.data_shards import (
    Holdout,
    Manifest,
    Segments,
    ShardReader,
    load_atlas,
    load_groups,
    load_manifest,
    split_segments,
)
from boldforge.pretrain import HeldoutClips, MaskConfig, MaskSampler, gather_patches, load_pretrained, region_tokens
from boldforge.pretrain.loss import squared_error
from boldforge.pretrain.model import NeuroStorm
from masking_parts.cells import STRATEGIES, Cell

MASKS_PER_CLIP = 2
HOLDOUT = {"by": "frames", "fraction": 0.25, "seed": 0}
CHOICE = {"by": "frames", "fraction": 0.5, "seed": 0}
"""Left out of training while the recipe is chosen, on those of these frames that `HOLDOUT` does not hold."""


class Numbered:
    """Draws other masks for the same clips: every key gets a number of its own."""

    def __init__(self, sampler: MaskSampler, number: int) -> None:
        self._sampler, self._number = sampler, number

    def sample(self, keys: Sequence[tuple[int, ...]]) -> Tensor:
        """Draw one mask per key, see `MaskSampler.sample`."""
        return self._sampler.sample([(*key, self._number) for key in keys])


def samplers(manifest: Manifest, model: NeuroStorm) -> dict[str, MaskSampler]:
    """Return a sampler of every strategy, all with the same budget."""
    atlas, grid = load_atlas("aal3"), model.token_grid
    regions, groups = region_tokens(atlas, manifest.grid, grid), load_groups(atlas)
    return {
        name: MaskSampler(grid, MaskConfig(strategy=name, ratio=0.5), regions, model.config.window, groups)
        for name in STRATEGIES
    }


def held_frames(manifest: Manifest) -> Segments:
    """Return the frames that are reported: the last quarter of every run."""
    return split_segments(manifest, Holdout.model_validate(HOLDOUT))[1]


def choice_frames(manifest: Manifest) -> Segments:
    """Return the frames that the recipe is chosen on: the third quarter of every run."""
    starts, stops = (split_segments(manifest, Holdout.model_validate(part))[0].table for part in (CHOICE, HOLDOUT))
    return Segments(np.column_stack([starts[:, 0], starts[:, 2], stops[:, 2]]))


@torch.no_grad()
def reconstruct(
    shards: Path,
    export: Path,
    held: Segments,
    tested: Sequence[str] = STRATEGIES,
    masks: int = MASKS_PER_CLIP,
    limit: int = 10_000,
) -> Cell:
    """Measure a pretrained model on held-out clips.

    Parameters
    ----------
    held
        What is cut into clips.
    tested
        Strategies of the masks.
    masks, limit
        Masks per clip; clips at most.

    Returns
    -------
    dict
        ``clips`` (run, first frame), and for each strategy under ``error`` and ``baseline`` the sum of squared errors
        of every clip over its hidden voxels and masks: of the model, and of the mean frame.
    """
    manifest, model = load_manifest(shards), load_pretrained(export).model
    reader, patch_voxels = ShardReader(manifest), model.patch_voxels
    found: Cell = {"error": {}, "baseline": {}}
    every = samplers(manifest, model)
    for name in tested:
        sums = []
        for number in range(masks):
            clips = HeldoutClips([reader], [held], Numbered(every[name], number), model.config.frames, limit)
            rows = []
            for place in range(len(clips.clips)):
                clip = clips.read(place)
                _, counted_BLP, rebuilt_BLP = clips.reconstruct(model, clip, patch_voxels)
                truth_BLP = gather_patches(clip.values_TV.unsqueeze(0), patch_voxels)
                mean_BLP = gather_patches(clip.mean_V.expand(1, model.config.frames, -1), patch_voxels)
                pair = (rebuilt_BLP, mean_BLP)
                rows.append([float(squared_error(guess, truth_BLP, counted_BLP)) for guess in pair])
            sums.append(rows)
        total = np.sum(sums, axis=0)
        found["error"][name], found["baseline"][name] = total[:, 0].tolist(), total[:, 1].tolist()
        found["clips"] = [list(clip[1:]) for clip in clips.clips]
    return found
