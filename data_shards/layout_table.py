"""A plain table of runs: one row per file, any column that is not about the file is a phenotype."""

from pathlib import Path

from boldforge.data_shards.dataset_files import why_refused
from boldforge.data_shards.phenotype import LayoutError, canonical, parse_number, parse_value, read_table
from boldforge.data_shards.runs import Run, RunList, Skipped

_KNOWN = frozenset({"path", "subject", "session", "site", "tr", "task", "run", "mask", "confounds"})


def find_table(source: Path, root: Path) -> RunList:
    """Read a TSV or CSV with the columns ``path`` and ``subject``.

    Optional ones are session, site, tr, task, run, mask and confounds.

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
    for number, raw in enumerate(read_table(table, root), start=2):
        row = {name.lower() if name.lower() in _KNOWN else name: value for name, value in raw.items()}
        for column in ("path", "subject"):
            if column not in row:
                raise LayoutError(f"{table}: has no column {column!r}; its columns are {', '.join(raw)}.")
        path = table.parent / row["path"]
        reason = why_refused(path, root) if row["path"] else None
        if reason is not None:
            skipped.append(Skipped(path, f"line {number} of {table.name} names a file that {reason}"))
        elif not row["path"] or not path.is_file():
            skipped.append(Skipped(path, f"line {number} of {table.name} names this file, but it does not exist."))
        elif not row["subject"]:
            skipped.append(Skipped(path, f"line {number} of {table.name} has no subject; fill it in."))
        else:
            runs.append(
                Run(
                    subject=row["subject"].removeprefix("sub-"),
                    session=_text(row, "session"),
                    site=_text(row, "site"),
                    tr=parse_number(row.get("tr")),
                    path=path,
                    mask_path=_beside(table, row, "mask"),
                    phenotype=canonical(row, _KNOWN),
                    task=_text(row, "task"),
                    number=_text(row, "run"),
                    confounds_path=_beside(table, row, "confounds"),
                )
            )
    return RunList(tuple(runs), tuple(skipped), "table")


def _beside(table: Path, row: dict[str, str], column: str) -> Path | None:
    return table.parent / row[column] if row.get(column) else None


def _text(row: dict[str, str], column: str) -> str | None:
    return None if parse_value(row.get(column)) is None else row[column]
