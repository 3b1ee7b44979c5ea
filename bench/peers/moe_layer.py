"""One expert layer on the CPU, forward and backward: jaxrl against transformers + torch.

    uv run python bench/peers/moe_layer.py --peer-python TORCH_PYTHON

Router and experts of Qwen3-MoE's sparse block in fp32: the same weights, input and cotangent of the
output. Output and every gradient (input, router, experts) must agree before anything is timed; then
the contenders, a process each, take turns. transformers has several implementations of experts: the
fastest of those that take part is the peer. `--peer` and `--ours` may be repeated:

    --ours implementation=xla --peer experts=grouped_mm --peer experts=eager,compile=yes

NAMES in capitals are environment variables of that contender (XLA_FLAGS=--xla_...).

Prints a table and appends one JSON object to `results.jsonl` beside this file.
"""

import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile

import numpy as np
from protocol import Worker, host, parse_variant, parser
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
PEERS = (  # batched_mm copies weights per row: not done in 10 min
    "experts=grouped_mm",
    "experts=grouped_mm,OMP_WAIT_POLICY=passive",
    "experts=eager,OMP_WAIT_POLICY=passive",
)
TOLERANCE = 1e-4  # of the largest value of a tensor


def arguments():
    peers = f"experts=NAME; default: {', '.join(PEERS)}"
    options = {"ours": "implementation=NAME", "peer": peers, "turns": 10, "steps": 3}
    made = parser(__doc__.splitlines()[0], **options)
    add = made.add_argument
    add("--tokens", type=int, default=2048)
    add("--hidden", type=int, default=512)
    add("--experts", type=int, default=32)
    add("--width", type=int, default=256, help="of an expert")
    add("--top-k", type=int, default=4)
    return made.parse_args()


def shape(args):
    """Fields of transformers' Qwen3MoeConfig, and of ours, under the same names."""
    return {
        "hidden_size": args.hidden,
        "num_experts": args.experts,
        "moe_intermediate_size": args.width,
        "num_experts_per_tok": args.top_k,
    }


def make_tensors(args):
    """Weights under transformers' names, input x and cotangent dy."""
    rng = np.random.default_rng(args.seed)
    E, F, D = args.experts, args.width, args.hidden
    shapes = {
        "gate.weight": (E, D),
        "experts.gate_up_proj": (E, 2 * F, D),
        "experts.down_proj": (E, D, F),
    }
    tensors = {k: 0.02 * rng.standard_normal(s, np.float32) for k, s in shapes.items()}
    for name in ("x", "dy"):
        tensors[name] = rng.standard_normal((args.tokens, D), np.float32)
    return tensors


class Contender:
    """A variant of one side, running."""

    def __init__(self, side, text, commands, environment, cpus):
        self.options, extra = parse_variant(text)
        self.side, self.name = side, f"{side} {text}"
        self.worker = Worker(commands[side], environment | extra, cpus)
        self.turns = []

    @property
    def seconds(self):
        return [s for turn in self.turns for s in turn]


def main():
    args = arguments()
    load = os.getloadavg()
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(cpus) < args.threads:
        sys.exit(f"--threads {args.threads}: this process may use {len(cpus)} CPUs")
    environment = {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu"}
    commands = {
        "ours": [sys.executable, str(HERE / "moe_jaxrl_worker.py")],
        "peer": [args.peer_python, str(HERE / "moe_torch_worker.py")],
    }
    variants = [("ours", text) for text in args.ours or ["implementation=xla"]]
    variants += [("peer", text) for text in args.peer or PEERS]
    contenders = [Contender(*variant, commands, environment, cpus) for variant in variants]
    try:
        with tempfile.TemporaryDirectory() as folder:
            contenders, refused, differences = start(args, contenders, folder)
        for turn in range(args.turns):
            # Every other turn the other way round: who runs after whom must not matter.
            for c in contenders[:: -1 if turn % 2 else 1]:
                c.turns.append(c.worker.ask("steps", count=args.steps)["seconds"])
        result = put_together(args, contenders)
    finally:
        for c in contenders:
            c.worker.close()
    result |= {"refused": refused, "largest_differences": differences}
    result["load_average_at_start"] = load
    result["command"] = ["TORCH_PYTHON" if a == args.peer_python else a for a in sys.argv[1:]]
    with args.output.open("a") as file:
        file.write(json.dumps(result) + "\n")
    show(result)


def start(args, contenders, folder):
    """Start all, compare what they compute, warm up: (those that run; errors; differences)."""
    tensors = f"{folder}/tensors.safetensors"
    save_file(make_tensors(args), tensors)
    running, refused, results = [], {}, {}
    for i, c in enumerate(contenders):
        try:
            c.info = c.worker.ask(
                "start", shape=shape(args), tensors=tensors, options=c.options, threads=args.threads
            )
            c.worker.ask("results", path=f"{folder}/{i}.safetensors")
            results[c.name] = load_file(f"{folder}/{i}.safetensors")
            c.worker.ask("steps", count=2)
            running.append(c)
        except RuntimeError as error:  # an implementation that does not run here
            refused[c.name] = str(error)
            c.worker.close()
    if {c.side for c in running} != {"ours", "peer"}:
        sys.exit(f"nothing to compare: {refused}")
    first = next(c.name for c in running if c.side == "peer")
    differences = {}
    for name in results:
        for tensor, want in results[first].items():
            size = np.max(np.abs(want))
            difference = float(np.max(np.abs(results[name][tensor] - want)) / size)
            differences[tensor] = max(differences.get(tensor, 0.0), difference)
            if not difference <= TOLERANCE:
                sys.exit(f"{name}: {tensor} differs from {first} by {difference:.1e} of its size")
    return running, refused, differences


def put_together(args, contenders):
    ours, *_ = (c for c in contenders if c.side == "ours")
    peer = min(
        (c for c in contenders if c.side == "peer"), key=lambda c: statistics.median(c.seconds)
    )
    reports = []
    for c in contenders:
        low, median, high = statistics.quantiles(c.seconds, n=4)
        # One ratio per turn: neighbours in time, so that slow spells cancel.
        ratios = [
            statistics.median(theirs) / statistics.median(mine)
            for theirs, mine in zip(peer.turns, c.turns, strict=True)
        ]
        low_ratio, median_ratio, high_ratio = statistics.quantiles(ratios, n=4)
        reports.append(
            {
                "name": c.name,
                "median_s": median,
                "iqr_s": [low, high],
                "seconds": c.turns,
                "speed_vs_peer": statistics.median(peer.seconds) / median,
                "speed_vs_peer_turn_by_turn": median_ratio,
                "speed_vs_peer_iqr": [low_ratio, high_ratio],
                "peak_rss": c.worker.ask("peak_rss")["bytes"],
            }
        )
    tokens, width = args.tokens * args.top_k, args.width
    return {
        "benchmark": "moe_layer",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "note": args.note,
        "commit": ours.info["commit"],
        "source": ours.info["source"],
        "host": host(),
        "threads": args.threads,
        "shape": shape(args) | {"tokens": args.tokens},
        "versions": ours.info["versions"] | peer.info["versions"],
        "xla_flags": ours.info["xla_flags"],
        "temp_bytes": ours.info["temp_bytes"],
        "experts_flops": 3 * 3 * 2 * tokens * width * args.hidden,
        "peer": peer.name,
        "ratio": reports[0]["speed_vs_peer"],
        "contenders": reports,
    }


def show(result):
    gflop = result["experts_flops"] / 1e9
    print(
        f"{result['host']['cpu']}, {result['threads']} threads, load "
        f"{result['load_average_at_start'][0]:.1f}; experts' products {gflop:.0f} GFLOP; peer: "
        f"{result['peer']}; commit {result['commit']}"
    )
    row = "{:<47} {:>9} {:>15} {:>7} {:>7} {:>11} {:>8} {:>8}"
    print(row.format("contender", "median ms", "IQR", "x peer", "by turn", "IQR", "GFLOP/s", "RSS"))
    for c in result["contenders"]:
        print(
            row.format(
                c["name"],
                f"{1e3 * c['median_s']:.1f}",
                "{:.1f}-{:.1f}".format(*(1e3 * s for s in c["iqr_s"])),
                f"{c['speed_vs_peer']:.2f}",
                f"{c['speed_vs_peer_turn_by_turn']:.2f}",
                "{:.2f}-{:.2f}".format(*c["speed_vs_peer_iqr"]),
                f"{gflop / c['median_s']:.0f}",
                f"{c['peak_rss'] / 2**30:.2f}",
            )
        )
    for name, error in result["refused"].items():
        print(f"{name}: does not run here: {error}")
    worst = max(result["largest_differences"].values())
    print(f"largest difference, of a tensor's largest value: {worst:.1e}")


if __name__ == "__main__":
    main()
