"""The verbs ``inspect`` and ``shard``: what they print about the data layer's work."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from boldforge.configs import ConfigError, count_of
from boldforge.data_shards import (
    DataRecipe,
    Manifest,
    Run,
    RunList,
    append_shards,
    build_shards,
    check_headers,
    find_runs,
    load_manifest,
    open_bold,
    verify_shards,
)
from boldforge.data_shards.find import Layout
from boldforge.data_shards.manifest import MANIFEST_FILE, REJECTED_FILE
from boldforge.data_shards.phenotype import describe_columns
from boldforge.launch.progress import progress


def print_inspection(
    folder: Path, layout: Layout, source_tr: float | None, console: Console, root: Path | None = None
) -> None:
    """Print a table of the runs in a folder, opened but not decoded, and of what would be skipped and why.

    Raises
    ------
    ConfigError
        If nothing in the folder can be used, once that is printed.
    """
    found = check_headers(find_runs(folder, layout, source_tr, root=root))
    counts = f"{count_of(len(found.runs), 'usable run')}, {len(found.skipped)} skipped"
    console.print(f"{folder}: layout {found.layout}, {counts}.", highlight=False, soft_wrap=True, markup=False)
    if found.runs:
        titles = ("run", "site", "frames", "TR (s)", "shape", "with", "diagnosis")
        rows = [_cells(run) for run in found.runs]
        # An empty column would take room from the runs' names.
        shown = [column for column in range(len(titles)) if any(row[column] for row in rows)]
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
        for title in (titles[column] for column in shown):
            right = title in ("frames", "TR (s)")
            table.add_column(title, overflow="fold", justify="right" if right else "left", no_wrap=title != "run")
        for row in rows:
            table.add_row(*(row[column] for column in shown))
        console.print(table, markup=False)
        columns = describe_columns(run.phenotype for run in found.runs)
        said = "; ".join(f"{name}: {text}" for name, text in columns.items()) or "none"
        console.print(f"Phenotype columns: {said}.", highlight=False, soft_wrap=True, markup=False)
    for note in found.notes:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    for path, reason in found.skipped:
        console.print(Text(f"skipped {_below(path, folder)}: {reason.removeprefix(f'{path}: ')}"), soft_wrap=True)
    if not found.runs:
        raise ConfigError(
            f"{folder}: none of the {len(found.skipped)} files found can be used; the reasons are listed above."
        )


def is_dataset(path: Path) -> bool:
    """Say whether a path is a folder of shards, or its manifest."""
    return (path / MANIFEST_FILE).is_file() or (path.name == MANIFEST_FILE and path.is_file())


def print_summary(path: Path, console: Console) -> None:
    """Print what a dataset holds, from its manifest alone."""
    manifest = load_manifest(path)
    runs = list(manifest.runs)
    sites = {run.site for run in runs} - {None}
    coverage, fidelity = ([getattr(run, name) for run in runs] for name in ("coverage", "tsnr_db"))
    columns = describe_columns(run.phenotype for run in runs)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows = {
        "runs": f"{len(runs)} of {count_of(len({run.subject for run in runs}), 'subject')}, "
        + (count_of(len(sites), "site") if sites else "no named sites"),
        "frames": f"{manifest.n_frames}, {hours_of(manifest.n_frames, manifest):.2f} hours",
        "recipe": manifest.recipe.as_options() + f" --dtype {manifest.recipe.dtype}",
        "source TR (s)": ", ".join(
            f"{tr:g} ({n})" for tr, n in count_repetition_times([run.source_tr for run in runs])
        ),
        "coverage": f"{np.median(coverage):.3f}, lowest {min(coverage):.3f}",
        "storage SNR": f"{np.median(fidelity):.1f} dB, lowest {min(fidelity):.1f}",
        "simulated": count_of(sum(run.simulated for run in runs), "run"),
        "left out": f"{count_of(files_left_out(manifest), 'file')}, see {REJECTED_FILE}",
        "phenotypes": "; ".join(f"{name}: {text}" for name, text in columns.items()) or "none",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table, highlight=False, markup=False)
    console.print(
        f"For figures of every run: boldforge inspect {path} --html quality.html",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def hours_of(frames: int, manifest: Manifest) -> float:
    """Return how long stored frames last."""
    return frames * manifest.recipe.tr / 3600


def files_left_out(manifest: Manifest) -> int:
    """Return how many files the build left out."""
    path = manifest.folder / REJECTED_FILE
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return max(sum(1 for _ in file) - 1, 0)


def count_repetition_times(times: Sequence[float]) -> list[tuple[float, int]]:
    """Return the repetition times and how many runs have each, shortest first."""
    return sorted(Counter(round(tr, 3) for tr in times).items())


class Source(NamedTuple):
    """How a folder is to be read; see `find_runs`."""

    layout: Layout = "auto"
    tr: float | None = None
    root: Path | None = None


class Crew(NamedTuple):
    """Who does the work; see `build_shards`."""

    workers: int | None = None
    address: str | None = None


_ONE = Crew()


def shard_folder(
    folder: Path, out: Path | None, source: Source, recipe: DataRecipe, crew: Crew, console: Console, overwrite: bool
) -> None:
    """Shard the runs of a folder.

    Raises
    ------
    ConfigError
        If there is no `out`, or it lies in the folder.
    """
    out = _outside(folder, _required(out))
    shard_runs(find_runs(folder, source.layout, source.tr, root=source.root), out, recipe, console, crew, overwrite)


def shard_runs(
    found: RunList, out: Path, recipe: DataRecipe, console: Console, crew: Crew = _ONE, overwrite: bool = False
) -> Manifest:
    """Shard runs under a progress bar and print how many went in and where the others are listed."""
    with progress(f"shard into {out}", "runs") as on_progress:
        built = build_shards(found, out, recipe, crew.workers, on_progress, overwrite, crew.address)
    manifest = built.manifest
    stored = f"{manifest.n_runs} runs, {manifest.n_frames} frames, {recipe.grid} at {recipe.tr:g} s"
    console.print(f"{out}: {stored}.", highlight=False, soft_wrap=True, markup=False)
    _print_rejected(out, len(built.rejected), console)
    return manifest


def append(folder: Path, out: Path | None, source: Source, crew: Crew, console: Console) -> None:
    """Add the new runs of a folder to a dataset, and print how many there were."""
    out = _outside(folder, _required(out))
    found = find_runs(folder, source.layout, source.tr, root=source.root)
    with progress(f"append to {out}", "runs") as on_progress:
        report = append_shards(found, out, crew.workers, on_progress, crew.address)
    runs = f"{report.added} runs added, {report.known} were there already, {report.manifest.n_runs} in all"
    console.print(f"{out}: {runs}.", highlight=False, soft_wrap=True, markup=False)
    _print_rejected(out, len(report.rejected), console)


def check_append(out: Path | None, recipe: DataRecipe, stated: Collection[str]) -> None:
    """Refuse to add runs by another recipe than the dataset's.

    Parameters
    ----------
    out
        The dataset's folder.
    recipe
        What the command line says.
    stated
        Names of the options that were given; of the recipe, only those are compared.

    Raises
    ------
    ConfigError
        If something that was stated is not the dataset's.
    """
    if "overwrite" in stated:
        raise ConfigError("--append keeps what is there and --overwrite replaces it; pass one of them.")
    there, wanted = load_manifest(_required(out)).recipe.model_dump(), recipe.model_dump()
    for name in wanted:
        if name in stated and wanted[name] != there[name]:
            raise ConfigError(
                f"{out}: was built with {name} {there[name]}, so runs at {wanted[name]} cannot be added; leave "
                f"--{name.replace('_', '-')} out."
            )


def check_alone(stated: Collection[str], verb: str) -> None:
    """Refuse options of a build beside one that only reads a dataset.

    Raises
    ------
    ConfigError
        If there are any.
    """
    option = f"--{verb.replace('_', '-')}"
    others = [f"--{name.replace('_', '-')}" for name in stated if name not in {"folder", verb}]
    if others:
        raise ConfigError(f"{option} reads the folder of shards it is given, and takes no {others[0]}; leave that out.")


def _required(out: Path | None) -> Path:
    if out is None:
        raise ConfigError("boldforge shard needs --out FOLDER, where the shards go.")
    return out


def _outside(folder: Path, out: Path) -> Path:
    """Refuse to write where the runs are: a user's data are only read."""
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        place = "is the input itself" if out.resolve() == folder.resolve() else f"lies in the input {folder}"
        raise ConfigError(f"{out}: {place}, which is only read; choose an --out elsewhere.")
    return out


def _print_rejected(out: Path, count: int, console: Console) -> None:
    if count:
        listed = f"{count_of(count, 'file')} left out; the reasons are in {out / 'rejected.tsv'}."
        console.print(listed, highlight=False, soft_wrap=True, markup=False)


def export(folder: Path, out: Path, console: Console) -> None:
    """Copy a dataset into a Zarr v3 store."""
    from boldforge.data_shards import export_zarr

    manifest = load_manifest(folder)
    with progress(f"export to {out}", "runs") as on_progress:
        export_zarr(manifest, out, on_progress)
    console.print(
        f"{out}: {manifest.n_runs} runs as Zarr v3, read back equal.", highlight=False, soft_wrap=True, markup=False
    )


def verify(folder: Path, console: Console) -> int:
    """Read a dataset against its checksums, print everything that is damaged, and return the exit code."""
    load_manifest(folder)  # what is no dataset is told at once
    with progress(f"verify {folder}", "shards") as on_progress:
        damages = verify_shards(folder, on_progress)
    for damage in damages:
        console.print(damage.reason, highlight=False, soft_wrap=True, markup=False)
    if damages:
        return 2
    manifest = load_manifest(folder)
    sound = f"{manifest.n_runs} runs in {len(manifest.shards)} shards, every byte as it was written"
    console.print(f"{folder}: {sound}.", highlight=False, soft_wrap=True, markup=False)
    return 0


def _cells(run: Run) -> tuple[str, ...]:
    bold = open_bold(run.path, run.tr)
    diagnosis = run.phenotype.get("diagnosis")
    shape = "×".join(map(str, bold.shape))
    beside = [name for name, path in (("mask", run.mask_path), ("confounds", run.confounds_path)) if path is not None]
    known = "" if diagnosis is None else {0: "control", 1: "ADHD"}.get(diagnosis, str(diagnosis))  # type: ignore[call-overload]
    return (run.key, run.site or "", str(bold.n_frames), f"{bold.tr:g}", shape, " ".join(beside), known)


def _below(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path
