"""What of a backbone learns: LoRA through peft, prompts, some of its weights, all of them, or none."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from pydantic import Field, model_validator
from torch import Tensor, nn

from boldforge.configs import StrictModel
from boldforge.finetune.backbone import Backbone
from boldforge.finetune.conv_lora import Conv3dLora
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.linear_lora import LinearLora

# peft writes this before every name, so that a file also loads through `peft.PeftModel.from_pretrained`.
_PEFT_PREFIX = "base_model.model."


class AdapterError(FinetuneError):
    """An adapter does not fit its backbone, or its folder cannot be read."""


class AdapterConfig(StrictModel):
    """What learns: updates W + (alpha / rank) · B·A (LoRA, Hu et al. 2021, arXiv 2106.09685), prompts, or weights."""

    kind: Literal["lora", "prompts", "probe", "partial", "full"] = Field(
        "lora",
        description="lora: low-rank updates of a frozen backbone. prompts: learned tokens before every window of a "
        "frozen backbone (TPT, Wang et al. 2025). probe: the head alone. partial: the weights of the last_stages, or "
        "those that unfreeze names. full: every weight from first_stage on.",
    )
    prompts: int = Field(50, ge=1, le=1000, description="Of kind prompts: learned tokens per block.")
    last_stages: int | None = Field(None, ge=1, description="Of kind partial: train the last so many stages.")
    unfreeze: tuple[str, ...] = Field(
        (), description="Of kind partial: train the parameters with these names or patterns (stages.3.*, *.norm?.*)."
    )
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
    rank_stabilised: bool = Field(
        False, description="Scale by alpha / √rank in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)."
    )
    dora: bool = Field(
        False, description="Learn every output's magnitude beside the update's direction (DoRA, arXiv 2402.09353)."
    )
    targets: tuple[str, ...] = Field(
        ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2"),
        min_length=1,
        description="Which layers to adapt: last names, or patterns (layer4.*) of last or whole names; the default is "
        "every layer of a Mamba block.",
    )
    ranks: dict[str, int] = Field(
        default_factory=dict,
        description="Other ranks for some targets, by last name or pattern of the whole name; of several that fit, the "
        "first one written counts, and 0 leaves the layer out.",
    )
    first_stage: int = Field(
        0,
        ge=0,
        description="Encoder stage, counted from 0, from which layers are adapted. What lies below stays frozen and is "
        "computed once per clip, so 1 saves most of the time: the first stage holds most of the tokens.",
    )

    @property
    def frozen(self) -> bool:
        """Whether the head alone is trained."""
        return self.kind == "probe" or (self.kind == "lora" and self.rank == 0)

    @model_validator(mode="after")
    def _one_meaning(self) -> "AdapterConfig":
        named = bool(self.last_stages or self.unfreeze)
        if self.kind == "partial" and not named:
            raise ValueError(
                "kind partial trains what you name; add adapter.last_stages=1 or 'adapter.unfreeze=[stages.3.*]'"
            )
        if named and self.kind != "partial":
            raise ValueError(
                f"last_stages and unfreeze are read by kind partial alone, not by {self.kind}; set "
                "adapter.kind=partial or leave them out"
            )
        if self.last_stages and self.unfreeze:
            raise ValueError("last_stages and unfreeze both say what to train; set one of them")
        return self


@dataclass(frozen=True)
class AdapterInfo:
    """What `attach_adapter` did: numbers of parameters and the adapted layers."""

    trainable: int
    total: int
    layers: tuple[str, ...]


def resolve_adapter(backbone: Backbone, config: AdapterConfig) -> AdapterConfig:
    """Return the config with the first stage that learns, which for the last N stages depends on the backbone.

    Raises
    ------
    AdapterError
        If the backbone has no such stage.
    """
    stages = backbone.n_stages
    if config.last_stages is not None:
        if config.last_stages > stages:
            raise AdapterError(
                f"adapter.last_stages is {config.last_stages}, but this encoder has {stages} stages; set it to "
                f"{stages} or less, or kind to full."
            )
        return config.model_copy(update={"first_stage": stages - config.last_stages})
    # For a head alone everything may lie below.
    if config.first_stage >= stages + config.frozen:
        raise AdapterError(
            f"adapter.first_stage is {config.first_stage}, but this encoder has {stages} stages, counted "
            f"from 0; set it to {stages - 1} or less."
        )
    return config


def attach_adapter(backbone: Backbone, config: AdapterConfig, seed: int = 0) -> AdapterInfo:
    """Freeze a backbone and give it what learns: LoRA, prompts, or weights of its own; in place.

    LoRA's updates start at zero (B = 0), so the embedding does not change until something is learned.

    Parameters
    ----------
    backbone
        Its ``network`` must carry no adapter yet.
    config
        Kind ``probe`` and rank 0 freeze and adapt nothing. Of kind ``full``, every parameter that `first_stage` and
        what lies above it use is trained, of kind ``partial`` those of them that are asked for.
    seed
        Decides A, or the prompts.

    Returns
    -------
    AdapterInfo
        Trainable and total parameters of the network, without a head.

    Raises
    ------
    AdapterError
        If no layer has one of the target names, a key of `ranks` fits none of them, the first stage does not exist, or
        the backbone cannot take prompts.
    """
    config = resolve_adapter(backbone, config)
    if hasattr(backbone.network, "peft_config"):
        raise ValueError("the network already carries an adapter; load the backbone afresh")
    backbone.network.requires_grad_(False)
    if config.frozen:
        return AdapterInfo(0, _count(backbone.network), ())
    if config.kind == "prompts":
        names = _add_prompts(backbone, config, seed)  # gives the backbone another network
        return _learn(backbone.network, names)
    if config.kind in ("partial", "full"):
        return _learn(backbone.network, _unfrozen(backbone, config))
    network = backbone.network
    ranks = _layer_ranks(backbone, config)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha if config.alpha is not None else 2 * config.rank),
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilised,
        use_dora=config.dora,
        # peft takes a list's names for endings, and one layer's whole name may be how another's ends.
        target_modules="|".join(re.escape(name) for name in ranks),
    )
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.rank}
    lora.rank_pattern = other
    if config.alpha is None:
        lora.alpha_pattern = {name: 2 * rank for name, rank in other.items()}
    lora._register_custom_module({nn.Conv3d: Conv3dLora, nn.Linear: LinearLora})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(lora, network)
    adapted = {name: layer.r["default"] for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    assert adapted == ranks, "peft has adapted other layers, or at other ranks, than it was asked to"
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return AdapterInfo(trainable, _count(network), tuple(ranks))


def _learn(network: nn.Module, names: list[str]) -> AdapterInfo:
    for name in names:
        network.get_parameter(name).requires_grad_(True)
    return AdapterInfo(sum(network.get_parameter(name).numel() for name in names), _count(network), tuple(names))


def _unfrozen(backbone: Backbone, config: AdapterConfig) -> list[str]:
    """Name the backbone's own parameters that learn."""
    known = backbone.stage_parameters(config.first_stage)
    for pattern in config.unfreeze:
        if not any(_fits(name, pattern) for name in known):
            raise AdapterError(
                f"adapter.unfreeze: {pattern!r} fits no parameter from stage {config.first_stage} on, such as "
                f"{', '.join(known[:3])}; correct it, or set adapter.first_stage lower."
            )
    return [name for name in known if not config.unfreeze or any(_fits(name, pattern) for pattern in config.unfreeze)]


def _add_prompts(backbone: Backbone, config: AdapterConfig, seed: int) -> list[str]:
    """Give the blocks their prompts and name these."""
    give = getattr(backbone, "add_prompts", None)
    if give is None:
        raise AdapterError(
            "adapter.kind is prompts, but this network has no windows to put prompts before; set it to lora."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return give(config.prompts, config.first_stage)


def merge_adapter(backbone: Backbone) -> None:
    """Add the updates to the weights they update, so that inference costs what the plain network costs."""
    for layer in _lora_layers(backbone):
        layer.merge()


def unmerge_adapter(backbone: Backbone) -> None:
    """Take off what `merge_adapter` added, to rounding."""
    for layer in _lora_layers(backbone):
        if layer.merged:
            layer.unmerge()


def adapter_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return what training changes, on the CPU: LoRA's tensors under peft's file names, prompts, or unfrozen weights.

    Empty where the backbone is frozen and carries no adapter.
    """
    if not hasattr(backbone.network, "peft_config"):
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in backbone.network.named_parameters()
            if parameter.requires_grad
        }
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
    if state and not hasattr(backbone.network, "peft_config"):
        backbone.network.load_state_dict(state, strict=False)
    elif state:
        peft.set_peft_model_state_dict(
            backbone.network, {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in state.items()}
        )


def peft_description(backbone: Backbone) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``; the order of everything in it is fixed."""
    described = backbone.network.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    return {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in sorted(described.items())
    } | {"inference_mode": True, "base_model_name_or_path": f"sha256:{backbone.weights_hash}"}


def _lora_layers(backbone: Backbone) -> list[LoraLayer]:
    return [module for module in backbone.network.modules() if isinstance(module, LoraLayer)]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name.rsplit(".", 1)[-1], pattern) or fnmatchcase(name, pattern)


def _layer_ranks(backbone: Backbone, config: AdapterConfig) -> dict[str, int]:
    """Give every layer to adapt its rank, which is at least 1."""
    adaptable = backbone.adaptable_layers(config.first_stage)
    targets = [name for name in adaptable if any(_fits(name, pattern) for pattern in config.targets)]
    if not targets:
        known = sorted({name.rsplit(".", 1)[-1] for name in adaptable})
        raise AdapterError(
            f"adapter.targets {list(config.targets)} name no layer of this encoder; the layers it can adapt are "
            f"{', '.join(known)}."
        )
    for pattern, rank in config.ranks.items():
        if rank < 0 or not any(_fits(name, pattern) for name in targets):
            wrong = f"is {rank}, expected 0 or more" if rank < 0 else f"fits none of {', '.join(sorted(targets)[:8])}"
            raise AdapterError(f"adapter.ranks: {pattern!r} {wrong}; correct it or take it out.")
    ranks = {
        name: next((rank for pattern, rank in config.ranks.items() if _fits(name, pattern)), config.rank)
        for name in targets
    }
    kept = {name: rank for name, rank in ranks.items() if rank > 0}
    if not kept:
        raise AdapterError("adapter.ranks leaves no layer to adapt; set adapter.rank to 0 to train the head alone.")
    return kept


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))
