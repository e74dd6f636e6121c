"""The verb ``finetune``: which recipe and shards it works on, and what is printed of the result."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

import boldforge
from boldforge.configs import ConfigError, check_out, load_config, recipe_names, recipe_path
from boldforge.data_shards import DataRecipe, RunList, find_runs
from boldforge.launch.figure_names import call_figure, show_interval, show_number, show_p, tested_figures, true_minus
from boldforge.launch.progress import progress
from boldforge.launch.sharding import is_dataset, shard_runs

RECIPE = "configs/finetune/adhd.yaml"
# What shards are made like for a network that has never seen any.
_PLAIN_RECIPE = DataRecipe(grid="mni4mm", tr=2.0)


class Asked(NamedTuple):
    """What the command line says: a recipe or a task or both, a folder of data, and overrides."""

    recipe: str | None = None
    task: str | None = None
    data: Path | None = None
    overrides: Sequence[str] = ()


def finetune_and_print(asked: Asked, console: Console) -> Path:
    """Fine-tune under a progress bar, print the figures beside the baselines', and return the folder.

    Raises
    ------
    BoldForgeError
        For a recipe, data or an encoder that cannot be used.
    """
    from boldforge.finetune import FinetuneConfig, finetune

    config = load_config(FinetuneConfig, *_settings(asked))
    check_out(config.out, config.product)  # before hours of sharding
    if asked.data is not None and config.images is None and not is_dataset(asked.data):
        found = find_runs(asked.data)
        _check_task(config.task, found)
        shards = _shard(asked.data, found, config.backbone, config.out, console)
        folder = config.events.folder or asked.data
        config = config.model_copy(
            update={"shards": str(shards), "events": config.events.model_copy(update={"folder": folder})}
        )
    with progress("finetune", "clips") as on_progress:
        results = finetune(config, on_progress)
    print_results(results, console)
    _say(f"Adapter: {config.out / 'adapter'}", console)
    return config.out


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """Print what was trained, every figure with its interval, the baselines beside it, and the verdict."""
    parts = results["trainable_by_part"]
    share = results["trainable_parameters"] / results["total_parameters"]
    trained = ", ".join(f"{name} {_count(count)}" for name, count in parts.items())
    _say(f"Trainable parameters: {trained}; {_percent(share)} % of {_count(results['total_parameters'])}.", console)
    print_figures(results, console)


def print_figures(results: Mapping[str, Any], console: Console) -> None:
    """Print every figure with its interval, the baselines beside it, and the verdict."""
    figures = results["figures"]
    people = len(results.get("people") or ())
    of = results["rows"] + (f" of {people} {'person' if people == 1 else 'people'}" if people else "")
    simulated = "simulated " if results["simulated"] else ""
    positive = f", {figures['n_positive']} {results['classes'][1]} (positive)" if "n_positive" in figures else ""
    tested = f"{figures['n']} {simulated}{of}{positive}"
    _say(f"Test on {tested}, {results['measured_by']}{_left_out(results)}:", console)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("figure", "value", "95 % interval"):
        table.add_column(title, justify="left" if title == "figure" else "right")
    for row in tested_figures(results):
        if row["value"] is not None:
            table.add_row(row["name"], show_number(row["value"]), show_interval(row["interval"], 3) or "none")
    console.print(table)
    if results["baselines"]:
        _print_beside(results, console)
    _say(true_minus(results["verdict"]), console)


def _percent(share: float) -> str:
    return "100" if share == 1 else f"{100 * share:.2g}" if share < 0.095 else f"{100 * share:.0f}"


def _left_out(results: Mapping[str, Any]) -> str:
    """Say how many were left out and why; nothing where nobody was."""
    reasons = {
        "n_unlabelled": "without a label",
        "n_too_short": "with runs shorter than a clip",
        "n_duplicates": "with a scan that is also another's",
        "n_repeated": "listed twice",
    }
    found = [f"{results[key]} {reason}" for key, reason in reasons.items() if results.get(key)]
    return f" (left out: {', '.join(found)})" if found else ""


def _print_beside(results: Mapping[str, Any], console: Console) -> None:
    name = results["compared_by"]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("beside it", call_figure(name, results), "95 % interval", "difference", "p"):
        table.add_column(title, justify="left" if title == "beside it" else "right", overflow="fold")
    for entry in results["baselines"].values():
        against = entry["model_minus_baseline"]
        cells = (show_number(entry["figures"][name]), show_interval(entry["intervals"].get(name), 3) or "none")
        table.add_row(entry["says"], *cells, true_minus(f"{against['difference']:+.3f}"), show_p(against["p"]))
    console.print(table)


def _settings(asked: Asked) -> tuple[str, list[str]]:
    """Return the recipe and its overrides; a task has a recipe of its own name, or borrows the one for ADHD."""
    recipe, extra = asked.recipe, []
    if asked.task is not None:
        if any(override.startswith("task=") for override in asked.overrides):
            raise ConfigError("--task and task= both say what to predict; pass one of them.")
        extra.append(f"task={json.dumps(asked.task)}")
        own = f"finetune/{asked.task}.yaml"
        if recipe is None and own in recipe_names():
            recipe = f"configs/{own}"
        elif recipe is None:
            extra.append(f"out={json.dumps('runs/finetune-' + asked.task.replace(':', '-'))}")
    if asked.data is not None:
        if any(override.startswith(("shards=", "images.table=")) for override in asked.overrides):
            raise ConfigError("--data and shards= both say what to read; pass one of them.")
        extra.append(f"{'images.table' if _reads_images(recipe or RECIPE) else 'shards'}={json.dumps(str(asked.data))}")
    return recipe or RECIPE, [*extra, *asked.overrides]


def _reads_images(recipe: str) -> bool:
    try:
        content = yaml.safe_load(recipe_path(recipe).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # what is wrong with it is said where it is loaded
    return isinstance(content, dict) and "images" in content


def _check_task(task: str, found: RunList) -> None:
    """Make sure that there are labels for a task before a folder is sharded for it, which may take hours."""
    from boldforge.finetune import FinetuneError, get_task
    from boldforge.finetune.tasks import OF_PARTS

    if task in OF_PARTS or not found.runs:
        return
    asked = get_task(task, (run.phenotype for run in found.runs), people=(run.subject for run in found.runs))
    if all(asked.label(run.phenotype) is None for run in found.runs):
        raise FinetuneError(
            f"phenotype column {asked.column!r} is empty in all {len(found.runs)} runs; fill it in, or name another "
            "column."
        )


def _shard(data: Path, found: RunList, backbone: Any, out: Path, console: Console) -> Path:
    """Make shards of a folder as the encoder reads them, beside `out`; those of the same files are taken again."""
    from boldforge.finetune.cohort import recipe_of
    from boldforge.finetune.networks import backbone_data

    encoder = backbone_data(backbone)
    recipe = _PLAIN_RECIPE if encoder is None else recipe_of(encoder)
    target = out.parent / f"{data.resolve().name}-shards-{_digest(found, recipe)[:12]}"
    if is_dataset(target):
        _say(f"{target}: kept from before, the files in {data} have not changed.", console)
    else:
        shard_runs(found, target, recipe, console)
    return target


def _digest(found: RunList, recipe: DataRecipe) -> str:
    """Return a hash of everything that the shards depend on, but for the files' bytes: their sizes and times."""
    runs = []
    for run in found.runs:
        files = [_state(path) for path in (run.path, run.mask_path, run.confounds_path)]
        about = (run.key, run.subject, run.session, run.site, run.task, run.tr, run.phenotype, run.simulated)
        runs.append((files, *about))
    content = [boldforge.__version__, recipe.model_dump(mode="json"), runs]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _state(path: Path | None) -> tuple[str, int, int] | None:
    if path is None:
        return None
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
