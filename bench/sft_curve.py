"""Plot a run's losses: `uv run python bench/sft_curve.py METRICS_JSONL OUT_PNG`."""

import json
import sys

import matplotlib.pyplot as plt


def main(metrics: str, out: str) -> None:
    with open(metrics) as file:
        lines = [json.loads(line) for line in file]
    fig, ax = plt.subplots(figsize=(7, 3), dpi=150)
    for key, label, style in (
        ("loss", "training", {"color": "#c9ced6"}),
        ("eval_loss", "validation", {"color": "#2f6fde", "marker": "o"}),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        ax.plot(*zip(*points, strict=True), label=label, **style)
    ax.set_xlabel("step")
    ax.set_ylabel("loss per trained token")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: bench/sft_curve.py METRICS_JSONL OUT_PNG")
    main(*sys.argv[1:])
