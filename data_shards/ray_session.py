"""Start or reach Ray, quietly, and leave nothing behind: for builds of shards and for sweeps."""

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from boldforge.configs import BoldForgeError

_PATIENCE_S = 10.0
_PREFIX = "bf-"
_OBJECT_STORE_BYTES = 80 * 2**20  # tasks and their outcomes only: the data goes through files
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Ray guards its ports with a token; one made here keeps it from writing its own into the user's home. A cluster that is
# reached at an address has its own.
_TOKEN = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Ray repeats in the log what the error says in a sentence.
_QUIET_LOGGERS = ("ray._private.worker", "ray._private.authentication")


@contextmanager
def ray_session(
    address: str | None,
    cpus: int | None,
    error: type[BoldForgeError],
    work: str,
    environment: Mapping[str, str] | None = None,
    loggers: Sequence[str] = (),
    record: Path | None = None,
) -> Iterator[Any]:
    """Run Ray while something is done; environment and log levels are as before afterwards.

    Parameters
    ----------
    address
        A cluster to reach; None starts Ray on this machine and ends it afterwards.
    cpus
        For a Ray of this machine: how many tasks run at a time; None is one per CPU.
    error
        What is raised where Ray cannot start or be reached.
    work
        What is to be done, as a message says it: ``"a build"``.
    environment, loggers
        More variables to set and loggers to quiet meanwhile.
    record
        File that names Ray's folder meanwhile, so that the next session with the same record removes what a killed one
        left there.

    Yields
    ------
    The module ``ray``.

    Raises
    ------
    BoldForgeError
        Of the kind `error`, if Ray runs in this process already, cannot start, or nothing answers at the address.
    """
    variables = {**_ENVIRONMENT, **(environment or {}), **(_TOKEN if address is None else {})}
    with _quiet(variables, (*_QUIET_LOGGERS, *loggers)):
        import ray

        if ray.is_initialized():
            raise error(f"Ray is already running in this process; call ray.shutdown() before {work}.")
        with session_folder(record) as folder:
            here: dict[str, Any] = {
                "num_cpus": cpus,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
            try:
                _knock(address)
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    configure_logging=False,
                    **(here if address is None else {}),
                )
            except (OSError, RuntimeError, ValueError) as reason:
                where = "start on this machine" if address is None else f"be reached at {address}"
                said = " ".join(str(reason).split())
                raise error(f"Ray could not {where} ({said}); see boldforge doctor.") from reason
            try:
                yield ray
            finally:
                ray.shutdown()


@contextmanager
def session_folder(record: Path | None) -> Iterator[str]:
    """Lend a folder under a short path: Ray puts sockets below it, whose names are limited to about 100 characters.

    `record` as for `ray_session`; only a folder of the same making and owner is removed.
    """
    if record is not None and record.is_file():
        left = Path(record.read_text())
        made_here = left.name.startswith(_PREFIX) and left.parent == Path(tempfile.gettempdir())
        if made_here and left.is_dir() and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as folder:
        if record is not None:
            record.write_text(folder)
        yield folder
    if record is not None:
        record.unlink(missing_ok=True)


def _knock(address: str | None) -> None:
    """Raise OSError where nothing listens at ``host:port``: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()


@contextmanager
def _quiet(environment: Mapping[str, str], loggers: Sequence[str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
