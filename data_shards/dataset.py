"""Open a dataset wherever it lies, and the keys of a recipe that say where."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from boldforge.configs import StrictModel
from boldforge.data_shards.manifest import Manifest, load_manifest
from boldforge.data_shards.remote import CACHE_BYTES, open_remote, why_refused

_GIB = 2**30


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _without_secrets(place: str) -> str:
    if why := why_refused(place):
        raise ValueError(why)
    return place


# Not a Path, which would turn s3://bucket into s3:/bucket.
ShardsPlace = Annotated[str, BeforeValidator(_as_text), Field(min_length=1), AfterValidator(_without_secrets)]


class CacheConfig(StrictModel):
    """Where what was fetched from an address is kept; not used for folders."""

    folder: Path | None = Field(None, description="None: $BOLDFORGE_CACHE, or ~/.cache/boldforge.")
    gib: float = Field(CACHE_BYTES / _GIB, gt=0, description="GiB of blocks at most, the least recently used go first.")


def open_dataset(place: str | Path, cache: CacheConfig | None = None) -> Manifest:
    """Open the dataset in a folder, or at an address such as ``s3://bucket/shards``.

    Raises
    ------
    ShardError
        If there is no dataset.
    RemoteError
        If an address cannot be reached and the cache does not hold its manifest.
    CacheError
        If the cache cannot be used.
    """
    place = os.fspath(place)
    if "://" not in place:
        return load_manifest(place)
    cache = cache or CacheConfig()
    return open_remote(place, cache.folder, int(cache.gib * _GIB))
