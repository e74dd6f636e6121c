"""A figure as a row, the machine it was measured on, and the file both are written to."""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

Row = dict[str, object]


def row(figure: str, value: float, unit: str, goal: float | None = None, better: str = "higher") -> Row:
    """Return one figure."""
    return {"figure": figure, "value": float(f"{value:.4g}"), "unit": unit, "goal": goal, "better": better}


def line_of(row: Row, width: int = 42) -> str:
    """Return a figure as a line of the table."""
    goal = "" if row["goal"] is None else f"goal {row['goal']:g}"
    return f"{row['figure']:<{width}}{row['value']:>10g} {row['unit']:<14}{goal}"


def machine(device: str = "cpu") -> str:
    """Return the processor and its cores, or the GPU, the version of torch and the day."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    name = f"{model}, {os.cpu_count()} cores" if device == "cpu" else torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def write(file: Path | None, rows: Sequence[Row], machine: str, **more: object) -> None:
    """Write the machine, the figures and what else there is as JSON, where a file was asked for."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"machine": machine, "rows": list(rows), **more}, indent=1) + "\n")
