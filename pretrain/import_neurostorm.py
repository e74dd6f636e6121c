"""Take over NeuroSTORM's checkpoints: their hyperparameters become our config, their keys our parameters, one by one.

The published structure and key names are those of Wang et al. 2025 (arXiv 2506.11167) and of its Lightning checkpoints:
``model.*`` for the network, the encoder alone or the masked autoencoder. Every key must be used, and every parameter
filled; nothing is guessed.

Shape suffixes: S spatial tokens · T frames · C channels · P prompts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boldforge.configs import BoldForgeError, load_config
from boldforge.data_shards import DataRecipe, brain_mask, get_grid, mask_hash
from boldforge.pretrain.import_checkpoint import ImportCheckpointError, LightningCheckpoint, read_lightning
from boldforge.pretrain.model import MASK_TOKEN_NAMES, NeuroStorm
from boldforge.pretrain.model_config import ModelConfig
from boldforge.pretrain.tokens import TokenGrid

RECIPE = DataRecipe(grid="neurostorm", tr=0.8, normalisation="neurostorm", dtype="int8")
"""What its input must be; `boldforge shard` with these makes it."""
_PREFIX = "model."
_SHOWN = 4
# Any of these names may stand in a checkpoint, newest first; `None` as default: one of them must.
_SETTINGS: dict[str, tuple[tuple[str, ...], Any]] = {
    "model": (("model", "model_name"), None),
    "img_size": (("img_size",), None),
    "patch_size": (("patch_size",), [6, 6, 6, 1]),
    "depths": (("depths", "depth"), None),
    "embed_dim": (("embed_dim",), None),
    "window_size": (("window_size",), None),
    "first_window_size": (("first_window_size",), None),
    "whole_last": (("last_layer_full_MSA", "last_layer_full_msa"), None),
    "c_multiplier": (("c_multiplier",), 2),
    "in_chans": (("in_chans",), 1),
    "use_mamba": (("use_mamba",), True),
    "prompt_len": (("prompt_len",), 0),
    "use_strd": (("use_strd",), False),
    "strd_l_spat": (("strd_l_spat",), 5),
    "strd_l_temp": (("strd_l_temp",), 5),
    "spatial_mask": (("spatial_mask",), "window"),
    "time_mask": (("time_mask",), "random"),
    "mask_ratio": (("mask_ratio",), 0.5),
}
_MODELS = ("neurostorm", "fmrifound", "swin4d_ver7", "swin4d_mae")


@dataclass(frozen=True)
class UsedKey:
    """One tensor that was taken over: its key in the checkpoint, ours, and its shape there."""

    theirs: str
    ours: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Imported:
    """A checkpoint in our terms.

    Attributes
    ----------
    weights
        Our parameter names to float32 tensors, the brain mask included.
    config
        Content of ``config.json``: ``model``, ``data``, ``training``, ``embedding``.
    keys
        Every key of the checkpoint that was used.
    settings
        Every hyperparameter that was used, under the name it has there.
    left_out
        Keys that were left out on request.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]
    keys: tuple[UsedKey, ...]
    settings: dict[str, Any]
    left_out: tuple[str, ...]


def import_neurostorm(path: str | Path, leave_out: Sequence[str] = ()) -> Imported:
    """Read a NeuroSTORM checkpoint.

    Parameters
    ----------
    path
        A Lightning ``.ckpt`` file.
    leave_out
        Keys, or beginnings of keys, that are left out on purpose (such as ``output_head``, the head of a fine-tuned
        model).

    Raises
    ------
    ImportCheckpointError
        If the file cannot be read, is of another network, or any key is missing, left over or of another shape.
    """
    checkpoint = read_lightning(path)
    settings, names = read_settings(checkpoint)
    left_out = tuple(key for key in checkpoint.weights if leave_out and key.startswith(tuple(leave_out)))
    weights = {key: tensor for key, tensor in checkpoint.weights.items() if key not in left_out}
    config = model_config(settings, weights, checkpoint.path)
    grid = get_grid(RECIPE.grid)
    size = [*grid.shape, config.frames]
    if list(settings["img_size"]) != size:
        raise ImportCheckpointError(
            f"{path}: img_size is {list(settings['img_size'])}, expected {size}: only networks on the full cube of "
            f"{grid.shape[0]} voxels at 2 mm can be taken over."
        )
    mask = brain_mask(grid)
    token_grid = TokenGrid(mask, config.patch_size(grid.voxel_size), config.frames, config.n_stages)
    ours, keys = convert(weights, config, token_grid, checkpoint.path)
    data = {
        **RECIPE.model_dump(mode="json"),
        "clip_length": config.frames,
        "mask_sha256": mask_hash(mask),
        "simulated": False,
    }
    training = {
        "imported": {
            "from": "NeuroSTORM",
            "file": checkpoint.path.name,
            "sha256": checkpoint.sha256,
            "hyper_parameters": names,
            "keys": len(keys),
            "left_out": list(left_out),
        }
    }
    # Its heads average over all tokens of the last stage.
    described = {"model": config.model_dump(mode="json"), "data": data, "training": training}
    return Imported(ours, described | {"embedding": {"pool": "mean"}}, keys, names, left_out)


def read_settings(checkpoint: LightningCheckpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the hyperparameters that shape the network, under our names for them and under those of the file.

    Raises
    ------
    ImportCheckpointError
        If one is missing or says that the network is another.
    """
    settings, used = {}, {}
    for name, (theirs, default) in _SETTINGS.items():
        known = [other for other in theirs if other in checkpoint.settings]
        if not known and default is None:
            raise ImportCheckpointError(
                f"{checkpoint.path}: hyper_parameters has no {theirs[0]!r}, which the network's shape depends on; it "
                "is no NeuroSTORM checkpoint, or was stripped: fetch the original."
            )
        settings[name] = checkpoint.settings[known[0]] if known else default
        if known:
            used[known[0]] = settings[name]
    expected = {"c_multiplier": 2, "in_chans": 1, "use_mamba": True}
    wrong = [name for name, value in expected.items() if settings[name] != value]
    if settings["model"] not in _MODELS:
        raise ImportCheckpointError(
            f"{checkpoint.path}: the network is {settings['model']!r}, expected one of {', '.join(_MODELS)}."
        )
    if wrong:
        raise ImportCheckpointError(
            f"{checkpoint.path}: {wrong[0]} is {settings[wrong[0]]!r}, expected {expected[wrong[0]]!r}: that network "
            "is another one."
        )
    return settings, used


def model_config(settings: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """Build the config that these hyperparameters and the presence of a decoder and of mask tokens ask for.

    Raises
    ------
    ImportCheckpointError
        If a hyperparameter cannot be used.
    """
    try:
        *image, frames = (int(size) for size in settings["img_size"])
        x, y, z, t = (int(edge) for edge in settings["patch_size"])
        depths = [int(depth) for depth in settings["depths"]]
        window = [int(size) for size in settings["window_size"]]
        tokens = [size // x for size in image]
        if not x == y == z or t != 1 or any(size % x for size in image):
            raise ValueError(f"patch_size is {[x, y, z, t]}, expected a cube that divides the image, and 1 frame")
        first = [int(size) for size in settings["first_window_size"]]
        _check_padding(tokens, frames, depths, first, window)
        whole = [max(1, size // 2 ** (len(depths) - 1)) for size in tokens]
        config = {
            "patch_mm": 2.0 * x,
            "frames": frames,
            "embed_dim": int(settings["embed_dim"]),
            "depths": depths,
            "decoder_depths": depths[-2::-1],
            "window": window,
            "first_window": first,
            "last_window": [*whole, window[3]] if settings["whole_last"] else None,
            "last_shifted": not settings["whole_last"],
            "scan_mode": "wrap",
            "prompts": int(settings["prompt_len"]),
            "redundancy_dropout": bool(settings["use_strd"]),
            "redundancy_reach": [int(settings["strd_l_spat"]) // 2, int(settings["strd_l_temp"]) // 2],
            "decoder": f"{_PREFIX}decoder_pred.weight" in weights,
            "mask_tokens": _mask_tokens(settings, weights),
        }
        return load_config(ModelConfig, config)
    except (BoldForgeError, ValueError, TypeError) as error:
        raise ImportCheckpointError(
            f"{path}: its hyper_parameters cannot be used ({str(error).rstrip('.')}); is it a NeuroSTORM checkpoint?"
        ) from None


def _check_padding(tokens: list[int], frames: int, depths: list[int], first: list[int], window: list[int]) -> None:
    for stage in range(len(depths)):
        grid = [*(size // 2**stage for size in tokens), frames]
        # The decoder's finest stage has the common window.
        pairs = [*zip(grid, window, strict=True), *(zip(grid, first, strict=True) if stage == 0 else ())]
        for size, wide in pairs:
            if size > wide and size % wide:
                raise ValueError(
                    f"stage {stage + 1} has {size} tokens along an axis with windows of {wide}, and its zero padding "
                    "is scanned there, which this model does not do"
                )


def _mask_tokens(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """Old autoencoders have a token per place in the window under the name that new ones give to the shared token."""
    has = {name for name in MASK_TOKEN_NAMES.values() if f"{_PREFIX}{name}" in weights}
    if not has and f"{_PREFIX}decoder_pred.weight" not in weights:
        return []
    if has == {"mask_token"}:
        return ["window"]
    first = {"window": "window", "atlas": "atlas"}.get(str(settings["spatial_mask"]), "random")
    return sorted(("random", "window", "atlas"), key=lambda name: name != first)


def convert(
    weights: Mapping[str, Tensor], config: ModelConfig, token_grid: TokenGrid, path: Path
) -> tuple[dict[str, Tensor], tuple[UsedKey, ...]]:
    """Turn a NeuroSTORM state dict into ours.

    Parameters
    ----------
    weights
        Tensors under ``model.*``.
    config, token_grid
        Of the network that they shall fill; the grid must be dense.
    path
        Named in errors.

    Raises
    ------
    ImportCheckpointError
        If a key is missing, left over, of another shape, or holds NaN or infinity.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in NeuroStorm(config, token_grid).state_dict().items()}
    expected.pop("brain_mask_bits")
    box = token_grid.stages
    renamed = {name: _PREFIX + _their_name(name, config) for name in expected}
    missing = sorted(set(renamed.values()) - weights.keys())
    left_over = sorted(weights.keys() - set(renamed.values()))
    if missing or left_over:
        raise ImportCheckpointError(
            f"{path}: {len(missing)} keys are missing ({_some(missing)}) and {len(left_over)} left over "
            f"({_some(left_over)}); it belongs to another network, or name what shall not be taken over with "
            "--leave-out."
        )
    ours, keys = {}, []
    for name, theirs in renamed.items():
        tensor = weights[theirs]
        to_ours, shape = _reshaping(name, expected[name], box)
        if tuple(tensor.shape) != shape:
            raise ImportCheckpointError(
                f"{path}: {theirs} has shape {list(tensor.shape)}, expected {list(shape)} for its hyper_parameters; "
                "the checkpoint belongs to another network."
            )
        if not tensor.isfinite().all():
            raise ImportCheckpointError(f"{path}: {theirs} holds NaN or infinity; fetch or train it again.")
        ours[name] = to_ours(tensor.float()).contiguous().clone()
        keys.append(UsedKey(theirs, name, shape))
    ours["brain_mask_bits"] = torch.from_numpy(np.packbits(token_grid.mask.reshape(-1)))
    return ours, tuple(keys)


def _their_name(name: str, config: ModelConfig) -> str:
    """Return a parameter's name in NeuroSTORM's network."""
    if name == "window_mask_token" and config.mask_tokens == ("window",):
        return "mask_token"
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
        (r"^patch_embed\.", "patch_embed.fc."),
        (r"^stages\.(\d+)\.position$", r"pos_embeds.\1.pos_embed"),
        (r"^stages\.(\d+)\.time$", r"pos_embeds.\1.time_embed"),
        (r"^stages\.", "layers."),
        (r"^merging\.(\d+)\.", r"layers.\1.downsample."),
        (r"^expanding\.0\.", "first_patch_expanding."),
        (r"^expanding\.(\d+)\.", lambda found: f"layers_up.{int(found[1]) - 1}.upsample."),
        (r"^decoder\.(\d+)\.", r"layers_up.\1.blocks."),
        (r"\.mlp\.fc", ".mlp.linear"),
        (r"\.mamba\.dt_bias$", ".mamba.dt_proj.bias"),
    )
    for pattern, theirs in rules:
        name = re.sub(pattern, theirs, name)
    return name


def _reshaping(name: str, shape: torch.Size, box: Sequence[Any]) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """Say how their tensor becomes ours, and which shape it must have."""
    stage = re.match(r"^stages\.(\d+)\.(position|time)$", name)
    if stage and stage[2] == "position":
        grid = box[int(stage[1])].grid
        return (lambda value: value[0, ..., 0].flatten(1).T.unsqueeze(1)), (1, shape[-1], *grid, 1)
    if stage:
        return (lambda value: value[0, :, 0, 0, 0].T.unsqueeze(0)), (1, shape[-1], 1, 1, 1, shape[1])
    if name.endswith(".prompt"):
        return (lambda value: value[0]), (1, *shape)
    return (lambda value: value), tuple(shape)


def _some(keys: Sequence[str]) -> str:
    more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return (", ".join(keys[:_SHOWN]) or "none") + more
