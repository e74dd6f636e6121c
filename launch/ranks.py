"""Start a training module on one or more local ranks through DeepSpeed's own launcher, and watch it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from boldforge.configs import BoldForgeError

_POLL_SECONDS = 0.5
_WATCHDOG = ("sh", "-c", "read line; kill -KILL 0")
_LAUNCHER = "deepspeed.launcher.runner"  # what the `deepspeed` program runs; found even where PATH lacks .venv/bin


class RanksError(BoldForgeError):
    """The ranks ended before their work was done, with ``exit_code``."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launcher_command(module: str, arguments: Sequence[str], ranks: int, port: int) -> list[str]:
    """Return the command line: ``deepspeed --num_accelerators N --module MODULE ARGUMENTS``."""
    launcher = [sys.executable, "-m", _LAUNCHER, "--num_accelerators", str(ranks), "--master_port", str(port)]
    return [*launcher, "--no_local_rank", "--module", module, *arguments]


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_environment(ranks: int, cuda: bool) -> dict[str, str]:
    """Return the environment of the ranks: the CPU accelerator where there is no GPU, and the cores shared out."""
    environment = dict(os.environ)
    if not cuda:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    # The launcher lists scripts such as ninja by name: they lie beside the interpreter, which PATH may lack.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    return environment


def run_ranks(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    log: Path,
    cuda: bool,
    while_running: Callable[[], None] = lambda: None,
) -> None:
    """Run a module on local ranks until it ends.

    Parameters
    ----------
    module
        Name for ``python -m``.
    arguments
        Its command line.
    ranks
        Processes to start.
    log
        File that receives everything the ranks and the launcher print; appended to.
    cuda
        Whether the ranks use GPUs.
    while_running
        Called about twice a second, to show progress.

    Raises
    ------
    RanksError
        If the launcher ends with another exit code than 0; the message quotes the end of the log.
    KeyboardInterrupt
        After the ranks have been stopped.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = launcher_command(module, arguments, ranks, _free_port())
    with log.open("ab") as stream:
        began = stream.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=rank_environment(ranks, cuda),
            # Its own process group, so that stopping it stops every rank and not the caller.
            process_group=0,
        )
        # If this process is killed, it cannot stop the ranks, and a second start would write beside them into the same
        # folder. Its death closes this pipe, and the watchdog ends the group.
        watchdog = subprocess.Popen(_WATCHDOG, stdin=subprocess.PIPE, process_group=process.pid)
        try:
            while process.poll() is None:
                while_running()
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            _stop_group(process)
            watchdog.communicate()
    while_running()
    if process.returncode != 0:
        raise RanksError(_explain(process.returncode, log, began), process.returncode)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """Stop every process of the group; after a clean end there is none left."""
    for stop, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, stop)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _explain(exit_code: int, log: Path, began: int) -> str:
    with log.open("rb") as stream:
        stream.seek(began)
        lines = stream.read().decode(errors="replace").splitlines()
    for line in lines:
        if line.startswith("boldforge: "):  # what the ranks' own main prints for a mistake that the user can mend
            return line.removeprefix("boldforge: ")
    quoted = "\n  ".join(lines[-15:])
    return f"The ranks ended with exit code {exit_code}; the whole output is in {log}, its end:\n  {quoted}"
