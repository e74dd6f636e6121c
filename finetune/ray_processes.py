"""Whether the Ray that this process started is still there: when its own processes die, Ray Tune waits for ever."""

import os
from pathlib import Path

# What manages a node and what manages the cluster; the others are either replaced by these or take them along.
_NEEDED = ("raylet", "gcs_server")


class RayProcesses:
    """The processes without which no trial can run, as they are now; none where Ray was started by somebody else."""

    def __init__(self) -> None:
        self._numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_needed(int(path.name))]

    @property
    def ended(self) -> bool:
        """Whether one of them has died since."""
        return not all(_is_needed(number) for number in self._numbers)


def _is_needed(number: int) -> bool:
    """Whether a process is a living child of this one and one of those that a node of Ray cannot do without."""
    try:
        about = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    # The name stands in brackets and may hold any character; after it state and parent.
    name, (state, parent, *_) = about[about.index("(") + 1 : about.rindex(")")], about[about.rindex(")") + 1 :].split()
    return name in _NEEDED and state not in "ZX" and int(parent) == os.getpid()
