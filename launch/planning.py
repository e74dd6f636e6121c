"""``boldforge pretrain --dry-run``: check a recipe and print what it will need; nothing is trained or written."""

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from boldforge.configs import load_config
from boldforge.data_shards import Manifest, get_grid
from boldforge.launch.ranks import rank_environment
from boldforge.pretrain import PretrainConfig
from boldforge.pretrain.checks import (
    check_backend,
    check_batch,
    check_checkpoint,
    check_data,
    prepare_masks,
)
from boldforge.pretrain.plan import TrainingPlan, estimate_seconds_per_frame, plan_training

_GIB = 2**30


def print_plan(recipe: str, overrides: Sequence[str], ranks: int, grid_name: str | None, console: Console) -> None:
    """Check a recipe against its shards and print parameters, memory, operations and an estimate of the speed.

    Parameters
    ----------
    recipe, overrides
        As for a run.
    ranks
        Processes of the run.
    grid_name
        A grid instead of shards: what depends on the data is then not checked.
    console
        Where it is printed.

    Raises
    ------
    BoldForgeError
        For everything that can be known to be wrong before the first step.
    """
    config = load_config(PretrainConfig, recipe, overrides)
    check_batch(config, ranks)
    check_backend(config)
    manifests: list[Manifest] = []
    if grid_name:
        frames, prepared = 0, prepare_masks(config, get_grid(grid_name))
    else:
        manifests, frames = check_data(config)
        prepared = prepare_masks(config, manifests[0].grid, manifests[0])
    plan = plan_training(config, prepared, ranks)
    goes_on = check_checkpoint(config, plan.shapes)
    patch = prepared.token_grid.patch_voxels.shape[1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(int(rank_environment(ranks, cuda=False)["OMP_NUM_THREADS"]))
    seconds = estimate_seconds_per_frame(config, plan, patch, ranks, device)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    source = _source(manifests, prepared.grid.name)
    say(f"{recipe}: {source}; {ranks} {device.upper()} ranks. Nothing was written.")
    if goes_on is not None:
        say(f"{config.out}: would go on from {goes_on.name}.")
    for name, text in _facts(config, plan, frames).items():
        say(f"{name:<18}{text}")
    say(f"Memory of one rank in GiB, a micro-batch of {plan.micro_batch} clips, by ZeRO stage:")
    console.print(_memory(config, plan))
    rate = 1 / seconds
    hours = config.steps * config.batch_size * plan.frames * seconds / ranks / 3600
    say(
        f"About {rate:.3g} frames/s a rank on this {'GPU' if device == 'cuda' else 'CPU'}, {rate * ranks:.3g} in all, "
        f"{hours:,.1f} hours for {config.steps} steps: an estimate from blocks that ran for a moment, without reading "
        "and communication."
    )


def _source(manifests: Sequence[Manifest], grid_name: str) -> str:
    if not manifests:
        return f"grid {grid_name}, no shards looked at"
    return f"{sum(manifest.n_runs for manifest in manifests)} runs on {grid_name}"


def _facts(config: PretrainConfig, plan: TrainingPlan, frames: int) -> dict[str, str]:
    flops = plan.flops
    per_frame = flops.step / plan.frames / 1e9
    seen = f"; the encoder computes {_counts(plan.seen)}" if plan.seen != plan.tokens else ""
    facts = {
        "parameters": f"{plan.parameters:,}, of them {plan.encoder_parameters:,} in the encoder",
        "tokens of a clip": f"{_counts(plan.tokens)} by stage{seen}",
        "hidden": f"{plan.hidden:.1%} of the first stage's, by {config.mask.strategy}",
        "operations": f"{per_frame:.3g} GFLOP a frame, forward and backward; "
        f"{flops.step_scan / flops.step:.0%} of them in scans",
    }
    if frames:
        times = config.steps * config.batch_size * plan.frames / frames
        facts["data"] = f"{frames:,} frames to train on; {config.steps} steps see each about {times:.3g} times"
    return facts


def _counts(tokens: Sequence[float]) -> str:
    return " / ".join(f"{round(count):,}" for count in tokens)


def _memory(config: PretrainConfig, plan: TrainingPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("ZeRO", "weights", "gradients", "moments", "passing", "activations", "all", ""):
        table.add_column(title, justify="right")
    for stage, memory in plan.memory.items():
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.passing, memory.activations)
        chosen = "recipe" if stage == config.zero_stage else ""
        table.add_row(str(stage), *(f"{part / _GIB:.3f}" for part in (*parts, memory.total)), chosen)
    return table
