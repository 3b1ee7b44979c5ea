"""Importing jaxrl on a host without a GPU: quiet, on the CPU, unless the user chose."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from jaxrl import _platform


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """`code` in a fresh interpreter that knows nothing of this one's JAX settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, timeout=120
    )


needs_no_gpu = pytest.mark.skipif(_platform.has_nvidia_gpu(), reason="this host has a GPU")


@needs_no_gpu
@pytest.mark.parametrize("imports", ["jaxrl, jax", "jax, jaxrl"])
def test_quiet_on_the_cpu(imports):
    done = run(f"import {imports}; print(jax.devices()[0].platform)")
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def test_importing_jaxrl_does_not_import_jax():
    assert run("import jaxrl, sys; print('jax' in sys.modules)").stdout == "False\n"


@pytest.fixture
def host(monkeypatch):
    """A host without GPU whose user has set nothing; JAX's own setting is put back after."""
    before = jax.config.jax_platforms
    monkeypatch.setattr(_platform, "has_nvidia_gpu", lambda: False)
    for name in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        monkeypatch.setenv(name, "")  # remembers what was there, if only that nothing was
        monkeypatch.delenv(name)
    jax.config.update("jax_platforms", None)
    yield monkeypatch
    jax.config.update("jax_platforms", before)


def test_without_gpu_the_cpu_is_chosen(host):
    _platform.use_cpu_without_gpu()
    assert os.environ["JAX_PLATFORMS"] == jax.config.jax_platforms == "cpu"
    assert os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"


@pytest.mark.parametrize("platforms", ["cuda", "cpu", ""])
def test_a_users_choice_is_left_alone(host, platforms):
    host.setenv("JAX_PLATFORMS", platforms)
    host.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "0")
    _platform.use_cpu_without_gpu()
    assert os.environ["JAX_PLATFORMS"] == platforms
    assert os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "0"
    assert jax.config.jax_platforms is None


def test_with_a_gpu_nothing_is_changed(host):
    host.setattr(_platform, "has_nvidia_gpu", lambda: True)
    _platform.use_cpu_without_gpu()
    assert "JAX_PLATFORMS" not in os.environ and jax.config.jax_platforms is None
    assert "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ


def test_what_counts_as_a_gpu(monkeypatch, tmp_path):
    root = types.SimpleNamespace(Path=lambda path: pathlib.Path(f"{tmp_path}{path}"))
    monkeypatch.setattr(_platform, "pathlib", root)
    assert not _platform.has_nvidia_gpu()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not _platform.has_nvidia_gpu()
    (tmp_path / "dev/nvidia0").touch()
    assert _platform.has_nvidia_gpu()
    (tmp_path / "dev/nvidia0").unlink()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    assert _platform.has_nvidia_gpu()


@pytest.mark.parametrize(
    ("user", "found"),
    [
        ({}, {"XLA_CLIENT_MEM_FRACTION": "0.92"}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {}),  # JAX refuses both
        ({"XLA_CLIENT_MEM_FRACTION": ".9", "JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "cuda,cpu"}),
        ({"XLA_CLIENT_MEM_FRACTION": ".9", "JAX_PLATFORMS": "cpu"}, {}),
    ],
)
def test_a_process_takes_its_gpus_whole(monkeypatch, user, found):
    for name in (*_platform.FRACTIONS, "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    assert _platform.whole_gpus() == found
