"""Ways to save memory, on real ranks: what is learned stays the same."""

from pathlib import Path

import pytest

from boldforge.pretrain import load_pretrained, read_metrics
from tests.pretrain.test_train import figures, launch

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
