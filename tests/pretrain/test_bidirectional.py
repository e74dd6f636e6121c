"""The scan in both directions, beside the forward one on clips turned round."""

import numpy as np
import pytest
import torch

from boldforge.kernels import conv_oracle, reverse_index, scan_oracle, window_index
from boldforge.pretrain import ModelConfig, NeuroStorm, TokenGrid
from boldforge.pretrain.mamba import ShiftedMamba


def network(config: ModelConfig, mask: np.ndarray) -> NeuroStorm:
    torch.manual_seed(0)
    return NeuroStorm(config, TokenGrid(mask, (2, 2, 2), config.frames, config.n_stages))


@pytest.fixture
def mixer() -> ShiftedMamba:
    torch.manual_seed(0)
    mixer = ShiftedMamba(6, d_state=3, backend="torch", bidirectional=True).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def one_way(part: torch.nn.Module, x: torch.Tensor, z: torch.Tensor, index: object) -> torch.Tensor:
    x = conv_oracle(x, part.conv1d.weight[:, 0], part.conv1d.bias, index)
    dt, B, C = (x @ part.x_proj.weight.T).split([1, 3, 3], dim=-1)
    return scan_oracle(x, dt @ part.dt_proj.weight.T, -part.A_log.exp(), B, C, part.D, z, part.dt_bias, index)


@pytest.mark.parametrize("mode", ["region", "wrap"])
def test_it_is_the_sum_of_a_scan_forward_and_one_backward(mixer: ShiftedMamba, mode: str) -> None:
    keep = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0)) < 0.7
    grid = ((5, 4, 3), (2, 2, 2), (1, 1, 1), mode, keep)
    forward, backward = (window_index(*grid, reverse=reverse) for reverse in (False, True))
    x = torch.randn(2, int(keep.sum()), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inner, z = (x @ mixer.in_proj.weight.T).chunk(2, dim=-1)
        wanted = one_way(mixer, inner, z, forward) + one_way(mixer.backwards, inner, z, backward)
        # The scan takes decay, skip and bias in float32.
        torch.testing.assert_close(mixer(x, forward), wanted @ mixer.out_proj.weight.T, rtol=1e-5, atol=1e-5)


def test_turning_the_clip_and_the_weights_round_turns_the_result_round(mixer: ShiftedMamba) -> None:
    index = window_index((7,), (7,), (0,))
    x = torch.randn(1, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = mixer(x, index)
    ahead = {name: weight.clone() for name, weight in mixer.state_dict().items()}
    behind = {name: ahead[f"backwards.{name}"] for name in mixer.backwards.state_dict()}
    swapped = {name: ahead[name] for name in ("in_proj.weight", "out_proj.weight")}
    swapped |= behind | {f"backwards.{name}": ahead[name] for name in behind}
    mixer.load_state_dict(swapped)
    torch.testing.assert_close(mixer(x.flip(1), index).flip(1), y, rtol=1e-5, atol=1e-5)
    assert reverse_index(index).tokens.tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_a_token_sees_what_comes_after_it(small_config: ModelConfig, small_mask: np.ndarray) -> None:
    seen = {}
    for both in (False, True):
        config = small_config.model_copy(update={"bidirectional": both, "window": (2, 2, 2, 3), "depths": (1, 1)})
        model = network(config, small_mask)
        clips = torch.zeros(1, 3, model.token_grid.n_voxels)
        changed = clips.clone()
        changed[:, 2] += 1.0
        stage = [
            model._run_blocks(model.embed_patches(c), model.stages[0].blocks, 0, 3, config.window)
            for c in (clips, changed)
        ]
        seen[both] = bool((stage[0] - stage[1]).unflatten(1, (-1, 3))[:, 0, 0].any())
    assert seen == {False: False, True: True}


@pytest.mark.parametrize("prompts", [0, 2])
def test_every_parameter_learns_and_the_projections_are_shared(
    small_config: ModelConfig, small_mask: np.ndarray, prompts: int
) -> None:
    config = small_config.model_copy(update={"bidirectional": True, "prompts": prompts})
    model, plain = network(config, small_mask), network(config.model_copy(update={"bidirectional": False}), small_mask)
    clips = torch.randn(1, 3, model.token_grid.n_voxels, generator=torch.Generator().manual_seed(1))
    hidden = torch.rand(1, model.token_grid.stages[0].n_tokens * 3, generator=torch.Generator().manual_seed(2)) < 0.5
    model(clips, hidden).square().mean().backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []

    def count(network: NeuroStorm) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    # Per inner channel: 4 taps and a bias, x_proj to R + 2N, dt_proj from R, its bias, N decays and D; R = 1, N = 4.
    inner = [2 * 8 * 2, 2 * 16 * 2, 2 * 8 * 2]  # width times blocks, of the two encoder stages and the decoder's
    assert count(model) - count(plain) == sum(inner) * (5 + (1 + 2 * 4) + 1 + 1 + 4 + 1)
