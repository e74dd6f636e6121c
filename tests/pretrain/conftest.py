"""A small brain on a small grid, shared by the pretraining tests."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from boldforge.pretrain import ModelConfig, TokenGrid

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_mask() -> np.ndarray:
    """An ellipsoid that touches no wall, on a grid no patch size divides."""
    x, y, z = np.ogrid[:13, :15, :11]
    return ((x - 6) / 6) ** 2 + ((y - 7) / 7) ** 2 + ((z - 5) / 5) ** 2 <= 1


@pytest.fixture
def small_config() -> ModelConfig:
    return ModelConfig(
        frames=3,
        embed_dim=8,
        depths=(2, 2),
        decoder_depths=(2,),
        window=(2, 2, 2, 2),
        d_state=4,
        mlp_ratio=2.0,
        backend="torch",
    )


@pytest.fixture
def small_grid(small_mask: np.ndarray, small_config: ModelConfig) -> TokenGrid:
    return TokenGrid(small_mask, (2, 2, 2), small_config.frames, small_config.n_stages)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
