"""The loop on real recordings, real ranks and the real launcher."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from boldforge.configs import ConfigError, folder_lock
from boldforge.pretrain import load_pretrained, read_metrics

ARGUMENTS = [
    *("model.frames=4", "model.embed_dim=8", "model.depths=[1,2]", "model.decoder_depths=[1]", "model.d_state=4"),
    *("model.drop_path=0.1", "batch_size=2", "steps=8", "checkpoint_every=2", "evaluate_every=4", "evaluation_clips=3"),
    *("optimizer.warmup_steps=2", "holdout.fraction=0.2"),
]


def command(shards: Path, out: Path, *overrides: str, ranks: int = 2) -> list[str]:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks), "--master_port"]
    port = str(20000 + os.getpid() % 20000)
    config = ["--module", "boldforge.pretrain.train", "--config", "pretrain/tiny.yaml"]
    return [*launcher, port, *config, f"shards={shards}", f"out={out}", *ARGUMENTS, *overrides]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}


def launch(shards: Path, out: Path, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    line = command(shards, out, *overrides, ranks=ranks)
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def finished(real_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain") / "run"
    done = launch(real_shards, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def figures(out: Path) -> list[tuple[float, ...]]:
    """What must not depend on when or how often the run was interrupted: everything but the speed."""
    names = ("step", "loss", "lr", "grad_norm", "heldout_error", "heldout_baseline")
    return [tuple(row.get(name, -1.0) for name in names) for row in read_metrics(out)]


def kill(process: subprocess.Popen, victim: str) -> None:
    """Kill the launcher with all its ranks, or the second rank alone, whereupon the launcher must end the others."""
    if victim == "everything":
        os.killpg(process.pid, signal.SIGKILL)
        return
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "--config" in child.cmdline()]
    (second,) = [child for child in ranks if child.environ().get("RANK") == "1"]
    second.kill()
    assert process.wait(timeout=60) != 0
    assert not psutil.wait_procs(ranks, timeout=60)[1], "a rank is still alive"


@pytest.mark.distributed
@pytest.mark.parametrize("victim", ["everything", pytest.param("one rank", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    victim: str, finished: Path, real_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(
        command(real_shards, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 400
        while len(read_metrics(out)) < 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        kill(process, victim)
    assert 5 <= len(read_metrics(out)) < 8, "the run must die in its middle"
    again = launch(real_shards, out)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on from the checkpoint of step" in again.stderr
    assert figures(out) == figures(finished)
    assert load_pretrained(out / "export").weights_hash == load_pretrained(finished / "export").weights_hash


@pytest.mark.distributed
def test_a_run_leaves_what_the_report_and_the_release_need(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["ranks"] == 2 and summary["zero_stage"] == 2 and summary["simulated"] is False
    assert [row["step"] for row in read_metrics(finished)] == list(range(1, 9))
    assert (finished / "reconstruction.npz").is_file() and (finished / "regions.csv").is_file()
    with (finished / "region_errors.tsv").open(newline="") as stream:
        logged = list(csv.DictReader(stream, delimiter="\t"))
    with (finished / "regions.csv").open(newline="") as stream:
        last = list(csv.DictReader(stream))
    assert {row["step"] for row in logged} == {"4", "8"} and len(last) > 100
    assert [{**row, "step": "8"} for row in last] == [row for row in logged if row["step"] == "8"]
    for name in ("region_error.nii.gz", "region_error_ratio.nii.gz"):
        shown = np.unique(np.asarray(nib.load(finished / name).dataobj))
        assert len(shown[np.isfinite(shown)]) > 100
    assert any((finished / "tensorboard").iterdir())
    pretrained = load_pretrained(finished / "export")
    assert pretrained.config["data"]["n_subjects"] == 2
    assert pretrained.config["training"]["step"] == 8


def learn(shards: Path, out: Path, *overrides: str) -> list[dict[str, float]]:
    """Train the demo's recipe with these changes and return its metrics."""
    line = [word for word in command(shards, out, *overrides) if word not in ARGUMENTS]
    line[line.index("pretrain/tiny.yaml")] = "pretrain/demo.yaml"
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(out)
    losses = [row["loss"] for row in rows]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])
    return rows


# The baseline is what predicting zero gives here: a model that has learned nothing about brains cannot get below it.
# Filling in single tokens from their neighbours is learned in a few steps, whole regions take the demo's full length.


@pytest.mark.distributed
def test_losses_fall_and_held_out_frames_are_reconstructed_better_than_by_the_mean_frame(
    real_shards: Path, tmp_path: Path
) -> None:
    rows = learn(real_shards, tmp_path / "run", "mask.strategy=random", "steps=40", "evaluate_every=20")
    assert rows[-1]["heldout_error"] < 0.97 * rows[-1]["heldout_baseline"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_reconstructs_hidden_regions_better_than_the_mean_frame(
    real_shards: Path, tmp_path: Path, seed: int
) -> None:
    rows = learn(real_shards, tmp_path / "run", f"seed={seed}")
    assert rows[-1]["heldout_error"] < 0.95 * rows[-1]["heldout_baseline"]


@pytest.mark.slow
@pytest.mark.distributed
def test_another_recipe_in_the_same_folder_is_refused(finished: Path, real_shards: Path) -> None:
    done = launch(real_shards, finished, "seed=5", ranks=1)
    assert done.returncode == 2
    assert "started with seed = 0, now it is 5" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_folder_that_another_run_writes_to_is_refused(real_shards: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path, "pretraining"):
        done = launch(real_shards, tmp_path, ranks=1)
    assert done.returncode == 2
    assert "another process is pretraining in it" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_passed_over(finished: Path, tmp_path: Path) -> None:
    import shutil

    from boldforge.pretrain.run_folder import newest_checkpoint

    copy = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", copy)
    newest = newest_checkpoint(copy)
    assert newest is not None and newest.name == "step-00000008"
    victim = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    found = newest_checkpoint(copy)
    assert found is not None and found.name == "step-00000006"


def test_a_batch_the_ranks_cannot_share_is_refused() -> None:
    from boldforge.pretrain import PretrainConfig
    from boldforge.pretrain.checks import check_batch

    config = PretrainConfig(shards=Path("shards"), out=Path("out"), batch_size=6, micro_batch_size=2)
    with pytest.raises(ConfigError, match="batch_size is 6, which 4 ranks cannot share"):
        check_batch(config, 4)


def test_atlases_and_tables_that_do_not_fit_end_the_command_with_one_sentence(
    real_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from boldforge.pretrain import train

    # The data are looked at before any rank is needed.
    monkeypatch.setattr(train, "join_ranks", lambda: (0, 1))
    far = np.diag([2.0, 2, 2, 1])
    far[:3, 3] = 900
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), far), tmp_path / "far.nii.gz")
    (tmp_path / "groups.txt").write_text("Precentral_L motor\nBroca_L language\n")
    cases = {
        f"mask.atlas={tmp_path}/far.nii.gz": "Atlas far: none of its 1 regions meets the brain of grid mni4mm",
        f"mask.groups={tmp_path}/groups.txt": "groups.txt: line 2 names region Broca_L, which atlas aal3 does not have",
        f"mask.groups={tmp_path}/none.txt": "none.txt: no such table",
        f"mask.labels={tmp_path}/none.txt": "none.txt: no such table",
        "mask.ratio=0.9999": "mask.ratio is 0.9999, which hides all 1419 patches",
    }
    for number, (override, said) in enumerate(cases.items()):
        strategy = "region" if "far" in override else "group"
        line = command(real_shards, tmp_path / str(number), f"mask.strategy={strategy}", override)
        assert train.main(line[line.index("--config") :]) == 2, override
        shown = capsys.readouterr().err.strip()
        assert said in shown and shown.startswith("boldforge: ") and "\n" not in shown


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_stages_ranks_and_micro_batches_do_not_change_what_is_learned(real_shards: Path, tmp_path: Path) -> None:
    ways = {
        "stage 0": (1, ["zero_stage=0"]),
        "stage 1": (2, ["zero_stage=1"]),
        "stage 3": (2, ["zero_stage=3"]),
        "micro-batches": (1, ["zero_stage=2", "micro_batch_size=1"]),
    }
    same = ["model.drop_path=0", "precision=fp32", "steps=4", "mask.strategy=pair", "loss.targets=clip"]
    terms = ["loss_voxel", "loss_region", "loss_parcel", "loss_gradient"]
    same += [f"{term.replace('_', '.')}={weight}" for term, weight in zip(terms, (1, 0.5, 2, 0.25), strict=True)]
    losses, errors = {}, {}
    for name, (ranks, overrides) in ways.items():
        out = tmp_path / name.replace(" ", "-")
        done = launch(real_shards, out, *same, *overrides, ranks=ranks)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
        rows = read_metrics(out)
        losses[name] = [row[term] for row in rows for term in ("loss", *terms)]
        errors[name] = rows[-1]["heldout_error"]
        assert load_pretrained(out / "export").config["training"]["step"] == 4
    for name in ways:
        assert losses[name] == pytest.approx(losses["stage 1"], rel=1e-4), name
        assert errors[name] == pytest.approx(errors["stage 1"], rel=1e-4), name
