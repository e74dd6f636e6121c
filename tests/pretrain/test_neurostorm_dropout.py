"""Redundancy dropout beside its formula in loops, and what a user sees of it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from boldforge.kernels import window_index
from boldforge.pretrain import ModelConfig, NeuroStorm, TokenGrid
from boldforge.pretrain.neurostorm_dropout import (
    RedundancyDropout,
    drop_probability,
    window_neighbours,
    window_table,
)

REACH = (2, 2)


def probability_in_loops(h_NC: Tensor, places: list[tuple[int, ...]], sides: list[int], reach: tuple[int, int]) -> list:
    """The published formula for one window, one pair of tokens at a time."""
    n, channels = h_NC.shape
    attention = []
    for i in range(n):
        weights = [math.exp(float(h_NC[i] @ h_NC[j]) / math.sqrt(channels)) for j in range(n)]
        attention.append([weight / sum(weights) for weight in weights])
    result = []
    for i in range(n):
        spatial, temporal = [], []
        for j in range(n):
            apart = [abs(a - b) for a, b in zip(places[i], places[j], strict=True)]
            if i == j or sides[i] != sides[j]:
                continue
            if apart[3] == 0 and max(apart[:3]) <= reach[0]:
                spatial.append(j)
            if max(apart[:3]) == 0 and apart[3] <= reach[1]:
                temporal.append(j)
        total = 0.0
        for j in range(n):
            weight = 0.0
            for mine, other in ((spatial, temporal), (temporal, spatial)):
                if mine:
                    largest = max((attention[i][k] for k in other), default=0.0)
                    weight += 0.5 * largest * attention[i][j] / (sum(attention[i][k] for k in mine) + 1e-8)
            total += min(weight, 1.0)
        result.append(min(total / max(len(spatial) + len(temporal), 1), 1.0))
    return result


@pytest.mark.parametrize("mode", ["wrap", "region"])
@pytest.mark.parametrize("reach", [(2, 2), (1, 1), (0, 1), (1, 0)])
def test_the_probability_is_the_published_formula(mode: str, reach: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    grid, window, shift = (5, 4, 2, 6), (4, 4, 4, 3), (2, 0, 0, 1)
    keep = generator.random(grid) < 0.7
    table = window_table(grid, window, shift, keep, restarts=mode == "region")
    count = int(keep.sum())
    h_BLC = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(2))
    found = RedundancyDropout(reach).probability(h_BLC, table)
    for clip in range(2):
        for tokens, sides in zip(table.tokens_WN.tolist(), table.side_WN.tolist(), strict=True):
            here = [n for n, token in enumerate(tokens) if token < count]
            places = [tuple(int(i) for i in np.unravel_index(n, table.window)) for n in here]
            rows = [tokens[n] for n in here]
            wanted = probability_in_loops(h_BLC[clip, rows], places, [sides[n] for n in here], reach)
            np.testing.assert_allclose(found[clip, rows], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["wrap", "region"])
def test_windows_are_those_of_the_scan(mode: str) -> None:
    grid, window, shift = (6, 5, 4, 7), (4, 4, 4, 4), (2, 2, 0, 2)
    keep = np.random.default_rng(1).random(grid) < 0.6
    index = window_index(grid, window, shift, mode=mode, keep=torch.from_numpy(keep))
    table = window_table(grid, window, shift, keep, restarts=mode == "region")
    count = int(keep.sum())
    edges = index.cu_seqlens.tolist()
    scanned = [index.tokens[a:b].tolist() for a, b in pairwise(edges)]
    for row, side, sequence in zip(table.tokens_WN, table.side_WN, scanned, strict=True):
        kept = row < count
        order = torch.argsort(side[kept], stable=True) if mode == "region" else slice(None)
        assert row[kept][order].tolist() == sequence


def test_neighbours_share_a_frame_or_a_place() -> None:
    spatial, temporal = window_neighbours((4, 4, 4, 4), (2, 2))
    assert not (spatial & temporal).any() and not spatial.diagonal().any() and not temporal.diagonal().any()
    corner, middle = 0, 1 * 64 + 1 * 16 + 1 * 4 + 1
    assert spatial[corner].sum() == 3**3 - 1 and spatial[middle].sum() == 4**3 - 1
    assert temporal[corner].sum() == 2 and temporal[middle].sum() == 3


def test_a_token_unlike_the_others_is_kept_and_copies_are_dropped_more() -> None:
    spatial, temporal = window_neighbours((2, 2, 2, 2), REACH)
    h = torch.zeros(1, 16, 8)
    h[0, 1:, 0] = 4.0  # token 0 is no copy of the others
    probability = drop_probability(h, spatial[None], temporal[None], torch.ones(1, 16, dtype=torch.bool))
    assert probability.min() >= 0 and probability.max() <= 1
    apart = torch.eye(16)[None] * 30
    assert drop_probability(apart, spatial[None], temporal[None], torch.ones(1, 16, dtype=torch.bool)).max() < 1e-3
    assert probability[0, 1:].min() > 1e-3


def test_it_drops_whole_tokens_as_often_as_it_says() -> None:
    table = window_table((4, 4, 4, 4), (4, 4, 4, 4), (0, 0, 0, 0), np.ones((4, 4, 4, 4), dtype=bool), restarts=False)
    layer = RedundancyDropout(REACH)
    h_BLC = torch.randn(1, 256, 6, generator=torch.Generator().manual_seed(0)).expand(200, -1, -1)
    out = layer(h_BLC, table, torch.rand(200, 256, generator=torch.Generator().manual_seed(1)))
    gone = (out == 0).all(dim=-1)
    assert torch.equal(out[~gone], h_BLC[~gone])
    expected = layer.probability(h_BLC[:1], table).sum()
    assert float(gone.sum() / 200) == pytest.approx(float(expected), rel=0.1)


def test_a_model_drops_while_training_only_and_every_gradient_flows(small_mask: np.ndarray) -> None:
    config = ModelConfig(
        frames=3,
        embed_dim=8,
        depths=(2, 2),
        decoder_depths=(2,),
        window=(2, 2, 2, 2),
        d_state=4,
        redundancy_dropout=True,
    )
    grid = TokenGrid(small_mask, (2, 2, 2), 3, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NeuroStorm(config, grid)
        plain = NeuroStorm(config.model_copy(update={"redundancy_dropout": False}), grid)
        plain.load_state_dict(model.state_dict())
        clips = torch.randn(1, 3, grid.n_voxels)
        assert torch.equal(model.eval()(clips), plain.eval()(clips))
        model.train()
        first = model(clips)
        assert not torch.equal(first, model(clips))
        first.square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == ["mask_token"]
