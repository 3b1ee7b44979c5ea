"""A whole GRPO step side by side: `jaxrl.rl` against TRL's GRPOTrainer, both on the CPU.

    uv run python bench/peers/grpo.py --peer-python TORCH_PYTHON

Whole programs: the same checkpoint (SmolLM2-135M-Instruct), the same tasks and rewards (texts
written backwards), groups of the same size, fp32, the same optimizer; a step draws the rollouts,
scores them and trains on them. The checkpoint's eos token is replaced by one that is not drawn, so
that every completion has `--tokens` tokens on both sides. They take turns, each a process of its
own; the first steps of each process are left out. `--peer-rows` may be repeated: rows of TRL's
micro-batches, 0 for all; the fastest counts. Prints a table and appends one JSON object to
`results.jsonl` beside this file.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile

from protocol import host, run_process

from jaxrl.envs.reverse_text import ReverseText
from jaxrl.models import smollm2
from jaxrl.perf import provenance

HERE = pathlib.Path(__file__).parent
NEVER = "<jupyter_script>"  # a token that the model does not draw
CONFIG = """
from jaxrl.config import default_config
from jaxrl.rl_config import RlConfig


def get_config():
    config = default_config(RlConfig)
    config.env.name = "reverse_text"
    config.env.options = '{"tags": false}'
    config.algorithm.keep_flat = True
    config.train.compute_dtype = "float32"
    config.train.ac = "none"
    config.rows_per_device = 2
    config.rollout.decode_steps = 16
    config.tensorboard = False
    config.checkpoint.every = 0
    return config
"""


def main():
    args = arguments()
    load = os.getloadavg()
    sides = ["ours", *(f"peer rows={rows}" for rows in args.peer_rows or [0, 8])]
    turns = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        model = smollm2.convert(folder / "model")
        never_end(model)
        for turn in range(args.turns):
            for number, side in enumerate(sides[::-1] if turn % 2 else sides):
                at = folder / f"{turn}-{number}"
                steps = ours(args, at, model) if side == "ours" else peer(args, at, model, side)
                turns[side].append(steps)
                print(side, [round(s["seconds"], 2) for s in steps], flush=True)
    result = compare(args, turns) | {"load_average_at_start": load}
    with args.output.open("a") as file:
        file.write(json.dumps(result) + "\n")
    show(result)


def arguments():
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--peer-python", required=True, help="python of the torch environment (README.md)")
    add("--peer-rows", action="append", type=int, help="rows of the peer's micro-batches, 0: all")
    add("--turns", type=int, default=2, help="processes of each side")
    add("--steps", type=int, default=5, help="steps of each process")
    add("--left-out", type=int, default=2, help="first steps of each process that do not count")
    add("--tasks-per-step", type=int, default=4)
    add("--group-size", type=int, default=8)
    add("--tokens", type=int, default=64, help="of a completion")
    add("--seq-len", type=int, default=640, help="of our rows; a group fits into one")
    add("--threads", type=int, default=2)
    add("--learning-rate", type=float, default=1e-6)
    add("--ours", action="append", default=[], help="NAME=VALUE, an option of ours")
    add("--note", default="", help="kept with the result")
    add("--output", type=pathlib.Path, default=HERE / "results.jsonl")
    return made.parse_args()


def never_end(model):
    """Let completions end at a token that is not drawn."""
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    vocabulary = {token["content"]: token["id"] for token in added}
    settings["eos_token"] = NEVER
    file.write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((model / name).read_text())
        values["eos_token_id"] = vocabulary[NEVER]
        (model / name).write_text(json.dumps(values))


def ours(args, folder, model):
    """A line of metrics.jsonl per step, of one process."""
    folder.mkdir()
    config = folder / "config.py"
    config.write_text(CONFIG)
    flags = {
        "model": model,
        "seq_len": args.seq_len,
        "tasks_per_step": args.tasks_per_step,
        "algorithm.group_size": args.group_size,
        "rollout.max_tokens": args.tokens,
        "rollout.slots": args.tasks_per_step * args.group_size,
        "optimizer.learning_rate": args.learning_rate,
        "max_steps": args.steps,
        "output": folder / "run",
    }
    command = [sys.executable, "-m", "jaxrl.rl", f"--config={config}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    command += [f"--config.{option}" for option in args.ours]
    run_process(command, args.threads)
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [
        {
            "seconds": s["total_s"],
            "rollout_s": s["rollout_s"],
            "train_s": s["train_s"],
            "sync_s": s["sync_s"],
            "tokens": round(s["tokens_per_s_rollout"] * s["rollout_s"]),
            "reward": s["reward_mean"],
            "loss": s["loss"],
        }
        for s in map(json.loads, lines)
        if "total_s" in s
    ]


def peer(args, folder, model, side):
    folder.mkdir()
    keys = ("threads", "steps", "tasks_per_step", "group_size", "tokens", "learning_rate")
    options = {key: getattr(args, key) for key in keys}
    environment = ReverseText(tags=False)
    tasks = [environment.task(i) for i in range(args.tasks_per_step * args.steps)]
    options |= {
        "model": str(model),
        "rows": int(side.partition("=")[2]),
        "loss": "dapo",
        "tasks": [{"prompt": list(t.messages), "answer": t.info["answer"]} for t in tasks],
    }
    worker = str(HERE / "grpo_trl_worker.py")
    run_process(
        [args.peer_python, worker, json.dumps(options), str(folder / "steps")], args.threads
    )
    return [json.loads(line) for line in (folder / "steps").read_text().splitlines()]


def compare(args, turns):
    """The figures of all sides, over all counted steps and turn by turn."""
    counted = {side: [steps[args.left_out :] for steps in runs] for side, runs in turns.items()}
    wanted = args.tasks_per_step * args.group_size * args.tokens
    for side, runs in counted.items():
        short = {s["tokens"] for steps in runs for s in steps if s["tokens"] < 0.97 * wanted}
        if short:
            sys.exit(f"{side} drew {short} tokens in a step, not {wanted}: completions ended early")
    by_turn = {
        side: [statistics.median(s["seconds"] for s in steps) for steps in runs]
        for side, runs in counted.items()
    }
    medians = {
        side: statistics.median(s["seconds"] for steps in runs for s in steps)
        for side, runs in counted.items()
    }
    best = min((side for side in medians if side != "ours"), key=medians.__getitem__)
    pairs = zip(by_turn[best], by_turn["ours"], strict=True)
    shown = ("turns", "steps", "tasks_per_step", "group_size", "tokens", "seq_len", "threads")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "what": "grpo",
        "note": args.note,
        "commit": provenance.commit(),
        "host": host(),
        "settings": {key: getattr(args, key) for key in (*shown, "ours")},
        "seconds": medians,
        "seconds_by_turn": by_turn,
        "peer": best,
        "x_peer": medians[best] / medians["ours"],
        "x_peer_by_turn": [theirs / ours for theirs, ours in pairs],
        "steps": turns,
    }


def show(result):
    print(
        f"{result['host']['cpu']}, load {result['load_average_at_start'][0]:.1f}; "
        f"{result['settings']}; commit {result['commit']}"
    )
    for side, seconds in result["seconds"].items():
        turns = ", ".join(f"{s:.2f}" for s in result["seconds_by_turn"][side])
        print(f"{side}: {seconds:.2f} s a step (by turn {turns})")
    phases = [s for steps in result["steps"]["ours"] for s in steps[-1:]]
    print("ours, last step of each process:", phases)
    by_turn = ", ".join(f"{r:.2f}" for r in result["x_peer_by_turn"])
    print(f"ours is {result['x_peer']:.2f} x {result['peer']} (by turn {by_turn})")


if __name__ == "__main__":
    main()
