"""A small brain on a small grid, shared by the pretraining tests."""

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from boldforge.configs import BoldForgeError
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


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[[Callable[[int], object]], list[str]]:
    """Run a function of the rank in two real processes; return what each returned, or refused, as text."""

    def run(work: Callable[[int], object]) -> list[str]:
        meeting = tmp_path / f"meeting-{len(list(tmp_path.glob('meeting-*')))}"

        def rank_of(rank: int) -> None:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
            try:
                said = str(work(rank))
            except BoldForgeError as error:
                said = f"refused: {error}"
            dist.barrier()
            (tmp_path / f"rank-{rank}.txt").write_text(said)

        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=rank_of, args=(rank,)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()
        return [(tmp_path / f"rank-{rank}.txt").read_text() for rank in range(2)]

    return run
