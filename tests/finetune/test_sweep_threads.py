"""A sweep's files depend on `cpus`, not on the threads that its process was started with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from boldforge.configs import load_config
from boldforge.finetune import SweepConfig, nested_sweep, sweep
from tests.finetune.small_sweeps import SMALL

SWEEP = SMALL | {"baselines": ["connectivity", "image"]}
SCRIPT = """
import os
import sys
from boldforge.configs import load_config
from boldforge.finetune import SweepConfig, sweep

os.chdir(sys.argv[4])
sweep(load_config(SweepConfig, {"shards": sys.argv[1], "backbone": sys.argv[2], "out": "out", **eval(sys.argv[3])}))
"""


def _threads():
    return {torch.get_num_threads()} | {library["num_threads"] for library in threadpool_info()}


@pytest.mark.parametrize(("cpus", "fails"), [(1, False), (2, False), (2, True)])
def test_inside_a_sweep_all_have_its_threads_and_after_it_those_from_before(
    cohort, encoder, tmp_path, monkeypatch, cpus, fails
):
    seen = []

    def search(*_):
        seen.append(_threads())
        if fails:
            raise ValueError("as asked")
        return {}

    monkeypatch.setattr(nested_sweep, "search_once", search)
    config = load_config(
        SweepConfig, {"shards": cohort, "backbone": encoder, "out": tmp_path / "out", **SWEEP, "cpus": cpus}
    )
    threads, other = torch.get_num_threads(), 3 - cpus
    try:
        with threadpool_limits(other):
            torch.set_num_threads(other)
            if fails:
                with pytest.raises(ValueError, match="as asked"):
                    sweep(config)
            else:
                sweep(config)
            assert seen == [{cpus}] and _threads() == {other}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_its_files_are_the_same_whatever_number_the_process_was_started_with(cohort, encoder, tmp_path):
    found = []
    for threads in ("1", "2"):
        folder = tmp_path / threads
        folder.mkdir()
        many = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        command = [sys.executable, "-c", SCRIPT, str(cohort), str(encoder), repr(SWEEP), str(folder)]
        subprocess.run(command, env=os.environ | many, check=True)
        found.append(_files(folder / "out"))
    assert found[0] == found[1]
    assert {"sweep.json", "best/metrics.json", "best/predictions.tsv"} <= found[0].keys()


def _files(out: Path):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
