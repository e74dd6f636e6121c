"""What is done to a run before it is stored; the model's config carries the same recipe, so inference repeats it."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from boldforge.configs import BoldForgeError, StrictModel
from boldforge.data_shards.grid import get_grid

NormalisationName = Literal["residual-z", "voxel-z", "global-z", "min-max", "percent-signal-change", "neurostorm"]
TimeFilterName = Literal["gaussian", "sinc"]

# Left out of a dump while they stand at their defaults: recipes, and the hashes over them, from before they existed
# stay what they were.
_OPTIONS = frozenset(
    {"antialias", "confounds", "detrend", "high_pass", "low_pass", "scrub_fd", "scrub_keep", "time_filter"}
)


class DataRecipe(StrictModel):
    """Grid, repetition time, normalisation and stored precision, and what is cleaned away before."""

    grid: str = "mni2mm"
    """Name of the grid; mni4mm is eight times smaller and enough for data acquired at 3 to 4 mm."""
    tr: float = Field(default=2.0, gt=0.02, le=100.0)
    """Seconds between stored frames; every run is resampled to it, because a clip's length must mean one duration."""
    normalisation: NormalisationName = "residual-z"
    """residual-z keeps differences in amplitude between regions and people; see `normalise`."""
    dtype: Literal["int16", "int8"] = "int16"
    """Stored integers: int8 halves the size and leaves about 46 dB of temporal SNR, int16 about 90."""
    antialias: bool = False
    """Smooth finer runs before they are sampled on the grid, so that detail below its voxels does not fold."""
    confounds: tuple[str, ...] = ()
    """Sets (motion-6, motion-24, wm-csf, global-signal, cosine) or columns of fMRIPrep's confounds file, with * and ?,
    that are regressed out of every voxel as `nilearn.signal.clean` does."""
    detrend: bool = False
    """Remove a straight line from every voxel and confound; the voxel's mean stays."""
    high_pass: float | None = Field(default=None, gt=0)
    """Hz; slower drifts are filtered out (Butterworth, as in nilearn); the voxel's mean stays."""
    low_pass: float | None = Field(default=None, gt=0)
    """Hz; faster fluctuations are filtered out."""
    scrub_fd: float | None = Field(default=None, gt=0)
    """mm; frames whose framewise displacement is larger are removed, and no clip reaches over the gap."""
    scrub_keep: int = Field(default=5, ge=2)
    """Frames; shorter stretches between removed frames are removed too."""

    def as_options(self) -> str:
        """Return the recipe as options of ``boldforge shard``, less what the command has anyway and the precision."""
        words = [f"--grid {self.grid} --tr {self.tr:g} --normalisation {self.normalisation}"]
        for name, value in self.model_dump(mode="json").items():
            if name in _OPTIONS:
                option = f"--{name.replace('_', '-')}"
                words += [f"{option} {item}" for item in value] if name == "confounds" else []
                words += [option if value is True else f"{option} {value}"] if name != "confounds" else []
        return " ".join(words)

    time_filter: TimeFilterName = "gaussian"
    """How a run is brought to another TR: gaussian blurs a little in time and cuts softly, sinc keeps the band; see
    `boldforge.data_shards.resample.to_tr`."""

    @property
    def cleans(self) -> bool:
        """Whether values change before they are resampled in time."""
        return bool(self.confounds or self.detrend or self.high_pass or self.low_pass)

    @field_validator("grid")
    @classmethod
    def _grid_exists(cls, name: str) -> str:
        try:
            return get_grid(name).name
        except BoldForgeError as error:
            raise ValueError(str(error).rstrip(".")) from None

    @model_validator(mode="after")
    def _band_is_one(self) -> "DataRecipe":
        if self.high_pass and self.low_pass and self.high_pass >= self.low_pass:
            raise ValueError(f"high_pass ({self.high_pass:g} Hz) must be below low_pass ({self.low_pass:g} Hz)")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in handler(self).items()
            if name not in _OPTIONS or getattr(self, name) != fields[name].default
        }
