"""One CPU training step side by side: jaxrl against transformers + torch.

    uv run python bench/peers/train_step.py --peer-python TORCH_PYTHON

Each contender is a process; they start from the same weights (the peer's, through a Hugging Face
checkpoint folder), must agree on the loss of the first steps, and then take turns of a few steps
each, so that whatever else the host does hits all of them. `--ours` and `--peer` may be repeated;
the first of each is compared with the other, the rest are variants:

    --ours ac=recompute --ours ac=selective --peer loss=labels --peer compile=yes

NAMES in capitals are environment variables of that contender (XLA_FLAGS=--xla_..., MALLOC_...).

Prints a table and appends one JSON object to `results.jsonl` beside this file.
"""

import datetime
import json
import os
import pathlib
import random
import statistics
import sys
import tempfile

from protocol import Worker, host, parse_variant, parser

HERE = pathlib.Path(__file__).parent
CHECKED_STEPS = 3
TOLERANCE = 1e-4


def arguments():
    variants = {"ours": "StepConfig fields, e.g. ac=none", "peer": "see torch_worker.OPTIONS"}
    made = parser(__doc__.splitlines()[0], **variants, turns=8, steps=2)
    add = made.add_argument
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=512)
    add("--vocab", type=int, default=32000)
    add("--seq-len", type=int, default=2048)
    add("--matmul-size", type=int, default=2048, help="square product that gives the peak")
    return made.parse_args()


def shape(args):
    """Keyword arguments of transformers' Qwen3Config."""
    return {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 128,
        "head_dim": 64,
        "max_position_embeddings": max(args.seq_len, 2048),
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


OPTIMIZER = {
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "max_grad_norm": 1.0,
}


class Contender:
    """A variant of one side, running."""

    def __init__(self, side, text, start_worker):
        self.options, environment = parse_variant(text)
        self.side, self.name = side, f"{side} {text}".strip()
        self.worker = start_worker(environment)
        self.turns, self.cpu_turns, self.losses = [], [], []

    def run(self, steps):
        answer = self.worker.ask("steps", count=steps)
        self.losses += answer["losses"]
        return answer["seconds"], answer["cpu_seconds"]

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
        "ours": [sys.executable, str(HERE / "jaxrl_worker.py")],
        "peer": [args.peer_python, str(HERE / "torch_worker.py")],
    }

    def contender(side, text):
        start = lambda extra: Worker(commands[side], environment | extra, cpus)  # noqa: E731
        return Contender(side, text, start)

    contenders = [contender("ours", text) for text in args.ours or ["ac=recompute"]]
    contenders += [contender("peer", text) for text in args.peer or [""]]
    tokens = random.Random(args.seed).choices(range(args.vocab), k=args.seq_len)
    try:
        with tempfile.TemporaryDirectory() as folder:
            maker = Worker(commands["peer"], environment)
            maker.ask("make_checkpoint", shape=shape(args), path=folder, seed=args.seed)
            maker.close()
            for c in contenders:
                c.info = c.worker.ask(
                    "start",
                    shape=shape(args),
                    optimizer=OPTIMIZER,
                    checkpoint=folder,
                    tokens=tokens,
                    options=c.options,
                    threads=args.threads,
                )
        result = compare(args, contenders)
    finally:
        for c in contenders:
            c.worker.close()
    result["load_average_at_start"] = load
    result["command"] = ["TORCH_PYTHON" if a == args.peer_python else a for a in sys.argv[1:]]
    with args.output.open("a") as file:
        file.write(json.dumps(result) + "\n")
    show(result)
    if not result["same_losses"]:
        sys.exit(
            f"losses of the fp32 contenders differ by more than {TOLERANCE}: not the same work"
        )


def compare(args, contenders):
    """Warm up (checking losses), take turns, and put the figures together."""
    for c in contenders:
        c.run(CHECKED_STEPS)
    peaks = {"ours": [], "peer": []}
    firsts = {side: next(c for c in contenders if c.side == side) for side in peaks}
    for turn in range(args.turns):
        for side, c in firsts.items():
            answer = c.worker.ask("matmul_peak", size=args.matmul_size, repetitions=3)
            peaks[side].append(answer["flops"])
        # Every other turn the other way round: who runs after whom must not matter.
        for c in contenders[:: -1 if turn % 2 else 1]:
            seconds, cpu_seconds = c.run(args.steps)
            c.turns.append(seconds)
            c.cpu_turns.append(cpu_seconds)
    peak = statistics.median(peaks["ours"])
    flops = firsts["ours"].info["model_flops"]
    precise = [c for c in contenders if c.options.get("dtype", "float32") == "float32"]
    expected = firsts["peer"].losses[:CHECKED_STEPS]
    worst = max(abs(a - b) for c in precise for a, b in zip(c.losses, expected, strict=False))
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "note": args.note,
        "commit": firsts["ours"].info["commit"],
        "source": firsts["ours"].info["source"],
        "host": host(),
        "threads": args.threads,
        "shape": shape(args) | {"seq_len": args.seq_len, "batch": 1},
        "versions": firsts["ours"].info["versions"] | firsts["peer"].info["versions"],
        "xla_flags": firsts["ours"].info["xla_flags"],
        "model_flops": flops,
        "matmul_peak_flops": peak,
        "matmul_peak_flops_torch": statistics.median(peaks["peer"]),
        "max_loss_difference": worst,
        "same_losses": worst <= TOLERANCE,
        "contenders": [report(c, firsts["peer"], flops, peak) for c in contenders],
    }


def report(c, peer, flops, peak):
    low, median, high = statistics.quantiles(c.seconds, n=4)
    # One ratio per turn: neighbours in time, so that slow spells cancel.
    ratios = [
        statistics.median(theirs) / statistics.median(ours)
        for theirs, ours in zip(peer.turns, c.turns, strict=True)
    ]
    ratio_low, _, ratio_high = statistics.quantiles(ratios, n=4)
    keep = ("step", "compile_s", "temp_bytes", "parameters")
    return {
        "name": c.name,
        "median_s": median,
        "iqr_s": [low, high],
        "cpu_median_s": statistics.median(s for turn in c.cpu_turns for s in turn),
        "seconds": c.turns,
        "cpu_seconds": c.cpu_turns,
        "speed_vs_peer": statistics.median(peer.seconds) / median,
        "speed_vs_peer_iqr": [ratio_low, ratio_high],
        "model_flops_share_of_peak": flops / median / peak,
        "rss_after_import": c.info["after_import"],
        "peak_rss": c.worker.ask("peak_rss")["bytes"],
        "losses": c.losses[:CHECKED_STEPS],
        "info": {k: c.info[k] for k in keep if k in c.info},
    }


def show(result):
    print(
        f"{result['host']['cpu']}, {result['threads']} threads, load "
        f"{result['load_average_at_start'][0]:.1f}; model {result['model_flops'] / 1e9:.0f} GFLOP "
        f"per step; fp32 matmul peak {result['matmul_peak_flops'] / 1e9:.0f} GFLOP/s (XLA), "
        f"{result['matmul_peak_flops_torch'] / 1e9:.0f} (torch); commit {result['commit']}"
    )
    head = (
        "contender",
        "median s",
        "IQR",
        "CPU s",
        "x peer",
        "IQR",
        "of peak",
        "RSS GiB",
        "import",
    )
    row = "{:<44} {:>8} {:>13} {:>6} {:>7} {:>10} {:>8} {:>8} {:>7}"
    print(row.format(*head))
    for c in result["contenders"]:
        print(
            row.format(
                c["name"],
                f"{c['median_s']:.3f}",
                "{:.3f}-{:.3f}".format(*c["iqr_s"]),
                f"{c['cpu_median_s']:.2f}",
                f"{c['speed_vs_peer']:.2f}",
                "{:.2f}-{:.2f}".format(*c["speed_vs_peer_iqr"]),
                f"{c['model_flops_share_of_peak']:.1%}",
                f"{c['peak_rss'] / 2**30:.2f}",
                f"{c['rss_after_import'] / 2**30:.2f}",
            )
        )
    print(f"largest difference of fp32 losses to the peer: {result['max_loss_difference']:.1e}")


if __name__ == "__main__":
    main()
