"""One side's training steps in a process of its own, so that its peak memory is its own: python step.py JOB (JSON).

Prints one line of JSON. A step is what a trainer does once the clips are there: forward with half of the tokens hidden,
mean squared error on the hidden ones, backward, AdamW. All sides have one clip of the same brain, float32, one thread.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from boldforge.configs import load_config
from boldforge.data_shards import brain_mask, get_grid
from boldforge.pretrain import (
    LossConfig,
    MaskConfig,
    MaskSampler,
    ModelConfig,
    NeuroStorm,
    Objective,
    PretrainConfig,
    TokenGrid,
    make_targets,
)
from boldforge.pretrain.evaluate import counted_voxels
from boldforge.pretrain.flops import Flops, clip_flops
from boldforge.pretrain.visible import visible_tokens
from pretrain_parts.peer import Peer, count_parameters
from tests.pretrain.neurostorm_transcription import Shape

RATIO = 0.5
OWN = {"scan_mode": "region", "mask_tokens": ("random",)}
SIDES: dict[str, dict[str, object]] = {
    "same numbers": {},
    "brain tokens": OWN,
    "visible tokens": {**OWN, "encoder_sees": "visible"},
}
"""What each of our sides changes in configs/pretrain/neurostorm.yaml."""


@dataclass(frozen=True)
class Job:
    """What a process measures."""

    side: str
    frames: int
    steps: int
    device: str = "cpu"
    shape: Shape = field(default_factory=Shape)

    @property
    def ours(self) -> bool:
        """Whether it is our network, not a peer."""
        return self.side in SIDES


@dataclass(frozen=True)
class Setup:
    """A network ready to train, a forward pass that gives its loss, the encoder's tokens by stage, its operations."""

    network: nn.Module
    loss: Callable[[], Tensor]
    tokens: tuple[int, ...]
    flops: Flops


def our_config(job: Job) -> ModelConfig:
    """Return NeuroSTORM's recipe with what the side changes."""
    recipe = load_config(PretrainConfig, "configs/pretrain/neurostorm.yaml").model
    shape = job.shape
    size = {"embed_dim": shape.dim, "depths": shape.depths, "decoder_depths": shape.depths[-2::-1]}
    size |= {"window": shape.window, "frames": job.frames}
    return recipe.model_copy(update={**size, **SIDES[job.side]})


def brain(job: Job) -> np.ndarray:
    """Return the brain at 2 mm; every nth voxel of it where the shape's image is smaller than 96³."""
    cube = brain_mask(get_grid("mni2mm"))
    return cube[np.ix_(*(np.arange(n) * have // n for have, n in zip(cube.shape, job.shape.image[:3], strict=True)))]


def our_setup(job: Job) -> Setup:
    """Build our network and a clip of it."""
    config = our_config(job)
    mask = brain(job) if SIDES[job.side] else np.ones(job.shape.image[:3], dtype=bool)
    grid = TokenGrid(mask, (job.shape.patch,) * 3, config.frames, config.n_stages)
    hidden_BL = MaskSampler(grid, MaskConfig(strategy="window", ratio=RATIO), window=config.window).sample([(0,)])
    tokens = [stage.n_tokens * config.frames for stage in grid.stages]
    seen = tokens
    if config.encoder_sees == "visible":
        seen = [int(stage.visible_BL.sum()) for stage in visible_tokens(hidden_BL, grid, torch.device("cpu"))]
    network = NeuroStorm(config, grid).to(job.device)
    values_BTV = torch.randn(1, config.frames, grid.n_voxels).to(job.device)
    signal_BV = torch.ones(1, grid.n_voxels, dtype=torch.bool, device=job.device)
    objective = Objective(LossConfig(), config.frames)

    def loss() -> Tensor:
        counted_BLP = counted_voxels(hidden_BL.to(job.device), signal_BV, network.patch_voxels)
        target_BLP = make_targets(values_BTV, signal_BV, network.patch_voxels, "values")
        totals = objective.counts(counted_BLP).cpu()
        return objective(network(values_BTV, hidden_BL), target_BLP, counted_BLP, totals)["loss"]

    return Setup(network, loss, tuple(seen), clip_flops(config, tokens, grid.patch_voxels.shape[1], seen))


def peer_setup(job: Job) -> Setup:
    """Build the peer and a clip of it: the cube around the same brain."""
    shape = Shape(**{**vars(job.shape), "image": (*job.shape.image[:3], job.frames)})
    network = Peer(shape).use(job.side).to(job.device)
    images = torch.randn(1, *shape.image).to(job.device)
    tokens = [size // shape.patch for size in shape.image[:3]]
    wide = [t // w for t, w in zip((*tokens, job.frames), shape.window, strict=True)]
    hidden = torch.rand(1, *wide, generator=torch.Generator().manual_seed(0)) < RATIO
    for axis, size in enumerate(shape.window, start=1):
        hidden = hidden.repeat_interleave(size, dim=axis)
    hidden = hidden.to(job.device)
    counts = tuple(int(np.prod(tokens)) // 8**i * job.frames for i in range(len(shape.depths)))
    flops = clip_flops(our_config(replace(job, side="same numbers")), counts, shape.patch**3)
    return Setup(network, lambda: network.loss(images, hidden), counts, flops)


def measure(job: Job) -> dict[str, object]:
    """Do one step to warm up and as many as asked, and return the shortest, the peak memory and what was computed."""
    torch.manual_seed(0)
    cuda = job.device == "cuda"
    before = 0 if cuda else peak_rss()
    setup = our_setup(job) if job.ours else peer_setup(job)
    optimizer = torch.optim.AdamW(setup.network.parameters(), lr=5e-5)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = setup.loss()
        loss.backward()
        optimizer.step()
        return loss.detach()

    first = float(step())
    spent = [_seconds(step, cuda) for _ in range(job.steps)]
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss() - before
    return {
        "side": job.side,
        "frames": job.frames,
        "seconds": min(spent),
        "frames_per_second": job.frames / min(spent),
        "peak_bytes": peak,
        "parameters": count_parameters(setup.network),
        "tokens": setup.tokens,
        "matmul_flops": setup.flops.step_matmul,
        "scan_flops": setup.flops.step_scan,
        "first_loss": first,
    }


def peak_rss() -> int:
    """Return the most memory this process ever had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds(step: Callable[[], object], cuda: bool) -> float:
    """Time one step: processor time of one thread, which other work disturbs least, or the GPU's wall time."""
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    began = clock()
    step()
    if cuda:
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    """Measure the job on the command line."""
    torch.set_num_threads(1)
    content = json.loads(sys.argv[1])
    print(json.dumps(measure(Job(**{**content, "shape": Shape(**content.get("shape", {}))}))))


if __name__ == "__main__":
    main()
