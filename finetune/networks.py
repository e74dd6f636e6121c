"""Which network is trained: a pretrained folder, or one built from nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boldforge.data_shards import Manifest, brain_mask, get_grid, mask_hash
from boldforge.finetune.backbone import Backbone, Pool, load_backbone
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.fmcib_config import FmcibConfig
from boldforge.finetune.resnet_rnn import ResnetRnnBackbone, ResnetRnnConfig

BackboneSpec = ResnetRnnConfig | FmcibConfig | Path


def shard_data(manifest: Manifest, frames: int | None = None) -> dict[str, Any]:
    """Return what a network must know of its shards, and the frames of its clips where they are not its own."""
    recipe = manifest.recipe
    asked = {} if frames is None else {"clip_length": frames}
    return asked | {
        "grid": recipe.grid,
        "tr": float(recipe.tr),
        "normalisation": recipe.normalisation,
        "mask_sha256": manifest.mask_sha256,
    }


def make_backbone(spec: BackboneSpec, pool: Pool, data: Mapping[str, Any], seed: int) -> Backbone:
    """Load a pretrained backbone, or build one.

    Parameters
    ----------
    spec
        A folder, or the configuration of a network.
    pool
        Of a pretrained encoder.
    data
        What `shard_data` gave, or an adapter folder recorded; a pretrained encoder brings its own, see `load_backbone`.
        For FMCIB, what to record beside its own.
    seed
        Decides the first weights of a network without any.

    Raises
    ------
    BoldForgeError
        If the folder does not hold a model, or the brain mask is another one.
    """
    if isinstance(spec, Path):
        return load_backbone(spec, pool, data)
    if isinstance(spec, FmcibConfig):
        from boldforge.finetune.fmcib import load_fmcib  # MONAI takes seconds to import

        backbone = load_fmcib(spec.weights)
        backbone.data = {**backbone.data, **data}
        return backbone
    if data.get("clip_length", spec.clip_length) != spec.clip_length:
        raise FinetuneError(
            f"frames is {data['clip_length']}, but backbone {spec.kind} has a clip_length of its own, "
            f"{spec.clip_length}; leave frames out and set backbone.clip_length."
        )
    mask = brain_mask(get_grid(data["grid"]))
    if mask_hash(mask) != data["mask_sha256"]:
        raise FinetuneError(
            f"the brain mask of grid {data['grid']} is not the one that the shards were made with, because another "
            "nilearn made them; make the shards again with the one installed here."
        )
    return ResnetRnnBackbone(spec, mask, data, seed)


def backbone_data(spec: BackboneSpec) -> Mapping[str, Any] | None:
    """Return what a pretrained encoder says of its input; None for a network that is built from nothing.

    Raises
    ------
    BoldForgeError
        If the folder does not hold a model.
    """
    return load_backbone(spec).data if isinstance(spec, Path) else None
