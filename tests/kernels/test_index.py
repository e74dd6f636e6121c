"""The scan path: every token once, no scan across a seam, and exactly NeuroSTORM's order in wrap mode."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boldforge.kernels import ScanIndex, window_index


@st.composite
def layouts(draw, dense=False):
    """A grid of up to four axes with its windows and shifts."""
    n_axes = draw(st.integers(1, 4))
    window = [draw(st.integers(1, 4)) for _ in range(n_axes)]
    grid = [w * draw(st.integers(1, 3)) if dense else draw(st.integers(1, 6)) for w in window]
    shift = [draw(st.integers(0, w - 1)) for w in window]
    return grid, window, shift


def kept(draw_seed, grid):
    keep = torch.rand(*grid, generator=torch.Generator().manual_seed(draw_seed)) < 0.6
    keep.view(-1)[draw_seed % keep.numel()] = True
    return keep


def sequences(index):
    return index.rows.split(index.cu_seqlens.diff().tolist())


def coordinates(index, grid, keep):
    """Grid coordinates of every place of the scan, [S, axes]."""
    return keep.nonzero()[index.tokens]


@given(layouts(), st.integers(0, 999), st.sampled_from(["region", "wrap"]), st.booleans())
def test_every_kept_token_is_visited_exactly_once(layout, seed, mode, reverse):
    grid, window, shift = layout
    keep = kept(seed, grid)
    index = window_index(grid, window, shift, mode, keep, reverse)
    assert index.n_tokens == int(keep.sum())
    assert torch.equal(index.tokens.sort().values, torch.arange(index.n_tokens))
    assert int(index.cu_seqlens.diff().min()) >= 1


@given(layouts(), st.integers(0, 999), st.booleans())
def test_region_mode_never_scans_across_a_seam(layout, seed, reverse):
    grid, window, shift = layout
    keep = kept(seed, grid)
    index = window_index(grid, window, shift, "region", keep, reverse)
    where = coordinates(index, grid, keep)
    first, length = index.segments
    for segment in where.split(length.tolist()):
        # Tokens of one stretch are true neighbours: they fit into one window without wrapping round.
        assert ((segment.max(0).values - segment.min(0).values) < torch.tensor(window)).all()
    assert torch.equal(first, index.starts.nonzero().flatten())


@given(layouts(), st.integers(0, 999))
def test_restarts_lie_only_between_regions(layout, seed):
    grid, window, shift = layout
    keep = kept(seed, grid)
    index = window_index(grid, window, shift, "region", keep)
    for sequence in sequences(index):
        # At most one stretch per side of every seam: two to the power of the shifted axes.
        assert not bool(sequence[0] < 0)
        assert int((sequence < 0).sum()) < 2 ** sum(s > 0 for s in shift)


@given(layouts(), st.integers(0, 999), st.booleans())
def test_the_inverse_gives_the_place_of_every_token(layout, seed, reverse):
    grid, window, shift = layout
    index = window_index(grid, window, shift, keep=kept(seed, grid), reverse=reverse)
    tokens, places = torch.arange(index.n_tokens), index.inverse
    assert torch.equal(index.tokens[places], tokens)
    assert torch.equal(places[index.tokens], tokens)


@given(layouts(dense=True), st.randoms(use_true_random=False))
def test_wrap_mode_is_roll_and_window_partition(layout, random):
    grid, window, shift = layout
    order = random.sample(range(len(grid)), len(grid))
    index = window_index(grid, window, shift, "wrap", order=order)
    ids = torch.arange(torch.Size(grid).numel()).view(*grid)
    moves = [0 if size <= width else -moved for size, width, moved in zip(grid, window, shift, strict=True)]
    rolled = torch.roll(ids, moves, dims=tuple(range(len(grid))))
    split = rolled.view([n for size, width in zip(grid, window, strict=True) for n in (size // width, width)])
    n = len(grid)
    expected = split.permute(*range(0, 2 * n, 2), *(2 * axis + 1 for axis in order)).reshape(-1)
    assert torch.equal(index.rows.long(), expected)
    assert set(index.cu_seqlens.diff().tolist()) == {torch.Size(window).numel()}


@given(layouts(), st.integers(0, 999), st.sampled_from(["region", "wrap"]))
def test_reverse_is_a_flip_of_every_window(layout, seed, mode):
    grid, window, shift = layout
    forward = window_index(grid, window, shift, mode, kept(seed, grid))
    backward = window_index(grid, window, shift, mode, kept(seed, grid), reverse=True)
    assert torch.equal(forward.cu_seqlens, backward.cu_seqlens)
    lengths = forward.cu_seqlens.diff().tolist()
    for there, back in zip(forward.tokens.split(lengths), backward.tokens.split(lengths), strict=True):
        assert torch.equal(there.flip(0), back)
    assert int((forward.rows < 0).sum()) == int((backward.rows < 0).sum())


@given(layouts(), st.integers(0, 999), st.sampled_from(["region", "wrap"]))
def test_keep_only_leaves_tokens_out_of_the_dense_path(layout, seed, mode):
    grid, window, shift = layout
    keep = kept(seed, grid)
    dense, sparse = window_index(grid, window, shift, mode), window_index(grid, window, shift, mode, keep)
    number = keep.flatten().cumsum(0) - 1
    expected = [
        number[sequence[keep.flatten()[sequence]]] for sequence in dense.tokens.split(dense.cu_seqlens.diff().tolist())
    ]
    expected = [sequence for sequence in expected if len(sequence)]
    found = sparse.tokens.split(sparse.cu_seqlens.diff().tolist())
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@given(layouts(), st.integers(0, 999), st.sampled_from(["region", "wrap"]))
def test_the_last_axis_is_the_fastest_unless_told(layout, seed, mode):
    grid, window, shift = layout
    keep = kept(seed, grid)
    plain = window_index(grid, window, shift, mode, keep)
    told = window_index(grid, window, shift, mode, keep, order=range(len(grid)))
    swapped = window_index(grid, window, shift, mode, keep, order=range(len(grid))[::-1])
    assert torch.equal(plain.rows, told.rows)
    assert torch.equal(plain.cu_seqlens, swapped.cu_seqlens)
    for there, other in zip(sequences(plain), sequences(swapped), strict=True):
        assert set((there & 0x7FFFFFFF).tolist()) == set((other & 0x7FFFFFFF).tolist())
        assert int((there < 0).sum()) == int((other < 0).sum())


@given(layouts(), st.integers(0, 999), st.sampled_from(["region", "wrap"]), st.booleans(), st.integers(1, 3))
def test_prompts_begin_every_stretch_and_change_nothing_else(layout, seed, mode, reverse, prompts):
    grid, window, shift = layout
    plain = window_index(grid, window, shift, mode, kept(seed, grid), reverse)
    index = window_index(grid, window, shift, mode, kept(seed, grid), reverse, prompts=prompts)
    first, length = index.segments
    assert index.n_clip_tokens == plain.n_tokens
    assert index.n_sequences == plain.n_sequences
    assert torch.equal(index.tokens.sort().values, torch.arange(index.n_tokens))
    own, added = [], []
    for stretch in index.tokens.split(length.tolist()):
        added.append(stretch[:prompts])
        own.append(stretch[prompts:])
    assert [len(tokens) for tokens in own] == plain.segments[1].tolist()
    assert torch.equal(torch.cat(own), plain.tokens)
    assert torch.equal(torch.cat(added), torch.arange(plain.n_tokens, index.n_tokens))
    # Restarts stay where they were: on the first prompt now, and only between the stretches of one sequence.
    assert int((index.rows < 0).sum()) == int((plain.rows < 0).sum())
    assert bool((index.rows[first][~torch.isin(first, index.cu_seqlens)] < 0).all())


def test_prompts_are_not_repeated_inside_a_wrapped_window():
    windows = prod((4, 4))
    wrap, region = (window_index((8, 8), (2, 2), (1, 1), mode, prompts=5) for mode in ("wrap", "region"))
    assert wrap.n_tokens == 64 + 5 * windows
    # Seven windows of the last row and column hold two sides of one seam, and the corner holds four of two.
    assert region.n_tokens == 64 + 5 * (windows + 6 + 3)


def test_small_axes_are_neither_shifted_nor_cut():
    index = window_index((2, 2, 2, 8), (4, 4, 4, 4), (2, 2, 2, 2))
    assert index.cu_seqlens.diff().tolist() == [32, 32]
    # Only time is shifted: one of the two windows glues the last two frames to the first two.
    assert int((index.rows < 0).sum()) == 1


def test_neighbours_stop_at_restarts_and_sequences():
    rows = torch.tensor([3, 0, 2 | -(2**31), 1, 4], dtype=torch.int32)
    index = ScanIndex(rows, torch.tensor([0, 4, 5], dtype=torch.int32), 5)
    none = 5
    assert index.neighbours(2).tolist() == [[3, 2, none, none, none], [none] * 5]
    assert index.neighbours(-2).tolist() == [[none, none, 1, 0, none], [none] * 5]
    assert index.to("cpu") is index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 4), (2,), (0, 0)), "one entry per axis"),
        (((4, 0), (2, 2), (0, 0)), "at least 1"),
        (((4, 4), (2, 2), (2, 0)), "between 0 and the window"),
        (((4, 4), (2, 2), (-1, 0)), "between 0 and the window"),
        (((4, 4), (2, 2), (1, 0), "glue"), "glue"),
        (((4, 4), (2, 2), (1, 0), "wrap", torch.zeros(4, 4, dtype=torch.bool)), "no token"),
        (((4, 4), (2, 2), (1, 0), "wrap", torch.ones(4, 3, dtype=torch.bool)), r"\[4, 3\]"),
        (((4, 4), (2, 2), (1, 0), "wrap", torch.ones(4, 4)), "float32"),
        (((4, 4), (2, 2), (1, 0), "wrap", None, False, (0, 0)), r"order .* 0…1 once, found \(0, 0\)"),
        (((4, 4), (2, 2), (1, 0), "wrap", None, False, None, -1), "prompts must be 0 or more, found -1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_index(*arguments)


@pytest.mark.parametrize(
    ("rows", "edges", "n_tokens"),
    [
        ([0, 1, 1], [0, 3], 3),
        ([0, 1, 3], [0, 3], 3),
        ([0, 1, 2], [0, 2], 3),
        ([0, 1, 2], [0, 0, 3], 3),
        ([0, 1, 2], [0], 3),
        ([0, 1, 2], [1, 3], 3),
        ([0, 1], [0, 2], 3),
        ([], [0, 0], 0),
    ],
)
def test_tables_that_contradict_each_other_are_refused(rows, edges, n_tokens):
    with pytest.raises(ValueError, match=r"rows|cu_seqlens"):
        ScanIndex(torch.tensor(rows, dtype=torch.int32), torch.tensor(edges, dtype=torch.int32), n_tokens)


def test_tables_of_the_wrong_type_are_refused():
    with pytest.raises(ValueError, match="int64"):
        ScanIndex(torch.arange(3), torch.tensor([0, 3], dtype=torch.int32), 3)


@pytest.mark.parametrize(
    ("rows", "prompts", "message"),
    [
        ([2, 0, 1], 1, None),
        ([2, 0, 1], 3, "found 3 prompts and a stretch of 3 places"),
        ([0, 2, 1], 1, "begin every stretch with its 1 prompts"),
        ([2, 1, 0], 2, "the tokens from 1 on"),
        ([2, 0, 1], -1, "0 or more, found -1"),
    ],
)
def test_prompts_in_the_wrong_place_are_refused(rows, prompts, message):
    tables = (torch.tensor(rows, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32), 3, prompts)
    if message is None:
        assert ScanIndex(*tables).n_clip_tokens == 2
        return
    with pytest.raises(ValueError, match=message):
        ScanIndex(*tables)


def test_a_window_far_larger_than_the_grid_is_the_whole_grid():
    huge, whole = (window_index((2, 3, 4, 5), window, (0, 0, 0, 0)) for window in ((2**20,) * 4, (2, 3, 4, 5)))
    assert torch.equal(huge.rows, whole.rows)
    assert torch.equal(huge.cu_seqlens, whole.cu_seqlens)
