from itertools import pairwise
from pathlib import Path

from boldforge.pretrain import OptimizerConfig, read_metrics
from boldforge.pretrain.metrics import MetricsWriter
from boldforge.pretrain.schedule import learning_rate


def test_warms_up_linearly_and_ends_at_the_smallest_rate() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and abs(rates[-1] - 0.1) < 1e-12
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))


def test_rows_after_the_checkpoint_are_taken_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0) as metrics:
        for step in range(1, 5):
            metrics.write({"step": step, "loss": 1 / 3 * step})
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("5,0.1")
    with MetricsWriter(tmp_path, 2) as metrics:
        metrics.write({"step": 3, "loss": 7.0, "heldout_error": 0.5})
    rows = read_metrics(tmp_path)
    assert rows == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 7.0, "heldout_error": 0.5},
    ]
