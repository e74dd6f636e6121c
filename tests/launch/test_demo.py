import io
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from boldforge.launch.demo import DemoError, Stages, run_demo, running_command


@pytest.fixture
def stages():
    return Stages(3, Console(file=io.StringIO(), width=200))


def _touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_finished_stage_is_kept_and_said_to_be(stages, tmp_path):
    _touch(tmp_path / "a")
    stages.run("Shard", tmp_path / "a", lambda: pytest.fail("ran again"))
    said = stages._console.file.getvalue()
    assert "[1/3] Shard: kept from before" in said
    assert "after a change of recipe, add --fresh" in said, "a kept stage does not read its recipe again"


def test_what_follows_a_stage_that_ran_is_made_anew_from_an_empty_folder(stages, tmp_path):
    _touch(tmp_path / "second" / "done")
    ran = []
    stages.run("first", tmp_path / "first", lambda: ran.append("first"))
    folder = tmp_path / "second"
    stages.run("second", folder / "done", lambda: ran.append(folder.exists()), remake=folder)
    assert ran == ["first", False]


def test_an_interrupted_stage_goes_on_in_its_own_folder(stages, tmp_path):
    _touch(tmp_path / "first")
    _touch(tmp_path / "run" / "checkpoint")
    stages.run("first", tmp_path / "first", lambda: pytest.fail("ran again"))
    seen = []
    run = tmp_path / "run"
    stages.run("second", run / "done", lambda: seen.append((run / "checkpoint").exists()), remake=run)
    assert seen == [True]


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_without_the_real_runs_the_demo_says_where_they_are(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DemoError, match=f"{name}: the demo's two real runs are not here.*--data"):
        run_demo(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def finished_demo(tmp_path, monkeypatch):
    """A demo whose long stages are all done; only release, load and report are left, and these do nothing."""
    out = tmp_path / "demo"
    for name in ("shards-real/manifest.json", "pretrain/summary.json", "shards-simulated/manifest.json"):
        _touch(out / name)
    from boldforge.data_shards.simulate import PHENOTYPE_FILE

    _touch(out / "cohort" / PHENOTYPE_FILE)
    _touch(out / "sweep" / "sweep.json")
    monkeypatch.setattr("boldforge.launch.release.write_release", lambda *arguments, **options: None)
    monkeypatch.setattr("boldforge.launch.report.write_report", lambda *arguments: None)
    return out


def test_a_release_that_does_not_reproduce_fails_the_demo(finished_demo, monkeypatch):
    monkeypatch.setattr("boldforge.launch.release.check_release", lambda *arguments: 1)
    with pytest.raises(DemoError, match="release: does not give the values recorded"):
        run_demo(Path(__file__).parents[1] / "data", finished_demo)


def test_the_last_lines_can_be_typed_as_they_stand(finished_demo, monkeypatch, capsys):
    monkeypatch.setattr("boldforge.launch.release.check_release", lambda *arguments: 0)
    monkeypatch.setattr(sys, "argv", [".venv/bin/boldforge", "demo"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run_demo(Path(__file__).parents[1] / "data", finished_demo)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert all(line.startswith("  .venv/bin/boldforge ") for line in lines)
    assert all(len(line) <= 80 for line in lines), "a terminal would break a longer one"


def test_the_command_is_named_by_what_finds_it(tmp_path, monkeypatch):
    command = tmp_path / "boldforge"
    command.touch()
    monkeypatch.setattr(sys, "argv", [str(command)])
    monkeypatch.setattr(shutil, "which", lambda name: str(command))
    assert running_command() == "boldforge"
    monkeypatch.setattr(shutil, "which", lambda name: "/another/boldforge")
    assert running_command() == str(command)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    assert running_command() == "python -m boldforge.launch.cli"
