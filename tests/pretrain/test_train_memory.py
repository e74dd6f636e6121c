"""Ways to save memory, on real ranks: what is learned stays the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from boldforge.configs import load_config
from boldforge.data_shards import get_grid
from boldforge.pretrain import PretrainConfig, load_pretrained, read_metrics
from boldforge.pretrain.checks import prepare_masks
from boldforge.pretrain.plan import plan_training
from tests.pretrain.test_train import environment, figures, launch

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_checkpointed_activations_change_no_bit_of_a_run(zero_stage: int, real_shards: Path, tmp_path: Path) -> None:
    """With stochastic depth, bf16 and an encoder of visible tokens, whose draws the recomputation must repeat."""
    runs = []
    for checkpointed in ("false", "true"):
        out = tmp_path / checkpointed
        changes = ["model.encoder_sees=visible", f"zero_stage={zero_stage}", "model.drop_path=0.3", "steps=4"]
        done = launch(real_shards, out, *changes, f"checkpoint_activations={checkpointed}")
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append((figures(out), load_pretrained(out / "export").weights_hash))
    assert runs[0] == runs[1]


def test_accumulated_gradients_are_those_of_the_whole_batch_but_for_rounding(real_shards: Path, tmp_path: Path) -> None:
    losses = []
    for size in (4, 2, 1):
        out = tmp_path / str(size)
        changes = ["model.encoder_sees=visible", "model.drop_path=0", "precision=fp32", "batch_size=4", "steps=4"]
        done = launch(real_shards, out, *changes, f"micro_batch_size={size}", ranks=1)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append([row["loss"] for row in read_metrics(out)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


LARGE = [
    *("model.frames=12", "model.embed_dim=32", "model.depths=[2,2]", "model.decoder_depths=[2]", "model.drop_path=0.1"),
    *("batch_size=8", "steps=2", "evaluation_clips=1", "optimizer.warmup_steps=0", "holdout.fraction=0.2"),
    *("loss.region=0.5", "loss.gradient=0.5"),
]
WAYS = {
    "float32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "checkpointed": ["precision=fp32", "checkpoint_activations=true"],
    "one clip at a time": ["precision=fp32", "micro_batch_size=1"],
}


def test_a_run_needs_as_much_less_memory_as_the_plan_says(real_shards: Path, tmp_path: Path) -> None:
    """The most that the process has resident, beside what it has in float32; and the losses are the same."""
    program, peak, planned, losses = str(Path(__file__).with_name("step_memory_program.py")), {}, {}, {}
    for name, changes in WAYS.items():
        keys = [*LARGE, *changes, f"shards={real_shards}", f"out={tmp_path / name}"]
        line = [sys.executable, program, "--config", "pretrain/tiny.yaml", *keys]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        peak[name] = int(done.stdout.split()[-1])
        config = load_config(PretrainConfig, "configs/pretrain/tiny.yaml", keys)
        planned[name] = plan_training(config, prepare_masks(config, get_grid("mni4mm")), 1).memory[2].activations
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    assert planned["float32"] > 1e9, "less would be lost among everything else that the process holds"
    for name in ("bf16", "checkpointed", "one clip at a time"):
        saved, wanted = peak["float32"] - peak[name], planned["float32"] - planned[name]
        assert saved == pytest.approx(wanted, rel=0.25), f"{name}: {peak}, {planned}"
        assert losses[name] == pytest.approx(losses["float32"], rel=0.01 if name == "bf16" else 1e-4), name
