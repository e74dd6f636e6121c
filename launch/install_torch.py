"""Install torch into the interpreter that runs this file, without CUDA packages where there is no NVIDIA GPU.

Standard library only, because it runs before anything is installed:
``.venv/bin/python launch/install_torch.py constraints.txt``.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Plan = Literal["nothing", "pip", "cpu-build"]
_GPU_PACKAGE = re.compile(r"(nvidia|cuda)-", re.IGNORECASE)


def has_nvidia_gpu(devices: Path = Path("/dev")) -> bool:
    """Tell whether this machine has an NVIDIA driver: its tool on PATH, or its device files."""
    return shutil.which("nvidia-smi") is not None or any(devices.glob("nvidia[0-9]*"))


def choose_plan(gpu: bool, packages: Iterable[str]) -> Plan:
    """Decide how to install torch.

    Parameters
    ----------
    gpu
        Whether an NVIDIA GPU is present.
    packages
        Names of what ``pip install torch`` would install here; empty when torch is already there.

    Returns
    -------
    ``"nothing"``, ``"pip"`` (the plain way), or ``"cpu-build"`` when the plain way would bring CUDA packages that a
    machine without a GPU has no use for.
    """
    packages = list(packages)
    if not packages:
        return "nothing"
    if not gpu and any(_GPU_PACKAGE.match(name) for name in packages):
        return "cpu-build"
    return "pip"


def resolve(constraints: Path) -> list[str]:
    """Return the names of the packages that ``pip install torch`` would install here."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip("--dry-run", "--quiet", "--report", str(report), "torch", "-c", str(constraints))
        return [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True)


def _install_cpu_build(constraints: Path) -> None:
    # uv knows where PyTorch keeps its CPU builds; pip would need that address written here.
    _pip("--quiet", "uv")
    command = ["uv", "pip", "install", "--python", sys.executable, "torch", "--torch-backend", "cpu"]
    subprocess.run([sys.executable, "-m", *command, "-c", str(constraints)], check=True)


def main(arguments: list[str]) -> int:
    """Install torch at the version that the constraints file names; return the exit code."""
    constraints = Path(arguments[0])
    gpu = has_nvidia_gpu()
    try:
        plan = choose_plan(gpu, resolve(constraints))
        print(f"torch: {'an NVIDIA GPU is' if gpu else 'no NVIDIA GPU'} here; plan: {plan}.", flush=True)
        if plan == "pip":
            _pip("--quiet", "torch", "-c", str(constraints))
        elif plan == "cpu-build":
            _install_cpu_build(constraints)
    except subprocess.CalledProcessError as error:
        print(
            f"torch: {' '.join(map(str, error.cmd[2:5]))} … failed (see above); install torch "
            f"into {sys.prefix} by hand at the version in {constraints}, then run make again.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
