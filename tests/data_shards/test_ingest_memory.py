import importlib.util
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from boldforge.data_shards import DataRecipe, Run
from boldforge.data_shards import nifti as nifti_module
from boldforge.data_shards import prepare as prepare_module
from boldforge.data_shards import spool as spool_module


@pytest.fixture
def ingest():
    path = Path(__file__).parents[2] / "benchmarks/ingest.py"
    spec = importlib.util.spec_from_file_location("ingest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_twenty_minutes_at_2mm_are_read_in_less_than_two_gigabytes(ingest, tmp_path):
    path = ingest.write_long_run(tmp_path / "long_bold.nii.gz")
    found = ingest.measure(path, "mni2mm", tr=0.72)
    assert (found["frames_in"], found["frames_out"]) == (1200, 1200)
    assert found["peak_mb"] < 2000  # as one float32 array the run has 4132


def test_what_is_held_at_once_is_far_less_than_the_run(tmp_path, monkeypatch):
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = (-90, -126, -72)
    values = np.random.default_rng(0).integers(900, 1100, (46, 55, 46, 250), dtype=np.int16)
    image = nib.Nifti1Image(values, affine)
    image.header.set_zooms((4, 4, 4, 2))
    nib.save(image, tmp_path / "long.nii")
    as_floats = 4 * values.size
    del values, image

    monkeypatch.setattr(spool_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(prepare_module, "_VOXELS_AT_ONCE", 2048)
    monkeypatch.setattr(nifti_module.Bold.blocks, "__defaults__", (2**20,))
    run = Run("01", None, None, None, tmp_path / "long.nii")
    recipe = DataRecipe(grid="mni4mm", tr=2.0, dtype="int8")
    prepare_module.store_run(run, recipe)  # the mask and the points of the grid are kept from now on
    tracemalloc.start()
    stored = prepare_module.store_run(run, recipe).stored
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - stored.q.nbytes < 0.25 * as_floats
