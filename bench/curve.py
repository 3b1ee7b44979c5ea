"""Plot runs: `uv run python bench/curve.py loss|reward OUT_PNG METRICS_JSONL...`."""

import json
import sys

import matplotlib.pyplot as plt

# Of each figure: its axis, and (key, label) of what training and the held-out evaluations have.
FIGURES = {
    "loss": ("loss per trained token", ("loss", "training"), ("eval_loss", "validation")),
    "reward": ("mean reward", ("reward_mean", "rollouts"), ("eval/reward_mean", "held-out tasks")),
}
COLORS = ("#2f6fde", "#d9822b", "#2e9d67")


def main(figure: str, out: str, *files: str) -> None:
    ylabel, *keys = FIGURES[figure]
    fig, ax = plt.subplots(figsize=(7, 3), dpi=150)
    for number, file in enumerate(files):
        with open(file) as lines:
            metrics = [json.loads(line) for line in lines]
        color, run = COLORS[number % len(COLORS)], f", run {number}" if len(files) > 1 else ""
        for (key, label), style in zip(keys, ({"alpha": 0.35}, {"marker": "o"}), strict=True):
            points = [(line["step"], line[key]) for line in metrics if key in line]
            ax.plot(*zip(*points, strict=True), label=label + run, color=color, **style)
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in FIGURES:
        sys.exit("usage: bench/curve.py loss|reward OUT_PNG METRICS_JSONL...")
    main(*sys.argv[1:])
