"""The configuration: its keys, how files and command line fill them, and the errors of the user's."""

from utils.config.errors import ConfigError, UserError
from utils.config.keys import Config
from utils.config.loading import ROOT, default_config, flatten, key_help, read_config, read_yaml, to_dict

__all__ = [
    "ROOT",
    "Config",
    "ConfigError",
    "UserError",
    "default_config",
    "flatten",
    "key_help",
    "read_config",
    "read_yaml",
    "to_dict",
]
