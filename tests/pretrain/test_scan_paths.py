"""Scan paths are kept while they are used, and not for ever."""

import numpy as np
import pytest
import torch

from boldforge.kernels import ScanIndex, window_index
from boldforge.pretrain import ModelConfig, NeuroStorm, TokenGrid

PLACE = np.diag([6.0, 6.0, 6.0, 1.0])
OPTIONS = {
    "frames joined": {"merge_time": (True,), "frames": 4},
    "three windows": {"first_window": (2, 2, 2, 1), "last_window": (4, 4, 4, 4), "prompts": 2},
    "visible tokens": {"encoder_sees": "visible", "redundancy_dropout": True},
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the paths that were built."""
    found: list[int] = []
    check = ScanIndex.__post_init__
    monkeypatch.setattr(ScanIndex, "__post_init__", lambda index: (found.append(index.n_tokens), check(index))[1])
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_clips_of_many_lengths_keep_the_paths_of_a_few(
    options: dict, small_config: ModelConfig, small_mask: np.ndarray, built: list[int]
) -> None:
    any_length = {"position": "mm", "time": "seconds", "d_state": 1, "embed_dim": 2}
    config = ModelConfig(**small_config.model_dump() | any_length | options)
    torch.manual_seed(0)
    model = NeuroStorm(config, TokenGrid(small_mask, (2, 2, 2), config.frames, config.n_stages, PLACE))

    def embed(frames: int) -> torch.Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return model.encode(torch.ones(1, frames, model.token_grid.n_voxels), tr=2.0)

    first, kept = embed(4), []
    for frames in range(5, 26):
        embed(frames)
        kept.append((len(model._paths._indexes), len(model._paths._tables)))
    assert kept[-1] == kept[-2] == kept[-3], "what is kept grows with every length"
    used = [embed(frames) for frames in (25, 24, 25)]
    built.clear()
    assert torch.equal(embed(25), used[0]) and torch.equal(embed(24), used[1])
    assert not built, "the lengths used last are kept"
    assert torch.equal(embed(4), first) and built, "a path that was given up is built again"


def test_a_kept_path_is_the_one_that_was_asked_for(small_config: ModelConfig, small_grid: TokenGrid) -> None:
    paths = NeuroStorm(small_config, small_grid)._paths
    keep = torch.from_numpy(small_grid.stages[0].keep)
    for frames in [*range(1, 25), 2, 1, 24]:
        for shifted in (False, True):
            place = paths.place(0, frames, (2, 2, 2, 2), shifted)
            found = paths.index(place, torch.device("cpu"))
            whole = keep.unsqueeze(-1).expand(*keep.shape, frames)
            wanted = window_index(whole.shape, place.window, place.shift, mode="region", keep=whole)
            assert torch.equal(found.rows, wanted.rows) and torch.equal(found.cu_seqlens, wanted.cu_seqlens)
            assert place.shift == (*(3 * [int(shifted)]), int(shifted and frames > 2))
