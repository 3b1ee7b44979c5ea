"""Experiment trackers that are not jaxrl's own: Weights & Biases and MLflow, where installed."""

import contextlib
import importlib
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from jaxrl.options import ConfigError


class Tracker(Protocol):
    """What a run's scalars are sent to."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def start(kind: type, name: str, folder: pathlib.Path, config: Mapping[str, Any]) -> Tracker:
    """A `Wandb` or `Mlflow`. Raises ConfigError, in one line, where it does not start."""
    try:
        return kind(name, folder, config)
    except ConfigError:
        raise
    except Exception as error:  # of many kinds: no login, no server, a store that it refuses
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"{kind.__name__.lower()} does not start: {line}") from error


class Wandb:
    """Scalars and options to the Weights & Biases project `project`.

    A resumed run goes on in the same W&B run, whose id is kept in `FOLDER/wandb_run_id`.
    """

    def __init__(self, project: str, folder: pathlib.Path, config: Mapping[str, Any]):
        wandb = _imported("wandb", project)
        kept = folder / "wandb_run_id"
        known = kept.read_text().strip() if kept.is_file() else None
        self._run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            id=known,
            resume="allow",
        )
        kept.write_text(f"{self._run.id}\n")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """Scalars and options to the MLflow experiment `experiment`, at the tracking URI that MLflow's
    own settings name.

    A resumed run goes on in the same MLflow run, whose id is kept in `FOLDER/mlflow_run_id`.
    """

    def __init__(self, experiment: str, folder: pathlib.Path, config: Mapping[str, Any]):
        mlflow = _imported("mlflow", experiment)
        kept = folder / "mlflow_run_id"
        known = kept.read_text().strip() if kept.is_file() else None
        self._mlflow = mlflow
        mlflow.set_experiment(experiment)
        run = mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        if known is None:
            kept.write_text(f"{run.info.run_id}\n")
            mlflow.log_params(dict(config))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # nothing of the run is lost by it
            self._mlflow.end_run()


def _imported(package: str, value: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{package} is {value!r}, and the package is not installed: pip install {package}, or "
            f"leave config.{package} empty"
        )
    return importlib.import_module(package)
