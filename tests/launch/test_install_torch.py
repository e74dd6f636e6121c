import json
import subprocess

import pytest

from boldforge.launch import install_torch
from boldforge.launch.install_torch import choose_plan

CUDA = ["torch", "sympy", "nvidia-cublas-cu13", "triton"]
CUDA_BY_ITS_NEW_NAME = ["torch", "cuda-bindings"]
PLAIN = ["torch", "sympy", "jinja2", "python-cudnn-name-in-the-middle"]


@pytest.mark.parametrize(
    ("gpu", "packages", "plan"),
    [
        (False, CUDA, "cpu-build"),
        (False, CUDA_BY_ITS_NEW_NAME, "cpu-build"),
        (False, ["NVIDIA-nccl"], "cpu-build"),
        (False, PLAIN, "pip"),
        (True, CUDA, "pip"),
        (True, [], "nothing"),
        (False, [], "nothing"),
    ],
)
def test_cuda_packages_come_only_where_there_is_a_gpu(gpu, packages, plan):
    assert choose_plan(gpu, packages) == plan


def test_a_gpu_is_seen_by_its_device_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install_torch.has_nvidia_gpu(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not install_torch.has_nvidia_gpu(tmp_path), "the control device alone is no GPU"
    (tmp_path / "nvidia0").touch()
    assert install_torch.has_nvidia_gpu(tmp_path)


@pytest.fixture
def commands(monkeypatch):
    """Record commands instead of running them; a dry run reports a resolution with CUDA packages."""
    ran = []

    def run(command, check):
        ran.append(command)
        if "--report" in command:
            content = {"install": [{"metadata": {"name": name}} for name in CUDA]}
            with open(command[command.index("--report") + 1], "w") as stream:
                json.dump(content, stream)

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_without_a_gpu_the_cpu_build_is_installed(commands, monkeypatch, capsys):
    monkeypatch.setattr(install_torch, "has_nvidia_gpu", lambda: False)
    assert install_torch.main(["constraints.txt"]) == 0
    assert commands[-1][-4:] == ["--torch-backend", "cpu", "-c", "constraints.txt"]
    assert "no NVIDIA GPU" in capsys.readouterr().out


def test_with_a_gpu_pip_installs_what_it_resolved(commands, monkeypatch):
    monkeypatch.setattr(install_torch, "has_nvidia_gpu", lambda: True)
    assert install_torch.main(["constraints.txt"]) == 0
    assert commands[-1][1:] == ["-m", "pip", "install", "--quiet", "torch", "-c", "constraints.txt"]


def test_a_failed_download_is_one_sentence(monkeypatch, capsys):
    def run(command, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    assert install_torch.main(["constraints.txt"]) == 1
    assert "by hand at the version in constraints.txt" in capsys.readouterr().err
