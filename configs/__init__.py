"""Recipes (YAML) and the one loader that reads them: unknown keys are refused, ``key=value`` overrides apply."""

from boldforge.configs.errors import BoldForgeError, ConfigError
from boldforge.configs.loading import StrictModel, load_config, recipe_names, recipe_path

__all__ = ["BoldForgeError", "ConfigError", "StrictModel", "load_config", "recipe_names", "recipe_path"]
