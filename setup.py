"""Packaging: the top-level folders are the subpackages of one import package, ``boldforge``.

No folder is importable under its own name, because ``kernels`` belongs to another project on PyPI.
"""

import ast
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGE_DIR = {
    "boldforge": "launch/boldforge",
    "boldforge.configs": "configs",
    "boldforge.data_shards": "data_shards",
    "boldforge.kernels": "kernels",
    "boldforge.pretrain": "pretrain",
    "boldforge.finetune": "finetune",
    "boldforge.finetune.tasks": "finetune/tasks",
    "boldforge.launch": "launch",
}


def read_version() -> str:
    """Return the one place the version is written, without importing the package."""
    tree = ast.parse((ROOT / "launch/boldforge/__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError("launch/boldforge/__init__.py does not set __version__")


setup(
    version=read_version(),
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={
        "boldforge": ["py.typed"],
        "boldforge.configs": ["*/*.yaml"],
        "boldforge.data_shards": ["atlas/*"],
        "boldforge.kernels": ["cpu/*"],
        "boldforge.launch": ["templates/*"],
    },
)
