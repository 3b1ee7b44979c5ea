"""A model that is served: its running engine, and how it takes new weights."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from jaxrl.data.tokenizer import Tokenizer
from jaxrl.serve_config import ServerConfig
from jaxrl.serving.service import Service


@dataclasses.dataclass(frozen=True)
class Served:
    """What those who ask work with. load: the weights in a folder, on the devices, where they may
    be replaced."""

    service: Service
    tokenizer: Tokenizer
    name: str
    max_len: int
    options: ServerConfig
    load: Callable[[str], Any]
    _updating: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    async def update(self, folder: str, version: int | None = None) -> int:
        """Draw with the weights in this folder from now on; returns their version, None being the
        next. Raises ConfigError for a folder that holds none of this model."""
        engine = self.service.engine
        async with self._updating:  # one at a time: each holds a copy of the weights
            weights = await asyncio.to_thread(self.load, folder)
            version = engine.version + 1 if version is None else version
            await self.service.run(lambda: engine.set_weights(weights, version))
        return version
