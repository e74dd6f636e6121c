"""The operations of a step by formula beside those that torch counts as it computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from boldforge.pretrain import ModelConfig, NeuroStorm, TokenGrid
from boldforge.pretrain.flops import clip_flops
from boldforge.pretrain.merging import frames_at
from boldforge.pretrain.visible import visible_tokens

CHANGES: dict[str, dict[str, object]] = {
    "as it is": {},
    "wide": {"expand": 3, "mlp_ratio": 3.5, "d_state": 5, "d_conv": 3},
    "uneven": {"depths": (1, 3), "decoder_depths": (2,)},
    "encoder alone": {"decoder": False, "mask_tokens": ()},
    "visible": {"encoder_sees": "visible"},
    "both ways": {"bidirectional": True},
    "frames merged": {"merge_time": (True,)},
    "frames merged, visible": {"merge_time": (True,), "encoder_sees": "visible"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_formula_counts_what_torch_counts(name: str, small_config: ModelConfig, small_grid: TokenGrid) -> None:
    config = small_config.model_copy(update=CHANGES[name])
    model = NeuroStorm(config, small_grid)
    clips = torch.randn(2, small_grid.frames, small_grid.n_voxels)
    joined = config.frames_joined
    tokens = [stage.n_tokens * frames_at(i, config.frames, joined) for i, stage in enumerate(small_grid.stages)]
    hidden = torch.zeros(2, tokens[0], dtype=torch.bool)
    hidden[0, ::2], hidden[1, : tokens[0] // 2] = True, True
    seen = None
    if config.encoder_sees == "visible":
        stages = visible_tokens(hidden, small_grid, clips.device, joined=joined)
        seen = [float(stage.visible_BL.sum()) / 2 for stage in stages]
    found = clip_flops(config, tokens, small_grid.patch_voxels.shape[1], seen)
    with FlopCounterMode(display=False) as forward:
        y = model(clips, hidden) if config.decoder else model.encode(clips)
    assert forward.get_total_flops() == 2 * found.matmul
    with FlopCounterMode(display=False) as backward:
        y.square().mean().backward()
    assert forward.get_total_flops() + backward.get_total_flops() == 2 * found.step_matmul
    inner = [config.expand * config.embed_dim * 2**i for i in range(2)]
    per_channel = (1 + config.bidirectional) * (9 * config.d_state + 2 * config.d_conv)
    blocks = [depth * count for depth, count in zip(config.depths, seen or tokens, strict=True)]
    if config.decoder:
        blocks[0] += config.decoder_depths[0] * tokens[0]
    assert found.scan == sum(n * d * per_channel for n, d in zip(blocks, inner, strict=True))
    assert found.step_scan == 3 * found.scan
