"""The launch files: they parse, agree with themselves, and start what jaxrl understands."""

import os
import pathlib
import re
import subprocess

import yaml

from jaxrl import bench, cli
from jaxrl.config import BenchConfig
from jaxrl.parallel.distributed import Processes, from_environment
from jaxrl.rl_config import RlConfig
from jaxrl.serve_config import ServeConfig

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


def stub(folder: pathlib.Path, name: str, script: str) -> None:
    """A program that a launch file calls."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


SAYS = 'printf "%s|" "$CUDA_VISIBLE_DEVICES" "$@" >> "$CALLS"; echo >> "$CALLS"'


SERVES = 'echo $$ > "$CALLS.$$"; exec sleep 600'


def after(count: int) -> str:
    """What a trainer does until so many servers run."""
    return f'until [ "$(ls "$CALLS".* 2>&- | wc -l)" = {count} ]; do sleep 0.02; done'


def ended(tmp_path, count: int) -> None:
    """So many servers were started, and none is left; waits for the last ones."""
    pids = [file.read_text().strip() for file in tmp_path.glob("calls.*")]
    assert len(pids) == count
    for pid in pids:
        subprocess.run(["tail", f"--pid={pid}", "-f", os.devnull], check=True, timeout=20)


def launched(script: str, tmp_path, *arguments: str, **env: str):
    """(exit code, stderr, what the stubs were called with)."""
    calls = tmp_path / "calls"
    calls.touch()
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments],
        env=os.environ | {"PATH": path, "CALLS": str(calls), "CUDA_VISIBLE_DEVICES": ""} | env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    return done.returncode, done.stderr, sorted(calls.read_text().splitlines())


def test_one_node_serves_and_trains(tmp_path):
    """Servers go on until the trainer has ended, with whose exit code all ends."""
    stub(
        tmp_path, "python", f'{SAYS}; [[ "$2" = jaxrl.rl ]] && {{ {after(2)}; exit 3; }}; {SERVES}'
    )
    code, _, calls = launched(
        "rl_node.sh", tmp_path, "--config=F.py", MODEL="M", SERVE_GPUS="0,2", TRAIN_GPUS="4,5"
    )
    assert code == 3
    serve = "-m|jaxrl.serve|--config=configs/serve.py|--config.model=M|--config.server.port="
    room = "--config.engine.max_len=8192|"
    assert calls[:2] == [f"0|{serve}8001|{room}", f"2|{serve}8002|{room}"]
    urls = "http://127.0.0.1:8001,http://127.0.0.1:8002"
    assert calls[2] == (
        f"4,5|-m|jaxrl.rl|--config=F.py|--config.model=M|--config.rollout.servers={urls}|"
        "--config.rollout.server_start_s=1800|"
    )
    ended(tmp_path, 2)
    code, said, _ = launched("rl_node.sh", tmp_path, "--config=F.py")
    assert code == 2 and said.startswith("usage: MODEL=")


def test_slurm_nodes_serve_and_train(tmp_path):
    stub(
        tmp_path,
        "srun",
        f'{SAYS}; [[ "$*" != *jaxrl.serve* ]] && {{ {after(1)}; exit; }}; {SERVES}',
    )
    stub(tmp_path, "scontrol", "printf 'gpu1\\ngpu2\\ngpu3\\n'")
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "gpu[1-3]", "SLURM_CPUS_ON_NODE": "96"}
    flags = ("--config=F.py",)
    code, _, calls = launched("rl_slurm.sbatch", tmp_path, *flags, MODEL="M", **job)
    each = "|--ntasks-per-node=1|--cpus-per-task=96"
    assert code == 0 and len(calls) == 2
    assert calls[0].startswith(
        f"{each}|--nodes=1|--ntasks=1|--nodelist=gpu1|python|-m|jaxrl.serve|"
    )
    assert "--config.server.port=8013|--config.engine.max_len=8192|" in calls[0]
    trains = f"{each}|--nodes=2|--ntasks=2|--nodelist=gpu2,gpu3|python|-m|jaxrl.rl|"
    assert calls[1].startswith(f"{trains}--config=F.py|")
    assert "--config.rollout.servers=http://gpu1:8013|" in calls[1]
    ended(tmp_path, 1)
    nobody = job | {"SERVE_NODES": "3"}
    code, said, _ = launched("rl_slurm.sbatch", tmp_path, *flags, MODEL="M", **nobody)
    assert code == 2 and "none is left to train" in said


def test_the_examples_run_fits_what_its_servers_take(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = cli.parse(RlConfig, ["rl", "--config=configs/rl_qwen3_4b.py"], "")
    for script in ("rl_node.sh", "rl_slurm.sbatch"):
        text = (ROOT / "launch" / script).read_text()
        (most,) = re.findall(r"max_len=\"\$\{MAX_LEN:-(\d+)\}\"", text)
        assert "configs/rl_qwen3_4b.py" in text and int(most) >= config.seq_len


def test_kubernetes_servers_and_their_trainer(monkeypatch):
    service, servers, job = yaml.safe_load_all((ROOT / "launch/rl_kubernetes.yaml").read_text())
    name, spec = servers["metadata"]["name"], servers["spec"]
    assert spec["serviceName"] == service["metadata"]["name"] == name
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == spec["selector"]["matchLabels"] == labels
    (server,) = spec["template"]["spec"]["containers"]
    (trainer,) = job["spec"]["template"]["spec"]["containers"]
    assert server["env"] == trainer["env"]
    monkeypatch.chdir(ROOT)
    serving = cli.parse(ServeConfig, ["serve", *server["args"]], "")
    training = cli.parse(RlConfig, ["rl", *trainer["args"]], "")
    port = serving.server.port
    names = [f"http://{name}-{i}.{name}:{port}" for i in range(spec["replicas"])]
    assert list(training.rollout.servers) == names
    assert server["readinessProbe"]["httpGet"]["port"] == port
    assert serving.model == training.model and serving.engine.max_len >= training.seq_len
    mounts = {mount["mountPath"] for mount in trainer["volumeMounts"]}
    assert pathlib.PurePath(training.output).parts[:2] == ("/", "results") and "/results" in mounts
