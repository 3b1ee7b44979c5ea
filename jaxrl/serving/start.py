"""From a server's options to its engine and its app."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.models.hf import load_pretrained
from jaxrl.models.hf_config import CheckpointError, read_config
from jaxrl.models.lora import LoraConfig, add_lora
from jaxrl.models.params import nest, specs
from jaxrl.models.peft import CONFIG as ADAPTER
from jaxrl.models.peft import WEIGHTS as ADAPTER_WEIGHTS
from jaxrl.models.peft import load_adapter
from jaxrl.models.transformer import Transformer, merge_trees
from jaxrl.options import ConfigError
from jaxrl.parallel.mesh import make_mesh
from jaxrl.parallel.sharding import param_shardings
from jaxrl.rollout.engine import Engine, EngineLimits
from jaxrl.rollout.memory import holds_whole_layers, servers_limits
from jaxrl.rollout.programs import Programs
from jaxrl.serve_config import ServeConfig
from jaxrl.serving.served import Served
from jaxrl.serving.service import Service
from jaxrl.train.pretrained import find_checkpoint

KEY = "JAXRL_API_KEY"


class Weights:
    """The served model's weights: those it began with, and what folders bring."""

    def __init__(self, config: ServeConfig, folder: Path):
        self.config, self.folder = config, folder
        self.dtype = jnp.dtype(config.engine.dtype)
        model = Transformer(read_config(folder))
        if config.lora_rank:
            add_lora(model, LoraConfig(config.lora_rank, config.lora.alpha, config.lora.targets))
        self.model = model
        self.mesh = make_mesh(jax.devices(), expert=config.mesh.expert)
        self._adapted: Transformer | None = None  # of a server that takes adapters

    def first(self) -> Any:
        """Of the folder the server was started with; adapters that add nothing."""
        loaded = load_pretrained(self.folder, dtype=self.dtype, mesh=self.mesh)
        if not self.config.lora_rank:
            return _values(loaded)
        adapters = nest({p: s.shape for p, s in specs(self.model, nnx.LoRAParam).items()})
        zeros = jax.jit(
            lambda: jax.tree.map(jnp.zeros, adapters, is_leaf=lambda x: isinstance(x, tuple)),
            out_shardings=param_shardings(self.model, self.mesh, nnx.LoRAParam),
        )
        values = merge_trees(_values(loaded), zeros())
        self._adapted = nnx.merge(nnx.graphdef(self.model), values)
        return values

    def load(self, path: str) -> Any:
        """Of a folder: a model's, or where the server has adapters a PEFT folder. Raises
        ConfigError for what is neither, or not whole, or not of this model."""
        try:
            return self._load(Path(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error

    def _load(self, folder: Path) -> Any:
        if (folder / ADAPTER).is_file():
            if self._adapted is None:
                raise ConfigError(
                    f"{folder} is an adapter; start the server with --config.lora_rank=RANK"
                )
            if not (folder / ADAPTER_WEIGHTS).is_file():
                raise ConfigError(f"{folder} has {ADAPTER} and no {ADAPTER_WEIGHTS}")
            self._adapted = load_adapter(self._adapted, folder)
            return _values(self._adapted)
        if self._adapted is not None:
            raise ConfigError(f"{folder} holds no adapter, which this server takes")
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder on the server's host")
        there, here = read_config(folder), self.model.config
        if there.replace(name="") != here.replace(name=""):
            raise CheckpointError(f"{folder} holds another model than the one served")
        return _values(load_pretrained(folder, dtype=self.dtype, mesh=self.mesh))


def _values(model: Transformer) -> Any:
    return nnx.to_pure_dict(nnx.state(model))


@contextlib.contextmanager
def started(config: ServeConfig) -> Iterator[Served]:
    """A server's engine, with weights, running. Raises ConfigError for what it cannot serve."""
    key = config.server.api_key or os.environ.get(KEY, "")
    if not key and not config.server.is_local():
        raise ConfigError(
            f"config.server.host {config.server.host} is reached from other hosts: set {KEY}, or "
            "listen on 127.0.0.1"
        )
    folder = find_checkpoint(config.model)
    weights = Weights(config, folder)
    model, options = weights.model, config.engine
    tokenizer = load_tokenizer(
        config.tokenizer or folder, model.config.vocab_size, config.chat_template
    )
    programs = Programs(
        model,
        weights.mesh,
        dtype=options.dtype,
        attention=options.attention,
        grouped_matmul=options.grouped_matmul,
        whole_layers=holds_whole_layers(options.weights, model, weights.mesh, options.dtype),
    )
    first = programs.own(weights.first())
    engine = Engine(
        programs,
        servers_limits(EngineLimits.of(options, options.max_len), programs, first),
        stop_tokens=tokenizer.stop_ids,
        tokenizer=tokenizer.hf,
    )
    engine.set_weights(first, 0)
    del first  # the engine lets go of it when it gets others
    if options.warm_up:
        engine.warm_up()
    with Service(engine, max_waiting=config.server.max_waiting) as service:
        yield Served(
            service,
            tokenizer,
            config.server.model_name or folder.resolve().name,
            options.max_len,
            dataclasses.replace(config.server, api_key=key),
            weights.load,
        )
