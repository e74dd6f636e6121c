"""A table of numbers larger than memory should hold: filled by rows, read by columns, or the other way round."""

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

# Below this a spool is a plain array: most runs on the 4 mm grid never touch the disk.
IN_MEMORY_BYTES = 128 * 2**20


class Spool:
    """An array [rows, columns] in memory when it is small, else in a file that has no name and vanishes with us.

    Positioned reads and writes, not a memory map: mapped pages count as memory, and a full disk would kill the process
    where a write raises OSError.

    Parameters
    ----------
    rows, columns, dtype
        Its shape and type.
    folder
        Where the file lies; None takes the system's temporary folder.
    in_memory
        Bytes up to which it is an array.
    """

    def __init__(
        self, rows: int, columns: int, dtype: npt.DTypeLike, folder: Path | None = None, in_memory: int | None = None
    ) -> None:
        self.shape = (rows, columns)
        self.dtype = np.dtype(dtype)
        self._array: npt.NDArray[Any] | None = None
        self._file: Any = None
        limit = IN_MEMORY_BYTES if in_memory is None else in_memory
        if rows * columns * self.dtype.itemsize <= limit:
            self._array = np.empty(self.shape, dtype=self.dtype)
        else:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".spool-", buffering=0)  # noqa: SIM115
            # Also where an exception has taken the `with` away that it would have reached.
            weakref.finalize(self, self._file.close)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory or the disk space back."""
        self._array = None
        if self._file is not None:
            self._file.close()

    def write_rows(self, start: int, rows: npt.NDArray[Any]) -> None:
        """Put [n, columns] at row `start`."""
        if self._array is not None:
            self._array[start : start + len(rows)] = rows
        else:
            self._write(self._offset(start, 0), np.ascontiguousarray(rows, dtype=self.dtype))

    @contextmanager
    def rows_to_fill(self, start: int, n_rows: int) -> Iterator[npt.NDArray[Any]]:
        """Give an array [n, columns] that becomes the rows from `start` on when the block ends."""
        if self._array is not None:
            yield self._array[start : start + n_rows]
        else:
            rows = np.empty((n_rows, self.shape[1]), dtype=self.dtype)
            yield rows
            self.write_rows(start, rows)

    def read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows `start` to `stop`, [n, columns]."""
        if self._array is not None:
            return self._array[start:stop]
        rows = np.empty((stop - start, self.shape[1]), dtype=self.dtype)
        self._read(self._offset(start, 0), rows)
        return rows

    def write_columns(self, start: int, columns: npt.NDArray[Any]) -> None:
        """Put [rows, n] at column `start`."""
        if self._array is not None:
            self._array[:, start : start + columns.shape[1]] = columns
        else:
            columns = np.ascontiguousarray(columns, dtype=self.dtype)
            for row, values in enumerate(columns):
                self._write(self._offset(row, start), values)

    def read_columns(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return columns `start` to `stop`, [rows, n], a copy in C order."""
        if self._array is not None:
            return np.ascontiguousarray(self._array[:, start:stop])
        columns = np.empty((self.shape[0], stop - start), dtype=self.dtype)
        for row, values in enumerate(columns):
            self._read(self._offset(row, start), values)
        return columns

    def _offset(self, row: int, column: int) -> int:
        return (row * self.shape[1] + column) * self.dtype.itemsize

    def _write(self, offset: int, values: npt.NDArray[Any]) -> None:
        view = values.data.cast("B")
        self._file.seek(offset)
        while len(view):
            view = view[self._file.write(view) :]

    def _read(self, offset: int, values: npt.NDArray[Any]) -> None:
        view = values.data.cast("B")
        self._file.seek(offset)
        while len(view):
            read = self._file.readinto(view)
            if read == 0:
                raise ValueError("a spool was read where nothing has been written")
            view = view[read:]
