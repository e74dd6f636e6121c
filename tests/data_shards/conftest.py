import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from boldforge.data_shards import DataRecipe, build_shards, find_runs

REAL_RUNS = Path(__file__).parents[1] / "data"
ATHENA_AFFINE = np.array([[-4.0, 0, 0, 96], [0, 4, 0, -132], [0, 0, 4, -70], [0, 0, 0, 1]])


@pytest.fixture(scope="session")
def real_runs():
    return find_runs(REAL_RUNS)


@pytest.fixture(scope="session")
def real_shards(tmp_path_factory, real_runs):
    """The two real runs as a dataset; read-only: tests that damage it copy it first."""
    out = tmp_path_factory.mktemp("real_shards")
    return build_shards(real_runs, out, DataRecipe(grid="mni4mm", tr=2.0)).manifest


@pytest.fixture
def write_bold(tmp_path):
    """Write a small 4D file with a made signal; returns its path."""

    def write(name="sub-01_task-rest_space-MNI152_bold.nii.gz", frames=12, seed=0, affine=None, tr=2.0, units="sec"):
        shape = (12, 14, 12)
        if affine is None:
            affine = np.diag([14.0, 14.0, 14.0, 1.0])
            affine[:3, 3] = (-77, -105, -70)
        values = 1000 + 20 * np.random.default_rng(seed).standard_normal((*shape, frames))
        image = nib.Nifti1Image(values.astype(np.int16), affine)
        image.header.set_xyzt_units("mm", units)
        image.header["pixdim"][4] = tr
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        return path

    return write


@pytest.fixture
def place(request, write_bold, tmp_path):
    """Copy one small recording to many names below tmp_path/data; its TR is the module's ``PLACE_TR``, or 2 s."""
    source = write_bold("source.nii.gz", tr=getattr(request.module, "PLACE_TR", 2.0))
    root = tmp_path / "data"

    def put(*names):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / name)
        return root

    return put
