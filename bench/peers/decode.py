"""Sampling on the CPU: the rollout engine against transformers' `generate` on torch.

    uv run python bench/peers/decode.py --peer-python TORCH_PYTHON

SmolLM2-135M-Instruct in fp32, `--sequences` prompts of `--prompt` random tokens, `--tokens` new
tokens each, no early end, temperature 1 without top-k. First both choose the likeliest tokens, and
must choose alike. Then they take turns, a process each; prefill and sampling are in the time.
`--ours` and `--peer` may be repeated: `--ours steps=16 --peer OMP_WAIT_POLICY=passive`.

Prints a table and appends one JSON object to `results.jsonl` beside this file.
"""

import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile

from protocol import Worker, host, parse_variant, parser

from jaxrl.models import smollm2
from jaxrl.perf import provenance

HERE = pathlib.Path(__file__).parent
PEERS = ("", "OMP_WAIT_POLICY=passive")


def main():
    made = parser(
        __doc__.splitlines()[0],
        ours="steps=N, tokens between two looks at what waits",
        peer="environment variables",
        turns=4,
        steps=1,
    )
    made.add_argument("--sequences", type=int, default=16)
    made.add_argument("--prompt", type=int, default=64)
    made.add_argument("--tokens", type=int, default=128)
    args, load = made.parse_args(), os.getloadavg()
    commands = {
        "ours": [sys.executable, str(HERE / "decode_jaxrl_worker.py")],
        "peer": [args.peer_python, str(HERE / "decode_torch_worker.py")],
    }
    variants = [("ours", text) for text in args.ours or ["steps=16"]]
    variants += [("peer", text) for text in args.peer or PEERS]
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    environment = {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu"}
    sizes = {key: getattr(args, key) for key in ("sequences", "prompt", "tokens")}
    running = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(smollm2.convert(pathlib.Path(folder) / "model"))
        try:
            for side, text in variants:
                options, extra = parse_variant(text)
                worker = Worker(commands[side], environment | extra, cpus)
                running[f"{side} {text}".strip()] = worker
                worker.ask("start", model=model, options=options, threads=args.threads, **sizes)
            alike = agreement([w.ask("greedy", seed=args.seed)["tokens"] for w in running.values()])
            if alike < 0.95:
                sys.exit(f"the likeliest tokens are the same in {100 * alike:.0f} % of places only")
            turns = take_turns(running, args.turns)
        finally:
            for worker in running.values():
                worker.close()
    result = compare(args, sizes, turns) | {"alike": alike, "load_average_at_start": load}
    with args.output.open("a") as file:
        file.write(json.dumps(result) + "\n")
    show(result)


def agreement(found):
    """Share of places at which all chose the first one's token, up to where a sequence parts."""
    same = total = 0
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            parts = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
            same, total = same + parts, total + len(a)
    return same / total


def take_turns(running, count):
    """Seconds of each contender's turns, the first left out: it compiles."""
    turns = {name: [] for name in running}
    for turn in range(count + 1):
        for name in sorted(running, reverse=bool(turn % 2)):
            seconds = running[name].ask("draw", seed=turn)["seconds"]
            if turn:
                turns[name].append(seconds)
    return turns


def compare(args, sizes, turns):
    medians = {name: statistics.median(seconds) for name, seconds in turns.items()}
    peer = min((name for name in turns if name.startswith("peer")), key=medians.__getitem__)
    drawn = sizes["sequences"] * sizes["tokens"]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "what": "decode",
        "note": args.note,
        "commit": provenance.commit(),
        "host": host(),
        "threads": args.threads,
        "sizes": sizes,
        "peer": peer,
        "seconds": turns,
        "tokens_per_s": {name: drawn / median for name, median in medians.items()},
        "x_peer": {name: medians[peer] / median for name, median in medians.items()},
        "x_peer_by_turn": {
            name: [a / b for a, b in zip(turns[peer], seconds, strict=True)]
            for name, seconds in turns.items()
        },
    }


def show(result):
    print(
        f"{result['host']['cpu']}, load {result['load_average_at_start'][0]:.1f}; "
        f"{result['sizes']}; commit {result['commit']}; the likeliest tokens are the same in "
        f"{100 * result['alike']:.1f} % of places"
    )
    for name, speed in result["tokens_per_s"].items():
        turns = ", ".join(f"{r:.2f}" for r in result["x_peer_by_turn"][name])
        print(f"{name}: {speed:.0f} tokens/s, {result['x_peer'][name]:.2f} x peer (turns {turns})")


if __name__ == "__main__":
    main()
