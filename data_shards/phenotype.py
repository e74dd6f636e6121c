"""Read phenotype tables: missing codes, canonical names and values."""

import csv
import io
import math
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from boldforge.configs import BoldForgeError
from boldforge.data_shards.dataset_files import why_refused

Phenotype = dict[str, float | str | None]

# The codes that ADHD-200 and BIDS tables use for "not known".
MISSING = frozenset({"", "n/a", "na", "nan", "none", "null", "pending", "withheld"})
_FEW = 6
_NOT_MEASURED = -999  # comes as an integer and as a float
_CONTROL = frozenset({"0", "control", "controls", "hc", "healthy", "td", "tdc", "typically developing children"})
_ADHD = frozenset({"1", "2", "3", "adhd", "adhd-combined", "adhd-inattentive", "adhd-hyperactive/impulsive", "patient"})
_SEX = {"f": "F", "female": "F", "m": "M", "male": "M"}


class LayoutError(BoldForgeError):
    """A folder or table of runs does not look like the layout asked for."""


def read_table(path: Path, root: Path | None = None) -> list[dict[str, str]]:
    """Read a TSV or CSV table (by its first line) into one dict per row, names and values stripped.

    A row shorter than the header has empty cells at its end; what reaches beyond the header is left out.

    Raises
    ------
    LayoutError
        If the file is empty, has no header, repeats a column, is separated by semicolons, is not UTF-8 text, has a
        quote that is not closed, or leads out of `root`.
    """
    return [row for _, row in read_lines(path, root)]


def read_lines(path: Path, root: Path | None = None) -> list[tuple[int, dict[str, str]]]:
    """Read a table as `read_table` does, each row with the number of the line on which it starts."""
    if root is not None and (reason := why_refused(path, root)):
        raise LayoutError(f"{path}: {reason}")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        raise LayoutError(f"{path}: is one scan, expected a folder of scans or a table of runs; pass its folder.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise LayoutError(f"{path}: is not UTF-8 text; save it as a TSV or CSV file in UTF-8.") from None
    rows = list(_cells(path, text))
    if not rows:
        raise LayoutError(f"{path}: the table is empty, expected a header line and one line per row.")
    header = rows[0][1]
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise LayoutError(f"{path}: column {sorted(repeated)[0]!r} occurs twice; rename one.")
    if len(header) == 1 and ";" in header[0]:
        raise LayoutError(f"{path}: its columns are separated by semicolons; save it with commas or tabs.")
    return [(line, dict(zip_longest(header, row[: len(header)], fillvalue=""))) for line, row in rows[1:]]


def _cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which a row starts, and its cells, stripped; rows of empty cells are passed over."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    rows = csv.reader(io.StringIO(text), delimiter="\t" if "\t" in first else ",", strict=True)
    start = 1
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield start, cells
            start = rows.line_num + 1
    except csv.Error as error:
        # Read on without strict rules, a quote that is never closed would take all rows after it into one cell.
        raise LayoutError(
            f"{path}: the row at line {start} cannot be told apart into cells ({error}); close or remove its quotes."
        ) from None


def is_missing(text: str | None) -> bool:
    """Say whether a cell is empty or one of the codes for "not known", -999 among them."""
    if text is None or text.strip().lower() in MISSING:
        return True
    try:
        return float(text) == _NOT_MEASURED
    except ValueError:
        return False


def parse_value(text: str | None) -> float | str | None:
    """Return a number where the text is one, None where it is a missing code or not finite, else the text."""
    if text is None or is_missing(text):
        return None
    try:
        number = float(text)
    except ValueError:
        return text.strip()
    # JSON has no infinity: it would come back from the manifest as something else.
    return number if math.isfinite(number) else None


def parse_number(text: str | None) -> float | None:
    """Return the number that the text holds, or None."""
    value = parse_value(text)
    return value if isinstance(value, float) else None


def parse_diagnosis(text: str | None) -> float | str | None:
    """Return 0.0 for a control, 1.0 for ADHD (subtypes 1, 2 and 3 alike), None where it is missing.

    A code that is none of these is returned as it is, so that a task refuses it instead of taking it for missing.
    """
    word = (text or "").strip().lower().removesuffix(".0")
    if word in _CONTROL:
        return 0.0
    return 1.0 if word in _ADHD else parse_value(text)


def parse_sex(text: str | None) -> str | None:
    """Return "F", "M" or None from a word or letter."""
    return _SEX.get((text or "").strip().lower())


def canonical(row: dict[str, str], known: frozenset[str]) -> Phenotype:
    """Turn a table row into phenotypes: ``diagnosis``, ``age``, ``sex`` canonical, other columns as they are.

    An age that is no number stays the text it is, so that a task refuses it instead of taking it for missing.

    ``dx`` is the diagnosis as the table has it, so that subtypes stay apart. Of two columns, ``diagnosis`` and ``dx``,
    each gives its own.

    Parameters
    ----------
    row
        One row of a table.
    known
        Lower-case names of columns that are not phenotypes (path, subject, …).
    """
    phenotype: Phenotype = {}
    coded: dict[str, str] = {}
    for name, text in row.items():
        lower = name.lower()
        if lower in known:
            continue
        if lower in {"diagnosis", "dx"}:
            coded[lower] = text
        elif lower in {"sex", "gender"}:
            phenotype["sex"] = parse_sex(text)
        elif lower == "age":
            phenotype["age"] = parse_value(text)
        else:
            phenotype[name] = parse_value(text)
    if coded:
        phenotype["diagnosis"] = parse_diagnosis(coded.get("diagnosis", coded.get("dx")))
        phenotype["dx"] = parse_value(coded.get("dx", coded.get("diagnosis")))
    return phenotype


def describe_columns(phenotypes: Iterable[Phenotype]) -> dict[str, str]:
    """Say of every phenotype column, by name, what it holds: a few values as they are, of many numbers the ends."""
    values: dict[str, set[float | str | None]] = {}
    for phenotype in phenotypes:
        for name, value in phenotype.items():
            values.setdefault(name, set()).add(value)
    return {name: _describe(values[name] - {None}) for name in sorted(values)}


def _describe(found: set[float | str | None]) -> str:
    numbers = sorted(value for value in found if isinstance(value, int | float))
    texts = sorted(value for value in found if isinstance(value, str))
    if len(found) <= _FEW:
        return ", ".join([f"{value:g}" for value in numbers] + texts) or "empty"
    parts = [f"{numbers[0]:g} to {numbers[-1]:g}"] if numbers else []
    return ", ".join(parts + ([f"{len(texts)} different texts"] if texts else []))
