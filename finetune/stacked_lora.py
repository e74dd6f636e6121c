"""Several trials' LoRA on one copy of a frozen backbone: their batches lie one after the other and pass it together.

Every trial keeps its own parameters, rank, scale and dropout; what they share are the frozen weights and each large
product, which is one over all trials. Nothing flows between trials.

Shape suffixes: K trials · B clips of a trial's batch · N = K·B · n tokens of a trial's batch · R largest rank · I, O
channels in and out · C channels of an embedding.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from boldforge.finetune.backbone import Backbone, Partway
from boldforge.finetune.classifier import Classifier
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.linear_lora import LinearLora


def share_backbone(backbone: Backbone) -> Backbone:
    """Return a second backbone on the same weights: it can carry an adapter of its own and needs no room for others."""
    tensors = (*backbone.network.parameters(), *backbone.network.buffers())
    return copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors})


class OwnDraws:
    """Every trial's own random numbers: those that it would draw if it trained alone.

    Parameters
    ----------
    seeds
        One per trial.
    device
        Where they are drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._generator = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        self._states = []
        for seed in seeds:
            self._generator.manual_seed(seed)
            self._states.append(self._generator.get_state())

    @contextmanager
    def of(self, place: int) -> Iterator[None]:
        """Draw from one trial's numbers; the caller puts the generator back when all is done."""
        self._generator.set_state(self._states[place])
        yield
        self._states[place] = self._generator.get_state()


class Stack:
    """Trials that train on one backbone at the same time.

    Parameters
    ----------
    backbone
        Carries no adapter; its linear layers are replaced, and it is of no other use afterwards.
    classifiers
        The trials, each on a backbone from `share_backbone`, on the same device.

    Raises
    ------
    FinetuneError
        If a trial trains something else than plain LoRA on linear layers, or not from the same stage on.
    """

    def __init__(self, backbone: Backbone, classifiers: Sequence[Classifier]) -> None:
        _check(classifiers)
        self.stage = classifiers[0].adapter.first_stage
        self.active: tuple[int, ...] = tuple(range(len(classifiers)))
        self.draws: OwnDraws | None = None
        self._backbone = backbone
        layers = [dict(_updates(classifier)) for classifier in classifiers]
        for name in dict.fromkeys(name for found in layers for name in found):
            parent, _, last = name.rpartition(".")
            base = backbone.network.get_submodule(name)
            assert isinstance(base, nn.Linear)
            setattr(
                backbone.network.get_submodule(parent), last, _StackedLinear(base, [f.get(name) for f in layers], self)
            )

    def embed(self, partway: Partway) -> Tensor:
        """Embed the active trials' batches, one after the other [K·B, …], as [K, B, C].

        Every trial's own generator is asked for its dropout while `draws` is set. Without active trials, the backbone
        alone embeds a batch [B, …] as [1, B, C].
        """
        embeddings_NC = self._backbone.embed_from(partway, self.stage)
        return embeddings_NC.unflatten(0, (max(1, len(self.active)), -1))


class _StackedLinear(nn.Module):
    """A frozen linear layer and every trial's update of it; None where a trial leaves it as it is."""

    def __init__(self, base: nn.Linear, layers: Sequence[LinearLora | None], stack: Stack) -> None:
        super().__init__()
        self.base = base
        # Not as submodules: they are the trials' own.
        self._layers, self._stack = tuple(layers), (stack,)

    def forward(self, x_NI: Tensor) -> Tensor:
        """[K·B, …, I] to [K·B, …, O]."""
        (stack,) = self._stack
        layers = [self._layers[trial] for trial in stack.active]
        if all(layer is None for layer in layers):
            return self.base(x_NI)
        weight = self.base.weight
        down_KRI, up_KOR = _padded(layers, weight)
        x_KnI = x_NI.reshape(len(layers), -1, weight.shape[1])
        dropped = [layer is not None and _drops(layer.lora_dropout["default"]) for layer in layers]
        if not any(dropped):
            y_KnO = _StackedLowRank.apply(x_KnI, weight, self.base.bias, down_KRI, up_KOR)
            return y_KnO.view(*x_NI.shape[:-1], weight.shape[0])
        parts = []
        for place, (layer, x_BI) in enumerate(zip(layers, x_NI.chunk(len(layers)), strict=True)):
            if not dropped[place]:
                parts.append(x_BI)
                continue
            assert layer is not None and stack.draws is not None
            with stack.draws.of(place):
                parts.append(layer.lora_dropout["default"](x_BI))
        dropped_KnI = torch.cat(parts).view_as(x_KnI)
        update_KnO = (dropped_KnI @ down_KRI.mT) @ up_KOR.mT
        return self.base(x_NI) + update_KnO.view(*x_NI.shape[:-1], weight.shape[0])


def _drops(dropout: nn.Module) -> bool:
    # Without dropout peft puts an identity there, which says that it is training at all times.
    return dropout.training and not isinstance(dropout, nn.Identity)


class _StackedLowRank(torch.autograd.Function):
    """y = x·(W + B·A)ᵀ + bias for every trial; W + B·A is formed again in the backward, where it is small."""

    @staticmethod
    def forward(ctx: Any, x_KnI: Tensor, weight: Tensor, bias: Tensor | None, a_KRI: Tensor, b_KOR: Tensor) -> Tensor:
        """Return [K, n, O]."""
        ctx.save_for_backward(x_KnI, weight, a_KRI, b_KOR)
        whole_KOI = torch.baddbmm(weight, b_KOR, a_KRI)
        y_KnO = torch.bmm(x_KnI, whole_KOI.mT)
        return y_KnO if bias is None else y_KnO.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_KnO: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B; the few rows of the rank go first."""
        x_KnI, weight, a_KRI, b_KOR = ctx.saved_tensors
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.bmm(dy_KnO, torch.baddbmm(weight, b_KOR, a_KRI))
        if ctx.needs_input_grad[3]:
            da = (b_KOR.mT @ dy_KnO.mT) @ x_KnI
        if ctx.needs_input_grad[4]:
            db = ((a_KRI @ x_KnI.mT) @ dy_KnO).mT
        return dx, None, None, da, db


def _padded(layers: Sequence[LinearLora | None], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [K, R, I] and scaled B [K, O, R], zero beyond a trial's own rank; gradients reach its own tensors."""
    most = max(layer.r["default"] for layer in layers if layer is not None)
    outputs, inputs = weight.shape
    down, up = [], []
    for layer in layers:
        if layer is None:
            down.append(weight.new_zeros(most, inputs))
            up.append(weight.new_zeros(outputs, most))
            continue
        short = most - layer.r["default"]
        a: Any = layer.lora_A["default"]
        b: Any = layer.lora_B["default"]
        down.append(nn.functional.pad(a.weight, (0, 0, 0, short)))
        up.append(nn.functional.pad(b.weight * layer.scaling["default"], (0, short)))
    return torch.stack(down), torch.stack(up)


def _updates(classifier: Classifier) -> Iterator[tuple[str, LinearLora]]:
    for name in classifier.info.layers:
        layer = classifier.network.get_submodule(name)
        if not isinstance(layer, LinearLora):
            raise FinetuneError(
                f"{name} is a {type(layer).__name__}; trials are batched where LoRA adapts linear layers only: train "
                "them one by one (batch_trials=1)."
            )
        yield name, layer


def _check(classifiers: Sequence[Classifier]) -> None:
    for classifier in classifiers:
        adapter = classifier.adapter
        if adapter.kind != "lora" or adapter.frozen or adapter.dora:
            found = "dora" if adapter.dora else "rank 0" if adapter.frozen else f"kind {adapter.kind}"
            raise FinetuneError(f"a batch of trials trains plain LoRA, found {found}; train it alone (batch_trials=1).")
    stages = sorted({classifier.adapter.first_stage for classifier in classifiers})
    if len(stages) > 1:
        raise FinetuneError(f"trials of one batch must have one adapter.first_stage, found {stages}.")
