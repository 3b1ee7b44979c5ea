"""Supervised fine-tuning side by side: `jaxrl.sft` against TRL's SFTTrainer, both on the CPU.

    uv run python bench/peers/sft.py --peer-python TORCH_PYTHON

Whole programs: the same checkpoint (SmolLM2-135M-Instruct), the same chats (gsm_symbolic), rows of
the same length packed by each side's own algorithm, the same optimizer and accumulation, fp32, only
answers trained. They take turns, each a process of its own; a step's tokens (padding is none) over
its seconds, the first steps of each process left out. Prints a table and appends one JSON object to
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

from jaxrl.data import gsm_symbolic
from jaxrl.models import smollm2
from jaxrl.perf import provenance

HERE = pathlib.Path(__file__).parent
CONFIG = """
from jaxrl.config import default_config
from jaxrl.sft_config import SftConfig


def get_config():
    config = default_config(SftConfig)
    config.data.window = 256
    config.optimizer.learning_rate = {learning_rate}
    config.train.compute_dtype = "float32"
    config.train.ac = {ac!r}
    config.tensorboard = False
    config.epochs = 0
    config.checkpoint.every = 0
    return config
"""


def main():
    args = arguments()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        model = smollm2.convert(folder / "model")
        data = gsm_symbolic.write(folder / "data", train=args.samples, held_out=1)
        turns = {"ours": [], "peer": []}
        for turn in range(args.turns):
            for side in sorted(turns, reverse=bool(turn % 2)):
                run = ours if side == "ours" else peer
                steps = run(args, folder / f"{side}{turn}", model, data / "train.jsonl")
                turns[side].append(steps)
                print(side, [round(speed(s)) for s in steps], flush=True)
    result = compare(args, turns)
    result["load_average_at_start"] = load
    with args.output.open("a") as file:
        file.write(json.dumps(result) + "\n")
    show(result)


def arguments():
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--peer-python", required=True, help="python of the torch environment (README.md)")
    add("--turns", type=int, default=3, help="processes of each side")
    add("--steps", type=int, default=6, help="steps of each process")
    add("--left-out", type=int, default=2, help="first steps of each process that do not count")
    add("--batch-size", type=int, default=2, help="rows per step, accumulated one by one")
    add("--seq-len", type=int, default=1024)
    add("--samples", type=int, default=1000)
    add("--recompute", action="store_true", help="activations recomputed, on both sides")
    add("--threads", type=int, default=2)
    add("--learning-rate", type=float, default=1e-5)
    add("--note", default="", help="kept with the result")
    add("--output", type=pathlib.Path, default=HERE / "results.jsonl")
    return made.parse_args()


def ours(args, folder, model, train):
    """A line of metrics.jsonl per step, of one process."""
    folder.mkdir()
    ac = "recompute" if args.recompute else "none"
    config = folder / "config.py"
    config.write_text(CONFIG.format(learning_rate=args.learning_rate, ac=ac))
    flags = {
        "model": model,
        "data.train": train,
        "data.seq_len": args.seq_len,
        "batch_size": args.batch_size,
        "max_steps": args.steps,
        "output": folder / "run",
    }
    command = [sys.executable, "-m", "jaxrl.sft", f"--config={config}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    run_process(command, args.threads)
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [
        {
            "seconds": s["step_s"],
            "tokens": round(s["tokens_per_s"] * s["step_s"]),
            "trained_tokens": s["trained_tokens"],
            "loss": s["loss"],
        }
        for s in steps
    ]


def peer(args, folder, model, train):
    folder.mkdir()
    keys = ("threads", "samples", "steps", "batch_size", "seq_len", "learning_rate", "recompute")
    options = {key: getattr(args, key) for key in keys}
    options |= {"model": str(model), "train": str(train)}
    worker = str(HERE / "sft_trl_worker.py")
    run_process(
        [args.peer_python, worker, json.dumps(options), str(folder / "steps")], args.threads
    )
    return [json.loads(line) for line in (folder / "steps").read_text().splitlines()]


def speed(step):
    """Tokens per second."""
    return step["tokens"] / step["seconds"]


def compare(args, turns):
    """The figures of both sides, over all counted steps and turn by turn."""
    counted = {side: [steps[args.left_out :] for steps in runs] for side, runs in turns.items()}
    by_turn = {
        side: [statistics.median(map(speed, steps)) for steps in runs]
        for side, runs in counted.items()
    }
    medians = {
        side: statistics.median(speed(s) for steps in runs for s in steps)
        for side, runs in counted.items()
    }
    ratios = [a / b for a, b in zip(by_turn["ours"], by_turn["peer"], strict=True)]
    shown = ("turns", "steps", "batch_size", "seq_len", "samples", "recompute", "threads")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "what": "sft",
        "note": args.note,
        "commit": provenance.commit(),
        "host": host(),
        "settings": {key: getattr(args, key) for key in shown},
        "tokens_per_s": medians,
        "tokens_per_s_by_turn": by_turn,
        "x_peer": medians["ours"] / medians["peer"],
        "x_peer_by_turn": ratios,
        "steps": turns,
    }


def show(result):
    print(
        f"{result['host']['cpu']}, load {result['load_average_at_start'][0]:.1f}; "
        f"{result['settings']}; commit {result['commit']}"
    )
    for side, tokens in result["tokens_per_s"].items():
        turns = ", ".join(f"{t:.0f}" for t in result["tokens_per_s_by_turn"][side])
        print(f"{side}: {tokens:.0f} tokens/s (by turn {turns})")
    by_turn = ", ".join(f"{r:.2f}" for r in result["x_peer_by_turn"])
    print(f"ours is {result['x_peer']:.2f} x the peer (by turn {by_turn})")


if __name__ == "__main__":
    main()
