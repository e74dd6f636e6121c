"""The ``boldforge`` command: one function per verb, in the order in which people meet them.

Everything heavy (torch, ray, deepspeed, nibabel) is imported inside the verbs, so that ``--help`` answers at once.
"""

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

import boldforge
from boldforge.configs import BoldForgeError, ConfigError
from boldforge.launch.importing import app as import_app

app = typer.Typer(
    name="boldforge",
    help="Distributed pretraining for functional MRI: 4D scans in, a foundation model and an adapted classifier out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, e.g. steps=500 optimizer.lr=1e-4"),
]
StudyOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, e.g. training.epochs=20 training.lr=1e-4"),
]
Recipe = Annotated[str, typer.Option("--config", help="Recipe (YAML): your own file, or one that comes with BoldForge")]
LayoutOption = Annotated[
    Literal["auto", "bids", "adhd200", "hcp", "openfmri", "table"],
    typer.Option(help="How the folder is laid out; auto looks at the names"),
]
RootOption = Annotated[
    Path | None, typer.Option(help="Nothing outside this folder is read, links included; by default FOLDER itself")
]
_TR_HELP = "Seconds between frames, where the files do not say or say it wrong"
TrOption = Annotated[float | None, typer.Option(help=_TR_HELP)]
# --tr was the first name of it here; messages and `boldforge shard` say --source-tr.
InspectTrOption = Annotated[float | None, typer.Option("--source-tr", "--tr", help=_TR_HELP)]

# What Ctrl-C ends with, as shells have it.
_INTERRUPTED = 130
_MENDS = {
    errno.ENOENT: "check the name",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.EEXIST: "choose another name or remove it",
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
}


def main() -> None:
    """Run the command line; a user's mistake becomes one sentence on standard error and exit code 2."""
    try:
        app()
    except BoldForgeError as error:
        print(error, file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("Stopped. What is whole stays; the same command goes on, or starts anew.", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in _MENDS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror}; {_MENDS[error.errno]}.", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(boldforge.__version__)
        raise typer.Exit


def _stated(context: typer.Context) -> list[str]:
    """Return the names of the parameters that the command line gives."""
    # By its name, because typer brings its own copy of click.
    return [name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version")] = False,
) -> None:
    pass


@app.command(epilog="Example: boldforge demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="Folder with the two real runs of the checkout")] = Path("tests/data"),
    fresh: Annotated[bool, typer.Option(help="Start again instead of going on from finished stages")] = False,
) -> None:
    """Run the whole pipeline on two real runs and a small simulated cohort, in a few minutes."""
    from boldforge.launch.demo import run_demo

    run_demo(data, out, fresh=fresh)


@app.command(epilog="Example: boldforge inspect shards/study --html quality.html")
def inspect(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of 4D NIfTI files, a table of runs, or a folder of shards")],
    layout: LayoutOption = "auto",
    source_tr: InspectTrOption = None,
    root: RootOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the quality page of a folder of shards here")] = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="With --html: numbers in place of run keys and sites")
    ] = False,
) -> None:
    """Show which runs a folder holds, and which would be skipped and why; of shards, what is in them and how good."""
    from boldforge.launch import sharding

    if html is None and anonymous:
        raise ConfigError("--anonymous says how a page names its runs; pass --html OUT.html too.")
    if html is not None or sharding.is_dataset(folder):
        sharding.check_alone([name for name in _stated(context) if name not in {"html", "anonymous"}], "inspect")
        if html is None:
            sharding.print_summary(folder, Console(markup=False))
        else:
            from boldforge.launch.quality import write_quality_page  # draws, so it takes a second to import

            print(f"Quality page written to {write_quality_page(folder, html, anonymous)}")
        return
    sharding.print_inspection(folder, layout, source_tr, Console(markup=False), root)


@app.command(epilog="Example: boldforge shard /data/fmriprep --out shards/study --grid mni4mm --tr 2.0 --workers 4")
def shard(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of 4D NIfTI files, or a table of runs; with --verify or --export-zarr, of shards"),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the shards")] = None,
    grid: Annotated[Literal["mni4mm", "mni2mm", "neurostorm"], typer.Option(help="Voxel grid")] = "mni4mm",
    tr: Annotated[float, typer.Option(help="Seconds between frames to resample every run to")] = 2.0,
    source_tr: TrOption = None,
    normalisation: Annotated[
        Literal["residual-z", "voxel-z", "global-z", "min-max", "percent-signal-change", "neurostorm"],
        typer.Option(help="How each run is normalised"),
    ] = "residual-z",
    dtype: Annotated[Literal["int16", "int8"], typer.Option(help="Stored type; int8 halves the size")] = "int16",
    antialias: Annotated[bool, typer.Option("--antialias", help="Smooth finer runs before sampling them")] = False,
    confounds: Annotated[
        list[str] | None,
        typer.Option(help="Regress these out: motion-6, motion-24, wm-csf, global-signal, cosine, or a column; repeat"),
    ] = None,
    detrend: Annotated[bool, typer.Option("--detrend", help="Remove a straight line from every voxel")] = False,
    high_pass: Annotated[float | None, typer.Option(help="Hz; filter slower drifts out")] = None,
    low_pass: Annotated[float | None, typer.Option(help="Hz; filter faster fluctuations out")] = None,
    scrub_fd: Annotated[float | None, typer.Option(help="mm; remove frames in which the head moved more")] = None,
    scrub_keep: Annotated[int, typer.Option(help="Frames; remove shorter stretches between removed ones")] = 5,
    time_filter: Annotated[
        Literal["gaussian", "sinc"], typer.Option(help="How runs are brought to --tr; sinc keeps the band sharper")
    ] = "gaussian",
    layout: LayoutOption = "auto",
    root: RootOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes: 1 here, all of a cluster's CPUs with --address")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to work on, e.g. auto or 10.0.0.1:6379")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset that is there")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add new runs to the dataset that is there")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read a dataset again, against its checksums")] = False,
    export_zarr: Annotated[Path | None, typer.Option(help="Copy a dataset into this new Zarr v3 store")] = None,
) -> None:
    """Turn a folder of runs into brain-only shards; a bad run is listed in rejected.tsv and the rest goes on.

    The same command again goes on from where a stopped or killed one was.
    """
    from boldforge.configs import load_config
    from boldforge.data_shards import DataRecipe
    from boldforge.launch import sharding

    stated = _stated(context)
    if verify or export_zarr is not None:
        sharding.check_alone(stated, "verify" if verify else "export_zarr")
        if export_zarr is not None:
            sharding.export(folder, export_zarr, Console(markup=False))
            return
        raise typer.Exit(sharding.verify(folder, Console(markup=False)))
    settings: dict[str, Any] = {"grid": grid, "tr": tr, "normalisation": normalisation, "dtype": dtype}
    settings |= {"antialias": antialias, "confounds": confounds or [], "detrend": detrend, "high_pass": high_pass}
    settings |= {"low_pass": low_pass, "scrub_fd": scrub_fd, "scrub_keep": scrub_keep, "time_filter": time_filter}
    recipe = load_config(DataRecipe, settings)
    source, crew = sharding.Source(layout, source_tr, root), sharding.Crew(workers, address)
    if append:
        sharding.check_append(out, recipe, stated)
        sharding.append(folder, out, source, crew, Console(markup=False))
    else:
        sharding.shard_folder(folder, out, source, recipe, crew, Console(markup=False), overwrite=overwrite)


@app.command(epilog="Example: boldforge simulate data/cohort --subjects 40 --effect 1.0 --region Thal_MDm_L --seed 0")
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder for the cohort, in the ADHD-200 Athena layout")],
    subjects: Annotated[int, typer.Option(min=2, help="Subjects, half of them with the planted difference")] = 40,
    frames: Annotated[int, typer.Option(min=8, help="Frames per run")] = 40,
    effect: Annotated[float, typer.Option(min=0, help="Size of the planted group difference; 0 plants none")] = 1.0,
    region: Annotated[list[str] | None, typer.Option(help="AAL3 region that carries it; repeat for several")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same files")] = 0,
) -> None:
    """Write a simulated ADHD cohort (NIfTI and phenotype table) with a group difference of known size."""
    from boldforge.configs import load_config
    from boldforge.data_shards import SimulationConfig, simulate_cohort
    from boldforge.launch.progress import progress

    settings = {"n_subjects": subjects, "n_frames": frames, "effect": effect, "seed": seed}
    config = load_config(SimulationConfig, settings | ({"regions": region} if region else {}))
    with progress("simulate", "subjects") as on_progress:
        simulate_cohort(out, config, on_progress)
    print(f"{subjects} simulated subjects written to {out}")


@app.command(
    epilog="Example: boldforge pretrain --config configs/pretrain/tiny.yaml shards=shards/study out=runs/pretrain"
)
def pretrain(
    config: Recipe = "configs/pretrain/tiny.yaml",
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine: one per GPU, or CPU processes")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and shards and print memory, operations and speed; no run")
    ] = False,
    grid: Annotated[str | None, typer.Option(help="With --dry-run: a grid, e.g. mni2mm, instead of shards")] = None,
    overrides: Overrides = None,
) -> None:
    """Pretrain on shards under DeepSpeed; the same command again goes on from the last checkpoint."""
    if dry_run or grid:
        from boldforge.launch.planning import print_plan

        if not dry_run:
            raise ConfigError("--grid goes with --dry-run; a run takes its grid from its shards.")
        print_plan(config, overrides or [], ranks, grid, Console(markup=False))
        return
    from boldforge.launch.training import pretrain_on_ranks

    pretrain_on_ranks(config, overrides or [], ranks, Console(markup=False))


@app.command(epilog="Example: boldforge finetune --task adhd --data data/adhd200 backbone=runs/pretrain out=runs/adhd")
def finetune(
    config: Annotated[
        str | None, typer.Option("--config", help="Recipe (YAML); by default the task's own, or finetune/adhd.yaml")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="What to predict: adhd, sex, age, classify:COLUMN, regress:COLUMN, states, retrieval, reidentify"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of scans, which is sharded beside out as the encoder reads it; or shards"),
    ] = None,
    overrides: StudyOverrides = None,
) -> None:
    """Adapt a pretrained model to a question about people, and test it on subjects it has not seen."""
    from boldforge.launch.finetuning import Asked, finetune_and_print

    finetune_and_print(Asked(config, task, data, overrides or []), Console(markup=False))


@app.command(
    epilog="Example: boldforge sweep --config configs/sweep/adhd-rank.yaml shards=shards/adhd backbone=runs/pretrain"
)
def sweep(
    config: Recipe = "configs/sweep/adhd-rank.yaml",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to work on, e.g. auto or 10.0.0.1:6379; by default this machine")
    ] = None,
    overrides: StudyOverrides = None,
) -> None:
    """Search over LoRA adapters with Ray Tune; the best by validation AUC is tested once.

    The same command again goes on from where a stopped or killed one was.
    """
    from boldforge.launch.training import sweep_and_print

    # As YAML, so that an address that looks like a number stays what it is.
    where = [f"address={json.dumps(address)}"] if address is not None else []
    sweep_and_print(config, [*(overrides or []), *where], Console(markup=False))


@app.command(epilog="Example: boldforge attribute runs/adhd clips=2 permutations=5000")
def attribute(
    model: Annotated[
        Path,
        typer.Argument(help="Folder of a fine-tuning or nested sweep; or of an adapter, with shards=, backbone=, out="),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, e.g. clips=2 steps=16")
    ] = None,
) -> None:
    """Show which brain regions a fine-tuned model reads, on subjects it has not seen: tables, maps and a figure."""
    from boldforge.launch.attributing import attribute_and_print

    attribute_and_print(model, overrides or [], Console(markup=False))


@app.command(
    epilog="Example: boldforge release runs/pretrain --adapter runs/sweep/best/adapter --out releases/study-v1"
)
def release(
    pretrained: Annotated[Path, typer.Argument(help="Pretraining run folder, or its export folder")],
    out: Annotated[Path, typer.Option(help="Folder for the release; must not exist yet")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder of a finetuning or a sweep's best trial")] = None,
    replace: Annotated[bool, typer.Option(help="Replace a release that is already there")] = False,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Release an adapter with an encoder it was not trained on")
    ] = False,
) -> None:
    """Write a release: config.json, model.safetensors, a model card and optionally an adapter."""
    from boldforge.launch.release import write_release

    print(f"Release written to {write_release(pretrained, out, adapter, replace, force_base)}")


app.add_typer(import_app, name="import")


@app.command(epilog="Example: boldforge load releases/study-v1")
def load(folder: Annotated[Path, typer.Argument(help="Release or export folder")]) -> None:
    """Read a release back, verify its files and reproduce what it recorded on a fixed clip."""
    from boldforge.launch.release import check_release

    raise typer.Exit(check_release(folder, Console(markup=False)))


@app.command(epilog="Example: boldforge report runs/pretrain runs/sweep releases/study-v1 --out report.html")
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders: pretraining, finetuning, sweep; and releases")],
    out: Annotated[Path, typer.Option(help="The page to write")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about runs: losses, reconstructions, sweep, ROC, provenance."""
    from boldforge.launch.report import write_report

    print(f"Report written to {write_report(folders, out)}")


@app.command(epilog="Example: boldforge doctor")
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs will be written; its free space is checked")] = Path(),
) -> None:
    """Look at this machine: versions, accelerators, scan backends, and what is missing and how to mend it."""
    from boldforge.launch.doctor import examine, print_findings

    findings = examine(folder)
    print_findings(findings, Console(markup=False))
    raise typer.Exit(1 if any(finding.status == "missing" for finding in findings) else 0)


if __name__ == "__main__":
    main()
