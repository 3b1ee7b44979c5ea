"""Supervised fine-tuning of a Hugging Face checkpoint on chat data.

python -m jaxrl.sft --config=configs/sft_smollm2.py
python -m jaxrl.sft --config=configs/sft_qwen3_4b.py --config.data.train=chats.jsonl
python -m jaxrl.sft --config=configs/sft_qwen3_4b.py --config.gpu=8xH100 --dry_run

Writes checkpoints, metrics.jsonl and TensorBoard files into the output folder; run again, it goes
on from the newest checkpoint. SIGTERM and Ctrl-C save and end the run. Exit code: 0 done or
stopped, 1 the run gave up (bad gradients), 2 bad input or a disk that is full.

Started on several hosts (see launch/), it is one program over all their devices.
"""

from collections.abc import Sequence

from jaxrl import cli
from jaxrl._platform import take_whole_gpus
from jaxrl.parallel import distributed
from jaxrl.perf.hardware import check_gpus_are_used
from jaxrl.sft_config import SftConfig


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; returns the exit code."""
    argv = cli.with_dry_run(argv)
    config = cli.parse(SftConfig, argv, __doc__ or "")
    if config.dry_run:
        from jaxrl.perf.dry_run import dry_run

        return dry_run(config)
    take_whole_gpus()
    distributed.initialize()
    check_gpus_are_used()
    from jaxrl.train.sft import train

    return train(config)


if __name__ == "__main__":
    cli.run(main)
