"""Find the runs in a folder, whichever way it is laid out."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from boldforge.data_shards.nifti import HeaderError, open_bold
from boldforge.data_shards.phenotype import LayoutError, Phenotype

Layout = Literal["auto", "bids", "adhd200", "table"]


@dataclass(frozen=True)
class Run:
    """One 4D recording of one subject in one session.

    ``tr`` is in seconds, None where the file's own header is to be asked. ``phenotype`` uses the canonical names
    ``diagnosis`` (0 control, 1 ADHD), ``age`` (years) and ``sex`` ("F", "M") where they are known.
    """

    subject: str
    session: str | None
    site: str | None
    tr: float | None
    path: Path
    mask_path: Path | None = None
    phenotype: Phenotype = field(default_factory=dict)
    task: str | None = None
    number: str | None = None
    simulated: bool = False
    confounds_path: Path | None = None

    @property
    def key(self) -> str:
        """The run's name inside a dataset; without dots, because WebDataset splits names at the first one."""
        entities = (("sub", self.subject), ("ses", self.session), ("task", self.task), ("run", self.number))
        return "_".join(f"{name}-{re.sub('[^A-Za-z0-9]+', '', value)}" for name, value in entities if value)


class Skipped(NamedTuple):
    """A file that was left out, and why (with the mend where there is one)."""

    path: Path
    reason: str


@dataclass(frozen=True)
class RunList:
    """What `find_runs` found: runs sorted by key, what was skipped, and the layout that was read."""

    runs: tuple[Run, ...]
    skipped: tuple[Skipped, ...]
    layout: str


def find_runs(
    folder: str | Path, layout: Layout = "auto", tr: float | None = None, band_passed: bool = True
) -> RunList:
    """Find runs without decoding any of them.

    Parameters
    ----------
    folder
        A BIDS derivatives folder as fMRIPrep writes it (``bids``), an ADHD-200 Athena folder (``adhd200``), or a table
        (``table``: a TSV or CSV file, or a folder with ``runs.tsv``).
    layout
        One of the three, or ``auto`` to look at the names.
    tr
        Seconds between frames for every run, in place of what sidecars and headers say.
    band_passed
        For ``adhd200``: take ``sfnwmrda`` files (band-passed) or ``snwmrda`` files (not); never both.

    Raises
    ------
    LayoutError
        If the folder does not exist, its layout cannot be told, or its table is malformed.
    """
    from boldforge.data_shards.layout_adhd200 import find_adhd200
    from boldforge.data_shards.layout_bids import find_bids
    from boldforge.data_shards.layout_table import find_table

    folder = Path(folder)
    if not folder.exists():
        raise LayoutError(f"{folder}: no such folder or table of runs.")
    chosen = detect_layout(folder) if layout == "auto" else layout
    finders: dict[str, Callable[[], RunList]] = {
        "bids": lambda: find_bids(folder),
        "adhd200": lambda: find_adhd200(folder, band_passed),
        "table": lambda: find_table(folder),
    }
    if chosen not in finders:
        raise LayoutError(f"Unknown layout {layout!r}; valid layouts are auto, {', '.join(finders)}.")
    found = _without_repeats(finders[chosen]())
    if tr is not None:
        found = replace(found, runs=tuple(replace(run, tr=tr) for run in found.runs))
    return found


def detect_layout(folder: Path) -> str:
    """Tell the layout from the names in a folder.

    Raises
    ------
    LayoutError
        If nothing in it looks like a known layout.
    """
    if folder.is_file() or (folder / "runs.tsv").is_file():
        return "table"
    for path in folder.rglob("*.nii*"):
        if re.match(r"s?f?nwmrda\d+", path.name):
            return "adhd200"
        if re.match(r"sub-[^_]+_.*bold\.nii(\.gz)?$", path.name):
            return "bids"
    raise LayoutError(
        f"{folder}: no runs found; expected fMRIPrep names (sub-*_bold.nii.gz), ADHD-200 Athena names "
        "(sfnwmrda*.nii.gz), or a table runs.tsv with the columns path and subject."
    )


def check_headers(found: RunList) -> RunList:
    """Open every run's header: fill in what it tells, and move runs that cannot be used to the skipped ones."""
    runs, skipped = [], list(found.skipped)
    for run in found.runs:
        try:
            bold = open_bold(run.path, run.tr)
            runs.append(replace(run, tr=bold.tr, simulated=run.simulated or bold.simulated))
        except HeaderError as error:
            skipped.append(Skipped(run.path, str(error)))
    return replace(found, runs=tuple(runs), skipped=tuple(skipped))


def _without_repeats(found: RunList) -> RunList:
    kept: dict[str, Run] = {}
    skipped = list(found.skipped)
    for run in sorted(found.runs, key=lambda run: (run.key, str(run.path))):
        if run.key in kept:
            reason = f"has the same name in the dataset ({run.key}) as {kept[run.key].path.name}; rename one of them."
            skipped.append(Skipped(run.path, reason))
        else:
            kept[run.key] = run
    return replace(found, runs=tuple(kept.values()), skipped=tuple(skipped))
