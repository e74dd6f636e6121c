"""Few long sequences in chunks: the rule, the tables, and the three passes in the interpreter."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boldforge.kernels import ScanIndex, window_index
from tests.kernels.test_triton import run

triton = pytest.importorskip("triton", reason="triton is not installed here")
chunked = pytest.importorskip("boldforge.kernels.triton_scan_chunked")


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 cannot loop up to a tensor with numpy 2.4 or newer",
)
def test_the_interpreted_passes_match_the_oracle():
    passed = run("-m", "pytest", str(Path(__file__).with_name("triton_chunked_cases.py")), TRITON_INTERPRET="1")
    assert "passed" in passed
    assert "skipped" not in passed


@pytest.mark.parametrize(
    ("n_sequences", "length", "b", "channels", "chunk"),
    [
        (1, 81_920, 1, 72, 128),
        (1, 81_920, 1, 1024, 1024),
        (1, 2048, 8, 1024, 256),
        (4, 20_480, 1, 64, 128),
        (1, 81_920, 64, 1024, 0),  # enough channels as they are
        (320, 256, 1, 8, 0),  # NeuroSTORM's windows are short, however few channels there are
        (1, 2047, 1, 8, 0),
    ],
)
def test_only_few_and_long_sequences_are_cut(n_sequences, length, b, channels, chunk):
    index = window_index((n_sequences, length), (1, length), (0, 0))
    assert chunked.chunk_length(index, b, channels) == chunk


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 12), st.lists(st.integers(0, 319), max_size=9)
)
def test_chunks_cover_every_sequence_and_know_their_restarts(lengths, chunk, restarts):
    n_tokens = sum(lengths)
    rows = torch.arange(n_tokens, dtype=torch.int32)
    for place in restarts:
        rows[place % n_tokens] |= -(2**31)
    index = ScanIndex(rows, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), n_tokens)
    chunks = chunked.chunks_of(index, chunk)
    assert chunks.index.rows is index.rows
    edges = chunks.index.cu_seqlens.tolist()
    for (start, stop), (first, last) in zip(
        pairwise(index.cu_seqlens.tolist()), pairwise(chunks.first.tolist()), strict=True
    ):
        assert edges[first : last + 1] == [*range(start, stop, chunk), stop]
    inside = [any(rows[start:stop] < 0) for start, stop in pairwise(edges)]
    assert (chunks.cut != 0).tolist() == inside
    assert chunked.chunks_of(index, chunk) is chunks


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_kernels_of_the_last_pass_do_not_spill(tmp_path):
    """They start from a state that is given, which the recorded variants do not."""
    code = """
from dataclasses import replace
from boldforge.kernels import aot
for variant in aot.variants(["fp32", "bf16"], [16]):
    if variant.kernel.__name__.startswith(("scan_forward", "scan_backward")):
        ends = {"HAS_INITIAL": True, "HAS_LAST": True}
        variant = replace(variant, constants={**variant.constants, **ends})
        found = aot.resources(variant, aot.compile_variant(variant, 90))
        print(found.variant, found.spilled_bytes)
"""
    found = [line.rsplit(" ", 1) for line in run("-c", code, TRITON_CACHE_DIR=str(tmp_path)).splitlines()]
    assert len(found) == 8
    assert {spilled for _, spilled in found} == {"0"}, found
