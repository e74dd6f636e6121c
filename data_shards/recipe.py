"""What is done to a run before it is stored; the model's config carries the same recipe, so inference repeats it."""

from typing import Literal

from pydantic import Field, field_validator

from boldforge.configs import BoldForgeError, StrictModel
from boldforge.data_shards.grid import get_grid

NormalisationName = Literal["residual-z", "voxel-z", "global-z"]


class DataRecipe(StrictModel):
    """Grid, repetition time, normalisation and stored precision."""

    grid: str = "mni2mm"
    """Name of the grid; mni4mm is eight times smaller and enough for data acquired at 3 to 4 mm."""
    tr: float = Field(default=2.0, gt=0.02, le=100.0)
    """Seconds between stored frames; every run is resampled to it, because a clip's length must mean one duration."""
    normalisation: NormalisationName = "residual-z"
    """residual-z keeps differences in amplitude between regions and people; see `normalise`."""
    dtype: Literal["int16", "int8"] = "int16"
    """Stored integers: int8 halves the size and leaves about 46 dB of temporal SNR, int16 about 90."""

    @field_validator("grid")
    @classmethod
    def _grid_exists(cls, name: str) -> str:
        try:
            return get_grid(name).name
        except BoldForgeError as error:
            raise ValueError(str(error).rstrip(".")) from None
