"""The datasets that a pretraining run reads: one, or a mixture with weights, in folders or at addresses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BeforeValidator, Field, PlainSerializer

from boldforge.configs import ConfigError, StrictModel
from boldforge.data_shards import Atlas, CacheConfig, Manifest, Segments, ShardsPlace, open_dataset

# What `identity` and `atlas_identity` add to a run's recipe.
_RECORDED = ("manifest_hash", "weights", "atlas_hash")


class DatasetConfig(StrictModel):
    """One dataset of a mixture."""

    path: ShardsPlace = Field(description="Folder that `boldforge shard` wrote, or its address.")
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Share of the clips, relative to the other datasets'; None for all: each its share of the clips.",
    )


def _as_list(value: Any) -> Any:
    """Read ``a``, ``[a, b]`` and ``[{path: a, weight: 3}, …]`` alike."""
    several = value if isinstance(value, list | tuple) else [value]
    return [{"path": each} if isinstance(each, str | Path) else each for each in several]


def _as_written(datasets: tuple[DatasetConfig, ...]) -> Any:
    if len(datasets) == 1 and datasets[0].weight is None:
        return datasets[0].path
    return [dataset.model_dump(exclude_none=True) for dataset in datasets]


DatasetsField = Annotated[
    tuple[DatasetConfig, ...], BeforeValidator(_as_list), Field(min_length=1), PlainSerializer(_as_written)
]


def open_datasets(datasets: Sequence[DatasetConfig], cache: CacheConfig) -> list[Manifest]:
    """Open every dataset, in the recipe's order.

    Raises
    ------
    ConfigError
        If one of them is named twice, only some have a weight, or their stored splits differ.
    BoldForgeError
        If one cannot be opened.
    """
    weighted = [dataset.weight is not None for dataset in datasets]
    if any(weighted) and not all(weighted):
        without = datasets[weighted.index(False)].path
        raise ConfigError(f"shards: {without} has no weight and others have one; give all of them one, or none.")
    manifests = [open_dataset(dataset.path, cache) for dataset in datasets]
    seen: dict[str, str] = {}
    for dataset, manifest in zip(datasets, manifests, strict=True):
        if manifest.content_hash in seen:
            raise ConfigError(
                f"shards: {seen[manifest.content_hash]} and {dataset.path} are the same dataset; name it once, with a "
                "larger weight."
            )
        seen[manifest.content_hash] = dataset.path
    planned = [(dataset.path, each.splits) for dataset, each in zip(datasets, manifests, strict=True) if each.splits]
    for path, plan in planned[1:]:
        if plan != planned[0][1]:
            raise ConfigError(
                f"shards: {planned[0][0]} and {path} store different splits, so that one could train on a subject that "
                "the other holds out; store the same plan in both (boldforge.data_shards.store_splits)."
            )
    return manifests


def identity(datasets: Sequence[DatasetConfig], manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return what a run records of its datasets: content hashes, of a mixture in a list, and the weights."""
    if len(manifests) == 1:
        return {"manifest_hash": manifests[0].content_hash}
    hashes = [manifest.content_hash for manifest in manifests]
    return {"manifest_hash": hashes, "weights": [dataset.weight for dataset in datasets]}


def atlas_identity(atlas: Atlas, groups: Mapping[str, Sequence[int]] | None) -> dict[str, Any]:
    """Return what a run records of its atlas: hashes of the volume, the names, and the groups where they are hidden.

    Of their content, not of the files: the same atlas may lie elsewhere, or be packed anew.
    """
    volume = xxhash.xxh3_128(atlas.volume.tobytes())
    volume.update(repr((atlas.volume.shape, atlas.affine.tolist())).encode())
    hashes = {"volume": volume.hexdigest(), "labels": _hash(atlas.labels)}
    return {"atlas_hash": hashes if groups is None else hashes | {"groups": _hash(groups)}}


def _hash(content: Mapping[Any, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(list(content.items())).encode())


def split_record(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a run's ``config.yaml`` into the recipe and what the run recorded besides."""
    recorded = {key: content[key] for key in _RECORDED if key in content}
    return {key: value for key, value in content.items() if key not in _RECORDED}, recorded


def check_lengths(
    frames: int, manifests: Sequence[Manifest], train: Sequence[Segments], held: Sequence[Segments]
) -> None:
    """Refuse clips of so many frames where a dataset has no run, or no stretch on either side, that holds one.

    Raises
    ------
    ConfigError
        Naming both lengths.
    """
    for manifest, training, segments in zip(manifests, train, held, strict=True):
        whole = int(manifest.index["n_frames"].max(initial=0))
        if whole < frames:
            raise ConfigError(
                f"{manifest.place}: the longest run has {whole} frames, a clip needs model.frames = {frames}; lower "
                f"model.frames, or make shards of longer runs or of a shorter TR (now {manifest.recipe.tr:g} s)."
            )
        for side, mend, longest in (
            ("stretch to train on", "lower", _longest(training)),
            ("held-out stretch", "raise", _longest(segments)),
        ):
            if longest < frames:
                raise ConfigError(
                    f"{manifest.place}: the longest {side} has {longest} frames, a clip needs model.frames = {frames}; "
                    f"{mend} holdout.fraction, or lower model.frames."
                )


def _longest(segments: Segments) -> int:
    _, start, stop = segments.table.T
    return int((stop - start).max(initial=0))
