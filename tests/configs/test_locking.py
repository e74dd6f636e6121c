import fcntl
import subprocess
import sys

import pytest

from boldforge.configs import BoldForgeError, folder_lock, locking


def test_a_second_one_in_the_folder_is_refused_and_told_what_the_first_does(tmp_path):
    folder = tmp_path / "new/out"
    with folder_lock(folder, "writing shards"):
        code = f"from boldforge.configs import folder_lock\nwith folder_lock({str(folder)!r}, 'sweeping'): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"{folder}: another process is writing shards in it; wait" in other.stderr
        with pytest.raises(BoldForgeError, match="writing shards"), folder_lock(folder, "sweeping"):
            pass
        with folder_lock(tmp_path / "elsewhere", "sweeping"):
            pass
    assert list(folder.iterdir()) == []
    with folder_lock(folder, "sweeping"):
        pass


def test_a_killed_holder_does_not_keep_the_folder(tmp_path):
    code = (
        "import os, signal\nfrom boldforge.configs import folder_lock\n"
        f"with folder_lock({str(tmp_path)!r}, 'writing shards'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert list(tmp_path.iterdir())
    with folder_lock(tmp_path, "sweeping"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path, "writing shards"):
        1 / 0  # noqa: B018
    with folder_lock(tmp_path, "writing shards"):
        pass


@pytest.mark.parametrize("looks", [1, 9])
def test_who_looks_for_a_moment_does_not_keep_the_folder(tmp_path, monkeypatch, looks):
    left = tmp_path / ".boldforge.lock"
    left.touch()  # as a killed run leaves it
    waits = []
    with left.open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)

        def wait(seconds):
            waits.append(seconds)
            if len(waits) == looks:
                fcntl.flock(looking, fcntl.LOCK_UN)

        monkeypatch.setattr(locking.time, "sleep", wait)
        if looks == 1:
            with folder_lock(tmp_path, "pretraining"):
                assert len(waits) == 1
        else:
            with pytest.raises(BoldForgeError, match="another process is at work"), folder_lock(tmp_path, "sweeping"):
                pass
            assert 1 <= len(waits) <= 2 and sum(waits) < 0.2
