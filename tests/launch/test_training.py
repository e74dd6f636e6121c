import io

import pytest
from rich.console import Console

from boldforge.launch import training


@pytest.fixture
def said(monkeypatch):
    """What `pretrain_on_ranks` says before it starts any rank."""

    class StartedError(Exception):
        pass

    def start(*arguments, **options):
        raise StartedError

    monkeypatch.setattr("boldforge.pretrain.datasets.open_datasets", lambda *asked: [])
    monkeypatch.setattr(training, "run_ranks", start)

    def run(out):
        console = Console(file=io.StringIO(), width=200)
        with pytest.raises(StartedError):
            training.pretrain_on_ranks("configs/pretrain/tiny.yaml", ["shards=s", f"out={out}"], 1, console)
        return console.file.getvalue()

    return run


def test_a_run_killed_before_its_first_checkpoint_is_said_to_start_anew(said, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,1.0\n2,0.9\n")
    text = said(tmp_path)
    assert "goes on" not in text
    assert "stopped before its first checkpoint; starts anew" in text


def test_a_run_with_a_checkpoint_is_said_to_go_on_from_it(said, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,1.0\n2,0.9\n")
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert "goes on from its last checkpoint" in said(tmp_path)


def test_a_new_run_says_neither(said, tmp_path):
    text = said(tmp_path / "new")
    assert "goes on" not in text
    assert "anew" not in text
