"""A 3D ResNet on every frame and a recurrent network over the frames, trained from nothing.

The paper this follows gives clips of 20 frames of 34³ voxels, residual networks A to D, and a bidirectional LSTM or GRU
after them; it does not publish what A to D are inside. Here they are a ladder of depths:

    network   blocks per stage (17³, 9³, 5³)   convolutions
    A         1, 1, 1                           7
    B         2, 2, 2                          13
    C         3, 4, 3                          21
    D         3, 8, 6                          35

Shape suffixes: B clips · T frames · V brain voxels · C features.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from boldforge.configs import StrictModel
from boldforge.finetune.backbone import Partway

SIZE = 34
DEPTHS: Mapping[str, tuple[int, int, int]] = {"A": (1, 1, 1), "B": (2, 2, 2), "C": (3, 4, 3), "D": (3, 8, 6)}


class ResnetRnnConfig(StrictModel):
    """Which of the eight networks, and how wide."""

    kind: Literal["resnet-rnn"] = Field(description="A 3D ResNet per frame and a recurrent network over frames.")
    depth: Literal["A", "B", "C", "D"] = Field("C", description="Blocks per stage: A 1-1-1, B 2-2-2, C 3-4-3, D 3-8-6.")
    rnn: Literal["lstm", "gru"] = Field("lstm", description="The recurrent network, in both directions of time.")
    width: int = Field(16, ge=4, multiple_of=4, description="Channels of the first stage; later ones double.")
    hidden: int = Field(64, ge=1, description="State of the recurrent network, per direction.")
    clip_length: int = Field(20, ge=1, description="Frames per clip.")


class _Block(nn.Module):
    """Two 3×3×3 convolutions and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, outputs)
        around = stride != 1 or inputs != outputs
        self.around = nn.Conv3d(inputs, outputs, 1, stride, bias=False) if around else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.around(x)).relu()


class ResnetRnn(nn.Module):
    """Clips of brain voxels to one vector each.

    Group normalisation takes the place of the paper's batch normalisation: it does not depend on who else is in a
    batch, so a subject's score does not either.

    Parameters
    ----------
    config
        Depth, width, recurrence.
    mask
        bool [X, Y, Z]: where the V voxels of a clip lie on their grid.
    """

    def __init__(self, config: ResnetRnnConfig, mask: npt.NDArray[np.bool_]) -> None:
        super().__init__()
        self.place: Tensor
        self.register_buffer("place", torch.from_numpy(np.flatnonzero(mask)), persistent=False)
        self.shape = mask.shape
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv3d(1, width, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, width), nn.ReLU()
        )
        blocks, inputs = [], width
        for stage, count in enumerate(DEPTHS[config.depth]):
            outputs = width * 2**stage
            for number in range(count):
                blocks.append(_Block(inputs, outputs, 2 if number == 0 and stage > 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        recurrent = nn.LSTM if config.rnn == "lstm" else nn.GRU
        self.rnn = recurrent(inputs, config.hidden, batch_first=True, bidirectional=True)

    def frames(self, values_BTV: Tensor) -> Tensor:
        """Put voxels at their places and bring every frame to 34³, [B · T, 1, 34, 34, 34]."""
        frames = values_BTV.flatten(0, 1)
        dense = frames.new_zeros(len(frames), int(np.prod(self.shape)))
        dense[:, self.place] = frames
        dense = dense.view(-1, 1, *self.shape)
        # Interpolation reads eight neighbours only: a grid more than twice as fine is averaged first, lest it alias.
        factor = max(min(self.shape) // (SIZE + 13), 1)
        dense = functional.avg_pool3d(dense, factor) if factor > 1 else dense
        return functional.interpolate(dense, (SIZE, SIZE, SIZE), mode="trilinear", align_corners=False)

    def forward(self, values_BTV: Tensor) -> Tensor:
        """[B, T, V] to [B, C]: the last state of either direction."""
        x = self.blocks(self.stem(self.frames(values_BTV))).mean(dim=(2, 3, 4))
        _, last = self.rnn(x.view(*values_BTV.shape[:2], -1))
        last = last[0] if isinstance(last, tuple) else last
        return torch.cat([last[0], last[1]], dim=-1)


class ResnetRnnBackbone:
    """`ResnetRnn` behind the backbone protocol. It has one stage and no pretrained weights, so all of it is trained.

    Parameters
    ----------
    config
        The network's.
    mask
        Of the shards' grid.
    data
        ``grid``, ``tr``, ``normalisation`` and ``mask_sha256`` of the shards.
    seed
        Decides the first weights.
    """

    pool = "mean"
    n_stages = 1

    def __init__(
        self, config: ResnetRnnConfig, mask: npt.NDArray[np.bool_], data: Mapping[str, Any], seed: int
    ) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network: nn.Module = ResnetRnn(config, mask)
        self.dim = 2 * config.hidden
        self.data: Mapping[str, Any] = {**data, "clip_length": config.clip_length}
        described = json.dumps(config.model_dump(), sort_keys=True)
        self.weights_hash = f"none-{hashlib.sha256(described.encode()).hexdigest()[:16]}"

    def embed(self, values_BTV: Tensor) -> Tensor:
        """Embed clips [B, T, V] as [B, C]."""
        return self.network(values_BTV)

    def encode_until(self, values_BTV: Tensor, stage: int) -> Partway:
        """Return the clips themselves: nothing of this network is frozen."""
        if stage:
            raise ValueError(f"stage is {stage}, but a network that is trained whole has stage 0 only")
        return Partway(values_BTV, values_BTV.new_zeros(len(values_BTV), 0))

    def embed_from(self, partway: Partway, stage: int) -> Tensor:
        """Embed what `encode_until` gave."""
        return self.embed(partway.x)

    def adaptable_layers(self, first_stage: int) -> list[str]:
        """Name the convolutions."""
        return [name for name, module in self.network.named_modules() if isinstance(module, nn.Conv3d)]

    def stage_parameters(self, first_stage: int) -> list[str]:
        """Name all parameters."""
        return [name for name, _ in self.network.named_parameters()]
