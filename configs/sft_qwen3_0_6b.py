"""SFT of Qwen3-0.6B on one GPU: `--config.data.train=chats.jsonl`."""

from jaxrl.config import default_config
from jaxrl.sft_config import SftConfig


def get_config():
    config = default_config(SftConfig)
    config.model = "Qwen/Qwen3-0.6B"
    config.output = "runs/sft_qwen3_0_6b"
    config.data.seq_len = 8192
    config.batch_size = 8
    config.epochs = 2
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    return config
