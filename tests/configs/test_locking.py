import subprocess
import sys

import pytest

from boldforge.configs import BoldForgeError, folder_lock


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
