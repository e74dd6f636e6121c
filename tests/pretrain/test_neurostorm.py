"""The package's network beside the transcription: the same weights must give the same numbers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boldforge.configs import ConfigError, load_config
from boldforge.data_shards import brain_mask, get_grid
from boldforge.pretrain import NeuroStorm, PretrainConfig, TokenGrid, build_model, gather_patches
from boldforge.pretrain.import_checkpoint import LightningCheckpoint
from boldforge.pretrain.import_neurostorm import UsedKey, convert, model_config, read_settings
from boldforge.pretrain.loss import reconstruction_loss
from boldforge.pretrain.neurostorm_prompts import add_prompts
from tests.pretrain.neurostorm_transcription import Shape, Transcription, hyper_parameters, patches

FORWARD, GRADIENT = 1e-5, 1e-4

# Every stage has at least two windows along every axis that the published one has, so nothing is only half exercised.
SMALL = Shape(image=(32, 16, 16, 8), patch=2, dim=6, depths=(2, 2, 2), window=(4, 4, 4, 4))
SHAPES = {
    "published, shrunk": SMALL,
    "another first window": replace(SMALL, first_window=(2, 2, 2, 4)),
    "last stage shifted in time": replace(SMALL, whole_last=False),
    "prompts": replace(SMALL, prompts=3),
    "old mask token": replace(SMALL, tokens="old"),
    "uneven windows": replace(SMALL, window=(2, 4, 2, 8), first_window=(2, 4, 2, 8)),
}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def taken_over(reference: Transcription, decoder: bool = True, **settings: object) -> tuple[NeuroStorm, list[UsedKey]]:
    """The package's network with the transcription's weights, by the importer."""
    shape = reference.shape
    weights = {f"model.{name}": tensor.detach() for name, tensor in reference.state_dict().items()}
    checkpoint = LightningCheckpoint(Path("x.ckpt"), "", weights, hyper_parameters(shape, **settings))
    read, _ = read_settings(checkpoint)
    config = model_config(read, weights, checkpoint.path)
    mask = np.ones(shape.image[:3], dtype=bool)
    token_grid = TokenGrid(mask, (shape.patch,) * 3, config.frames, config.n_stages)
    ours, keys = convert(weights, config, token_grid, checkpoint.path)
    model = NeuroStorm(config, token_grid)
    model.load_state_dict(ours)
    assert config.decoder == decoder
    return model.eval(), list(keys)


def images(shape: Shape, clips: int = 2) -> Tensor:
    return torch.randn(clips, *shape.image, generator=torch.Generator().manual_seed(3))


def values(clips: Tensor) -> Tensor:
    """[B, X, Y, Z, T] to the package's [B, T, V]."""
    return clips.flatten(1, 3).transpose(1, 2)


def tokens(volume: Tensor) -> Tensor:
    """[B, x, y, z, t, …] to [B, L, …]."""
    return volume.flatten(1, 4)


def window_mask(shape: Shape, clips: int = 2) -> Tensor:
    grid = [size // shape.patch for size in shape.image[:3]] + [shape.image[3]]
    coarse = [size // wide for size, wide in zip(grid, shape.window, strict=True)]
    mask = torch.rand(clips, *coarse, generator=torch.Generator().manual_seed(5)) < 0.5
    for axis, wide in enumerate(shape.window, start=1):
        mask = mask.repeat_interleave(wide, dim=axis)
    return mask


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def test_the_recipe_has_the_published_number_of_parameters() -> None:
    config = load_config(PretrainConfig, "configs/pretrain/neurostorm.yaml").model
    grid = get_grid("neurostorm")
    changes = {
        7_712_964: {},
        7_712_892: {"mask_tokens": ("window",)},
        5_173_020: {"decoder": False, "mask_tokens": ()},
        5_173_020 + 82_800: {"decoder": False, "mask_tokens": (), "prompts": 50},
    }
    for expected, change in changes.items():
        with torch.device("meta"):
            model = build_model(config.model_copy(update=change), brain_mask(grid), grid.voxel_size)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected
    grids = [(*stage.grid, stage.n_tokens) for stage in model.token_grid.stages]
    assert grids == [(16, 16, 16, 4096), (8, 8, 8, 512), (4, 4, 4, 64), (2, 2, 2, 8)]


@pytest.mark.parametrize("name", SHAPES)
def test_forward_agrees_with_the_transcription(name: str) -> None:
    shape = SHAPES[name]
    reference = Transcription(shape).eval()
    model, _ = taken_over(reference)
    clips, mask = images(shape), window_mask(shape)
    with torch.no_grad():
        assert relative(model.encode(values(clips)), tokens(reference.encode(clips))) < FORWARD
        found, wanted = model(values(clips), tokens(mask)), tokens(reference(clips, mask))
    assert relative(found, wanted) < FORWARD


@pytest.mark.parametrize("kind", ["random", "window", "atlas"])
def test_each_kind_of_mask_puts_its_own_token(kind: str) -> None:
    reference = Transcription(SMALL).eval()
    model, _ = taken_over(reference, spatial_mask=kind)
    clips, mask = images(SMALL), torch.rand(2, 16, 8, 8, 8) < 0.4
    with torch.no_grad():
        found = model.embed_patches(values(clips), tokens(mask))
        wanted = tokens(reference.hide(reference.patch_embed(clips), mask, kind))
        assert relative(found, wanted) < FORWARD
        assert relative(model(values(clips), tokens(mask)), tokens(reference(clips, mask, kind))) < FORWARD


def test_gradients_of_every_parameter_agree() -> None:
    reference = Transcription(replace(SMALL, prompts=2))
    model, keys = taken_over(reference)
    model.train()
    assert worst_gradient(reference, model, keys) < GRADIENT


def worst_gradient(reference: Transcription, model: NeuroStorm, keys: list[UsedKey], clips: int = 2) -> float:
    """Return the largest relative difference of any parameter's gradient, the losses being the same."""
    shape = reference.shape
    clip, mask = images(shape, clips), window_mask(shape, clips)
    wanted = reference.loss(clip, mask)
    wanted.backward()
    target = gather_patches(values(clip), model.patch_voxels)
    counted = tokens(mask).unsqueeze(-1).expand_as(target)
    found = reconstruction_loss(model(values(clip), tokens(mask)), target, counted)
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=FORWARD)
    theirs = {f"model.{name}": parameter for name, parameter in reference.named_parameters()}
    ours = dict(model.named_parameters())
    assert len(keys) == len(theirs) == len(ours)
    differences = []
    for key in keys:
        mine, other = ours[key.ours].grad, theirs[key.theirs].grad
        if other is None:  # a mask token that this mask does not use
            assert "mask_token" in key.ours and mine is None
            continue
        assert mine is not None
        if mine.shape != other.shape:  # [1, C, x, y, z, t] and [S, T, C]
            other = other[0] if key.ours.endswith("prompt") else other.flatten(2)[0].T.reshape(mine.shape)
        differences.append(relative(mine, other))
    return max(differences)


def test_an_encoder_alone_agrees_and_says_that_it_cannot_rebuild() -> None:
    reference = Transcription(SMALL, decoder=False).eval()
    model, keys = taken_over(reference, decoder=False)
    clips = images(SMALL)
    with torch.no_grad():
        assert relative(model.encode(values(clips)), tokens(reference.encode(clips))) < FORWARD
    assert len(keys) == len(reference.state_dict())
    with pytest.raises(ValueError, match="an encoder alone"):
        model(values(clips))
    with pytest.raises(ValueError, match="has no mask token"):
        model.encode(values(clips), tokens(window_mask(SMALL)))


@pytest.mark.slow
def test_forward_and_gradients_agree_at_the_published_shape() -> None:
    reference = Transcription(Shape())
    model, keys = taken_over(reference)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_712_964
    clips, mask = images(Shape(), 1), window_mask(Shape(), 1)
    with torch.no_grad():
        assert relative(model.encode(values(clips)), tokens(reference.encode(clips))) < FORWARD
        assert relative(model(values(clips), tokens(mask)), tokens(reference(clips, mask))) < FORWARD
    assert worst_gradient(reference, model.train(), keys, clips=1) < GRADIENT


def test_the_transcription_cuts_patches_as_unfolding_does() -> None:
    clip = torch.arange(4 * 4 * 4, dtype=torch.float32).reshape(1, 4, 4, 4, 1)
    assert patches(clip, 2)[0, 1, 0, 1, 0].tolist() == clip[0, 2:4, 0:2, 2:4, 0].flatten().tolist()


def test_a_recipe_whose_mask_and_token_do_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy is random, but model\.mask_tokens begins with window; put random"):
        load_config(PretrainConfig, "configs/pretrain/neurostorm.yaml", ["mask.strategy=random"])
    with pytest.raises(ConfigError, match=r"model\.decoder is false, but pretraining reconstructs"):
        load_config(PretrainConfig, "configs/pretrain/neurostorm.yaml", ["model.decoder=false"])


def test_prompts_on_a_frozen_backbone_are_all_that_learns() -> None:
    reference = Transcription(SMALL)
    model, _ = taken_over(reference)
    prompted = add_prompts(model, 5)
    learning = [parameter for parameter in prompted.parameters() if parameter.requires_grad]
    blocks = [2 * 6, 2 * 12, 2 * 24]
    assert sum(parameter.numel() for parameter in learning) == 5 * sum(blocks)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompted.encode(values(images(SMALL))).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learning)
    after = prompted.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="asked for 5 prompts on a model that has 5"):
        add_prompts(prompted, 5)
