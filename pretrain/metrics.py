"""Training figures, written to ``metrics.csv`` and TensorBoard."""

import csv
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

COLUMNS = (
    *("step", "loss", "lr", "grad_norm", "frames_per_second", "heldout_error", "heldout_baseline"),
    *("loss_voxel", "loss_region", "loss_parcel", "loss_gradient"),
)


class MetricsWriter:
    """Append one row per step; after a resume, rows beyond the checkpoint are taken back first.

    Parameters
    ----------
    folder
        The run folder.
    resume_step
        Steps that the checkpoint holds; later rows were computed by the run that was killed.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        path, partial = folder / "metrics.csv", folder / ".metrics.csv.partial"
        kept = [row for row in read_metrics(folder) if row["step"] <= resume_step]
        self._file = partial.open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow(COLUMNS)
        for row in kept:
            self._write(row)
        self._file.flush()
        # Renamed while open: a kill at any moment leaves either the old rows or the kept ones.
        partial.replace(path)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()

    def write(self, row: dict[str, float]) -> None:
        """Write the figures of one step; columns that were not measured stay empty."""
        self._write(row)
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def _write(self, row: dict[str, float]) -> None:
        # repr keeps every bit, so that two runs can be compared exactly.
        self._csv.writerow([repr(row[column]) if column in row else "" for column in COLUMNS])


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read ``metrics.csv`` of a run folder; empty cells are left out and a half-written last line is ignored."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if None in row.values() or not row["step"]:
                break
            rows.append({key: float(value) for key, value in row.items() if value})
    return [{**row, "step": int(row["step"])} for row in rows]
