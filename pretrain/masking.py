"""Which tokens to hide: at random, as tubes, windows, or whole anatomical regions.

Doodipala et al. 2025 (arXiv 2511.00443) mask whole AAL3 regions. Many tokens carry no label, so "half of the regions"
hides far fewer tokens than "half of the tokens"; strategies are comparable only at an equal budget of hidden tokens,
which every strategy here but one meets exactly. The one is ``atlas``, which is NeuroSTORM's (Wang et al. 2025, arXiv
2506.11167): a share of the regions, whatever they hold.

Shape suffixes: B clips · S spatial tokens of the first stage · T frames · L = S·T tokens · R regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from boldforge.configs import ConfigError, StrictModel
from boldforge.data_shards import Atlas, AtlasError, Grid
from boldforge.pretrain.tokens import TokenGrid

# A region hides a token of which it fills at least this share; below it, it would mostly hide its neighbours.
_MEMBER_SHARE = 0.25


class MaskConfig(StrictModel):
    """What is hidden from the encoder during pretraining."""

    strategy: Literal["random", "tube", "window", "region", "atlas"] = Field(
        "region",
        description="random: any tokens; tube: patches over all frames; window: whole windows of the first stage; "
        "region: atlas regions over all frames; atlas: NeuroSTORM's, that share of the regions, however large.",
    )
    time: Literal["random", "tube"] = Field(
        "random",
        description="tube: what is hidden is hidden in all frames (tube, region and atlas always do).",
    )
    ratio: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the brain's tokens hidden, the same for every strategy but atlas (of its regions).",
    )
    atlas: str = Field(
        "aal3", description="Atlas name, or a NIfTI label file, for the region and atlas strategies and for reports."
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

    Raises
    ------
    AtlasError
        If no region of the atlas holds a token: it lies in another space.
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
    if not present.any():
        raise AtlasError(
            f"Atlas {atlas.name}: none of its {len(ids)} regions meets the brain of grid {grid.name}; check that it is "
            "in MNI space and that its affine is right."
        )
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
        Needed for the ``region`` and ``atlas`` strategies.
    window
        Tokens along x, y, z, t of what the ``window`` strategy hides at once.

    Attributes
    ----------
    n_hidden : int or None
        Tokens hidden in every clip; None for ``atlas``, where it depends on the regions drawn.

    Raises
    ------
    ConfigError
        If the ratio leaves no visible token.
    """

    def __init__(
        self,
        token_grid: TokenGrid,
        config: MaskConfig,
        regions: RegionTokens | None = None,
        window: tuple[int, int, int, int] = (4, 4, 4, 4),
    ) -> None:
        self.config = config
        self.frames = token_grid.frames
        self.n_spatial = token_grid.stages[0].n_tokens
        self.n_hidden_spatial = max(1, round(config.ratio * self.n_spatial))
        if self.n_hidden_spatial >= self.n_spatial:
            raise ConfigError(
                f"mask.ratio is {config.ratio:g}, which hides all {self.n_spatial} patches of this grid, so that "
                f"nothing is left to see; use at most {max(0.0, 1 - 1 / self.n_spatial):.3g}."
            )
        if config.strategy in ("region", "atlas"):
            if regions is None:
                raise ValueError(f"the {config.strategy} strategy needs the regions' tokens")
            if len(regions.share) != self.n_spatial:
                raise ValueError(
                    f"the regions were measured on a grid of {len(regions.share)} patches, this one has "
                    f"{self.n_spatial}; measure them again with region_tokens"
                )
        self._regions = regions
        coordinates = token_grid.stages[0].coordinates // window[:3]
        _, windows_S = np.unique(coordinates, axis=0, return_inverse=True)
        self._windows_S = windows_S.reshape(-1)
        self._windows_T = np.arange(self.frames) // window[3]
        whole = config.strategy in ("tube", "region", "atlas") or config.time == "tube"
        self.n_hidden = None if config.strategy == "atlas" else self.n_hidden_spatial * self.frames
        self._draw = self._one_frame if whole else self._all_tokens

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
        return torch.from_numpy(np.stack([self._draw(np.random.default_rng(list(key))) for key in keys]))

    def _all_tokens(self, rng: np.random.Generator) -> np.ndarray:
        """Hide tokens of any frame: bool [L]."""
        n_tokens = self.n_spatial * self.frames
        if self.config.strategy == "window":
            windows_L = (self._windows_S[:, None] * (self._windows_T[-1] + 1) + self._windows_T).reshape(-1)
            order = _by_group(rng, windows_L)
        else:
            order = rng.permutation(n_tokens)
        hidden = np.zeros(n_tokens, dtype=bool)
        hidden[order[: self.n_hidden]] = True
        return hidden

    def _one_frame(self, rng: np.random.Generator) -> np.ndarray:
        """Hide the same patches in all frames: bool [L]."""
        hidden = np.zeros(self.n_spatial, dtype=bool)
        if self.config.strategy == "atlas":
            hidden = self._share_of_regions(rng)
        elif self.config.strategy == "window":
            hidden[_by_group(rng, self._windows_S)[: self.n_hidden_spatial]] = True
        elif self.config.strategy == "region":
            hidden[self._by_region(rng)[: self.n_hidden_spatial]] = True
        else:
            hidden[rng.permutation(self.n_spatial)[: self.n_hidden_spatial]] = True
        return np.repeat(hidden, self.frames)

    def _share_of_regions(self, rng: np.random.Generator) -> np.ndarray:
        """Hide every patch whose label is drawn, bool [S]; its label is the region that fills most of it."""
        assert self._regions is not None
        share_SR = self._regions.share
        label_S = np.where(share_SR.any(axis=1), share_SR.argmax(axis=1), -1)
        labels = np.unique(label_S[label_S >= 0])
        drawn = rng.permutation(labels)[: max(1, int(self.config.ratio * len(labels)))]
        return np.isin(label_S, drawn)

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


def _by_group(rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
    """Return the tokens group after group, the groups in random order; `group` says which each token belongs to."""
    rank = rng.permutation(int(group.max()) + 1)
    return np.argsort(rank[group], kind="stable")
