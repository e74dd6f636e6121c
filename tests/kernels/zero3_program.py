"""Two steps of a small model under DeepSpeed's ZeRO-3, run by test_deepspeed.py on two ranks.

Every block is checkpointed and everything runs under bf16 autocast. Rank 0 then takes the same steps alone, without
DeepSpeed and without checkpointing, and writes both sets of figures.
"""

import os
import sys
from functools import partial

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch.utils.checkpoint import checkpoint

from boldforge.kernels import window_index
from boldforge.pretrain.mamba import Block, ShiftedMamba

RANKS, STEPS, LEARNING_RATE = 2, 2, 1e-2
GRID = (5, 4, 3, 6)
KEEP = torch.rand(GRID, generator=torch.Generator().manual_seed(5)) < 0.7
INDEXES = [window_index(GRID, (4, 4, 2, 4), shift, keep=KEEP) for shift in ((0, 0, 0, 0), (2, 2, 1, 2))]


class Blocks(nn.Module):
    """Two shifted blocks and a head, all of a width that is no multiple of anything."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(12, ShiftedMamba(12, d_state=5), 2.0, 0.0) for _ in INDEXES)
        self.head = nn.Linear(12, 12)
        for block in self.blocks:
            if checkpointed:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(self, x_BLC):
        for block, index in zip(self.blocks, INDEXES, strict=True):
            x_BLC = block(x_BLC, index)
        return self.head(x_BLC)


def loss_of(model, clip):
    """Predict every token's neighbour along the list of tokens."""
    return (model(clip).float() - clip.roll(1, dims=1)).square().mean()


def under_deepspeed(clips):
    settings = {
        "train_batch_size": RANKS,
        "train_micro_batch_size_per_gpu": 1,
        # Without a threshold no parameter is so small that every rank would keep it whole.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        "steps_per_print": 1_000_000_000,
    }
    model = Blocks(checkpointed=True)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "ZeRO-3 has not split the parameters"
    figures = []
    for _ in range(STEPS):
        loss = loss_of(engine, clips[engine.global_rank : engine.global_rank + 1])
        engine.backward(loss)
        gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in model.named_parameters()}
        losses = loss.detach().clone() / RANKS
        torch.distributed.all_reduce(losses)
        engine.step()
        figures.append({"loss": losses, **gradients})
    return figures


def alone(clips):
    model = Blocks(checkpointed=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    figures = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for clip in clips.split(1):
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(loss_of(model, clip) / RANKS)
            losses[-1].backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        figures.append({"loss": torch.stack(losses).sum().detach(), **gradients})
    return figures


def main() -> None:
    deepspeed.init_distributed(verbose=False)
    clips = torch.randn(RANKS, INDEXES[0].n_tokens, 12, generator=torch.Generator().manual_seed(1))
    found = under_deepspeed(clips)
    if torch.distributed.get_rank() == 0:
        torch.save({"deepspeed": found, "alone": alone(clips)}, sys.argv[-1])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
