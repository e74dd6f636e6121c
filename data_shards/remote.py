"""Datasets at an address (s3://, gs://, hf://, http://): what is read is fetched, and kept in a bounded local cache.

Without a connection, everything that the cache holds can still be read.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from boldforge.configs import BoldForgeError
from boldforge.configs.durable import write_atomic
from boldforge.data_shards.block_cache import BLOCK_BYTES, BlockCache
from boldforge.data_shards.manifest import MANIFEST_FILE, MASK_FILE, Manifest, load_manifest, parse_manifest
from boldforge.data_shards.tables import ShardEntry, ShardError

logger = logging.getLogger(__name__)

# What to install where fsspec finds nothing that speaks a protocol; file and memory are its own.
PROTOCOLS = {
    **dict.fromkeys(("s3", "gs", "gcs"), "'boldforge[remote]'"),
    "hf": "huggingface_hub",
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("abfs", "az"), "adlfs"),
    **dict.fromkeys(("file", "memory"), "fsspec"),
}
CACHE_VARIABLE = "BOLDFORGE_CACHE"
CACHE_BYTES = 32 * 2**30
# Makes fsspec's http read ~/.netrc, which it does not by itself.
_NETRC = """FSSPEC_HTTP='{"client_kwargs": {"trust_env": true}}'"""
_WAITS = (0.2, 1.0, 3.0)  # seconds before another try

Result = TypeVar("Result")


class RemoteError(BoldForgeError):
    """A remote file cannot be fetched now; never skipped, because the next attempt may give the sample after all."""


def why_refused(url: str) -> str | None:
    """Say why an address is refused that holds a password or a signature, without repeating them; None if it is not.

    What is in an address lands in ``config.yaml`` and in messages.
    """
    protocol, found, rest = url.partition("://")
    if not found:
        return None
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, host = authority.rpartition("@")
    host, _, port = host.partition(":")
    beyond = "@" in rest[len(authority) :]
    container = protocol in ("abfs", "az") and ":" not in user  # abfs://container@account
    cut = beyond and port != "" and not port.isdigit()  # a password with a slash
    if not (at and not container) and not cut and not set("?#") & set(rest) and "@" not in protocol:
        return None
    # A password may hold every one of these signs; what may be a piece of it is not shown.
    shown = f"{protocol if re.fullmatch('[A-Za-z0-9+.-]+', protocol) else '…'}://{'…' if beyond else host}"
    return (
        f"{shown}: expected an address without a user, a password, '?' and '#', which would be written into files and "
        "messages; give them to the backend instead, in its environment variables, the cloud's credential file, or for "
        f"http in ~/.netrc with {_NETRC}"
    )


def open_remote(
    url: str, cache: str | Path | None = None, max_bytes: int = CACHE_BYTES, block_bytes: int = BLOCK_BYTES
) -> Manifest:
    """Open the dataset at an address; its shards are fetched block by block as clips are read.

    Parameters
    ----------
    url
        The folder of shards, such as ``s3://bucket/shards``; credentials come from where fsspec's backend looks.
    cache
        Local folder for what was fetched; by default ``$BOLDFORGE_CACHE`` or ``~/.cache/boldforge``.
    max_bytes
        Bound on the cached blocks (not on manifests, tables and masks, which stay).
    block_bytes
        See `BlockCache`.

    Raises
    ------
    RemoteError
        If the address cannot be reached and the cache does not hold the manifest, or the protocol is not known,
        or the address holds a password or a signature.
    ShardError
        If what lies there is not a dataset.
    """
    if why := why_refused(url):
        raise RemoteError(f"{why}.")
    folder = Path(cache or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "boldforge")
    remote = RemoteShards(url.rstrip("/"), BlockCache(folder, max_bytes, block_bytes))
    return remote.manifest()


class RemoteShards:
    """The shards at an address, read through a cache; pickles without its connection.

    Raises
    ------
    RemoteError
        If the address holds a password or a signature, or its protocol is not one of `PROTOCOLS`.
    """

    def __init__(self, url: str, cache: BlockCache) -> None:
        if why := why_refused(url):
            raise RemoteError(f"{why}.")
        self.url = url
        self.cache = cache
        self._connection: tuple[int, Any] | None = None
        protocol = url.partition("://")[0]
        if protocol not in PROTOCOLS or "::" in url:
            raise RemoteError(f"{url}: expected an address that starts with one of {', '.join(PROTOCOLS)} and ://")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def manifest(self) -> Manifest:
        """Return the manifest, its tables and mask on the local disk; the cached one where there is no connection."""
        place = xxhash.xxh3_64_hexdigest(self.url.encode())
        folder = self.cache.folder / "datasets" / place
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST_FILE
        with self.cache.locked(f"dataset-{place}"):  # all ranks of a machine come here at once
            try:
                data = self._fetch(MANIFEST_FILE)
            except RemoteError as error:
                if not path.exists():
                    raise
                logger.warning("%s Going on with the manifest in the cache.", error)
                data = path.read_bytes()
            # Before it takes the place of the cached one: a network that wants a login answers with a page.
            found = parse_manifest(data, f"{self.url}/{MANIFEST_FILE}", self.url)
            if not path.exists() or path.read_bytes() != data:
                # Another dataset at the same address: its mask has the same name.
                (folder / MASK_FILE).unlink(missing_ok=True)
                write_atomic(path, data)
            for name in (MASK_FILE, *(table.file for table in found.tables.values())):
                if not (folder / name).exists():
                    write_atomic(folder / name, self._fetch(name))
            return load_manifest(path).read_from(self)

    def fill(self, shard: ShardEntry, offset: int, buffer: memoryview) -> None:
        """Copy bytes of a shard into a buffer.

        Raises
        ------
        ShardError
            If the shard is missing or cut.
        RemoteError
            If the bytes are not in the cache and cannot be fetched.
        """

        def fetch(start: int, stop: int) -> bytes:
            data = self._fetch(shard.file, start, stop)
            if len(data) == shard.n_bytes > stop - start:
                data = data[start:stop]  # a server that does not know ranges sends the whole file
            if len(data) != stop - start:
                raise ShardError(
                    f"{self.url}/{shard.file}: gave {len(data)} bytes from {start}, expected {stop - start}: the shard "
                    "is cut; copy it there again."
                )
            return data

        if offset + len(buffer) > shard.n_bytes:
            raise ShardError(f"{self.url}/{shard.file}: ends at {shard.n_bytes}, expected data beyond; build it again.")
        self.cache.fill(shard.sha256, shard.n_bytes, offset, buffer, fetch)

    def forget(self, shard: ShardEntry, offset: int, length: int) -> None:
        """Drop a stretch from the cache, so that it is fetched again."""
        self.cache.forget(shard.sha256, offset, length)

    def _fetch(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        url = f"{self.url}/{name}"
        try:
            return _patiently(lambda: self._filesystem().cat_file(url, start=start, end=stop))
        except FileNotFoundError:
            raise ShardError(f"{url}: is missing; copy the dataset there again.") from None
        except ImportError as error:
            raise RemoteError(
                f"{url}: needs a package that is not installed ({_one_line(error)}); install it: pip install "
                f"{PROTOCOLS[self.url.partition('://')[0]]}"
            ) from None
        # Every backend raises its own kinds: OSError, aiohttp's, botocore's, Google's.
        except Exception as error:
            raise RemoteError(
                f"{url}: cannot be fetched ({type(error).__name__}: {_one_line(error)}); check the address and the "
                "connection."
            ) from None

    def _filesystem(self) -> Any:
        """Return this process's connection: fsspec's event loop does not survive a fork."""
        import fsspec
        import fsspec.asyn

        if self._connection is None or self._connection[0] != os.getpid():
            if self._connection is not None:
                fsspec.asyn.reset_lock()
            protocol = self.url.partition("://")[0]
            self._connection = (os.getpid(), fsspec.filesystem(protocol, skip_instance_cache=True))
        return self._connection[1]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _patiently(work: Callable[[], Result]) -> Result:
    for wait in _WAITS:
        try:
            return work()
        except (FileNotFoundError, ImportError, PermissionError):
            raise
        except Exception as error:
            logger.info("fetching again in %g s: %s", wait, error)
            time.sleep(wait)
    return work()
