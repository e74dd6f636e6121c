"""LoRA on a frozen backbone's linear layers, through peft."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from pydantic import Field
from torch import Tensor, nn

from boldforge.configs import StrictModel
from boldforge.finetune.backbone import Backbone
from boldforge.finetune.errors import FinetuneError

# peft writes this before every name, so that a file also loads through `peft.PeftModel.from_pretrained`.
_PEFT_PREFIX = "base_model.model."


class AdapterError(FinetuneError):
    """An adapter does not fit its backbone, or its folder cannot be read."""


class AdapterConfig(StrictModel):
    """Which layers learn a low-rank update W + (alpha / rank) · B·A (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(4, ge=0, le=256, description="Rank of every update; 0 trains the head alone (a linear probe).")
    alpha: float | None = Field(
        None,
        gt=0,
        description="Scale of the update times rank; none takes 2 · rank, so that a sweep over ranks compares capacity "
        "and not step size.",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of an update's inputs dropped in training, against overfitting.",
    )
    targets: tuple[str, ...] = Field(
        ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2"),
        min_length=1,
        description="Last names of the linear layers to adapt; the default is every layer of a Mamba block.",
    )
    first_stage: int = Field(
        0,
        ge=0,
        description="Encoder stage, counted from 0, from which layers are adapted. What lies below stays frozen and is "
        "computed once per clip, so 1 saves most of the time: the first stage holds most of the tokens.",
    )


@dataclass(frozen=True)
class AdapterInfo:
    """What `attach_adapter` did: numbers of parameters and the adapted layers."""

    trainable: int
    total: int
    layers: tuple[str, ...]


def attach_adapter(backbone: Backbone, config: AdapterConfig, seed: int = 0) -> AdapterInfo:
    """Freeze a backbone and put LoRA on its linear layers, in place.

    The updates start at zero (B = 0), so the embedding does not change until something is learned.

    Parameters
    ----------
    backbone
        Its ``network`` must carry no adapter yet.
    config
        Rank 0 freezes and adapts nothing.
    seed
        Decides A.

    Returns
    -------
    AdapterInfo
        Trainable and total parameters of the network, without a head.

    Raises
    ------
    AdapterError
        If no layer has one of the target names, or the first stage does not exist.
    """
    network = backbone.network
    if hasattr(network, "peft_config"):
        raise ValueError("the network already carries an adapter; load the backbone afresh")
    if config.first_stage >= backbone.n_stages:
        raise AdapterError(
            f"adapter.first_stage is {config.first_stage}, but this encoder has {backbone.n_stages} stages, counted "
            f"from 0; set it to {backbone.n_stages - 1} or less."
        )
    network.requires_grad_(False)
    if config.rank == 0:
        return AdapterInfo(0, _count(network), ())
    linear = backbone.linear_layers(config.first_stage)
    layers = tuple(name for name in linear if name.rsplit(".", 1)[-1] in config.targets)
    if not layers:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise AdapterError(
            f"adapter.targets {list(config.targets)} name no layer of this encoder; its linear layers are "
            f"{', '.join(known)}."
        )
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha if config.alpha is not None else 2 * config.rank),
        lora_dropout=config.dropout,
        target_modules=list(layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(lora, network)
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return AdapterInfo(trainable, _count(network), layers)


def adapter_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return the adapter's tensors on the CPU under peft's file names; empty where none is attached."""
    if not hasattr(backbone.network, "peft_config"):
        return {}
    state = peft.get_peft_model_state_dict(backbone.network)
    return {_PEFT_PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def load_adapter_state(backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    """Put tensors from `adapter_state` into an attached adapter.

    Raises
    ------
    AdapterError
        If a name or a shape differs from the attached adapter's.
    """
    expected = {name: tensor.shape for name, tensor in adapter_state(backbone).items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise AdapterError(
            f"the adapter's tensors do not fit this encoder: {len(differing)} differ, the first is {differing[0]} "
            f"(found {_shape(found.get(differing[0]))}, expected {_shape(expected.get(differing[0]))}); give the "
            "encoder that the adapter was trained on."
        )
    if state:
        peft.set_peft_model_state_dict(
            backbone.network, {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in state.items()}
        )


def peft_description(backbone: Backbone) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``; the order of everything in it is fixed."""
    described = backbone.network.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    return {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in sorted(described.items())
    } | {"inference_mode": True}


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))
