"""Where a run begins: at its own newest checkpoint, at a given one, or at another run's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxrl.options import ConfigError, flat, show_value
from jaxrl.run_config import RunConfig
from jaxrl.train.checkpoint import Checkpoints, Restored
from jaxrl.train.pretrained import kept
from jaxrl.train.state import StateLayout

# What a resumed run may change: where and how fast it runs, how long, what it shows. All other
# options decide what is computed.
FREE = (
    "output",
    "max_steps",
    "epochs",
    "rows_per_device",
    "mesh",
    "share_prompts",
    "train.ac",
    "train.attention",
    "train.grouped_matmul",
    "train.head_chunk",
    "train.mlp_chunk",
    "train.experts_chunk",
    "train.offload_optimizer",
    "max_bad_steps",
    "eval_every",
    "eval_batches",
    "checkpoint",
    "log_every",
    "tensorboard",
    "wandb",
    "mlflow",
    "profile",
    "dry_run",
    "gpu",
    "data.bad_samples",
    "data.workers",
    "data.validation",
    "data.validation_split",
    "env.workers",
    "env.timeout_s",
    "env.make_timeout_s",
    "eval",
    "rollout.slots",
    "rollout.cache_tokens",
    "rollout.weights",
    "rollout.page",
    "rollout.decode_steps",
    "rollout.prefill_tokens",
    "rollout.servers",
    "rollout.server_kind",
    "rollout.server_timeout_s",
    "rollout.server_start_s",
    "rollout.ray_workers",
    "rollout.ray_address",
    "rollout.ray_gpus",
)
# What decides the order of the data.
DATA = (
    "data",
    "batch_size",
    "seed",
    "tokenizer",
    "env",
    "algorithm",
    "curriculum",
    "chat_template",
)


class Stream(Protocol):
    """Data with a place in it."""

    def check(self, state: Mapping[str, Any]) -> None: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...


def resume(
    config: RunConfig,
    checkpoints: Checkpoints,
    layout: StateLayout,
    stream: Stream,
    say: Callable[[str], None],
) -> Restored | None:
    """The checkpoint that the run goes on from, with `pretrained.kept` of a state; None for a new
    run. `stream` is moved to its place.

    `say` is told where it begins, and of checkpoints that were corrupted. Raises ConfigError where
    options or data are not those that the checkpoint was written with.
    """
    wish, steps = config.checkpoint.resume, checkpoints.steps()
    if wish == "none" and steps:
        raise ConfigError(
            f"config.checkpoint.resume is none, and {config.output} holds checkpoints of steps "
            f"{', '.join(map(str, steps))}; name another config.output, or resume with auto"
        )
    if steps or wish not in ("auto", "none"):
        step = None if wish == "auto" else int(wish)
        # First: another rank or optimizer is better told by its option than by its arrays.
        _same_options(config, checkpoints.extra(step)[1])
        restored = checkpoints.restore(kept(layout, layout.abstract()), step)
        if restored is not None:
            _tell(restored, config.output, say)
            stream.set_state(restored.extra["data"])
            return restored
    return fork(config, layout, stream, say) if config.checkpoint.fork else None


def fork(
    config: RunConfig,
    layout: StateLayout,
    stream: Stream,
    say: Callable[[str], None],
) -> Restored:
    """The state of another run. The data goes on where that run was, if it is the same data in the
    same order, else from its beginning."""
    folder, at, step = config.checkpoint.fork.rpartition("@")
    if not at:
        folder, step = config.checkpoint.fork, ""
    elif not step.isdigit():
        raise ConfigError(f"config.checkpoint.fork names step {step!r}; write FOLDER@STEP")
    with Checkpoints(f"{folder}/checkpoints", read_only=True) as other:
        restored = other.restore(kept(layout, layout.abstract()), int(step) if step else None)
    if restored is None:
        raise ConfigError(f"config.checkpoint.fork: {folder} holds no checkpoint")
    _tell(restored, folder, say)
    changed = _changed(
        config, restored.extra, lambda key: not _within(key, DATA) or _within(key, FREE)
    )
    same = not changed
    if same:
        try:
            stream.check(restored.extra["data"])
        except ConfigError:
            same = False
    if same:
        stream.set_state(restored.extra["data"])
    else:
        say("other data than the forked run's, or another order: it begins anew")
    extra = {key: value for key, value in restored.extra.items() if key != "counts"}
    return dataclasses.replace(restored, extra=extra)


def _tell(restored: Restored, folder: str, say: Callable[[str], None]) -> None:
    for step, reason in restored.skipped:
        say(f"checkpoint of step {step} cannot be used: {reason}")
    say(f"going on from step {restored.step} of {folder}")


def _same_options(config: RunConfig, extra: Mapping[str, Any]) -> None:
    for key, (now, then) in _changed(config, extra, lambda key: _within(key, FREE)).items():
        raise ConfigError(
            f"config.{key} is {show_value(now)!r}, and the run in {config.output} has "
            f"{show_value(then)!r}; put it back, or fork the run: "
            f"--config.checkpoint.fork={config.output} --config.output=ANOTHER"
        )


def _changed(
    config: RunConfig, extra: Mapping[str, Any], left_out: Callable[[str], bool]
) -> Mapping[str, tuple[Any, Any]]:
    """(now, then) of the options that differ from the checkpoint's, by dotted key."""
    now, then = flat(dataclasses.asdict(config)), flat(extra["config"])
    return {
        key: (value, then[key])
        for key, value in now.items()
        # An option that the checkpoint does not know is younger than it is.
        if key in then and not left_out(key) and _plain(value) != _plain(then[key])
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
