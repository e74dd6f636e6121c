import subprocess
import sys
import time

import pytest

from boldforge.launch import ranks
from boldforge.launch.ranks import RanksError, launcher_command, rank_environment, run_ranks


def test_the_real_launcher_is_called_with_the_module_and_its_arguments():
    command = launcher_command("boldforge.pretrain.train", ["--config", "a b.yaml", "steps=3"], ranks=2, port=1234)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_accelerators") + 1] == "2"
    assert command[-5:] == ["--module", "boldforge.pretrain.train", "--config", "a b.yaml", "steps=3"]


def test_ranks_share_the_cores_and_use_the_cpu_where_there_is_no_gpu(monkeypatch):
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert rank_environment(ranks=2, cuda=False)["OMP_NUM_THREADS"] == "4"
    assert rank_environment(ranks=2, cuda=False)["DS_ACCELERATOR"] == "cpu"
    assert rank_environment(ranks=16, cuda=False)["OMP_NUM_THREADS"] == "1"
    assert "DS_ACCELERATOR" not in rank_environment(ranks=2, cuda=True)


def test_what_the_user_set_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert rank_environment(ranks=1, cuda=False)["OMP_NUM_THREADS"] == "3"


@pytest.fixture
def script(monkeypatch):
    """Put a small Python program in the launcher's place."""

    def put(program):
        monkeypatch.setattr(ranks, "launcher_command", lambda *arguments: [sys.executable, "-c", program])

    return put


def test_a_clean_end_is_silent_and_the_output_is_in_the_log(script, tmp_path):
    script("print('hello from a rank')")
    calls = []
    run_ranks("module", [], 1, tmp_path / "run" / "ranks.log", cuda=False, while_running=lambda: calls.append(1))
    assert "hello from a rank" in (tmp_path / "run" / "ranks.log").read_text()
    assert calls


def test_a_users_mistake_inside_the_ranks_comes_out_as_its_sentence(script, tmp_path):
    script("import sys; print('noise'); print('boldforge: shards: no such folder.'); sys.exit(2)")
    with pytest.raises(RanksError) as caught:
        run_ranks("module", [], 1, tmp_path / "ranks.log", cuda=False)
    assert str(caught.value) == "shards: no such folder."
    assert caught.value.exit_code == 2


def test_a_crash_forwards_its_exit_code_and_the_end_of_this_starts_log(script, tmp_path):
    log = tmp_path / "ranks.log"
    log.write_text("boldforge: an old mistake, long mended.\n")
    script("import sys; [print('line', i) for i in range(50)]; sys.exit(7)")
    with pytest.raises(RanksError, match=r"exit code 7.*ranks\.log") as caught:
        run_ranks("module", [], 1, log, cuda=False)
    assert caught.value.exit_code == 7
    assert "line 49" in str(caught.value)
    assert "line 3\n" not in str(caught.value)
    assert "old mistake" not in str(caught.value)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "alive"


@pytest.fixture
def endless(marker):
    """A launcher whose child touches the marker for ever."""
    child = f"import time\nwhile True:\n open({str(marker)!r}, 'w').close(); time.sleep(0.02)"
    return f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"


def _is_silent(marker):
    marker.unlink(missing_ok=True)
    deadline = time.monotonic() + 0.4
    while time.monotonic() < deadline:
        if marker.exists():
            return False
        time.sleep(0.02)
    return True


def test_stopping_leaves_no_process_behind(script, endless, marker, tmp_path):
    def stop_when_started():
        if marker.exists():
            raise KeyboardInterrupt

    script(endless)
    with pytest.raises(KeyboardInterrupt):
        run_ranks("module", [], 1, tmp_path / "ranks.log", cuda=False, while_running=stop_when_started)
    assert _is_silent(marker)


def test_killing_the_command_itself_ends_the_ranks_too(endless, marker, tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom boldforge.launch import ranks\n"
        f"ranks.launcher_command = lambda *arguments: [sys.executable, '-c', {endless!r}]\n"
        f"ranks.run_ranks('module', [], 1, Path({str(tmp_path / 'ranks.log')!r}), cuda=False)"
    )
    command = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 20
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert marker.exists(), "the rank has not started"
    command.kill()
    command.wait()
    ended = time.monotonic() + 5
    while not _is_silent(marker):
        assert time.monotonic() < ended, "the rank goes on without its command"
