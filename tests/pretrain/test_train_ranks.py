"""A run goes on at another number of ranks and another ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest

from boldforge.pretrain import load_pretrained, read_metrics
from tests.pretrain.test_train import launch

SAME = ["model.drop_path=0", "precision=fp32", "checkpoint_every=1", "keep_checkpoints=9"]
# From the step on which the checkpoint was written; each finds what the one before it left.
CHAIN = {2: (1, 3), 4: (2, 0), 6: (2, 3), 7: (1, 1)}
FIGURES = {"loss", "lr", "grad_norm", "heldout_error", "heldout_baseline"}


def stop_at(out: Path, step: int) -> None:
    """Leave the run as if it had died after this step."""
    for checkpoint in (out / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_rest_of_a_run_is_the_same_on_other_ranks_and_stages(real_shards: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "moved"
    done = launch(real_shards, whole, *SAME, "zero_stage=2", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(whole, out)
    for step, (ranks, stage) in CHAIN.items():
        stop_at(out, step)
        done = launch(real_shards, out, *SAME, f"zero_stage={stage}", ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"going on from the checkpoint of step {step}" in done.stderr
        listing = json.loads((out / "checkpoints" / "step-00000008" / "checkpoint.json").read_text())
        assert listing["world_size"] == ranks
        found, wanted = read_metrics(out), read_metrics(whole)
        assert [row["step"] for row in found] == list(range(1, 9))
        for one, other in zip(found, wanted, strict=True):
            for name in FIGURES & one.keys() & other.keys():  # stage 0 computes no gradient norm
                assert one[name] == pytest.approx(other[name], rel=1e-4), f"{name}, {ranks} ranks, stage {stage}"


@pytest.mark.distributed
@pytest.mark.slow
def test_a_checkpoint_of_deepspeeds_own_files_is_refused(real_shards: Path, tmp_path: Path) -> None:
    done = launch(real_shards, tmp_path, "steps=1", ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "checkpoints" / "step-00000001"
    path = folder / "checkpoint.json"
    (folder / "mp_rank_00_model_states.pt").touch()
    listing = json.loads(path.read_text())
    empty = "99aa06d3014798d86001c324468d497f"  # xxh3_128 of nothing
    path.write_text(json.dumps(listing | {"files": {"mp_rank_00_model_states.pt": [0, empty]}}))
    done = launch(real_shards, tmp_path, "steps=1", ranks=1)
    assert done.returncode == 2
    assert "written by an older version of boldforge" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_both_directions_learn_the_same_under_zero_3(real_shards: Path, tmp_path: Path) -> None:
    """The backward direction is a module of its own of the mixer, whose weights ZeRO-3 fetches when it is called."""
    same = [
        "model.bidirectional=true",
        "model.drop_path=0.3",
        "model.encoder_sees=visible",
        "precision=fp32",
        "steps=4",
    ]
    ways = {
        "whole": (1, ["zero_stage=0"]),
        "sharded": (2, ["zero_stage=3"]),
        "sharded, computed again": (2, ["zero_stage=3", "checkpoint_activations=true"]),
    }
    losses, weights = {}, {}
    for name, (ranks, changes) in ways.items():
        done = launch(real_shards, tmp_path / name, *same, *changes, ranks=ranks)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        rows = read_metrics(tmp_path / name)
        losses[name] = [row["loss"] for row in rows] + [rows[-1]["heldout_error"]]
        weights[name] = load_pretrained(tmp_path / name / "export").model.state_dict()
    assert losses["sharded"] == losses["sharded, computed again"]
    assert losses["sharded"] == pytest.approx(losses["whole"], rel=1e-4)
    backwards = [name for name in weights["whole"] if ".backwards." in name]
    assert len(backwards) == 7 * 4
    for name in backwards:
        assert (weights["sharded"][name] - weights["whole"][name]).abs().mean() < 1e-5, name
        if name.endswith(".D"):
            assert (weights["sharded"][name] != 1).all(), f"{name} has not learned"
