"""A backbone, its adapter and a head: clips in, logits out; and the folder that keeps the last two."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from boldforge.data_shards import DataRecipe
from boldforge.finetune.adapters import (
    AdapterConfig,
    AdapterError,
    AdapterInfo,
    adapter_state,
    attach_adapter,
    load_adapter_state,
    peft_description,
    resolve_adapter,
    unmerge_adapter,
)
from boldforge.finetune.backbone import Backbone
from boldforge.finetune.fmcib_config import FmcibConfig
from boldforge.finetune.networks import BackboneSpec, make_backbone
from boldforge.finetune.resnet_rnn import ResnetRnnBackbone, ResnetRnnConfig
from boldforge.finetune.tasks import Task, get_task
from boldforge.finetune.tasks.base import Matching

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
_TUNED = "tuned.safetensors"
_WEIGHTS = {"lora": "adapter_model.safetensors", "prompts": "prompts.safetensors", "partial": _TUNED, "full": _TUNED}
_KEPT = "candidates.safetensors"
ADAPTER_FILES = ("task.json", "head.safetensors", _KEPT, *dict.fromkeys(_WEIGHTS.values()), "adapter_config.json")
# What an encoder reads: clips, of which the precision of the shards is not part, or cubes.
_INPUT = ("clip_length", "mask_sha256", *(name for name in DataRecipe.model_fields if name != "dtype"))
_CUBE = ("input", "size", "order", "orientation", "cube")


class Head(nn.Module):
    """Standardise an embedding by the training clips' mean and deviation, then one linear layer, or two.

    Parameters
    ----------
    dim, outputs
        Sizes of an embedding and of the logits.
    hidden
        Width of a layer with a ReLU between them; 0 goes straight from one to the other.
    """

    def __init__(self, dim: int, outputs: int, hidden: int = 0) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.unit: Tensor
        self.register_buffer("unit", torch.tensor([1.0, 0.0]))
        self.hidden = nn.Linear(dim, hidden) if hidden else None
        self.linear = nn.Linear(hidden or dim, outputs)

    def fit_unit(self, scale: float, shift: float) -> None:
        """Let the outputs come in the label's unit: what the layers give, times `scale`, plus `shift`."""
        self.unit.copy_(torch.tensor([scale, shift]))

    def fit_scale(self, embeddings_BC: Tensor) -> None:
        """Take mean and deviation from the training clips' frozen embeddings [B, C].

        Channels differ by orders of magnitude; without this one step size cannot fit them all.
        """
        self.mean.copy_(embeddings_BC.mean(dim=0))
        self.deviation.copy_(embeddings_BC.std(dim=0, unbiased=False))

    def forward(self, embeddings_BC: Tensor) -> Tensor:
        """[B, C] to logits [B, K]."""
        # A channel that never varied in training carries nothing; it must not blow up on a subject where it does.
        scale = torch.where(self.deviation > 1e-6, self.deviation, torch.inf)
        x = (embeddings_BC - self.mean) / scale
        outputs = self.linear(x if self.hidden is None else self.hidden(x).relu())
        return outputs * self.unit[0] + self.unit[1]


class Classifier(nn.Module):
    """A frozen backbone with its adapter, and a head for one task.

    Parameters
    ----------
    backbone
        Carries no adapter yet; it is changed in place.
    task
        Decides the number of logits.
    adapter
        Attached here.
    seed
        Decides the adapter's and the head's first values.
    hidden
        Of the `Head`.
    """

    def __init__(self, backbone: Backbone, task: Task, adapter: AdapterConfig, seed: int = 0, hidden: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.task = task
        self.adapter = adapter = resolve_adapter(backbone, adapter)
        self.info: AdapterInfo = attach_adapter(backbone, adapter, seed)
        self.network = backbone.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(backbone.dim, task.n_outputs, hidden)
        self.train(False)

    @property
    def trainable_by_part(self) -> dict[str, int]:
        """Number of trainable parameters of the adapter, under its kind, and of the head."""
        adapter = {} if self.adapter.frozen else {self.adapter.kind: self.info.trainable}
        return adapter | {"head": sum(parameter.numel() for parameter in self.head.parameters())}

    @property
    def trainable(self) -> int:
        """Number of trainable parameters, head included."""
        return sum(self.trainable_by_part.values())

    @property
    def total(self) -> int:
        """Number of all parameters, head included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, values_BTV: Tensor) -> Tensor:
        """Logits [B, K] of clips [B, T, V]."""
        return self.head(self.backbone.embed(values_BTV))

    @torch.no_grad()
    def predict(self, values_BTV: Tensor) -> Tensor:
        """Return the task's scores of clips [B, T, V], [B]; average them over a subject's clips."""
        return self.task.scores(self(values_BTV))

    def train(self, mode: bool = True) -> "Classifier":
        """Switch the adapter's dropout; the backbone itself never leaves evaluation mode, recurrent layers apart.

        An adapter that was merged is taken off the weights first: merged, it would not learn, and nothing would say so.
        """
        super().train(mode)
        if mode:
            unmerge_adapter(self.backbone)
        for name, module in self.network.named_modules():
            # On a GPU a recurrent layer has a backward pass in training mode only; ours do the same in both.
            if "lora_dropout" not in name and not isinstance(module, nn.RNNBase):
                module.training = False
        return self

    def state(self) -> dict[str, Tensor]:
        """Return copies of all that training changes: adapter and head tensors."""
        head = {f"head.{name}": tensor.detach().cpu().clone() for name, tensor in self.head.state_dict().items()}
        return adapter_state(self.backbone) | head

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises
        ------
        AdapterError
            If a tensor's name or shape differs.
        """
        head = {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
        own = {name: tensor.shape for name, tensor in self.head.state_dict().items()}
        if own != {name: tensor.shape for name, tensor in head.items()}:
            raise AdapterError(
                f"the head was trained on embeddings of another size than this encoder's {self.backbone.dim}; give the "
                "encoder and the pooling that it was trained on."
            )
        load_adapter_state(self.backbone, {k: v for k, v in state.items() if not k.startswith("head.")})
        self.head.load_state_dict(head)


def save_adapter(classifier: Classifier, folder: str | Path, figures: Mapping[str, Any] | None = None) -> Path:
    """Write an adapter folder.

    Parameters
    ----------
    classifier
        What was trained.
    folder
        Made if missing; an older adapter in it is removed first. Receives ``adapter_config.json`` and
        ``adapter_model.safetensors`` (peft's format; absent for rank 0, which has no adapter), ``prompts.safetensors``
        or, of kinds ``partial`` and ``full``, ``tuned.safetensors``; ``head.safetensors`` and ``task.json``.
    figures
        Whatever should stand beside the weights: metrics, number of subjects, whether they were simulated.

    Returns
    -------
    Path
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # task.json goes first and comes back last: without it a half-written folder is no adapter, and never a mixed one.
    for name in ADAPTER_FILES:
        (folder / name).unlink(missing_ok=True)
    backbone = classifier.backbone
    state = classifier.state()
    head = {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
    save_file(head, folder / "head.safetensors")
    if isinstance(classifier.task, Matching):
        save_file({name: tensor.contiguous() for name, tensor in classifier.task.tensors.items()}, folder / _KEPT)
    kind = classifier.adapter.kind
    if not classifier.adapter.frozen:
        adapter = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        save_file(adapter, folder / _WEIGHTS[kind], metadata={"format": "pt"})
        if kind == "lora":
            _write_json(folder / "adapter_config.json", peft_description(backbone))
    content = {
        "format_version": FORMAT_VERSION,
        "task": classifier.task.name,
        "classes": list(classifier.task.classes),
        "head": {
            "inputs": backbone.dim,
            "outputs": classifier.task.n_outputs,
            "hidden": classifier.head.hidden.out_features if classifier.head.hidden is not None else 0,
        },
        "pool": backbone.pool,
        "adapter": classifier.adapter.model_dump(mode="json"),
        "trainable_parameters": classifier.trainable,
        "base_weights_hash": backbone.weights_hash,
        "network": backbone.config.model_dump() if isinstance(backbone, ResnetRnnBackbone) else None,
        "data": dict(backbone.data),
        "figures": dict(figures or {}),
    }
    _write_json(folder / "task.json", content)
    return folder


def load_adapter(folder: str | Path, backbone: Backbone, force: bool = False) -> Classifier:
    """Load an adapter folder onto the backbone it was trained on.

    Parameters
    ----------
    folder
        Written by `save_adapter`.
    backbone
        Freshly loaded; its weights hash, atlas, input recipe and pooling must be those recorded in ``task.json``.
    force
        Take another base all the same, if the adapter's tensors fit it, and warn; the pooling must still be the same.

    Returns
    -------
    Classifier
        In evaluation mode.

    Raises
    ------
    AdapterError
        If the folder is incomplete or damaged, or the backbone is another one.
    """
    folder = Path(folder)
    content = read_task(folder)
    _check_base(folder, content, backbone, force)
    if content["pool"] != backbone.pool:
        raise AdapterError(
            f"{folder}: the head was trained on pooling {content['pool']!r}, the encoder was loaded with "
            f"{backbone.pool!r}; load it with pool={content['pool']!r}."
        )
    adapter = AdapterConfig.model_validate(content["adapter"])
    head = _read_tensors(folder / "head.safetensors")
    state = {f"head.{name}": tensor for name, tensor in head.items()}
    if not adapter.frozen:
        state |= _read_tensors(folder / _WEIGHTS[adapter.kind])
    kept = _read_tensors(folder / _KEPT) if (folder / _KEPT).is_file() else None
    task = get_task(content["task"], classes=content.get("classes", ()), tensors=kept)
    hidden = content["head"].get("hidden", 0)
    classifier = Classifier(backbone, task, adapter, hidden=hidden)
    classifier.load_state(state)
    return classifier


def _check_base(folder: Path, content: Mapping[str, Any], backbone: Backbone, force: bool) -> None:
    """Refuse a base with other weights, another atlas or another input than the adapter was trained on."""
    differing = base_differences(content, backbone)
    if not differing:
        return
    said = f"{folder}: the encoder given is not the one this adapter was trained on ({', '.join(differing)})"
    if not force:
        raise AdapterError(
            f"{said}; on another base it would give meaningless predictions, so give the export that it was trained "
            "on, or finetune again (--force-base, or force=True, takes it all the same)."
        )
    logger.warning("%s; taken all the same, as asked: its figures do not hold here.", said)


def base_differences(content: Mapping[str, Any], backbone: Backbone) -> list[str]:
    """Say how weights, atlas and input differ from those that a ``task.json`` records; empty on the same base."""
    differing = []
    if content["base_weights_hash"] != backbone.weights_hash:
        differing.append(f"weights hash {backbone.weights_hash} instead of {content['base_weights_hash']}")
    found, expected = _flat(backbone.data), _flat(content.get("data", {}))
    for name in expected:
        if name.split(".")[0] in ("atlas_sha256", *_INPUT, *_CUBE) and found.get(name) != expected[name]:
            differing.append(f"{name} {found.get(name)} instead of {expected[name]}")
    return differing


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe says, the keys of a section in it as ``section.key``."""
    cube = data.get("cube") or {}
    return {name: value for name, value in data.items() if name != "cube"} | {f"cube.{k}": v for k, v in cube.items()}


def load_classifier(backbone_folder: str | Path | None, adapter_folder: str | Path, force: bool = False) -> Classifier:
    """Load an encoder and the adapter trained on it, with the pooling that the adapter records.

    Parameters
    ----------
    backbone_folder
        As for `load_backbone`, or FMCIB's weights file; None for a network that was trained from nothing, which its own
        folder holds whole.
    adapter_folder
        Written by `save_adapter`.
    force
        See `load_adapter`.

    Raises
    ------
    BoldForgeError
        As `load_backbone` and `load_adapter`.
    """
    content = read_task(adapter_folder)
    network = content.get("network")
    if (network is None) == (backbone_folder is None):
        raise AdapterError(
            f"{adapter_folder}: was trained "
            + ("on a pretrained encoder; give its folder." if network is None else "from nothing; give no encoder.")
        )
    spec: BackboneSpec = Path(str(backbone_folder))
    if network is not None:
        spec = ResnetRnnConfig.model_validate(network)
    elif content["data"].get("input") == "volume":
        spec = FmcibConfig(kind="fmcib", weights=Path(str(backbone_folder)))
    return load_adapter(adapter_folder, make_backbone(spec, content["pool"], content["data"], 0), force)


def read_task(folder: str | Path) -> dict[str, Any]:
    """Read an adapter folder's ``task.json``: the task, the adapter's shape, its base's hash and the figures.

    Raises
    ------
    AdapterError
        If it is missing, damaged, or of another format.
    """
    path = Path(folder) / "task.json"
    try:
        content = json.loads(path.read_text())
    except OSError:
        raise AdapterError(
            f"{path}: no such file; give the adapter/ folder that boldforge finetune or sweep wrote."
        ) from None
    except ValueError:
        raise AdapterError(f"{path}: is not valid JSON; finetune again.") from None
    needed = {"task", "pool", "adapter", "base_weights_hash"}
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION or not needed <= content.keys():
        raise AdapterError(
            f"{path}: has format version {version!r}, this boldforge reads {FORMAT_VERSION}; use the boldforge that "
            "wrote it, or finetune again."
        )
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); copy the adapter folder again."
        ) from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
