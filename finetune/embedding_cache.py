"""Embeddings of a frozen backbone, computed once and kept: every trial of a head alone reads the same file.

A cache is a folder; an entry is a folder in it, named by the hash of its key, with ``embeddings.npy`` and
``entry.json``. Whoever wants room may remove the cache, or entries of it, at any moment. Nothing else belongs into the
folder: one that holds other things is refused, and what is no entry is never removed.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boldforge.configs import FolderInUseError, folder_lock
from boldforge.configs.durable import sync_folder
from boldforge.finetune.sweep_journal import SweepError, checksum, write_whole

logger = logging.getLogger(__name__)
_FORMAT = 1
_VALUES, _ENTRY = "embeddings.npy", "entry.json"
_YOUNG_S = 60.0
_PARTIAL, _GONE = ".boldforge-partial-", ".boldforge-gone-"
_NAME = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Embeddings:
    """A file of embeddings, float32 [clips, C], and the checksum that it must have."""

    path: Path
    xxh3: str

    def load(self) -> np.ndarray | None:
        """Map the file into memory, read-only, after its bytes were checked; None if they are not those written."""
        try:
            if checksum(self.path.read_bytes()) != self.xxh3:
                return None
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None


class EmbeddingCache:
    """A folder of embeddings, bounded in size.

    Parameters
    ----------
    folder
        Made when something is kept. Several sweeps may use it at once.
    limit
        Bytes that it may hold; what was not used for longest goes first.

    Raises
    ------
    SweepError
        If the folder holds anything but entries; hidden files aside, which some disks put everywhere.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        others = sorted(name for name in names if not name.startswith(".") and not _NAME.fullmatch(name))
        if others:
            raise SweepError(
                f"{folder}: holds {others[0]}, which is none of an embedding cache's entries, so no embeddings are "
                "kept there; let cache name an empty folder, or a new one."
            )

    def get(self, key: Mapping[str, Any], compute: Callable[[], np.ndarray], place: Path) -> Embeddings:
        """Put the embeddings of a key at `place`: a link to the cache's file, which stays when the cache is emptied.

        Parameters
        ----------
        key
            All that the embeddings follow from, as JSON.
        compute
            Called if the cache has no entry of this key, or a damaged one; returns float32 [clips, C].
        place
            File to make; replaced if there.
        """
        key = {"format": _FORMAT, **key}
        entry = self._folder / checksum(json.dumps(key, sort_keys=True).encode())
        self._folder.mkdir(parents=True, exist_ok=True)
        found = self._find(entry, key, place)
        if found is None:
            found = self._add(entry, key, compute(), place)
        self._shrink(entry)
        return found

    def _find(self, entry: Path, key: Mapping[str, Any], place: Path) -> Embeddings | None:
        if not entry.is_dir():
            return None
        place.unlink(missing_ok=True)
        try:
            described = json.loads((entry / _ENTRY).read_text())
            _link(entry / _VALUES, place)
            found = Embeddings(place, described["xxh3"])
            # Compared as JSON gives it back, where a tuple is a list.
            if described["key"] == json.loads(json.dumps(key)) and found.load() is not None:
                os.utime(entry)
                logger.info("embeddings taken from %s", entry)
                return found
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.warning("%s: is damaged or incomplete; its embeddings are computed again.", entry)
        self._remove(entry)
        return None

    def _add(self, entry: Path, key: Mapping[str, Any], embeddings: np.ndarray, place: Path) -> Embeddings:
        with self._partial() as partial:
            made = partial / "entry"
            made.mkdir()
            np.save(made / _VALUES, np.ascontiguousarray(embeddings, dtype="<f4"))
            (made / _VALUES).chmod(0o444)
            content = (made / _VALUES).read_bytes()
            with (made / _VALUES).open("rb") as stream:
                os.fsync(stream.fileno())
            xxh3 = checksum(content)
            write_whole(made / _ENTRY, (json.dumps({"key": key, "xxh3": xxh3}, indent=1) + "\n").encode())
            sync_folder(made)
            place.unlink(missing_ok=True)
            _link(made / _VALUES, place)
            # Another sweep may have put the same there meanwhile.
            with contextlib.suppress(OSError):
                made.rename(entry)
        sync_folder(self._folder)
        return Embeddings(place, xxh3)

    @contextlib.contextmanager
    def _partial(self) -> Iterator[Path]:
        """Lend a folder beside the entries; it is locked, so that nobody takes it for a killed process's."""
        # Again: whoever removed the folder while the embeddings were computed was free to.
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._folder))
        try:
            with folder_lock(partial, "keeping embeddings"):
                yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _shrink(self, used: Path) -> None:
        """Remove what killed processes left, and the entries that were not used for longest."""
        for left in self._folder.glob(f"{_PARTIAL}*"):
            with contextlib.suppress(FolderInUseError, OSError):
                # One that was made a moment ago may not be locked yet.
                if time.time() - left.stat().st_mtime > _YOUNG_S:
                    with folder_lock(left, "removing it"):
                        shutil.rmtree(left, ignore_errors=True)
        for left in self._folder.glob(f"{_GONE}*"):
            shutil.rmtree(left, ignore_errors=True)
        sizes: list[tuple[float, int, Path]] = []
        for entry in self._folder.iterdir():
            if not _is_entry(entry):
                continue
            with contextlib.suppress(OSError):
                used_at = float("inf") if entry == used else entry.stat().st_mtime
                sizes.append((used_at, sum(path.stat().st_size for path in entry.iterdir()), entry))
        total = sum(size for _, size, _ in sizes)
        for _, size, entry in sorted(sizes):
            if total <= self._limit:
                break
            logger.info("%s: removed, the cache holds %.1f GB at most", entry, self._limit / 1e9)
            self._remove(entry)
            total -= size

    def _remove(self, entry: Path) -> None:
        gone = Path(tempfile.mkdtemp(prefix=_GONE, dir=self._folder))
        # In one step, so that nobody finds half an entry; another process may have been first.
        with contextlib.suppress(OSError):
            entry.rename(gone / "entry")
        shutil.rmtree(gone, ignore_errors=True)


def _is_entry(folder: Path) -> bool:
    """Say whether a folder is one that the cache made, whole, and nothing was put into it."""
    if not _NAME.fullmatch(folder.name):
        return False
    try:
        described = json.loads((folder / _ENTRY).read_text())
        return described.keys() == {"key", "xxh3"} and {path.name for path in folder.iterdir()} <= {_VALUES, _ENTRY}
    except (OSError, ValueError, AttributeError):
        return False


def _link(source: Path, place: Path) -> None:
    """Let `place` be the same file; a copy where the two lie on different disks."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
