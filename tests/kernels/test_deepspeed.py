"""The operators under DeepSpeed itself: ZeRO-3 on two real ranks, activation checkpointing, bf16 autocast."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.conftest import relative_error

PROGRAM = Path(__file__).with_name("zero3_program.py")


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.distributed
def test_zero_3_with_checkpointing_and_autocast_gives_the_losses_and_gradients_of_one_process(tmp_path):
    folder = Path(sys.executable).parent
    out = tmp_path / "figures.pt"
    port = str(20000 + os.getpid() % 20000)
    command = [str(folder / "deepspeed"), "--num_accelerators", "2", "--master_port", port, str(PROGRAM), str(out)]
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = torch.load(out, weights_only=True)
    first, *later = zip(figures["deepspeed"], figures["alone"], strict=True)
    found, wanted = first
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    assert len(errors) > 20
    assert max(errors.values()) < 1e-5, errors
    for found, wanted in later:  # after a step: the weights are the same as well
        assert abs(found["loss"] - wanted["loss"]) < 1e-3 * wanted["loss"]
        assert (
            max(relative_error(found[name], wanted[name]) for name in wanted) < 2e-2
        )  # Adam's step has the size of the rate even where a gradient is all rounding
        assert wanted["loss"] < first[1]["loss"]
