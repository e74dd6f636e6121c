"""Steps of the scan's backward kernels: the states of a span again, and sums over channels on the tensor cores."""

# Triton reads a kernel's source: its arguments carry no types, and its tuples grow by addition only.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

# A factor of a product on the tensor cores in the layout that Triton gives it here: lane 4 g + q holds, of the left
# one, rows g and g + 8 and RUN columns from RUN q on out of every 4 RUN, and of the right one the same with rows and
# columns exchanged. A vector [32] holds one value per lane, so eight of them are a factor as they stand, and nothing
# moves. Triton chooses 4 for RUN, or 1 where the terms are split; with the other one it would send them through shared
# memory, so a wrong guess shows in the count of instructions, not in the values.


@triton.jit
def _eight(v, FIRST: tl.constexpr):
    """Eight vectors [32] from the FIRST on as one array [32, 2, 2, 2]."""
    a0 = tl.join(v[FIRST + 0], v[FIRST + 4])
    a1 = tl.join(v[FIRST + 2], v[FIRST + 6])
    a2 = tl.join(v[FIRST + 1], v[FIRST + 5])
    a3 = tl.join(v[FIRST + 3], v[FIRST + 7])
    return tl.join(tl.join(a0, a1), tl.join(a2, a3))


@triton.jit
def _right(v, FIRST: tl.constexpr, RUN: tl.constexpr):
    """Eight vectors [32] as a right factor [32, 8]: value RUN s + r of lane 4 g + q at row RUN (4 s + q) + r, col g."""
    return tl.reshape(tl.permute(tl.reshape(_eight(v, FIRST), [8, 4, 8 // RUN, RUN]), [2, 1, 3, 0]), [32, 8])


@triton.jit
def _left(v, RUN: tl.constexpr):
    """Eight vectors [32] as a left factor [16, 32]: the same exchanged, in row g.

    Rows g + 8 are not used. What they hold is only different, or it would be copied before every product.
    """
    both = tl.reshape(tl.join(_eight(v, 0), 2.0 * _eight(v, 0)), [8, 4, 8 // RUN, RUN, 2])
    return tl.reshape(tl.permute(both, [4, 0, 2, 1, 3]), [16, 32])


@triton.jit
def _product(left, right, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """Left @ right; EXACT says which factor (0 or 1) is made of zeros and ones."""
    if SPLIT:
        # The tensor cores read 11 bits of each factor: the first 11 and what is left of each term make 22.
        if EXACT == 0:
            upper = (right.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            out = tl.dot(left, upper, input_precision="tf32")
            return tl.dot(left, right - upper, out, input_precision="tf32")
        upper = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        out = tl.dot(upper, right, input_precision="tf32")
        return tl.dot(left - upper, right, out, input_precision="tf32")
    return tl.dot(left, right, input_precision="tf32")


@triton.jit
def pickers(SPLIT: tl.constexpr):
    """Return the constant factors of ``sum_channels``: row n picks value n; columns 2 i, 2 i + 1 pick sum i of four."""
    lane = tl.arange(0, 32)
    picks = ()
    for n in tl.static_range(8):
        picks = picks + (tl.where(lane // 4 == n, 1.0, 0.0),)
    wanted = lane // 8
    four = tl.join(
        tl.join(tl.where(wanted == 0, 1.0, 0.0), tl.where(wanted == 2, 1.0, 0.0)),
        tl.join(tl.where(wanted == 1, 1.0, 0.0), tl.where(wanted == 3, 1.0, 0.0)),
    )
    # From [g, q, vector, half] to row (vector, half, q), column g.
    four = tl.permute(tl.reshape(four, [8, 4, 2, 2]), [2, 3, 1, 0])
    return _left(picks, 1 if SPLIT else 4), tl.reshape(four, [16, 8])


@triton.jit
def _by_quads(v, FIRST: tl.constexpr, pick, SPLIT: tl.constexpr):
    """Add eight vectors [32] from the FIRST on over every four lanes: [8, 4, 2], lanes 8 q + 4 j on at [n, q, j]."""
    sums = tl.reshape(_product(pick, _right(v, FIRST, 1 if SPLIT else 4), SPLIT, 0), [2, 8, 4, 2])
    sums, _ = tl.split(tl.permute(sums, [1, 2, 3, 0]))
    return sums


@triton.jit
def sum_channels(first, second, pick, four, N: tl.constexpr, SPLIT: tl.constexpr):
    """Add two times sixteen vectors over 32 lanes, a sum for each lane: value 8 h + g of w in lane 4 g + 2 w + h."""
    a = _by_quads(first, 0, pick, SPLIT)
    b = _by_quads(second, 0, pick, SPLIT)
    if N > 8:
        a = tl.join(a, _by_quads(first, 8, pick, SPLIT))
        b = tl.join(b, _by_quads(second, 8, pick, SPLIT))
    else:
        a = tl.join(a, tl.zeros_like(a))
        b = tl.join(b, tl.zeros_like(b))
    # From [g, q, j, half, vector] to row (j, g), column (vector, half, q).
    both = tl.reshape(tl.permute(tl.join(a, b), [2, 0, 4, 3, 1]), [16, 16])
    sums, _ = tl.split(tl.reshape(_product(both, four, SPLIT, 1), [2, 8, 4, 2]))
    even, odd = tl.split(tl.permute(sums, [1, 2, 0]))
    return tl.reshape(even + odd, [32])


@triton.jit
def store_channel_sums(target_ptr, first, second, pick, four, n_stored, N: tl.constexpr, SPLIT: tl.constexpr):
    """Store the sums over 32 lanes of the N vectors, those of the first before those of the second."""
    lane = tl.arange(0, 32)
    n = lane // 4 + lane % 2 * 8
    sums = sum_channels(first, second, pick, four, N, SPLIT)
    tl.store(target_ptr + (lane // 2 % 2 * N + n), sums, mask=n < n_stored)
