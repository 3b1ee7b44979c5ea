"""Reinforcement learning of a Hugging Face checkpoint on tasks whose answers can be scored.

python -m jaxrl.rl --config=configs/rl_smollm2.py
python -m jaxrl.rl --config=configs/rl_smollm2.py --config.env.name=guess_number
python -m jaxrl.rl --config=configs/rl_qwen3_4b.py --config.gpu=8xH100 --dry_run

Writes checkpoints, metrics.jsonl, rollouts.jsonl and TensorBoard files into the output folder; run
again, it goes on from the newest checkpoint. SIGTERM and Ctrl-C save and end the run. Exit code: 0
done or stopped, 1 the run gave up (bad gradients), 2 bad input or a disk that is full.

One process drives all devices of its host. Started on several hosts (README), the processes train
together, and the rollouts are drawn by servers, `--config.rollout.servers=URL,URL`.
"""

from collections.abc import Sequence

from jaxrl import cli
from jaxrl._platform import take_whole_gpus
from jaxrl.parallel import distributed
from jaxrl.perf.hardware import check_gpus_are_used
from jaxrl.rl_config import RlConfig


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; returns the exit code."""
    argv = cli.with_dry_run(argv)
    config = cli.parse(RlConfig, argv, __doc__ or "")
    if config.dry_run:
        from jaxrl.perf.dry_run import dry_run

        return dry_run(config)
    take_whole_gpus()
    distributed.initialize()
    check_gpus_are_used()
    from jaxrl.train.rl import train

    return train(config)


if __name__ == "__main__":
    cli.run(main)
