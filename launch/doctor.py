"""Look at this machine: what is installed, what works, what is missing and how to mend it."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

import boldforge

Status = Literal["ok", "note", "missing"]
_ESSENTIAL = ("torch", "deepspeed", "ray", "webdataset", "nibabel", "nilearn", "peft", "safetensors")
_ROOM_NEEDED_GIB = 5


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table: ``missing`` means that something essential does not work."""

    name: str
    status: Status
    found: str
    mend: str = ""


def examine(folder: Path) -> list[Finding]:
    """Examine this machine for running BoldForge.

    Parameters
    ----------
    folder
        Where runs will be written; its free space is checked.
    """
    return [
        _python(),
        *(_package(name) for name in _ESSENTIAL),
        _accelerator(),
        *_scan_backends(),
        *_compilers(),
        _processor(),
        _disk(folder),
    ]


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.prefix}")


def _package(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", "run make install in the checkout, or pip install boldforge")
    if name != "torch":
        return Finding(name, "ok", version)
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:
        return Finding(name, "missing", f"{version}, but does not import: {error}", "make clean, then make install")
    return Finding(name, "ok", version)


def _accelerator() -> Finding:
    try:
        import torch
    except (ImportError, OSError):
        return Finding("accelerator", "note", "unknown, because torch does not import")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("accelerator", "ok", f"{len(names)} × {', '.join(sorted(set(names)))}")
    if shutil.which("nvidia-smi") is not None:
        mend = f"torch {torch.__version__} cannot use the driver: reinstall torch for the CUDA version it shows"
        return Finding("accelerator", "note", "an NVIDIA driver, but not usable from torch", mend)
    return Finding("accelerator", "note", "none; everything runs on the CPU (slowly at real sizes)")


def _scan_backends() -> Iterator[Finding]:
    try:
        from boldforge.kernels import available_backends
    except (ImportError, OSError) as error:
        yield Finding("scan backends", "missing", str(error), "see the packages above")
        return
    backends = available_backends()
    for name, reason in backends.items():
        yield Finding(f"scan: {name}", "note" if reason else "ok", reason or "works")
    if all(backends.values()):
        yield Finding("scan backends", "missing", "none works", "reinstall torch: its backend needs nothing else")


def _compilers() -> Iterator[Finding]:
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("c++")
    mend = "install g++ (Debian: apt-get install g++); DeepSpeed compiles a small part at its first use"
    yield Finding("C++ compiler", "ok" if compiler else "missing", compiler or "none", "" if compiler else mend)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    mend = "install Python's headers (Debian: apt-get install python3-dev)"
    found = str(header) if header.is_file() else f"{header} is missing"
    yield Finding("Python.h", "ok" if header.is_file() else "note", found, "" if header.is_file() else mend)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    yield Finding("ninja", "ok" if ninja else "missing", ninja or "none", "" if ninja else "pip install ninja")


def _processor() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("processor", "ok", f"{usable} usable cores, {platform.machine()}")


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    found = f"{free_gib:.0f} GiB free at {existing}"
    if free_gib < _ROOM_NEEDED_GIB:
        return Finding("disk", "note", found, f"free some space: the demo needs about {_ROOM_NEEDED_GIB} GiB")
    return Finding("disk", "ok", found)


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table, and what to do about those that are missing."""
    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", "what", "found"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.status, style=colours[finding.status]), finding.name, Text(finding.found))
    console.print(f"BoldForge {boldforge.__version__}", highlight=False)
    console.print(table)
    for finding in findings:
        if finding.mend:
            console.print(Text(f"{finding.name}: {finding.mend}."))
    if not any(finding.status == "missing" for finding in findings):
        console.print("Everything essential works.")
