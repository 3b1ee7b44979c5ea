"""RL of Qwen3-4B-Instruct-2507 on 8 GPUs, which train and draw in turns.

`launch/rl_node.sh` has servers on some of them instead: with --config.rollout.max_staleness=1 they
draw while the others train. Tasks and verifier are reasoning-gym's (pip install reasoning-gym).
"""

from jaxrl.config import default_config
from jaxrl.rl_config import RlConfig

ENV = """{"dataset": "chain_sum", "count": 20000, "seed": 0,
"options": {"min_terms": 4, "max_terms": 8, "min_digits": 3, "max_digits": 5}}"""


def get_config():
    config = default_config(RlConfig)
    config.model = "Qwen/Qwen3-4B-Instruct-2507"
    config.output = "runs/rl_qwen3_4b"
    config.env.name = "reasoning_gym"
    config.env.options = ENV
    config.env.workers = 8
    config.eval.tasks = 200
    config.eval.options = '{"seed": 1000003}'
    config.eval.every = 20
    config.seq_len = 8192
    config.tasks_per_step = 32
    config.algorithm.group_size = 16
    config.rollout.max_tokens = 7168
    config.max_steps = 200
    config.checkpoint.every = 20
    config.optimizer.learning_rate = 1e-6
    return config
