"""What ends a run is said by all its ranks in one sentence: the front end quotes whichever came first."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from boldforge.pretrain.train import lost

# Python 3.12 warns of a fork beside torch's threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
TwoRanks = Callable[[Callable[[int], object]], list[str]]


@pytest.mark.parametrize("in_data", [True, False])
def test_a_lost_step_has_one_reason_on_all_ranks(two_ranks: TwoRanks, in_data: bool) -> None:
    manifest = SimpleNamespace(place="shards/x", runs=[SimpleNamespace(key=f"sub-0{number}") for number in (1, 2)])
    config = SimpleNamespace(optimizer=SimpleNamespace(lr=5e-4))
    run = SimpleNamespace(config=config, manifests=(manifest,), world_size=2)

    def lose(rank: int) -> str:
        values_BTV = torch.zeros(2, 3, 5)
        values_BTV[1, 0, 0] = float("nan") if rank == 1 and in_data else 0.0
        batch = SimpleNamespace(dequantise=lambda: values_BTV, dataset=torch.tensor([0, 0]), run=torch.tensor([0, 1]))
        return str(lost(run, batch, 41))

    first, second = two_ranks(lose)
    assert first == second
    said = "because run sub-02 of shards/x holds NaN" if in_data else "though the data are; lower optimizer.lr"
    assert first.startswith(f"step 42: the loss is not a finite number, {said}")
    # Another recipe is refused in a folder that has checkpoints.
    assert in_data or first.endswith("in a new out folder.")
