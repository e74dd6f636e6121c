"""``boldforge pretrain --dry-run``: check a recipe and print what it will need; nothing is trained or written."""

import math
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from boldforge.configs import count_of, load_config
from boldforge.data_shards import Manifest, get_grid
from boldforge.launch.ranks import rank_environment, usable_cores
from boldforge.launch.training import finished_sentence
from boldforge.pretrain import PretrainConfig
from boldforge.pretrain.checks import Prepared, Standing, check_backend, check_batch, check_run, prepare_masks
from boldforge.pretrain.plan import TrainingPlan, estimate_speed, plan_training
from boldforge.pretrain.speed_estimate import ROUNDS, Speed

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
    manifests: Sequence[Manifest] = ()
    frames, standing = 0, Standing(None, None)
    prepared: Prepared
    if grid_name:
        check_batch(config, ranks)
        check_backend(config)
        prepared = prepare_masks(config, get_grid(grid_name))
    else:
        checked, standing = check_run(config, ranks)
        manifests, frames, prepared = checked.data.manifests, checked.data.frames, checked.prepared
    plan = plan_training(config, prepared, ranks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(int(rank_environment(ranks, cuda=False)["OMP_NUM_THREADS"]))
    speed = estimate_speed(config, plan, prepared.token_grid.patch_voxels.shape[1], ranks, device)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    source, kind = _source(manifests, prepared.grid.name), "GPU" if device == "cuda" else "CPU"
    say(f"{recipe}: {source}; {count_of(ranks, f'{kind} rank')}. Nothing was written.")
    if standing.finished:
        say(finished_sentence(config.out, standing.finished))
    elif standing.checkpoint:
        say(f"{config.out}: would go on from its checkpoint of step {standing.checkpoint.step}.")
    for name, text in _facts(config, plan, frames).items():
        say(f"{name:<18}{text}")
    say(f"Memory of one rank in GiB, a micro-batch of {count_of(plan.micro_batch, 'clip')}, by ZeRO stage:")
    console.print(_memory(config, plan))
    left = 0 if standing.finished else config.steps - (standing.checkpoint.step if standing.checkpoint else 0)
    say(_speed(speed, ranks, device, left, left * config.batch_size * plan.frames, _left_out(config)))


def _speed(speed: Speed, ranks: int, device: str, steps: int, frames: int, left_out: str = "") -> str:
    """Say how fast all ranks are together on what this machine has, and how long the steps take."""
    on_gpu = device == "cuda"
    units, threads = (torch.cuda.device_count(), 1) if on_gpu else (usable_cores(), torch.get_num_threads())
    # A rank beyond the GPUs or cores that there are makes the others slower and adds nothing.
    at_once = min(ranks, max(1, units // threads))
    rate, low, high = (two_digits(at_once / seconds) for seconds in (speed.median, speed.longest, speed.shortest))
    owners = count_of(ranks, "rank") + ("" if on_gpu else f" of {count_of(threads, 'thread')}")
    share = f"{owners} {'run' if ranks > 1 else 'runs'} on {count_of(units, 'GPU' if on_gpu else 'core')}"
    lasts = f", {duration(frames * speed.median / at_once)} for {steps:,} steps" if steps else ""
    return (
        f"About {rate} frames/s on this machine, where {share}{lasts}: an estimate from single blocks, "
        f"without reading and communication{left_out}. {ROUNDS} measurements of the blocks gave {low} to {high}, "
        "which is the range of the probes and not the error of a whole step."
    )


def _left_out(config: PretrainConfig) -> str:
    """Name what of the network neither operations nor speed nor activations count."""
    names = {"STRD": config.model.redundancy_dropout, "prompts": config.model.prompts}
    return "".join(f", {name} (not counted in operations and memory either)" for name, on in names.items() if on)


def two_digits(number: float) -> str:
    """Write a positive number with two significant digits and no exponent: 0.0012, 1.1, 130, 8,000."""
    places = 1 - math.floor(math.log10(number))
    rounded = round(number, places)
    places = 1 - math.floor(math.log10(rounded))  # 0.996 has become 1.0
    return f"{rounded:,.{max(0, places)}f}"


def duration(seconds: float) -> str:
    """Write a time with two significant digits, in the unit that suits it."""
    for limit, length, unit in ((90, 1, "seconds"), (5400, 60, "minutes"), (172_800, 3600, "hours")):
        if seconds < limit:
            return f"{two_digits(seconds / length)} {unit}"
    days = seconds / 86_400
    return f"{two_digits(days)} days" if days < 730 else f"{two_digits(days / 365.25)} years"


def _source(manifests: Sequence[Manifest], grid_name: str) -> str:
    if not manifests:
        return f"grid {grid_name}, no shards looked at"
    return f"{sum(manifest.n_runs for manifest in manifests)} runs on {grid_name}"


def _facts(config: PretrainConfig, plan: TrainingPlan, frames: int) -> dict[str, str]:
    flops = plan.flops
    per_frame = flops.step / plan.frames / 1e9
    seen = f"; the encoder computes {_counts(plan.seen)}" if plan.seen != plan.tokens else ""
    again = ", blocks' forward twice" if config.checkpoint_activations else ""
    facts = {
        "parameters": f"{plan.parameters:,}, of them {plan.encoder_parameters:,} in the encoder",
        "tokens of a clip": f"{_counts(plan.tokens)} by stage{seen}",
        "hidden": f"{plan.hidden:.1%} of the first stage's, by {config.mask.strategy}",
        "operations": f"{per_frame:.3g} GFLOP a frame, forward and backward{again}; "
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
    for title in ("ZeRO", "weights", "gradients", "optimizer", "buffers", "activations", "all", ""):
        table.add_column(title, justify="right")
    for stage, memory in plan.memory.items():
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.passing, memory.activations)
        chosen = "recipe" if stage == config.zero_stage else ""
        table.add_row(str(stage), *(f"{part / _GIB:.3f}" for part in (*parts, memory.total)), chosen)
    return table
