"""The shape of the network: every key of ``model:`` in a pretraining recipe, with unit and reason."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from boldforge.configs import ConfigError, StrictModel

Edge = Annotated[int, Field(ge=1)]
Reach = Annotated[int, Field(ge=0)]
Window = tuple[Edge, Edge, Edge, Edge]
MaskToken = Literal["random", "window", "atlas"]


class ModelConfig(StrictModel):
    """Shape of the network; see the fields for units and reasons."""

    patch_mm: float = Field(12.0, gt=0, description="Edge of a patch in mm; 12 mm is NeuroSTORM's 6 voxels at 2 mm.")
    patch_points: int | None = Field(
        None,
        ge=1,
        description="Points along a patch's edge where the weights live that read and write its voxels; voxels of "
        "another size are averaged or repeated onto them. None: the voxels of the grid of training.",
    )
    frames: int = Field(
        20,
        ge=1,
        description="T, frames per clip; one token per patch and frame. With time: seconds, clips may have another.",
    )
    position: Literal["learned", "mm"] = Field(
        "learned",
        description="Position embedding. learned: a table with a row per token of this grid; mm: a function of the "
        "token's centre in MNI millimetres, which another field of view or voxel size can use as it is.",
    )
    time: Literal["learned", "seconds"] = Field(
        "learned",
        description="Time embedding. learned: a table with a row per frame; seconds: a function of the time since the "
        "clip's first frame and of the TR, for clips of any length and TR.",
    )
    merge_time: tuple[bool, ...] = Field(
        (),
        description="For each merging (one fewer than depths) whether it also joins two frames; empty: none does.",
    )
    embed_dim: int = Field(
        32, ge=2, description="C of the first stage; doubles at every merging. A multiple of 32 suits the kernels."
    )
    depths: tuple[Edge, ...] = Field((2, 2, 6, 2), description="Blocks per encoder stage.")
    decoder_depths: tuple[Edge, ...] = Field(
        (6, 2, 2), description="Blocks per decoder stage, coarse to fine; one fewer than the encoder's."
    )
    window: Window = Field((4, 4, 4, 4), description="Tokens per window along x, y, z, t; clipped to the grid.")
    first_window: Window | None = Field(None, description="Window of the first encoder stage, if another.")
    last_window: Window | None = Field(None, description="Window of the last encoder stage, if another.")
    last_shifted: bool = Field(
        True, description="Whether odd blocks of the last encoder stage shift their windows; NeuroSTORM's do not."
    )
    scan_mode: Literal["region", "wrap"] = Field(
        "region",
        description="At a shifted window's seam: restart the scan (region), or run on as NeuroSTORM does (wrap).",
    )
    bidirectional: bool = Field(
        False,
        description="Scan every window backwards too, with weights of its own between shared projections; the sum goes "
        "on.",
    )
    d_state: int = Field(16, ge=1, le=64, description="N, states per inner channel.")
    d_conv: int = Field(4, ge=1, le=8, description="Width of the causal convolution, in tokens.")
    expand: int = Field(2, ge=1, description="Inner channels per channel.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden units of the MLP per channel.")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Largest stochastic-depth rate; grows linearly with depth.")
    redundancy_dropout: bool = Field(
        False, description="Drop redundant tokens of the encoder while training (NeuroSTORM's STRD)."
    )
    redundancy_reach: tuple[Reach, Reach] = Field(
        (2, 2), description="How far STRD looks for a token's like: tokens in space, and frames in time."
    )
    prompts: int = Field(
        0, ge=0, description="Learned tokens per encoder block that every window begins with (NeuroSTORM's TPT)."
    )
    mask_tokens: tuple[MaskToken, ...] = Field(
        ("random",),
        description="Learned mask tokens; the first replaces what is hidden. random, atlas: one vector; window: one "
        "for each place in a window. NeuroSTORM has all three.",
    )
    encoder_sees: Literal["all", "visible"] = Field(
        "all",
        description="Tokens that the encoder computes while some are hidden. all: every one, the mask token in place "
        "of hidden ones; visible: only those not hidden, and the decoder begins with the mask token elsewhere (MAE).",
    )
    decoder: bool = Field(True, description="False: an encoder alone, which embeds but cannot reconstruct.")
    backend: str = Field("auto", description="Scan backend; auto takes the fastest that runs here.")

    @model_validator(mode="after")
    def _decoder_mirrors_encoder(self) -> "ModelConfig":
        if len(self.decoder_depths) != len(self.depths) - 1:
            raise ValueError(
                f"decoder_depths has {len(self.decoder_depths)} entries, expected one fewer than depths: "
                f"{len(self.depths) - 1}"
            )
        return self

    @model_validator(mode="after")
    def _decoder_knows_what_is_hidden(self) -> "ModelConfig":
        if self.decoder and not self.mask_tokens:
            raise ValueError("mask_tokens is empty, but a decoder needs one; list random, or set decoder: false")
        if len(set(self.mask_tokens)) != len(self.mask_tokens):
            raise ValueError("mask_tokens lists one of them twice; list each once")
        if self.encoder_sees == "visible" and "window" in self.mask_tokens:
            raise ValueError(
                "encoder_sees is visible, so mask tokens first stand in the last stage, but mask_tokens lists window, "
                "which has one for each place in a window of the first; list random instead"
            )
        return self

    @model_validator(mode="after")
    def _frames_can_be_joined(self) -> "ModelConfig":
        if self.merge_time and len(self.merge_time) != self.n_stages - 1:
            raise ValueError(
                f"merge_time has {len(self.merge_time)} entries, expected one per merging, one fewer than depths: "
                f"{self.n_stages - 1}"
            )
        if self.frames < self.fewest_frames:
            raise ValueError(
                f"merge_time halves time {sum(self.merge_time)} times, which needs frames of at least "
                f"{self.fewest_frames}, found {self.frames}"
            )
        return self

    @property
    def frames_joined(self) -> tuple[int, ...]:
        """Frames that each merging joins, 1 or 2."""
        return tuple(1 + joins for joins in self.merge_time) or (1,) * (self.n_stages - 1)

    @property
    def fewest_frames(self) -> int:
        """Frames that a clip must have so that every merging of time has two to join."""
        return 2 ** sum(self.merge_time)

    @property
    def n_stages(self) -> int:
        """Number of encoder stages."""
        return len(self.depths)

    def patch_size(self, voxel_mm: float) -> tuple[int, int, int]:
        """Voxels per patch along x, y, z for voxels of this edge in mm.

        Raises
        ------
        ConfigError
            If a patch is not a whole number of voxels.
        """
        edge = round(self.patch_mm / voxel_mm)
        if edge < 1 or abs(edge * voxel_mm - self.patch_mm) > 1e-3 * voxel_mm:
            raise ConfigError(
                f"model.patch_mm is {self.patch_mm:g}, no multiple of the grid's voxels of {voxel_mm:g} mm; use "
                f"{max(1, edge) * voxel_mm:g}, or shard on another grid."
            )
        return edge, edge, edge
