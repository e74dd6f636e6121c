"""The C++ scan of ``kernels/cpu``: compiled once for this processor, kept in the user's cache, loaded once per process.

No instruction set is taken from ``-march=native``: the flags follow from the three levels torch itself knows, and the
level is part of the file's name, so a home directory shared by different machines never offers one the wrong code.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SWITCH = "BOLDFORGE_CPU_OP"
"""Environment variable: ``0`` keeps the C++ scan from being built or used."""

_FOLDER = Path(__file__).parent / "cpu"
_SOURCES = ("scan_forward.cpp", "scan_backward.cpp", "conv.cpp")
_HEADERS = ("lanes.h", "scan.h")
# Nothing here lets the compiler change the order of a sum or drop a NaN. -O3 is slower: it undoes the blocks by hand.
# -fopenmp is for compiling only: at run time the symbols must be those of the OpenMP that torch brought along, or there
# would be two pools of threads.
_FLAGS = ("-O2", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_LEVEL_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


def why_not() -> str:
    """Return why the C++ scan cannot be used here, or an empty string; never builds anything."""
    if os.environ.get(SWITCH) == "0":
        return f"it is turned off by {SWITCH}=0"
    if os.name != "posix":
        return "it is built on Linux and macOS only"
    if platform.machine() in ("x86_64", "AMD64") and _level() not in _LEVEL_FLAGS:
        return "the processor has no AVX2, and without it the torch backend is faster"
    if _attempted():
        return load()[1]
    if not library_path().exists() and _compiler() is None:
        return "it is not built yet and there is no C++ compiler (c++ or $CXX)"
    return ""


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and an empty string, or None and the reason; builds it first where needed.

    The answer is kept for the life of the process, so a training run never changes backend half-way. Where it cannot
    be built or loaded, one warning is logged.
    """
    try:
        path = library_path()
        if not path.exists():
            _build_once(path)
        return ctypes.CDLL(str(path)), ""
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = f"its build or loading failed ({_first_error(str(error))})"
        log.warning("The C++ scan is not used, the slower torch backend is: %s.", reason)
        return None, reason


def library_path() -> Path:
    """Return where the library for this source, torch and processor lies or will lie."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        root = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions")
    return Path(root) / f"boldforge_scan_{_level().lower()}_{_key()}.so"


@cache
def _key() -> str:
    digest = hashlib.sha256("\n".join((torch.__version__, platform.machine(), *_flags())).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def _level() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *_LEVEL_FLAGS.get(_level(), ()))


def _attempted() -> bool:
    return load.cache_info().currsize > 0


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _build_once(path: Path) -> None:
    """Build the library unless another process does so first; the lock dies with its holder."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            log.info("Building the C++ scan for this processor, once: about ten seconds.")
            _build(path)


def _build(path: Path) -> None:
    """Compile in a folder of its own and move the library into place, so that nobody ever sees half of one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _ninja_on_path(), _torch_silent():
        from torch.utils import cpp_extension

        cpp_extension.load(
            name=path.stem,
            sources=[str(_FOLDER / name) for name in _SOURCES],
            extra_cflags=list(_flags()),
            build_directory=folder,
            is_python_module=False,
        )
        (Path(folder) / path.name).replace(path)


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find the ninja of this Python's environment even where that is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, str(Path(sys.executable).parent)))
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextmanager
def _torch_silent() -> Iterator[None]:
    """Keep torch from a page of advice on every compiler it was not built with: a failed build does no harm here."""
    advice = logging.getLogger("torch.utils.cpp_extension")
    before, advice.disabled = advice.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        advice.disabled = before


def _first_error(message: str) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return ([line for line in named if "error:" in line] or named or lines or ["no message"])[0]
