"""Run by test_plan.py on two ranks: count the bytes of what DeepSpeed holds between backward and step."""

import gc
import json
import sys
import warnings
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from boldforge.configs import load_config
from boldforge.pretrain import NeuroStorm, PretrainConfig, TokenGrid

SMALL = ["shards=x", "out=x", "batch_size=2", "precision=bf16", "model.frames=1", "model.depths=[1,1]"]


def held() -> dict[int, int]:
    """Bytes of every piece of memory, by address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking a tensor that is no leaf for its gradient
        tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def main(stage: str, out: str) -> None:
    deepspeed.init_distributed(verbose=False)
    overrides = [*SMALL, "model.decoder_depths=[1]", "model.embed_dim=64", f"zero_stage={stage}"]
    config = load_config(PretrainConfig, "configs/pretrain/tiny.yaml", overrides)
    grid = TokenGrid(np.ones((4, 4, 4), dtype=bool), (2, 2, 2), 1, 2)
    clips = torch.zeros(1, 1, grid.n_voxels)
    before = set(held())
    model = NeuroStorm(config.model, grid)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tables = {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config.deepspeed(dist.get_world_size())
    )
    for number in range(2):
        loss = engine(clips).square().mean()
        engine.backward(loss)
        del loss
        if number:
            found = sum(count for address, count in held().items() if address not in before | tables)
            if dist.get_rank() == 0:
                Path(out).write_text(json.dumps({"parameters": parameters, "bytes": found}))
        engine.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
