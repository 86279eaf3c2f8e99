"""The configuration: its keys, how files and command line fill them, and the errors of the user's."""

from utils.config.errors import ConfigError, UserError, out_of_memory, reason
from utils.config.keys import Config
from utils.config.loading import ROOT, all_keys, find_path, flatten, key_help, load_config, read_yaml, to_dict, to_yaml
