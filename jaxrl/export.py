"""Write a run's checkpoint as a model that other programs read.

python -m jaxrl.export RUN_DIR OUT_DIR                    the newest checkpoint: a model folder
python -m jaxrl.export RUN_DIR OUT_DIR --step 200
python -m jaxrl.export RUN_DIR OUT_DIR --format adapter   of a LoRA run: a PEFT folder

A LoRA run's adapters are merged into the weights unless the adapter itself is asked for. Generation
settings, tokenizer and chat template are copied from the checkpoint that the run began with (the
last two from where the run's options say, if they do). Works on the CPU, in host memory, whatever
the run's devices were. Exit code: 0 written, 2 bad input or a disk that is full.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxrl import cli
from jaxrl.options import ConfigError

FORMATS = ("auto", "merged", "adapter")
DTYPES = ("float32", "bfloat16")


def main(argv: Sequence[str]) -> int:
    """Export as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrl.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="config.output of the run")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="a new folder")
    parser.add_argument("--step", type=int, help="default the newest checkpoint")
    parser.add_argument("--format", choices=FORMATS, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default bfloat16, of an adapter float32")
    args = parser.parse_args(argv[1:])
    if not args.run_dir.is_dir():
        raise ConfigError(f"no run in {args.run_dir}: it is no folder")
    from jaxrl.train.exporting import export

    print(export(args.run_dir, args.out_dir, args.step, args.format, args.dtype))
    return 0


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # a GPU's memory may be too small, or in use
    cli.run(main)
