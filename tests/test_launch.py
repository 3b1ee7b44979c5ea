"""The launch files: they parse, agree with themselves, and start what jaxrl understands."""

import os
import pathlib
import subprocess

import yaml

from jaxrl import bench, cli
from jaxrl.config import BenchConfig
from jaxrl.parallel.distributed import Processes, from_environment

ROOT = pathlib.Path(__file__).parents[1]
SBATCH = ROOT / "launch/slurm.sbatch"


def test_kubernetes_pods_find_each_other(monkeypatch):
    service, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]
    env = {e["name"]: e.get("value", "1") for e in container["env"]}  # as the second pod
    address = f"{name}-0.{pod['subdomain']}:61440"
    assert from_environment(env) == Processes(address, spec["completions"], 1)
    assert spec["completions"] == spec["parallelism"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    volumes = {v["name"] for v in pod["volumes"]}
    assert volumes == {m["name"] for m in container["volumeMounts"]}
    monkeypatch.chdir(ROOT)
    config = cli.parse(BenchConfig, ["bench", *container["args"]], "")
    assert [row.num_gpus for row in bench.table_rows(config)] == [gpus * spec["completions"]]


def test_sbatch_starts_its_arguments_on_every_node(tmp_path):
    subprocess.run(["bash", "-n", SBATCH], check=True)
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_ON_NODE": "96"}
    command = ["python", "-m", "jaxrl.bench", "--config.table=rl full 128 none xla 16xH100"]
    said = subprocess.run(
        ["bash", SBATCH, *command], env=env, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines() == ["--ntasks-per-node=1", "--cpus-per-task=96", *command]
    nothing = subprocess.run(["bash", SBATCH], env=env, capture_output=True, text=True)
    assert nothing.returncode == 2 and nothing.stderr.startswith("usage: sbatch ")


def test_the_readme_shows_a_row_for_two_nodes():
    text = (ROOT / "README.md").read_text()
    assert "sbatch --nodes=2 launch/slurm.sbatch python -m jaxrl.bench" in text
    assert "#SBATCH --ntasks-per-node=1" in SBATCH.read_text()
