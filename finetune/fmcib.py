"""A CT-pretrained 3D ResNet-50 (FMCIB, Pai et al. 2024, Nature Machine Intelligence) behind the backbone protocol.

The network is MONAI's. The published weights are a dictionary whose ``trunk_state_dict`` holds exactly its parameters.
Shape suffixes: B volumes · ZYX the cube's axes in the published order · C features.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from monai.networks.nets import resnet50
from torch import Tensor, nn

from boldforge.finetune.backbone import Partway, parameters_of
from boldforge.finetune.errors import FinetuneError

TRUNK = "trunk_state_dict"
SIZE = 50  # voxels along every axis of the published input
_LAYERS = ("layer1", "layer2", "layer3", "layer4")


def build_fmcib(widen_factor: float = 2) -> nn.Module:
    """Build the network without weights: 184,477,824 parameters and 4096 features at the published width of 2."""
    return resnet50(
        pretrained=False,
        n_input_channels=1,
        widen_factor=widen_factor,
        conv1_t_stride=2,
        feed_forward=False,
        bias_downsample=True,
    )


class FmcibBackbone:
    """FMCIB's trunk: cubes [B, 1, 50, 50, 50] in, the mean over the last stage's places out, [B, 4096].

    Stage 0 is the first convolution with its pooling; stages 1 to 4 are the ResNet's layers.

    Parameters
    ----------
    network
        What `build_fmcib` gives, with weights.
    weights_hash
        Names the weights; an adapter fits these and no others.
    """

    pool = "mean"
    n_stages = 1 + len(_LAYERS)

    def __init__(self, network: nn.Module, weights_hash: str) -> None:
        self.network = network
        self.weights_hash = weights_hash
        self.dim = int(network.layer4[-1].conv3.out_channels)  # type: ignore[index, union-attr, arg-type]
        self.data: Mapping[str, Any] = {"input": "volume", "size": SIZE, "order": "zyx", "orientation": "LPS"}

    def embed(self, values: Tensor) -> Tensor:
        """Embed cubes [B, 1, Z, Y, X] that `read_cube` gave as [B, C]."""
        return self.embed_from(self.encode_until(values, 0), 0)

    def encode_until(self, values: Tensor, stage: int) -> Partway:
        """Return the cubes for stage 0, else the feature maps [B, C', Z', Y', X'] that enter `stage`."""
        return self._run(Partway(values, values.new_zeros(len(values), 0)), 0, stage)

    def embed_from(self, partway: Partway, stage: int) -> Tensor:
        """Run `stage` and all above it on what `encode_until` gave, and pool to [B, C]."""
        x = self._run(partway, stage, self.n_stages).x
        return self.network.avgpool(x).flatten(1)  # type: ignore[operator, union-attr]

    def adaptable_layers(self, first_stage: int) -> list[str]:
        """Name the convolutions from `first_stage` on; all 53 for stage 0."""
        parts = self._parts(first_stage)
        return [
            name
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Conv3d) and name.split(".")[0] in parts
        ]

    def stage_parameters(self, first_stage: int) -> list[str]:
        """Name the parameters from `first_stage` on."""
        return parameters_of(self.network, [*self._parts(first_stage), *(["bn1"] if first_stage == 0 else [])])

    def _parts(self, first_stage: int) -> list[str]:
        return [*(["conv1"] if first_stage == 0 else []), *_LAYERS[max(first_stage - 1, 0) :]]

    def _run(self, partway: Partway, start: int, stop: int) -> Partway:
        x, network = partway.x, self.network
        for stage in range(start, stop):
            names = ("conv1", "bn1", "act", "maxpool") if stage == 0 else (_LAYERS[stage - 1],)
            for name in names:
                x = getattr(network, name)(x)
        return Partway(x, partway.pooled)


def load_fmcib(path: str | Path) -> FmcibBackbone:
    """Load published FMCIB weights, frozen and in evaluation mode.

    Parameters
    ----------
    path
        A torch file that holds a dictionary with ``trunk_state_dict``. It is read without unpickling code.

    Raises
    ------
    FinetuneError
        If the file cannot be read so, or any parameter is missing, left over or of another shape.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise FinetuneError(f"{path}: no such file; give the file with FMCIB's weights.") from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise FinetuneError(
            f"{path}: is not a torch file of tensors alone ({str(error).splitlines()[0]}); files that need Python code "
            "to be read are refused, so download the published weights again."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get(TRUNK), dict):
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise FinetuneError(f"{path}: holds {found or 'nothing'}, expected a dictionary with {TRUNK}.")
    state: dict[str, Tensor] = content[TRUNK]
    width = state["conv1.weight"].shape[0] / 64 if "conv1.weight" in state else 2
    with torch.device("meta"):
        network = build_fmcib(width)
    _check_keys(path, network, state)
    network.load_state_dict(state, assign=True)
    for module in network.modules():  # mapped tensors are read-only pages of the file; an adapter may be merged later
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            tensor.data = tensor.data.clone()
    network.requires_grad_(False).eval()
    return FmcibBackbone(network, _hash(network))


def _check_keys(path: Path, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise FinetuneError(
            f"{path}: {len(differing)} parameters do not fit the published network, the first is {name} (found "
            f"{found.get(name, 'none')}, expected {expected.get(name, 'none')}); download the published weights again."
        )


def _hash(network: nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
