"""A server of one model: --config.model says which."""

from jaxrl.config import default_config
from jaxrl.serve_config import ServeConfig


def get_config():
    return default_config(ServeConfig)
