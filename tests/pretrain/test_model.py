import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from boldforge.configs import ConfigError, load_config
from boldforge.pretrain import ModelConfig, NeuroStorm, TokenGrid


@pytest.fixture
def model(small_config: ModelConfig, small_grid: TokenGrid) -> NeuroStorm:
    torch.manual_seed(0)
    return NeuroStorm(small_config, small_grid)


@pytest.fixture
def clips(small_grid: TokenGrid) -> torch.Tensor:
    return torch.randn(2, small_grid.frames, small_grid.n_voxels, generator=torch.Generator().manual_seed(1))


def test_shapes(model: NeuroStorm, small_grid: TokenGrid, clips: torch.Tensor) -> None:
    tokens = model.encode(clips)
    assert tokens.shape == (2, small_grid.stages[-1].n_tokens * small_grid.frames, model.dim)
    assert model(clips).shape == (2, small_grid.stages[0].n_tokens * small_grid.frames, 8)


def test_hidden_tokens_do_not_leak(model: NeuroStorm, small_grid: TokenGrid, clips: torch.Tensor) -> None:
    hidden = torch.zeros(2, small_grid.stages[0].n_tokens * small_grid.frames, dtype=torch.bool)
    token, frame = 5, 1
    hidden[:, token * small_grid.frames + frame] = True
    changed = clips.clone()
    columns = torch.from_numpy(small_grid.patch_voxels[token])
    changed[:, frame, columns[columns < small_grid.n_voxels]] += 100.0
    assert torch.equal(model(clips, hidden), model(changed, hidden))
    assert not torch.equal(model(clips), model(changed))


def test_clips_of_a_batch_do_not_meet(model: NeuroStorm, clips: torch.Tensor) -> None:
    torch.testing.assert_close(model(clips)[1:], model(clips[1:]), rtol=1e-5, atol=1e-6)


def test_every_parameter_learns(model: NeuroStorm, small_grid: TokenGrid, clips: torch.Tensor) -> None:
    hidden = torch.zeros(2, small_grid.stages[0].n_tokens * small_grid.frames, dtype=torch.bool)
    hidden[:, ::2] = True
    model(clips, hidden).square().mean().backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []


def test_a_dense_grid_takes_the_same_path_and_costs_more(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    flops = {}
    for name, mask in (("brain", small_mask), ("dense", np.ones_like(small_mask))):
        grid = TokenGrid(mask, (2, 2, 2), small_config.frames, small_config.n_stages)
        model = NeuroStorm(small_config, grid)
        with FlopCounterMode(display=False) as counter:
            model.encode(torch.zeros(1, grid.frames, grid.n_voxels))
        flops[name] = counter.get_total_flops()
    assert flops["brain"] < 0.8 * flops["dense"]


def test_wrong_clips_are_refused_with_the_expected_shape(model: NeuroStorm) -> None:
    with pytest.raises(ValueError, match=r"expected clips \[B, 3 frames, "):
        model.encode(torch.zeros(1, 4, 10))


def test_decoder_depths_must_mirror_the_encoder() -> None:
    with pytest.raises(ConfigError, match="decoder_depths has 3 entries"):
        load_config(ModelConfig, {"depths": [1, 1], "decoder_depths": [1, 1, 1]})


def test_the_brain_mask_travels_with_the_weights(model: NeuroStorm, small_mask: np.ndarray) -> None:
    bits = np.unpackbits(model.state_dict()["brain_mask_bits"].numpy(), count=small_mask.size)
    assert np.array_equal(bits.reshape(small_mask.shape).astype(bool), small_mask)


@pytest.mark.parametrize("width", [2, 3, 5, 33])
def test_any_width_is_computed_the_same_by_every_backend(width: int, small_mask: np.ndarray) -> None:
    """A multiple of 32 suits the kernels; no other is refused or wrong, whatever the options."""
    shape = {"frames": 5, "embed_dim": width, "depths": (1, 2), "decoder_depths": (1,), "d_state": 3, "mlp_ratio": 0.3}
    options = {"position": "mm", "time": "seconds", "merge_time": (True,), "bidirectional": True}
    config = load_config(ModelConfig, {**shape, **options})
    grid = TokenGrid(small_mask, (2, 2, 2), 5, 2, np.diag([6.0, 6.0, 6.0, 1.0]))
    clips = torch.randn(2, 5, grid.n_voxels, generator=torch.Generator().manual_seed(1))
    found = []
    for backend in ("auto", "torch"):
        torch.manual_seed(0)
        model = NeuroStorm(config.model_copy(update={"backend": backend}), grid)
        y = model(clips, tr=1.2)
        y.square().mean().backward()
        found.append([y.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert len(found[0]) > 40
    for mine, reference in zip(*found, strict=True):
        assert (mine - reference).abs().max() <= 1e-3 * reference.abs().max() + 1e-7
