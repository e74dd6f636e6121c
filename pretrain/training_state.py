"""Weights and Adam's moments by the names of the parameters, whatever number of ranks and ZeRO stage hold them.

Every rank writes the parameters that fall to it, whole, into one safetensors file; any number of ranks at any ZeRO
stage reads them back. Nothing is pickled. A tensor's name in the files is its kind, a colon, and the parameter's name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_local_optimizer_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_WEIGHT, _BUFFER, _MOMENTS = "weight", "buffer", ("exp_avg", "exp_avg_sq")
_STEP = "optimizer_steps"


def write_state(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Write this rank's share of weights, buffers and moments; called by every rank.

    Parameters
    ----------
    engine
        The DeepSpeed engine, with torch's AdamW.
    folder
        Exists already; ``state-RRRRR-of-WWWWW.safetensors`` is written.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = {f"{_BUFFER}:{name}": value.cpu().clone() for name, value in _buffers(engine.module) if rank == 0}
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        for kind, value in _gathered(engine, parameter):
            if number % world_size == rank:
                share[f"{kind}:{name}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    metadata = {_STEP: str(_optimizer_steps(engine))}
    save_file(share, folder / f"state-{rank:05d}-of-{world_size:05d}.safetensors", metadata)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return what the model's ``load_state_dict`` takes: weights and buffers, on the CPU."""
    return {name: value for kind, name, value in _tensors(folder) if kind in (_WEIGHT, _BUFFER)}


def restore_moments(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Give the optimiser the moments of a checkpoint; called by every rank, before the first step.

    The weights are not touched: the model had them when the engine was made.
    """
    _make_room(engine, folder)
    parameters = dict(engine.module.named_parameters())
    for kind, name, value in _tensors(folder):
        if kind in _MOMENTS:
            _set_moment(engine, parameters[name], kind, value)


def _tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    for path in sorted(folder.glob("state-*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (it is no dict)
                kind, name = key.split(":", 1)
                yield kind, name, stream.get_tensor(key)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that belong to the model's state."""
    parameters = {name for name, _ in model.named_parameters()}
    yield from ((name, value) for name, value in model.state_dict().items() if name not in parameters)


def _gathered(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Yield a parameter and its moments, whole; a collective call above stage 0."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        state = _optimizer(engine).state[parameter]
        yield from ((_WEIGHT, parameter), *((kind, state[kind]) for kind in _MOMENTS))
        return
    # Below stage 3 the parameter itself is whole on every rank.
    yield _WEIGHT, safe_get_full_fp32_param(parameter) if stage == 3 else parameter
    for kind in _MOMENTS:
        yield kind, safe_get_full_optimizer_state(parameter, kind)


def _optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """Return torch's own optimiser, which ZeRO wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _optimizer_steps(engine: deepspeed.DeepSpeedEngine) -> int:
    steps = {int(state["step"]) for state in _optimizer(engine).state.values()}
    assert len(steps) == 1, f"AdamW's parameters have done {steps} steps"
    return steps.pop()


def _holders(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """Return the tensors that torch's optimiser updates: parameters, or this rank's flat parts of them."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return list(engine.module.parameters())
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def _make_room(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Make the state that AdamW would make at its first step, with the steps of the checkpoint."""
    with safe_open(next(iter(folder.glob("state-*.safetensors"))), framework="pt") as stream:
        steps = float(stream.metadata()[_STEP])
    state: dict[Any, Any] = _optimizer(engine).state
    for holder in _holders(engine):
        state[holder] = {"step": torch.tensor(steps), **{kind: torch.zeros_like(holder) for kind in _MOMENTS}}


def _set_moment(engine: deepspeed.DeepSpeedEngine, parameter: Any, kind: str, value: Tensor) -> None:
    stage, state = engine.zero_optimization_stage(), _optimizer(engine).state
    flat = value.flatten()
    if stage == 0:
        state[parameter][kind].copy_(value)
    elif stage == 3:
        size = parameter.ds_tensor.numel()  # equal on all ranks, the last one's padded
        padded = nn.functional.pad(flat, (0, size * dist.get_world_size() - len(flat)))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, size * dist.get_rank(), size), kind)
    elif parameter._hp_mapping is not None:  # this rank holds a part of it
        part, place = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
        holder = engine.optimizer.single_partition_of_fp32_groups[parameter._hp_mapping.param_group_index]
        state[holder][kind].narrow(0, place.start, place.numel).copy_(flat.narrow(0, part.start, part.numel))
