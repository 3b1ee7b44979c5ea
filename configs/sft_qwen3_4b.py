"""SFT of Qwen3-4B-Instruct-2507 on 8 GPUs: `--config.data.train=chats.jsonl`."""

from jaxrl.config import default_config
from jaxrl.sft_config import SftConfig


def get_config():
    config = default_config(SftConfig)
    config.model = "Qwen/Qwen3-4B-Instruct-2507"
    config.output = "runs/sft_qwen3_4b"
    config.data.seq_len = 16384
    config.batch_size = 16
    config.epochs = 2
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    return config
