"""How a recipe names FMCIB; apart from the network itself, which imports MONAI."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from boldforge.configs import StrictModel


class FmcibConfig(StrictModel):
    """FMCIB's CT-pretrained 3D ResNet-50, for studies of images."""

    kind: Literal["fmcib"] = Field(description="FMCIB's trunk, 3D ResNet-50 of double width.")
    weights: Path = Field(description="Its published file, a dictionary with trunk_state_dict.")
