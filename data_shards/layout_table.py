"""A plain table of runs: one row per file, any column that is not about the file is a phenotype."""

from pathlib import Path

from boldforge.data_shards.dataset_files import why_refused
from boldforge.data_shards.nifti import LONGEST_TR, SHORTEST_TR
from boldforge.data_shards.phenotype import LayoutError, canonical, is_missing, read_lines
from boldforge.data_shards.runs import Run, RunList, Skipped

_KNOWN = frozenset({"path", "subject", "session", "site", "tr", "task", "run", "mask", "confounds"})


def find_table(source: Path, root: Path, tr: float | None = None) -> RunList:
    """Read a TSV or CSV with the columns ``path`` and ``subject``.

    Optional ones are session, site, tr, task, run, mask and confounds. With a `tr`, the column is not looked at.

    Paths are relative to the table and stay in its folder, or in `root`. All other columns become phenotypes.

    Raises
    ------
    LayoutError
        If there is no table or a needed column is missing.
    """
    table = source if source.is_file() else source / "runs.tsv"
    if not table.is_file():
        raise LayoutError(f"{table}: no such table; write one with the columns path and subject.")
    runs, skipped = [], []
    lines = read_lines(table, root)
    if not lines:
        raise LayoutError(f"{table}: has a header and no rows; write one row for each run.")
    for line, raw in lines:
        row = {name.lower() if name.lower() in _KNOWN else name: value for name, value in raw.items()}
        for column in ("path", "subject"):
            if column not in row:
                raise LayoutError(f"{table}: has no column {column!r}; its columns are {', '.join(raw)}.")
        try:
            runs.append(_run(table, root, row | {"tr": "" if tr is not None else row.get("tr", "")}))
        except _UnusableError as error:
            skipped.append(Skipped(table.parent / row["path"], f"line {line} of {table.name} {error}"))
    return RunList(tuple(runs), tuple(skipped), "table")


class _UnusableError(Exception):
    """What is wrong with a row; the rest of a sentence that names the row."""


def _run(table: Path, root: Path, row: dict[str, str]) -> Run:
    if not row["path"]:
        raise _UnusableError("has no path; fill it in.")
    if is_missing(row["subject"]):
        raise _UnusableError("has no subject; fill it in.")
    return Run(
        subject=row["subject"].removeprefix("sub-"),
        session=_text(row, "session"),
        site=_text(row, "site"),
        tr=_seconds(row["tr"]),
        path=_file(table, root, row["path"], "a file"),
        mask_path=_beside(table, root, row, "mask"),
        phenotype=canonical(row, _KNOWN),
        task=_text(row, "task"),
        number=_text(row, "run"),
        confounds_path=_beside(table, root, row, "confounds"),
    )


def _seconds(text: str) -> float | None:
    if is_missing(text):
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not SHORTEST_TR <= seconds <= LONGEST_TR:
        raise _UnusableError(
            f"has {text!r} in the column tr, expected seconds from {SHORTEST_TR:g} to {LONGEST_TR:g}, for example 2.0; "
            "mend it, or leave it empty to take the header's."
        )
    return seconds


def _file(table: Path, root: Path, name: str, called: str) -> Path:
    path = table.parent / name
    try:
        reason = why_refused(path, root)
        exists = path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise _UnusableError(f"has a path that no file can have ({error}); mend it.") from None
    if reason is not None:
        raise _UnusableError(f"names {called} that {reason}")
    if not exists:
        raise _UnusableError(f"names {called} that {'is no file' if path.exists() else 'does not exist'}; mend it.")
    return path


def _beside(table: Path, root: Path, row: dict[str, str], column: str) -> Path | None:
    name = _text(row, column)
    return None if name is None else _file(table, root, name, f"the {column} {name}")


def _text(row: dict[str, str], column: str) -> str | None:
    return None if is_missing(row.get(column)) else row[column]
