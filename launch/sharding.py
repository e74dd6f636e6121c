"""The verbs ``inspect`` and ``shard``: what they print about the data layer's work."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from boldforge.data_shards import DataRecipe, Manifest, Run, RunList, build_shards, check_headers, find_runs, open_bold
from boldforge.data_shards.runs import Layout
from boldforge.launch.progress import progress


def print_inspection(
    folder: Path, layout: Layout, source_tr: float | None, console: Console, root: Path | None = None
) -> None:
    """Print a table of the runs in a folder, opened but not decoded, and of what would be skipped and why."""
    found = check_headers(find_runs(folder, layout, source_tr, root=root))
    counts = f"{len(found.runs)} usable runs, {len(found.skipped)} skipped"
    console.print(f"{folder}: layout {found.layout}, {counts}.", highlight=False, soft_wrap=True)
    if found.runs:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("run", "site", "frames", "TR (s)", "shape", "with", "diagnosis"):
            table.add_column(title, overflow="fold", justify="right" if title in ("frames", "TR (s)") else "left")
        for run in found.runs:
            table.add_row(*_cells(run))
        console.print(table)
    for note in found.notes:
        console.print(note, highlight=False, soft_wrap=True)
    for path, reason in found.skipped:
        console.print(Text(f"skipped {_below(path, folder)}: {reason.removeprefix(f'{path}: ')}"), soft_wrap=True)


def shard_runs(
    found: RunList, out: Path, recipe: DataRecipe, console: Console, workers: int = 1, overwrite: bool = False
) -> Manifest:
    """Shard runs under a progress bar and print how many went in and where the others are listed."""
    with progress(f"shard into {out}", "runs") as on_progress:
        built = build_shards(found, out, recipe, workers=workers, on_progress=on_progress, overwrite=overwrite)
    runs = built.manifest.runs
    frames = sum(entry.n_frames for entry in runs)
    stored = f"{len(runs)} runs, {frames} frames, {recipe.grid} at {recipe.tr:g} s"
    console.print(f"{out}: {stored}.", highlight=False, soft_wrap=True)
    if built.rejected:
        listed = f"{len(built.rejected)} files left out; the reasons are in {out / 'rejected.tsv'}."
        console.print(listed, highlight=False, soft_wrap=True)
    return built.manifest


def _cells(run: Run) -> tuple[str, ...]:
    bold = open_bold(run.path, run.tr)
    diagnosis = run.phenotype.get("diagnosis")
    shape = "×".join(map(str, bold.shape))
    beside = [name for name, path in (("mask", run.mask_path), ("confounds", run.confounds_path)) if path is not None]
    known = "" if diagnosis is None else {0: "control", 1: "ADHD"}.get(diagnosis, str(diagnosis))  # type: ignore[call-overload]
    return (run.key, run.site or "", str(bold.n_frames), f"{bold.tr:g}", shape, " ".join(beside), known)


def _below(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path
