from pathlib import Path

import numpy as np
import pytest

from boldforge.data_shards import DataRecipe, brain_mask, get_grid, mask_centres, open_bold, prepare_run
from boldforge.data_shards import prepare as prepare_module
from boldforge.data_shards import spool as spool_module
from boldforge.data_shards.normalise import normalise, quantise, temporal_snr
from boldforge.data_shards.prepare import store_run
from boldforge.data_shards.recipe import NormalisationName
from boldforge.data_shards.resample import to_grid, to_tr
from boldforge.data_shards.spool import Spool

METHODS = NormalisationName.__args__


@pytest.fixture
def small_pieces(monkeypatch, tmp_path):
    """Few voxels at a time, everything between on disk; nothing may be left there."""
    monkeypatch.setattr(prepare_module, "_VOXELS_AT_ONCE", 1237)
    monkeypatch.setattr(spool_module, "IN_MEMORY_BYTES", 0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    yield scratch
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_pieces_is_bit_for_bit_the_run_in_one(real_runs, small_pieces, method):
    dtype = "int8" if method == "voxel-z" else "int16"
    run = real_runs.runs[1]
    recipe = DataRecipe(grid="mni4mm", tr=2.0, normalisation=method, dtype=dtype)
    bold = open_bold(run.path)
    grid = get_grid("mni4mm")
    on_grid, covered = to_grid(bold, mask_centres(grid, brain_mask(grid)))
    whole = to_tr(on_grid.read_rows(0, bold.n_frames), bold.tr, recipe.tr)
    covered = covered & (whole.max(axis=0) > whole.min(axis=0))
    whole, how = normalise(whole, covered, method)
    covered = covered & (whole.max(axis=0) > whole.min(axis=0))

    prepared = prepare_run(run, recipe, small_pieces)
    np.testing.assert_array_equal(prepared.covered, covered)
    np.testing.assert_array_equal(prepared.values_TV, whole)
    assert prepared.normalisation == how
    assert prepared.stretches == ((0, len(whole), 0),)

    wanted = quantise(whole, covered, dtype)
    result = store_run(run, recipe, small_pieces)
    for part, part_too in zip(result.stored, wanted, strict=True):
        np.testing.assert_array_equal(part, part_too)
    assert result.tsnr_db == round(temporal_snr(whole, wanted), 2)


@pytest.mark.parametrize("in_memory", [0, 2**20])
def test_a_spool_is_an_array_that_may_lie_on_disk(tmp_path, in_memory):
    wanted = np.random.default_rng(0).normal(size=(13, 29)).astype(np.float32)
    with Spool(13, 29, np.float32, tmp_path, in_memory) as rows_first, Spool(13, 29, "f4", None, in_memory) as other:
        for start in range(0, 13, 4):
            rows_first.write_rows(start, wanted[start : start + 4])
        for start in range(0, 29, 10):
            np.testing.assert_array_equal(
                rows_first.read_columns(start, min(start + 10, 29)), wanted[:, start : start + 10]
            )
            other.write_columns(start, wanted[:, start : start + 10])
        np.testing.assert_array_equal(other.read_rows(2, 13), wanted[2:])
        assert list(tmp_path.iterdir()) == []  # its file has no name


def open_full_disk(**_):
    return Path("/dev/full").open("r+b", buffering=0)


def test_a_full_disk_is_an_error_and_not_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", open_full_disk)
    with Spool(4, 4, np.float32, tmp_path, in_memory=0) as spool, pytest.raises(OSError, match="No space left"):
        spool.write_rows(0, np.zeros((4, 4), dtype=np.float32))
