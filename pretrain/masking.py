"""Which tokens to hide: at random, as tubes, windows, or whole anatomical regions.

Doodipala et al. 2025 (arXiv 2511.00443) mask whole AAL3 regions. Many tokens carry no label, so "half of the regions"
hides far fewer tokens than "half of the tokens"; strategies are comparable only at an equal budget of hidden tokens,
which every strategy here but one meets exactly. The one is ``atlas``, which is NeuroSTORM's (Wang et al. 2025, arXiv
2506.11167): a share of the regions, whatever they hold.

Shape suffixes: B clips · S spatial tokens of the first stage · T frames · L = S·T tokens · R regions.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from boldforge.configs import ConfigError, StrictModel
from boldforge.pretrain.regions import RegionTokens, grouped, homologous_pairs
from boldforge.pretrain.tokens import TokenGrid

_BY_ANATOMY = ("region", "pair", "group", "atlas")


class MaskConfig(StrictModel):
    """What is hidden from the encoder during pretraining."""

    strategy: Literal["random", "tube", "window", "region", "pair", "group", "atlas"] = Field(
        "region",
        description="random: any tokens; tube: patches over all frames; window: whole windows of the first stage; "
        "region: atlas regions over all frames; pair: regions together with those of the other side; group: groups of "
        "regions, see groups; atlas: NeuroSTORM's, that share of the regions, however large.",
    )
    time: Literal["random", "tube"] = Field(
        "random",
        description="tube: what is hidden is hidden in all frames (tube and the strategies by anatomy always do).",
    )
    ratio: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the brain's tokens hidden, the same for every strategy but atlas (of its regions).",
    )
    atlas: str = Field(
        "aal3",
        description="Atlas name, or a NIfTI label file: what the strategies by anatomy hide, the regional terms of the "
        "loss count and reports name.",
    )
    labels: Path | None = Field(
        None,
        description="Label table of the atlas, one 'id name' per line. None: the atlas's own, or numbers as names.",
    )
    groups: Path | None = Field(
        None,
        description="Table of the group strategy, one 'region group' per line. None: the atlas's own (AAL3: lobes, "
        "insula, limbic, basal ganglia, thalamus, brainstem, cerebellum).",
    )


class MaskSampler:
    """Draw masks that are a pure function of a key, each hiding exactly `n_hidden` tokens.

    Parameters
    ----------
    token_grid
        Tokens of a clip.
    config
        Strategy and ratio.
    regions
        Needed for the strategies by anatomy.
    window
        Tokens along x, y, z, t of what the ``window`` strategy hides at once.
    groups
        Needed for the ``group`` strategy: the ids of each group's regions.

    Attributes
    ----------
    n_hidden : int or None
        Tokens hidden in every clip; None for ``atlas``, where it depends on the regions drawn.

    Raises
    ------
    ConfigError
        If the ratio leaves no visible token or hides none, or the atlas has no pairs or groups to hide.
    """

    def __init__(
        self,
        token_grid: TokenGrid,
        config: MaskConfig,
        regions: RegionTokens | None = None,
        window: tuple[int, int, int, int] = (4, 4, 4, 4),
        groups: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.config = config
        self.frames = token_grid.frames
        self.n_spatial = token_grid.stages[0].n_tokens
        self.n_hidden_spatial = 0 if config.strategy == "atlas" else _budget(config.ratio, self.n_spatial)
        if config.strategy in _BY_ANATOMY:
            if regions is None:
                raise ValueError(f"the {config.strategy} strategy needs the regions' tokens")
            if len(regions.share) != self.n_spatial:
                raise ValueError(
                    f"the regions were measured on a grid of {len(regions.share)} patches, this one has "
                    f"{self.n_spatial}; measure them again with region_tokens"
                )
        self._regions = regions
        if config.strategy == "atlas" and len(np.unique(self._labels())) < 2:
            raise ConfigError(
                f"mask.strategy is atlas, but one region fills all {self.n_spatial} patches of this grid, so that "
                "nothing is left to see where it is hidden; use an atlas of several regions, or strategy region."
            )
        self._units = _units(config.strategy, regions, groups)
        coordinates = token_grid.stages[0].coordinates // window[:3]
        _, windows_S = np.unique(coordinates, axis=0, return_inverse=True)
        self._windows_S = windows_S.reshape(-1)
        self._windows_T = np.arange(self.frames) // window[3]
        whole = config.strategy in ("tube", *_BY_ANATOMY) or config.time == "tube"
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
        elif self.config.strategy in _BY_ANATOMY:
            hidden[self._by_unit(rng)[: self.n_hidden_spatial]] = True
        else:
            hidden[rng.permutation(self.n_spatial)[: self.n_hidden_spatial]] = True
        return np.repeat(hidden, self.frames)

    def _share_of_regions(self, rng: np.random.Generator) -> np.ndarray:
        """Hide every patch whose label is drawn, bool [S]."""
        label_S = self._labels()
        labels = np.unique(label_S[label_S >= 0])
        drawn = rng.permutation(labels)[: max(1, int(self.config.ratio * len(labels)))]
        return np.isin(label_S, drawn)

    def _labels(self) -> np.ndarray:
        """Return each patch's label, the place of the region that fills most of it, int64 [S]; -1 where none does."""
        assert self._regions is not None
        share_SR = self._regions.share
        return np.where(share_SR.any(axis=1), share_SR.argmax(axis=1), -1)

    def _by_unit(self, rng: np.random.Generator) -> np.ndarray:
        """Tokens in the order in which they are hidden: unit after unit, then the tokens that no unit hides.

        A unit is a region, a pair or a group; inside it, region goes after region. The last one that fits is trimmed
        from its border (the tokens it fills least come last).
        """
        assert self._regions is not None
        order: list[np.ndarray] = []
        for unit in rng.permutation(len(self._units)):
            for region in rng.permutation(self._units[unit]):
                tokens = np.flatnonzero(self._regions.member[:, region])
                order.append(tokens[np.argsort(-self._regions.share[tokens, region], kind="stable")])
        order.append(rng.permutation(self.n_spatial))
        tokens = np.concatenate(order)
        _, first = np.unique(tokens, return_index=True)
        return tokens[np.sort(first)]


def sample_keys(seed: int, first: int, count: int) -> list[tuple[int, ...]]:
    """Return what names `count` training samples from `first` on: their masks and drops are drawn from it.

    A sample's number is its place in the stream, which depends neither on ranks, workers nor micro-batches.
    """
    return [(0, seed, sample) for sample in range(first, first + count)]


def _budget(ratio: float, n_spatial: int) -> int:
    """Return how many patches are hidden: at least one, and not all."""
    n_hidden = round(ratio * n_spatial)
    if n_spatial < 2:
        raise ConfigError(
            "this grid has a single patch, so that nothing is left to see where it is hidden; lower model.patch_mm."
        )
    if n_hidden >= n_spatial:
        raise ConfigError(
            f"mask.ratio is {ratio:g}, which hides all {n_spatial} patches of this grid, so that nothing is left to "
            f"see; use at most {math.floor(1e4 * (1 - 1 / n_spatial)) / 1e4:g}."
        )
    if n_hidden < 1:
        raise ConfigError(
            f"mask.ratio is {ratio:g}, which hides none of the {n_spatial} patches of this grid, so that there is "
            f"nothing to reconstruct; use at least {math.ceil(1e4 / n_spatial) / 1e4:g}."
        )
    return n_hidden


def _units(
    strategy: str, regions: RegionTokens | None, groups: Mapping[str, Sequence[int]] | None
) -> list[tuple[int, ...]]:
    """Return what a strategy by anatomy hides at once, as places in the regions' list."""
    if regions is None or strategy not in ("region", "pair", "group"):
        return []
    if strategy == "pair":
        return homologous_pairs(regions)
    if strategy == "group":
        if groups is None:
            raise ValueError("the group strategy needs the groups' regions")
        return grouped(regions, groups)
    return [(number,) for number in range(len(regions.ids))]


def _by_group(rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
    """Return the tokens group after group, the groups in random order; `group` says which each token belongs to."""
    rank = rng.permutation(int(group.max()) + 1)
    return np.argsort(rank[group], kind="stable")
