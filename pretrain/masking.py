"""Which tokens to hide: at random, as tubes, or whole anatomical regions, always the same number of them.

Doodipala et al. 2025 (arXiv 2511.00443) mask whole AAL3 regions. Many tokens carry no label, so "half of the regions"
hides far fewer tokens than "half of the tokens"; strategies are comparable only at an equal budget of hidden tokens,
which every strategy here meets exactly.

Shape suffixes: B clips · S spatial tokens of the first stage · T frames · L = S·T tokens · R regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from boldforge.configs import StrictModel
from boldforge.data_shards import Atlas, Grid
from boldforge.pretrain.tokens import TokenGrid

# A region hides a token of which it fills at least this share; below it, it would mostly hide its neighbours.
_MEMBER_SHARE = 0.25


class MaskConfig(StrictModel):
    """What is hidden from the encoder during pretraining."""

    strategy: Literal["random", "tube", "region"] = Field(
        "region",
        description="random: any tokens; tube: patches over all frames; region: atlas regions over all frames.",
    )
    ratio: float = Field(
        0.5, gt=0, lt=1, description="Share of the brain's tokens hidden, the same for every strategy."
    )
    atlas: str = Field(
        "aal3", description="Atlas name, or a NIfTI label file, for the region strategy and for reports."
    )


@dataclass(frozen=True)
class RegionTokens:
    """Which tokens belong to which atlas region.

    Attributes
    ----------
    ids, names
        Label and name of each region that is present on the grid (R of them).
    share
        float32 [S, R]: the share of the token's volume that the region fills.
    member
        bool [S, R]: true where hiding the region hides the token. Every region has at least one token: the one that
        holds most of it, however small the region is.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    share: np.ndarray
    member: np.ndarray


def region_tokens(atlas: Atlas, grid: Grid, token_grid: TokenGrid) -> RegionTokens:
    """Measure how much of every first-stage token each region fills.

    Every voxel of the atlas, at the atlas's own resolution, is put into the token that holds its centre in millimetres:
    a region of a few cubic millimetres is not lost on a coarse grid.
    """
    stage, ids = token_grid.stages[0], np.array(sorted(atlas.labels))
    labelled = np.argwhere(np.isin(atlas.volume, ids))
    to_grid = np.linalg.inv(grid.affine) @ atlas.affine
    # Rounded first: a voxel on the border of two tokens must fall on the same side on every machine.
    voxel = np.floor(np.round(labelled @ to_grid[:3, :3].T + to_grid[:3, 3], 6) + 0.5).astype(np.int64)
    patch = voxel // np.array(token_grid.patch_size)
    inside = ((voxel >= 0) & (patch < np.array(stage.grid))).all(axis=1)
    token = np.full(len(labelled), stage.n_tokens)
    token[inside] = stage.numbers[tuple(patch[inside].T)]
    region = np.searchsorted(ids, atlas.volume[tuple(labelled.T)])
    counts = np.zeros((stage.n_tokens + 1, len(ids)), dtype=np.int64)
    np.add.at(counts, (token, region), 1)
    counts = counts[:-1]
    present = counts.any(axis=0)
    ids, counts = ids[present], counts[:, present]
    voxel_volume = abs(np.linalg.det(atlas.affine[:3, :3]))
    token_volume = abs(np.linalg.det(grid.affine[:3, :3])) * np.prod(token_grid.patch_size)
    share = (counts * (voxel_volume / token_volume)).astype(np.float32)
    member = share >= _MEMBER_SHARE
    member[share.argmax(axis=0), np.arange(len(ids))] = True
    names = tuple(atlas.labels[int(label)] for label in ids)
    return RegionTokens(ids=tuple(int(label) for label in ids), names=names, share=share, member=member)


class MaskSampler:
    """Draw masks that are a pure function of a key, each hiding exactly `n_hidden` tokens.

    Parameters
    ----------
    token_grid
        Tokens of a clip.
    config
        Strategy and ratio.
    regions
        Needed for the ``region`` strategy.
    """

    def __init__(self, token_grid: TokenGrid, config: MaskConfig, regions: RegionTokens | None = None) -> None:
        if config.strategy == "region" and regions is None:
            raise ValueError("the region strategy needs the regions' tokens")
        self.config = config
        self.frames = token_grid.frames
        self.n_spatial = token_grid.stages[0].n_tokens
        self.n_hidden_spatial = min(max(1, round(config.ratio * self.n_spatial)), self.n_spatial - 1)
        self._regions = regions

    @property
    def n_hidden(self) -> int:
        """Tokens hidden in every clip, whatever the strategy."""
        return self.n_hidden_spatial * self.frames

    def sample(self, keys: Sequence[tuple[int, ...]]) -> Tensor:
        """Draw one mask per key.

        Parameters
        ----------
        keys
            Non-negative integers naming each clip, for example (seed, step, place in the global batch).

        Returns
        -------
        Tensor
            bool [B, L], true where hidden.
        """
        return torch.from_numpy(np.stack([self._one(np.random.default_rng(list(key))) for key in keys]))

    def _one(self, rng: np.random.Generator) -> np.ndarray:
        if self.config.strategy == "random":
            hidden = np.zeros(self.n_spatial * self.frames, dtype=bool)
            hidden[rng.permutation(hidden.size)[: self.n_hidden]] = True
            return hidden
        spatial = np.zeros(self.n_spatial, dtype=bool)
        order = rng.permutation(self.n_spatial) if self.config.strategy == "tube" else self._by_region(rng)
        spatial[order[: self.n_hidden_spatial]] = True
        return np.repeat(spatial, self.frames)

    def _by_region(self, rng: np.random.Generator) -> np.ndarray:
        """Tokens in the order in which they are hidden: region after region, then the tokens without a region.

        The last region that fits is trimmed from its border (the tokens it fills least come last).
        """
        assert self._regions is not None
        order: list[np.ndarray] = []
        for region in rng.permutation(len(self._regions.ids)):
            tokens = np.flatnonzero(self._regions.member[:, region])
            order.append(tokens[np.argsort(-self._regions.share[tokens, region], kind="stable")])
        order.append(rng.permutation(self.n_spatial))
        tokens = np.concatenate(order)
        _, first = np.unique(tokens, return_index=True)
        return tokens[np.sort(first)]
