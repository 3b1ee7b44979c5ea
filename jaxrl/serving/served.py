"""A model that is served: its running engine, and how it takes new weights."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrl.data.tokenizer import Tokenizer
from jaxrl.options import ConfigError
from jaxrl.serve_config import ServerConfig
from jaxrl.serving.service import Service

WHOLE_S = 60.0  # for a shared disk to show what another host has written


class NotWhole(ConfigError):
    """A folder of weights that lacks the file which says that all of it is there."""


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

    async def update(
        self, folder: str, version: int | None = None, marker: str | None = None
    ) -> int:
        """Draw with the weights in this folder from now on; returns their version, None being the
        next. marker: a file in it that is there when all others are, and is waited for. Raises
        NotWhole where it does not come, ConfigError for a folder that holds none of this model."""
        engine = self.service.engine
        async with self._updating:  # one at a time: each holds a copy of the weights
            if marker is not None:
                await _come(Path(folder) / marker)
            weights = await asyncio.to_thread(self.load, folder)
            version = engine.version + 1 if version is None else version
            await self.service.run(lambda: engine.set_weights(weights, version))
        return version


async def _come(file: Path) -> None:
    deadline = time.monotonic() + WHOLE_S
    while not await asyncio.to_thread(_is_there, file):  # a shared disk may take its time
        if time.monotonic() >= deadline:
            raise NotWhole(
                f"{file.parent} has no {file.name}: it is not whole, or not all of it is seen on "
                "the server's host"
            )
        await asyncio.sleep(0.05)


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
