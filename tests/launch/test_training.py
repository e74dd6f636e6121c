"""What `boldforge pretrain` says, and refuses, before it starts a rank."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from boldforge.configs import BoldForgeError
from boldforge.launch import training
from boldforge.pretrain.checks import Standing
from boldforge.pretrain.run_folder import Checkpoint


class StartedError(Exception):
    """The launcher would run now."""


@pytest.fixture
def start(monkeypatch):
    def start(*arguments, **options):
        raise StartedError

    monkeypatch.setattr(training, "run_ranks", start)


@pytest.fixture
def said(monkeypatch, start):
    """What `pretrain_on_ranks` says before it starts any rank, of a run that stands there."""

    def run(out: Path, standing: Standing, starts: bool = True) -> str:
        checked = SimpleNamespace(data=SimpleNamespace(manifests=()))
        monkeypatch.setattr("boldforge.pretrain.checks.check_run", lambda *asked: (checked, standing))
        console = Console(file=io.StringIO(), width=200)
        try:
            training.pretrain_on_ranks("configs/pretrain/tiny.yaml", ["shards=s", f"out={out}"], 1, console)
        except StartedError:
            assert starts
        else:
            assert not starts
        return console.file.getvalue()

    return run


def test_a_run_killed_before_its_first_checkpoint_is_said_to_start_anew(said, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,1.0\n2,0.9\n")
    text = said(tmp_path, Standing(None, None))
    assert "goes on" not in text
    assert "stopped before its first checkpoint; starts anew" in text


def test_a_run_with_a_checkpoint_is_said_to_go_on_from_it(said, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,1.0\n2,0.9\n")
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "step-00000002", 2, {}, 1)
    assert "goes on from its checkpoint of step 2." in said(tmp_path, Standing(checkpoint, None))


def test_a_new_run_says_neither(said, tmp_path):
    text = said(tmp_path / "new", Standing(None, None))
    assert "goes on" not in text
    assert "anew" not in text


def test_a_finished_run_says_so_in_one_line_and_starts_nothing(said, tmp_path):
    summary = {"steps": 200, "heldout_error": 0.9, "heldout_baseline": 1.0}
    text = said(tmp_path, Standing(None, summary), starts=False)
    assert text.count("\n") == 1
    assert "finished after 200 steps, nothing is left to do; held-out error 0.9000; predicting the mean" in text
    assert text.endswith(f"Weights: {tmp_path / 'export'}\n")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.frames=500", "a clip needs model.frames = 500"),
        ("mask.ratio=0.9999", "which hides all"),
        ("loss.background=true", "so there is no background to count"),
        ("batch_size=3", "which 2 ranks cannot share"),
    ],
)
def test_a_mistake_is_refused_before_the_launcher_starts_and_nothing_is_written(
    start, real_shards, tmp_path, override, said
):
    overrides = [f"shards={real_shards}", f"out={tmp_path / 'out'}", override]
    with pytest.raises(BoldForgeError, match=said):
        training.pretrain_on_ranks("configs/pretrain/tiny.yaml", overrides, 2, Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()
