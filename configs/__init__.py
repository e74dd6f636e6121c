"""Recipes (YAML) and the one loader that reads them: unknown keys are refused, ``key=value`` overrides apply."""

from boldforge.configs.errors import BoldForgeError, ConfigError
from boldforge.configs.loading import StrictModel, load_config, recipe_names, recipe_path
from boldforge.configs.locking import FolderInUseError, check_free, folder_lock
from boldforge.configs.products import check_out
from boldforge.configs.wording import count_of

__all__ = [
    "BoldForgeError",
    "ConfigError",
    "FolderInUseError",
    "StrictModel",
    "check_free",
    "check_out",
    "count_of",
    "folder_lock",
    "load_config",
    "recipe_names",
    "recipe_path",
]
