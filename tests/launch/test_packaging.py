"""What ends up in a wheel, and what the Makefile and the settings promise."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import boldforge

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "data_shards", "kernels", "pretrain", "finetune", "launch")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """Build a wheel from a copy of the tracked kinds of files, with nothing fetched, and list what is in it."""
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=environment)
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.startswith(f"boldforge-{boldforge.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_only_boldforge_is_importable_from_the_wheel(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"boldforge", f"boldforge-{boldforge.__version__}.dist-info"}


def test_recipes_atlas_sources_templates_and_types_travel_with_it(wheel_names):
    packaged = {name.removeprefix("boldforge/") for name in wheel_names}
    assert "py.typed" in packaged
    patterns = ("configs/*/*.yaml", "data_shards/atlas/*", "kernels/cpu/*", "launch/templates/*")
    wanted = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(wanted) > 12
    assert {str(path.relative_to(ROOT)) for path in wanted} <= packaged


def test_every_module_travels_with_it(wheel_names):
    modules = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    assert {f"boldforge/{path.relative_to(ROOT)}" for path in modules} <= set(wheel_names)


def test_the_version_is_written_in_one_place():
    number = re.escape(boldforge.__version__)
    written = [
        path.relative_to(ROOT)
        for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("launch/**/*.py"))
        if re.search(rf"__version__ = \"{number}\"|^version = ", path.read_text(), re.MULTILINE)
    ]
    assert written == [Path("launch/boldforge/__init__.py")]


def test_every_dependency_has_a_tried_version_in_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    tried = {canonicalize_name(line.name): line.specifier for line in map(Requirement, lines)}
    for requirement in map(Requirement, needed):
        name = canonicalize_name(requirement.name)
        assert name in tried, f"{name} is not in constraints.txt"
        newest = max((bound.version for bound in tried[name]), key=Version)
        assert requirement.specifier.contains(newest), requirement
        assert tried[name].contains(importlib.metadata.version(name).split("+")[0]), "what runs here is what was tried"


def test_every_dependency_is_imported_or_has_a_reason_to_be_there():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    # ninja builds DeepSpeed's extensions, torch.utils imports tensorboard, webdataset is for those who read
    # shards with it, the others serve stages still to come.
    unseen = {"ninja", "tensorboard", "webdataset", "huggingface-hub"}
    modules = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
    source = "\n".join(path.read_text() for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
    names = {canonicalize_name(Requirement(line).name) for line in needed} - unseen
    assert [n for n in names if not re.search(rf"^\s*(import|from) {modules.get(n, n)}\b", source, re.MULTILINE)] == []


def test_the_tried_versions_name_no_local_build_and_no_place():
    assert not any(mark in (ROOT / "constraints.txt").read_text() for mark in ("+cpu", "/", "@"))


def test_ci_calls_make_test_and_hands_its_exit_code_on(tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text("test:\n\t@echo called\n\t@exit 3\n")
    done = subprocess.run([tmp_path / ".ci" / "run"], cwd="/", capture_output=True, text=True, check=False)
    assert "called" in done.stdout
    assert done.returncode != 0
