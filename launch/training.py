"""The verbs ``pretrain`` and ``sweep``: start the work, show how far it is, print what came out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from boldforge.configs import ConfigError, count_of, load_config, recipe_path
from boldforge.launch.figure_names import show_interval, show_number, tested_figures
from boldforge.launch.finetuning import print_figures
from boldforge.launch.progress import progress
from boldforge.launch.ranks import run_ranks

_TAIL_BYTES = 4096


def pretrain_on_ranks(recipe: str, overrides: Sequence[str], ranks: int, console: Console) -> Path:
    """Pretrain under DeepSpeed's launcher, under a progress bar; return the run folder.

    Raises
    ------
    BoldForgeError
        For a recipe, shards or a run folder that cannot be used, before a rank is started where that can be told.
    """
    from boldforge.pretrain import PretrainConfig
    from boldforge.pretrain.checks import check_run

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    config = load_config(PretrainConfig, recipe, overrides)
    cuda = torch.cuda.is_available()
    if cuda and ranks > torch.cuda.device_count():
        raise ConfigError(
            f"--ranks is {ranks}, but this machine has {torch.cuda.device_count()} GPUs; use at most that."
        )
    checked, standing = check_run(config, ranks)
    if standing.finished:
        say(finished_sentence(config.out, standing.finished))
        return config.out
    log = config.out / "ranks.log"
    logged = steps_done(config.out)
    before = standing.checkpoint.step if standing.checkpoint else 0
    if standing.checkpoint:
        say(f"{config.out}: goes on from its checkpoint of step {before}.")
    elif logged:
        say(f"{config.out}: stopped before its first checkpoint; starts anew.")
    n_runs = sum(manifest.n_runs for manifest in checked.data.manifests)
    where = "GPU" if cuda else "CPU"
    say(
        f"pretrain: {n_runs} runs, {config.steps} steps, {ranks} {where} rank{'s' * (ranks > 1)}, "
        f"ZeRO-{config.zero_stage}; log: {log}"
    )
    del checked  # its tables and open shards are of no use while the ranks run
    arguments = ["--config", str(recipe_path(recipe)), *overrides]
    with progress("pretrain", "steps", before=before) as on_progress:

        def show_steps() -> None:
            # Until the first new step the ranks import, compile and read: that time says nothing about the rate.
            if (done := steps_done(config.out)) != logged:
                on_progress(done, config.steps)

        run_ranks("boldforge.pretrain.train", arguments, ranks, log, cuda, while_running=show_steps)
    _print_pretrained(config.out, console)
    return config.out


def finished_sentence(folder: Path, summary: Mapping[str, Any]) -> str:
    """Say of a run folder that nothing is left to do in it."""
    return (
        f"{folder}: finished after {summary['steps']} steps, nothing is left to do; {_figures(summary)}. Weights: "
        f"{folder / 'export'}"
    )


def steps_done(folder: Path) -> int:
    """Return the last step in a run's ``metrics.csv`` from the end of the file alone; 0 where there is none."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines(keepends=True)
    # The last line may be half-written, the first one cut; a header is not a number.
    steps = [line.split(",")[0] for line in lines if line.endswith("\n")]
    return next((int(step) for step in reversed(steps) if step.isdigit()), 0)


def sweep_and_print(recipe: str, overrides: Sequence[str], console: Console) -> Path:
    """Sweep over LoRA adapters under a progress bar, print a line per trial and the choice, and return the folder."""
    from boldforge.finetune import SweepConfig, sweep

    config = load_config(SweepConfig, recipe, overrides)
    with progress("sweep", "clips") as on_progress:
        results = sweep(config, on_progress)
    if config.outer_folds > 1:
        _print_nested(results, console)
        return config.out
    for trial in results["trials"]:
        stopped = "stopped early after" if trial["stopped_early"] else "trained for"
        called, value = next((k, trial[f"validation_{k}"]) for k in ("auc", "r2") if f"validation_{k}" in trial)
        best = "none" if value is None else f"{value:.3f}"
        figures = f"validation {called.upper()} {best}, {stopped} {count_of(trial['epochs'], 'epoch')}"
        diverged = ", diverged" if trial["diverged"] else ""
        console.print(f"{trial['name']}: {figures}{diverged}", highlight=False)
    console.print(results["sentence"], highlight=False, soft_wrap=True)
    if "baselines" in results:
        print_figures(results, console)
    else:  # a sweep of a boldforge that measured none
        _print_figures(results, console)
    console.print(f"Adapter: {config.out / 'best' / 'adapter'}", highlight=False, soft_wrap=True)
    return config.out


def _print_nested(results: Mapping[str, Any], console: Console) -> None:
    """Print what each outer fold's search chose, then the pooled figures beside the baselines'."""
    name = results["compared_by"]
    for fold in results["folds"]:
        tested = f"test {name.upper()} {fold['figures'][name]:.3f} on {fold['n_test']} subjects"
        chosen = f"{fold['chosen']}, validation {name.upper()} {fold[f'validation_{name}']:.3f}, {tested}"
        console.print(f"fold {fold['fold']}: {chosen}", highlight=False, soft_wrap=True)
    print_figures(results, console)


def _print_pretrained(folder: Path, console: Console) -> None:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    console.print(f"{folder}: {_figures(summary)}.", highlight=False, soft_wrap=True)
    console.print(f"Weights: {folder / 'export'}", highlight=False, soft_wrap=True)


def _figures(summary: Mapping[str, Any]) -> str:
    error, baseline = summary["heldout_error"], summary["heldout_baseline"]
    return f"held-out error {error:.4f}; predicting the mean frame gives {baseline:.4f}"


def _print_figures(results: Mapping[str, Any], console: Console) -> None:
    tested = [row for row in tested_figures(results) if row["value"] is not None]
    # A name may hold a comma before its unit, so semicolons between figures.
    parts = [f"{row['name']} {show_number(row['value'])} ({show_interval(row['interval'], 3)})" for row in tested]
    of = "simulated subjects" if results["simulated"] else "subjects"
    said = f"Test on {results['figures']['n']} {of} (95 % intervals): {'; '.join(parts)}."
    console.print(said, highlight=False, soft_wrap=True)
