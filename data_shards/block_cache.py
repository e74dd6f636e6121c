"""A bounded folder of blocks of remote files, shared by any number of processes.

A block is a fixed stretch of one shard, named after the shard's sha256: equal data, equal name, at whatever address. A
file appears whole or not at all (temporary name, then rename), and the least recently used ones go first.
"""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from boldforge.configs import BoldForgeError

BLOCK_BYTES = 4 * 2**20
# After a clean-up this share is free, so that not every new block needs another look at the folder.
_FREED = 0.1
_STRIPES = 64

Fetch = Callable[[int, int], bytes]


class CacheError(BoldForgeError):
    """The local cache of a remote dataset cannot be used."""


class BlockCache:
    """Blocks on the local disk, at most `max_bytes` in all.

    Parameters
    ----------
    folder
        Made if missing; several processes and datasets may share it.
    max_bytes
        Bound on the blocks together, at least 8 of them. Space for a block is made before it is written.
    block_bytes
        Smaller blocks fetch less that is not asked for, larger ones ask less often.

    Raises
    ------
    CacheError
        If the bound is too small, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, max_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        if max_bytes < 8 * block_bytes:
            raise CacheError(f"A cache of {max_bytes} bytes is too small; give it at least {8 * block_bytes}.")
        self.folder = folder
        self.max_bytes = max_bytes
        self.block_bytes = block_bytes
        try:
            for name in ("blocks", "locks"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{folder}: the cache cannot be made ({error.strerror}); choose another folder.") from None

    def fill(self, name: str, n_bytes: int, offset: int, buffer: memoryview, fetch: Fetch) -> None:
        """Copy bytes of a file into a buffer, from the cache where it holds them.

        Parameters
        ----------
        name
            The file's sha256.
        n_bytes
            The file's whole size, past which nothing is asked for.
        offset
            Where the buffer's first byte lies in the file.
        fetch
            Returns the file's bytes [start, stop); called for blocks that the cache does not hold.
        """
        done = 0
        while done < len(buffer):
            block, within = divmod(offset + done, self.block_bytes)
            start = block * self.block_bytes
            length = min(self.block_bytes, n_bytes - start)
            wanted = buffer[done : done + length - within]
            path = self._path(name, block)
            if not _copy(path, length, within, wanted):
                data = self._add(path, length, partial(fetch, start, start + length))
                wanted[:] = data[within : within + len(wanted)]
            done += len(wanted)

    def forget(self, name: str, offset: int, length: int) -> None:
        """Remove the blocks that hold a stretch of a file, so that they are fetched again."""
        for block in range(offset // self.block_bytes, (offset + length - 1) // self.block_bytes + 1):
            self._path(name, block).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """Return the sum of all blocks on the disk."""
        return sum(size for _, size, _ in self._blocks())

    def _path(self, name: str, block: int) -> Path:
        return self.folder / "blocks" / f"{name[:32]}-{self.block_bytes}-{block}"

    def _add(self, path: Path, length: int, fetch: Callable[[], bytes]) -> bytes:
        # One of several processes that miss a block fetches it, the others wait for that one.
        with self.locked(_stripe(path.name)):
            data = bytearray(length)
            if _copy(path, length, 0, memoryview(data)):
                return bytes(data)
            fetched = fetch()
            unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
            with self.locked("space"):
                self._make_room(length)
                try:
                    unfinished.write_bytes(fetched)
                    unfinished.replace(path)
                except OSError as error:
                    unfinished.unlink(missing_ok=True)
                    raise CacheError(
                        f"{self.folder}: the cache cannot be written ({error.strerror}); free some space or choose a "
                        "smaller bound."
                    ) from None
            return fetched

    def _make_room(self, length: int) -> None:
        """Count a new block; where the count exceeds the bound, remove the blocks that were used longest ago."""
        counter = self.folder / "locks" / "used"
        text = counter.read_text() if counter.exists() else ""
        used = int(text) if text.isdigit() else self.used_bytes()
        if used + length > self.max_bytes:
            blocks = sorted(self._blocks())
            used = sum(size for _, size, _ in blocks)
            for _, size, path in blocks:
                if used + length <= self.max_bytes * (1 - _FREED):
                    break
                Path(path).unlink(missing_ok=True)  # whoever has it open keeps reading it
                used -= size
        counter.write_text(str(used + length))

    def _blocks(self) -> list[tuple[int, int, str]]:
        """Return (time of last use, bytes, path) of every file, also of what a killed process left half-written."""
        found = []
        for entry in os.scandir(self.folder / "blocks"):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # another process removed it
            found.append((status.st_mtime_ns, status.st_size, entry.path))
        return found

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keep what a name stands for to this thread, of all threads and processes that share the cache."""
        with (self.folder / "locks" / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Closing is not enough: a process that was forked meanwhile has the file too, and would keep the lock.
                fcntl.flock(file, fcntl.LOCK_UN)


def _stripe(name: str) -> str:
    return f"stripe-{sum(name.encode()) % _STRIPES}"


def _copy(path: Path, length: int, within: int, buffer: memoryview) -> bool:
    """Copy from a block into a buffer and mark it as used; return False where it is not there, or not whole."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if os.fstat(file).st_size != length:
            return False
        done = 0
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], within + done)
            if count == 0:
                return False
            done += count
        os.utime(file)
        return True
    finally:
        os.close(file)
