"""A plain table of runs: one row per file, any column that is not about the file is a phenotype."""

from pathlib import Path

from boldforge.data_shards.phenotype import LayoutError, canonical, parse_number, parse_value, read_table
from boldforge.data_shards.runs import Run, RunList, Skipped

_KNOWN = frozenset({"path", "subject", "session", "site", "tr", "task", "run", "mask"})


def find_table(source: Path) -> RunList:
    """Read a TSV or CSV with the columns ``path`` and ``subject`` and, optionally, session, site, tr, task, run, mask.

    Paths are relative to the table. All other columns become phenotypes.

    Raises
    ------
    LayoutError
        If there is no table or a needed column is missing.
    """
    table = source if source.is_file() else source / "runs.tsv"
    if not table.is_file():
        raise LayoutError(f"{table}: no such table; write one with the columns path and subject.")
    runs, skipped = [], []
    for number, raw in enumerate(read_table(table), start=2):
        row = {name.lower() if name.lower() in _KNOWN else name: value for name, value in raw.items()}
        for column in ("path", "subject"):
            if column not in row:
                raise LayoutError(f"{table}: has no column {column!r}; its columns are {', '.join(raw)}.")
        path = table.parent / row["path"]
        if not row["path"] or not path.is_file():
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
                    mask_path=table.parent / row["mask"] if row.get("mask") else None,
                    phenotype=canonical(row, _KNOWN),
                    task=_text(row, "task"),
                    number=_text(row, "run"),
                )
            )
    return RunList(tuple(runs), tuple(skipped), "table")


def _text(row: dict[str, str], column: str) -> str | None:
    return None if parse_value(row.get(column)) is None else row[column]
