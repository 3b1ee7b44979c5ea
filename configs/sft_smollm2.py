"""SFT of SmolLM2-135M-Instruct on worked grade-school maths, on a laptop's CPU.

Model and data are real and come from PyPI; where they are not there yet, they are written below
`runs/` first (0.5 GB).
"""

import pathlib

from jaxrl.config import default_config
from jaxrl.data import gsm_symbolic
from jaxrl.sft_config import SftConfig

MODEL = pathlib.Path("runs/SmolLM2-135M-Instruct")
DATA = pathlib.Path("runs/gsm_symbolic")


def get_config():
    if not MODEL.is_dir():
        from jaxrl.models import smollm2

        smollm2.convert(MODEL)
    if not DATA.is_dir():
        gsm_symbolic.write(DATA)
    config = default_config(SftConfig)
    config.model = str(MODEL)
    config.output = "runs/sft_smollm2"
    config.data.train = (str(DATA / "train.jsonl"),)
    config.data.validation = (str(DATA / "held_out.jsonl"),)
    config.data.seq_len = 1024
    config.batch_size = 4
    config.max_steps = 60
    config.eval_every = 10
    config.eval_batches = 5
    config.checkpoint.every = 20
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 5
    # Memory is not what a CPU is short of.
    config.train.ac = "none"
    config.train.compute_dtype = "float32"
    return config
