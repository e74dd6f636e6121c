from pathlib import Path

import numpy as np
import pytest
import torch

from boldforge.data_shards import brain_mask, get_grid, mask_hash
from boldforge.pretrain import ModelConfig, build_model, write_export

GRID = "mni4mm"
FRAMES = 4
# Patches of 48 mm leave a few dozen tokens: the real encoder, small enough for a test.
TINY = ModelConfig(
    patch_mm=48,
    frames=FRAMES,
    embed_dim=8,
    depths=(2, 2),
    decoder_depths=(1,),
    d_state=4,
    mlp_ratio=2.0,
    backend="torch",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_encoder(tmp_path_factory):
    """Write an untrained encoder's export; another seed gives other weights."""

    def write(seed: int = 0, model: ModelConfig = TINY, **data) -> Path:
        grid = get_grid(GRID)
        mask = brain_mask(grid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_model(model, mask, grid.voxel_size)
        recipe = {"grid": GRID, "tr": 2.0, "normalisation": "residual-z", "dtype": "int16", "clip_length": model.frames}
        recipe |= {"mask_sha256": mask_hash(mask), **data}
        content = {"model": model.model_dump(mode="json"), "data": recipe, "training": {}}
        return write_export(network.state_dict(), content, tmp_path_factory.mktemp("export"))

    return write


@pytest.fixture(scope="session")
def encoder(write_encoder) -> Path:
    return write_encoder()


@pytest.fixture(scope="session")
def values_BTV() -> torch.Tensor:
    n_voxels = int(brain_mask(get_grid(GRID)).sum())
    generator = np.random.default_rng(5)
    return torch.from_numpy(generator.standard_normal((3, FRAMES, n_voxels)).astype(np.float32))
