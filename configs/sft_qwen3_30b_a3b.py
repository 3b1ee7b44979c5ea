"""SFT of Qwen3-30B-A3B-Instruct-2507 on 8 GPUs: `--config.data.train=chats.jsonl`.

LoRA on every linear map and expert by default; `:full` trains all weights.
"""

from jaxrl.config import default_config
from jaxrl.options import ConfigError
from jaxrl.sft_config import SftConfig


def get_config(kind: str = "lora"):
    if kind not in ("lora", "full"):
        raise ConfigError(f"there is no {kind!r}; use lora or full")
    config = default_config(SftConfig)
    config.model = "Qwen/Qwen3-30B-A3B-Instruct-2507"
    config.output = f"runs/sft_qwen3_30b_a3b_{kind}"
    config.data.seq_len = 16384
    config.lora_rank = 16 if kind == "lora" else 0
    config.batch_size = 16
    config.epochs = 2
    config.optimizer.learning_rate = 1e-4 if kind == "lora" else 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    return config
