"""Sweeps that are killed at random moments: the driver, a worker, a process of Ray's, or everything at once."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = (
    "sweep.json",
    "trials.tsv",
    "journal.jsonl",
    "best/metrics.json",
    "best/predictions.tsv",
    "best/adapter/task.json",
    "best/adapter/head.safetensors",
)
# Every second kill is of a worker, after which the driver goes on.
KINDS = ("driver", "worker", "ray", "worker", "all", "worker")
# Of Ray's own processes; the agents take the raylet along.
_OF_RAY = ("gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
# Every process of a sweep carries this in its environment, whoever its parent is by now.
_MARK = "BOLDFORGE_KILLED_SWEEP"
_PATIENCE_S, _LINGERING_S = 180.0, 120.0


@dataclass
class Outcome:
    """What became of a sweep that was killed again and again.

    Attributes
    ----------
    kills
        How often each kind of process was killed.
    redone
        Epochs that were begun more than once, counted as often as they were begun again.
    allowed
        As many as may be: one per kill and trial that can be training at a time.
    same
        Whether its files are those of a sweep that nobody disturbed, and the epochs it trained too.
    left
        Processes that were still there two minutes after the end. Ray's agents look for their node that long.
    complaints
        What went wrong, in words.
    """

    kills: Counter[str] = field(default_factory=Counter)
    redone: int = 0
    allowed: int = 0
    same: bool = False
    left: int = 0
    complaints: list[str] = field(default_factory=list)


class KilledSweep:
    """A sweep in processes of its own, which can be killed and started again.

    Parameters
    ----------
    recipe
        What `SweepConfig` reads; ``out`` must not exist yet.
    scratch
        A folder for the recipe, the log of epochs and what the processes print.
    """

    def __init__(self, recipe: dict[str, Any], scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.out, self.scratch = Path(recipe["out"]), scratch
        self._recipe, self.log, self.printed = scratch / "recipe.json", scratch / "epochs.log", scratch / "printed.txt"
        self._recipe.write_text(json.dumps({name: _plain(value) for name, value in recipe.items()}))
        self.log.touch()
        self._process: Any = None
        self._sessions: set[str] = set()

    def start(self) -> None:
        """Give the command that begins it, or goes on, in a process of its own."""
        # A fork has all imports behind it, but hangs where Ray's threads have run in this process.
        how = multiprocessing.get_context("spawn" if "ray" in sys.modules else "fork")
        self._process = how.Process(target=_sweep, args=(self._recipe, self.log, self.printed, self.scratch))
        self._process.start()

    @property
    def running(self) -> bool:
        """Whether the command has not come back yet."""
        return self._process is not None and self._process.is_alive()

    def wait(self, seconds: float = _PATIENCE_S) -> int | None:
        """Wait for the command; return its exit status, None if it does not come back."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self, kind: str, chance: random.Random) -> bool:
        """Kill a process, or all of them; return whether there was one of that kind."""
        processes = self.processes()
        wanted = {
            "driver": lambda pid, name: pid == self._process.pid,
            "worker": lambda pid, name: name.startswith("ray::ImplicitFunc"),
            "ray": lambda pid, name: any(part in name.split(" ")[0] for part in _OF_RAY),
            "all": lambda pid, name: True,
        }[kind]
        found = [pid for pid, name in processes.items() if wanted(pid, name)]
        for pid in found if kind == "all" else chance.sample(found, min(1, len(found))):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return bool(found)

    def processes(self) -> dict[int, str]:
        """Return the command lines of all processes that belong to the sweep, by their numbers."""
        mark = f"{_MARK}={self.scratch}".encode()
        record = self.out / "trials" / ".ray-session"
        if record.is_file():
            self._sessions.add(record.read_text())
        found = {self._process.pid: "driver"} if self.running else {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                # Ray's agents write their title over their environment; their logs tell whose they are.
                if mark in (folder / "environ").read_bytes().split(b"\0") or self._logs_here(folder):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if command:
                        found[int(folder.name)] = command
            except OSError:
                continue
        return found

    def _logs_here(self, process: Path) -> bool:
        """Whether a process has a file open in the folder of one of the sweep's Ray sessions."""
        opened = [str(link.readlink()) for link in (process / "fd").iterdir()]
        return any(path.startswith(f"{session}/") for session in self._sessions if session for path in opened)

    def epochs(self) -> Counter[str]:
        """Return how often every epoch of every trial was begun."""
        return Counter(self.log.read_text().split("\n")[:-1])

    def files(self) -> dict[str, bytes]:
        """Return everything the sweep wrote; its own folder's name reads OUT."""
        return {
            str(path.relative_to(self.out)): path.read_bytes().replace(str(self.out).encode(), b"OUT")
            for path in sorted(self.out.rglob("*"))
            if path.is_file()
        }


def undisturbed(recipe: dict[str, Any], scratch: Path) -> tuple[dict[str, bytes], Counter[str], float]:
    """Sweep without a kill; return the files, the epochs and the seconds it took."""
    swept = KilledSweep(recipe, scratch)
    start = time.monotonic()
    swept.start()
    status = swept.wait(600)
    if status != 0:
        raise RuntimeError(f"the undisturbed sweep ended with {status}: {swept.printed.read_text()[-2000:]}")
    return swept.files(), swept.epochs(), time.monotonic() - start


def sweep_under_fire(
    recipe: dict[str, Any],
    scratch: Path,
    wanted: tuple[dict[str, bytes], Counter[str], float],
    kinds: tuple[str, ...],
    n_kills: int,
    chance: random.Random,
) -> Outcome:
    """Kill a sweep as often as asked, let it end, and compare.

    Most kills come moments after some epoch began, one in five at any time of the sweep, start and end included.
    """
    files, epochs, seconds = wanted
    swept, outcome = KilledSweep(recipe, scratch), Outcome()
    kind = "nothing"
    width = recipe.get("concurrency", 2) if recipe.get("driver") != "serial" else 1
    while True:
        if not swept.running:
            swept.start()
        more = sum(outcome.kills.values()) < n_kills
        if more and _wait_for_a_moment(swept, seconds, chance):
            kind = chance.choice(kinds)
            if swept.kill(kind, chance):
                outcome.kills[kind] += 1
                outcome.allowed += 1 if kind == "worker" else width
            # Of a worker or a process of Ray's the driver itself makes good the loss.
            if kind in ("driver", "all") and swept.wait() is None:
                outcome.complaints.append(f"hangs after a kill of {kind}")
                swept.kill("all", chance)
                swept.wait()
            continue
        status = swept.wait(600)
        if status == 0:
            break
        ended = "hangs" if status is None else f"ended with {status}"
        outcome.complaints.append(f"{ended} after a kill of {kind}: {swept.printed.read_text()[-1500:]}")
        if status is None:
            swept.kill("all", chance)
            swept.wait()
        if len(outcome.complaints) > 3:
            swept.kill("all", chance)
            return outcome
    deadline = time.monotonic() + _LINGERING_S
    while (left := swept.processes()) and time.monotonic() < deadline:
        time.sleep(0.5)
    outcome.left = len(left)
    if left:
        outcome.complaints.append(f"left {', '.join(left.values())}")
    begun = swept.epochs()
    outcome.redone = sum(begun.values()) - len(begun)
    found = swept.files()
    differing = [name for name in sorted(files.keys() | found.keys()) if found.get(name) != files.get(name)]
    if differing:
        outcome.complaints.append(f"differs in {', '.join(differing)}")
    if begun.keys() != epochs.keys():
        outcome.complaints.append("trained other epochs")
    if outcome.redone > outcome.allowed:
        outcome.complaints.append(f"redid {outcome.redone} epochs, allowed are {outcome.allowed}")
    outcome.same = not differing and begun.keys() == epochs.keys() and outcome.redone <= outcome.allowed
    return outcome


def _sweep(recipe: Path, log: Path, printed: Path, mark: Path) -> None:
    here = str(Path(__file__).parent)
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in paths)
    os.environ |= {_MARK: str(mark), "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, here)
    with printed.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    from logged_sweep import sweep_noting_epochs

    sweep_noting_epochs(recipe, log)


def _wait_for_a_moment(swept: KilledSweep, seconds: float, chance: random.Random) -> bool:
    """Wait; return whether the sweep is still running."""
    deadline = time.monotonic() + chance.uniform(0, 1.2 * seconds)
    after = chance.randint(1, 6) if chance.random() < 0.8 else None
    begun = sum(swept.epochs().values())
    while swept.running and time.monotonic() < (deadline if after is None else deadline + seconds):
        if after is not None and sum(swept.epochs().values()) >= begun + after:
            time.sleep(chance.uniform(0, 0.3))
            break
        time.sleep(0.02)
    return swept.running


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
