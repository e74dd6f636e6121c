"""The pretraining recipe: every key of ``configs/pretrain/*.yaml``, with unit and reason."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from boldforge.configs import StrictModel
from boldforge.data_shards import CacheConfig, Holdout
from boldforge.pretrain.datasets import DatasetsField
from boldforge.pretrain.loss import LossConfig
from boldforge.pretrain.masking import MaskConfig
from boldforge.pretrain.model_config import ModelConfig

# DeepSpeed's own are 5e8 and 1e9, under which a network of a billion parameters is hardly sharded.
BUCKET_ELEMENTS = 50_000_000
"""Gradients or weights that ZeRO sends at a time; stages 2 and 3 hold as many whole."""
LIVE_PARAMETERS = 200_000_000
"""Weights that ZeRO-3 keeps whole while it computes; a layer that is larger is whole too."""

BetaRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictModel):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(5e-4, gt=0, description="Peak learning rate.")
    min_lr_ratio: float = Field(0.05, ge=0, le=1, description="Learning rate at the last step, as a share of the peak.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    betas: tuple[BetaRate, BetaRate] = Field((0.9, 0.95), description="Decay of the two moment estimates.")
    gradient_clipping: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")


class PretrainConfig(StrictModel):
    """One pretraining run."""

    shards: DatasetsField = Field(
        description="Folder that `boldforge shard` wrote, or its address (s3://, gs://, hf://, http://, …); or a list "
        "of those, or of path and weight, for a mixture."
    )
    shard_cache: CacheConfig = Field(default_factory=CacheConfig, description="Where what addresses give is kept.")
    out: Path = Field(description="Run folder; starting again with the same folder goes on from the last checkpoint.")
    holdout: Holdout = Field(default_factory=Holdout, description="What is kept away from training, to measure on.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    mask: MaskConfig = Field(default_factory=MaskConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    steps: int = Field(1000, ge=1, description="Optimiser steps in all.")
    batch_size: int = Field(8, ge=1, description="Clips per optimiser step over all ranks.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Clips per rank and forward pass; smaller needs less memory. None: the rank's whole share.",
    )
    checkpoint_activations: bool = Field(
        False,
        description="Keep only the input of every block and compute the rest again in the backward pass: less memory, "
        "more time, the same bits.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="What ZeRO shards: 1 optimiser, 2 also gradients, 3 also parameters."
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Compute type; weights are updated in fp32 either way."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of initial weights, data order and masks.")
    num_workers: int = Field(0, ge=0, description="Loader processes per rank; any number gives the same batches.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(3, ge=1, description="Checkpoints kept on disk.")
    evaluate_every: int = Field(100, ge=1, description="Steps between measurements on held-out clips.")
    evaluation_clips: int = Field(32, ge=1, description="Held-out clips measured, spread over the runs.")

    @property
    def weights(self) -> list[float | None]:
        """Each dataset's weight in the mixture."""
        return [dataset.weight for dataset in self.shards]

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> "PretrainConfig":
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _changes_need_two_frames(self) -> "PretrainConfig":
        if self.loss.gradient and self.model.frames < 2:
            raise ValueError(
                "loss.gradient compares frames, but model.frames is 1; raise it, or set loss.gradient to 0"
            )
        return self

    @model_validator(mode="after")
    def _hidden_tokens_are_rebuilt_from_their_own_token(self) -> "PretrainConfig":
        if not self.model.decoder:
            raise ValueError("model.decoder is false, but pretraining reconstructs; set it to true")
        anatomy = dict.fromkeys(("region", "pair", "group", "atlas"), "atlas")
        wanted = {"window": "window", **anatomy}.get(self.mask.strategy, "random")
        first = self.model.mask_tokens[0]
        if wanted in self.model.mask_tokens and first != wanted:
            raise ValueError(
                f"mask.strategy is {self.mask.strategy}, but model.mask_tokens begins with {first}; put {wanted} first"
            )
        return self

    def deepspeed(self, world_size: int) -> dict[str, object]:
        """Return DeepSpeed's own configuration for this many ranks."""
        rank_share = self.batch_size // world_size
        return {
            "train_batch_size": self.batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size or rank_share,
            "zero_optimization": {
                "stage": self.zero_stage,
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_bucket_size": BUCKET_ELEMENTS,
                "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
                "stage3_max_live_parameters": LIVE_PARAMETERS,
                "stage3_max_reuse_distance": LIVE_PARAMETERS,
            },
            # Autocast, not DeepSpeed's own bf16: weights stay fp32, so that the scan's step sizes and decay rates keep
            # their precision and the exported weights are those that were trained. No module's gradient is
            # communicated in bf16.
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
            "gradient_clipping": self.optimizer.gradient_clipping,
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": self.optimizer.lr,
                    "betas": list(self.optimizer.betas),
                    "weight_decay": self.optimizer.weight_decay,
                    # Without it DeepSpeed compiles its own CPU Adam, which gives other bits on another CPU.
                    "torch_adam": True,
                },
            },
            "steps_per_print": 1_000_000_000,
        }
