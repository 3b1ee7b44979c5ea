"""Post-train language models in JAX on NVIDIA GPUs, and know what it costs before renting them."""

import importlib
from typing import TYPE_CHECKING

from jaxrl._platform import use_cpu_without_gpu

if TYPE_CHECKING:
    from jaxrl.models.hf import load_pretrained, save_pretrained

use_cpu_without_gpu()

_EXPORTS = {"load_pretrained": "jaxrl.models.hf", "save_pretrained": "jaxrl.models.hf"}
__all__ = ["load_pretrained", "save_pretrained"]


def __getattr__(name: str):
    # Lazy: `python -m jaxrl.bench --help` must not wait for JAX.
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'jaxrl' has no attribute {name!r}")
