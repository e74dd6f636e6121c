"""``boldforge demo``: every stage once, on two real runs and a small simulated cohort."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from boldforge.configs import BoldForgeError

PRETRAIN_RECIPE = "configs/pretrain/demo.yaml"
SWEEP_RECIPE = "configs/sweep/demo.yaml"
_RANKS = 2
_NEXT = """\
Now on your own data (fMRIPrep or ADHD-200 folders, or a table of runs):
  {command} inspect YOUR_FOLDER
  {command} shard YOUR_FOLDER --out runs/shards
  {command} pretrain shards=runs/shards out=runs/pretrain"""


class DemoError(BoldForgeError):
    """The demo's own data are not where they were looked for, or its release does not reproduce."""


class Stages:
    """Runs the demo's stages in order; keeps one that is finished, unless an earlier one ran anew.

    Parameters
    ----------
    total
        Number of stages.
    console
        Where titles and times are printed.
    """

    def __init__(self, total: int, console: Console) -> None:
        self._total, self._console = total, console
        self._number = 0
        self._anew = False

    def run(self, title: str, finished: Path, work: Callable[[], object], remake: Path | None = None) -> None:
        """Do one stage.

        Parameters
        ----------
        title
            What is done, in a few words.
        finished
            Exists when the stage has been done.
        work
            Does it; goes on from where an interrupted one stopped, if it can.
        remake
            Folder to remove first when an earlier stage ran anew, because its content belongs to the old input.
        """
        self._number += 1
        place = f"[{self._number}/{self._total}] {title}"
        if finished.exists() and not self._anew:
            self._say(f"{place}: kept from before ({finished}); after a change of recipe, add --fresh")
            return
        if remake is not None and self._anew and remake.exists():
            shutil.rmtree(remake)
        # A stage that was interrupted leaves an unfinished folder whose input has not changed, so only a finished
        # stage that follows it must be made anew.
        self._say(place)
        began = time.monotonic()
        work()
        self._anew = True
        self._say(f"[{self._number}/{self._total}] took {time.monotonic() - began:.0f} s")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def run_demo(data: Path, out: Path, fresh: bool = False) -> None:
    """Run the demo and print where the report and the release are.

    Parameters
    ----------
    data
        Folder with the two real runs (``tests/data`` of a checkout).
    out
        Folder for everything that is made.
    fresh
        Remove what an earlier demo made there, instead of going on from it.

    Raises
    ------
    BoldForgeError
        If the data are missing, or a stage cannot be done.
    """
    if not data.is_dir() or not any(data.glob("*_bold.nii.gz")):
        raise DemoError(
            f"{data}: the demo's two real runs are not here; run it in a checkout of the repository, or name that "
            "checkout's tests/data with --data."
        )
    # Heavy imports only now: the mistake above should be known at once.
    from boldforge.data_shards import DataRecipe, SimulationConfig, find_runs, simulate_cohort
    from boldforge.data_shards.simulate import PHENOTYPE_FILE
    from boldforge.launch.progress import progress
    from boldforge.launch.release import check_release, write_release
    from boldforge.launch.report import write_report
    from boldforge.launch.sharding import shard_runs
    from boldforge.launch.training import pretrain_on_ranks, sweep_and_print

    console = Console(markup=False)
    began = time.monotonic()
    real, pretrained, cohort = out / "shards-real", out / "pretrain", out / "cohort"
    labelled, sweep, release, report = out / "shards-simulated", out / "sweep", out / "release", out / "report.html"
    if fresh:
        _remove((real, pretrained, cohort, labelled, sweep, release, report))
    recipe = DataRecipe(grid="mni4mm", tr=2.0)
    simulation = SimulationConfig()

    def simulate() -> None:
        with progress("simulate", "subjects") as on_progress:
            simulate_cohort(cohort, simulation, on_progress)

    def shard(source: Path, target: Path) -> None:
        shard_runs(find_runs(source), target, recipe, console, overwrite=True)

    def pretrain() -> None:
        pretrain_on_ranks(PRETRAIN_RECIPE, [f"shards={real}", f"out={pretrained}"], _RANKS, console)

    def search() -> None:
        settings = [f"shards={labelled}", f"backbone={pretrained}", f"out={sweep}"]
        sweep_and_print(SWEEP_RECIPE, settings, console)

    def verify() -> None:
        if check_release(release, console):
            raise DemoError(
                f"{release}: does not give the values recorded when it was written, though this machine wrote it; see "
                "the lines above, and run the demo again with --fresh."
            )

    stages = Stages(8, console)
    stages.run("Shard two real runs", real / "manifest.json", lambda: shard(data, real))
    stages.run("Pretrain on them: 2 ranks, ZeRO-2", pretrained / "summary.json", pretrain, remake=pretrained)
    stages.run("Simulate a small ADHD cohort (no real people)", cohort / PHENOTYPE_FILE, simulate)
    stages.run("Shard the simulated cohort", labelled / "manifest.json", lambda: shard(cohort, labelled))
    stages.run("Search over LoRA ranks with Ray Tune", sweep / "sweep.json", search, remake=sweep)
    stages.run("Release", release / "none", lambda: write_release(pretrained, release, sweep / "best", replace=True))
    stages.run("Load the release and compare its embedding", release / "none", verify)
    stages.run("Report", release / "none", lambda: write_report([pretrained, sweep, release], report))

    console.print(f"\nThe demo took {(time.monotonic() - began) / 60:.1f} minutes.", highlight=False)
    for name, place in (("Report", report), ("Release", release)):
        console.print(f"{name}: {place}", highlight=False, soft_wrap=True)
    console.print(_NEXT.format(command=running_command()), highlight=False, markup=False, soft_wrap=True)


def running_command() -> str:
    """Return what starts BoldForge here: after ``make demo`` it is in ``.venv``, which is not on the PATH."""
    started, on_path = Path(sys.argv[0]), shutil.which("boldforge")
    if started.name != "boldforge":
        return "python -m boldforge.launch.cli"
    return "boldforge" if on_path and Path(on_path).resolve() == started.resolve() else str(started)


def _remove(products: tuple[Path, ...]) -> None:
    for product in products:
        if product.is_dir():
            shutil.rmtree(product)
        else:
            product.unlink(missing_ok=True)
