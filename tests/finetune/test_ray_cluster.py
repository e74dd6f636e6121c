"""A sweep on a Ray that somebody else started: the command line's --address, and fractions of a GPU."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from boldforge.configs import load_config
from boldforge.finetune import SweepConfig, SweepError, rank_sweep, sweep
from tests.finetune.small_sweeps import SMALL

SWEEP = SMALL | {"driver": "ray", "training": {"epochs": 2}, "baselines": []}
_MARK = "BOLDFORGE_TEST_CLUSTER"


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _environment(**more: str) -> dict[str, str]:
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0", **more}


def _kill_marked(mark: str) -> None:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray head of our own, with two CPUs and a GPU that is one by name alone."""
    port = _free_port()
    address = f"127.0.0.1:{port}"
    # Short, because sockets live below it.
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as folder:
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=1", "--include-dashboard=false"]
        command += [f"--temp-dir={folder}", "--object-store-memory=80000000"]
        head = subprocess.Popen(
            command, env=_environment(**{_MARK: address}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            for line in head.stdout:
                if b"--block" in line:
                    break
            yield address
        finally:
            _kill_marked(address)
            head.wait()
            head.stdout.close()


def _answers(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


@pytest.mark.slow
def test_the_command_line_sweeps_on_the_cluster_and_leaves_it_running(cluster, cohort, encoder, tmp_path):
    recipe = {"shards": cohort, "backbone": encoder, "out": tmp_path / "here", "driver": "serial"}
    sweep(load_config(SweepConfig, SWEEP | recipe))
    command = [sys.executable, "-m", "boldforge.launch.cli", "sweep", "--address", cluster]
    settings = ["clips=1", "folds=3", "ranks=[0,1]", "grace=1", "adapter={first_stage: 1}", "training={epochs: 2}"]
    settings += ["baselines=[]", f"shards={cohort}", f"backbone={encoder}", f"out={tmp_path / 'there'}"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, env=_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Test on" in done.stdout
    for name in ("trials.tsv", "journal.jsonl", "best/predictions.tsv", "best/metrics.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name
    time.sleep(1)
    assert _answers(cluster)


@pytest.mark.slow
def test_two_trials_share_a_gpu_and_more_than_there_are_is_an_error(cluster, cohort, encoder, tmp_path, monkeypatch):
    seen = []

    def without_cuda(config, spec, *others):
        seen.append(spec.device)
        drive(config, replace(spec, device="cpu"), *others)

    drive = rank_sweep.drive
    monkeypatch.setattr(rank_sweep, "drive", without_cuda)
    recipe = SWEEP | {"shards": cohort, "backbone": encoder, "address": cluster, "concurrency": 2}
    with pytest.raises(SweepError, match="gpus is 2 per trial, but Ray sees 1 here; set gpus=0 to use CPUs"):
        sweep(load_config(SweepConfig, recipe | {"out": tmp_path / "two", "gpus": 2}))
    results = sweep(load_config(SweepConfig, recipe | {"out": tmp_path / "half", "gpus": 0.5}))
    assert seen == ["cuda", "cuda"] and len(results["trials"]) == 2


@pytest.mark.slow
def test_no_cluster_at_the_address_is_one_sentence(cohort, encoder, tmp_path):
    command = [sys.executable, "-m", "boldforge.launch.cli", "sweep", "--address", f"127.0.0.1:{_free_port()}"]
    settings = ["clips=1", "folds=3", f"shards={cohort}", f"backbone={encoder}", f"out={tmp_path / 'out'}"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, env=_environment(), timeout=120)
    assert done.returncode == 2
    assert "Ray could not be reached at 127.0.0.1:" in done.stderr and "Traceback" not in done.stderr
