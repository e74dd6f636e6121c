import io

import pytest
from rich.console import Console

from boldforge.launch.demo import DemoError, Stages, run_demo


@pytest.fixture
def stages():
    return Stages(3, Console(file=io.StringIO(), width=200))


def _touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_finished_stage_is_kept_and_said_to_be(stages, tmp_path):
    _touch(tmp_path / "a")
    stages.run("Shard", tmp_path / "a", lambda: pytest.fail("ran again"))
    assert "[1/3] Shard: kept from before" in stages._console.file.getvalue()


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
