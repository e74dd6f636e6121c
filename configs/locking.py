"""One run at a time in an output folder."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from boldforge.configs.errors import BoldForgeError

log = logging.getLogger(__name__)

_LOCK_FILE = ".boldforge.lock"
_TRIES = 3
"""`check_free` holds a lock for a moment: whoever only looked must not be taken for one at work."""
_PAUSE_SECONDS = 0.02
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FolderInUseError(BoldForgeError):
    """Another process writes to the same folder."""


@contextmanager
def folder_lock(folder: str | Path, doing: str) -> Iterator[None]:
    """Keep a folder to this process while the block runs; the kernel frees it even if the process is killed.

    The lock is an exclusive ``flock`` on a hidden file, which is removed at the end.

    Parameters
    ----------
    folder
        Made if missing.
    doing
        What the holder does, as in "another process is ... in it": ``"writing shards"``.

    Raises
    ------
    FolderInUseError
        If another process, or another block of this one, holds the folder.
    OSError
        If the folder cannot be made or written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK_FILE
    file = _locked(path)
    try:
        file.truncate(0)
        file.write(doing.encode())
        file.flush()
        yield
    finally:
        # Removed while still held: whoever opened it meanwhile finds in `_locked` that it is no longer the folder's.
        path.unlink(missing_ok=True)
        file.close()


def check_free(folder: str | Path) -> None:
    """Refuse a folder that `folder_lock` would refuse now; nothing is written.

    Raises
    ------
    FolderInUseError
        If another process holds it.
    """
    path = Path(folder) / _LOCK_FILE
    try:
        file = path.open("rb")
    except OSError:  # there is none, or it is another user's
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path, file) from None
        except OSError:  # no locks here
            return


def _locked(path: Path) -> BinaryIO:
    patience = _TRIES
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            patience -= 1
            if not patience:
                error = _in_use(path, file)
                file.close()
                raise error from None
            time.sleep(_PAUSE_SECONDS)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                log.warning("%s: this file system has no locks; start nothing else in this folder.", path.parent)
                return file
            file.close()
            raise
        # The holder removed the file between our opening and our locking it.
        file.close()


def _in_use(path: Path, file: BinaryIO) -> FolderInUseError:
    file.seek(0)
    doing = file.read().decode(errors="replace") or "at work"
    return FolderInUseError(
        f"{path.parent}: another process is {doing} in it; wait until that has ended, or choose another folder."
    )
