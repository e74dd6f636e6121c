"""What a sweep has done, on disk before anything follows from it: lines with checksums, files put in place whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from boldforge.configs.durable import sync_folder, write_atomic
from boldforge.finetune.errors import FinetuneError


class SweepError(FinetuneError):
    """A trial failed, a sweep's folder cannot be continued, or Ray could not start."""


class Journal:
    """A file that only grows, one record per line; what `append` has returned from survives a SIGKILL and a power cut.

    A last line that was cut short is taken off; the work behind it is done again.

    Parameters
    ----------
    path
        Made if missing, with its folder. One process writes at a time.

    Raises
    ------
    SweepError
        If a line before the last one is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records, length = _read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")
        self._stream.truncate(length)
        sync_folder(path.parent)

    def append(self, record: dict[str, Any]) -> dict[str, Any]:
        """Add a record and return it as a reader will find it."""
        text = json.dumps(record, allow_nan=False)
        self._stream.write(_line(text))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.records.append(json.loads(text))
        return self.records[-1]

    def once(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the record that carries `key`; only if there is none yet, do the work and record it."""
        for record in self.records:
            if key.items() <= record.items():
                return record
        return self.append(key | work())

    def clear(self) -> None:
        """Forget every record."""
        self.records.clear()
        self._stream.truncate(0)
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Give the file back."""
        self._stream.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the whole records of a journal, which another process may be writing; none where there is no file."""
    return _read(path)[0]


def write_whole(path: Path, content: bytes) -> str:
    """Put a file in place whole and durably, or not at all; return its checksum."""
    write_atomic(path, content)
    return checksum(content)


def checksum(content: bytes) -> str:
    """Return the XXH3 hash of some bytes, 128 bits in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def _line(text: str) -> bytes:
    return f'{{"xxh3": "{checksum(text.encode())}", "record": {text}}}\n'.encode()


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records and the length of the whole lines that hold them."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], 0
    records, length = [], 0
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            if number == len(lines):
                break
            raise SweepError(
                f"{path}: line {number} of {len(lines)} is damaged; remove {path.parent} and start the sweep again."
            )
        records.append(record)
        length += len(line)
    return records, length


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)["record"]
    except (ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) and _line(json.dumps(record)) == line else None
