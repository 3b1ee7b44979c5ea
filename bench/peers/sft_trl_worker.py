"""The peer of sft.py: TRL's SFTTrainer on torch's CPU. Runs in the torch environment.

    TORCH_PYTHON sft_trl_worker.py OPTIONS_JSON OUT_JSONL

Writes a line per step: seconds, tokens (padding is none), trained tokens, loss.
"""

import json
import os
import sys
import tempfile
import time

import datasets
import torch
import transformers
import trl


def main(options, out):
    torch.set_num_threads(options["threads"])
    with open(options["train"]) as file:
        chats = [json.loads(line)["messages"] for line in file][: options["samples"]]
    data = datasets.Dataset.from_list([{"prompt": c[:-1], "completion": c[-1:]} for c in chats])
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            max_steps=options["steps"],
            per_device_train_batch_size=1,
            gradient_accumulation_steps=options["batch_size"],
            max_length=options["seq_len"],
            packing=True,
            packing_strategy="bfd",
            learning_rate=options["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.01,
            max_grad_norm=1.0,
            gradient_checkpointing=options["recompute"],
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=torch.float32, attn_implementation="sdpa"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(options["model"])
        trainer = trl.SFTTrainer(
            model=model, args=config, train_dataset=data, processing_class=tokenizer
        )
        counter = Counter(trainer.data_collator)
        trainer.data_collator = counter

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                self.begin = time.perf_counter()

            def on_step_end(self, *args, **kwargs):
                lines.append({"seconds": time.perf_counter() - self.begin})

            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "loss" in logs:
                    lines[-1]["loss"] = logs["loss"]

        trainer.add_callback(Clock())
        trainer.train()
    size = options["batch_size"]
    for i, line in enumerate(lines):
        rows = counter.rows[i * size : (i + 1) * size]
        line["tokens"], line["trained_tokens"] = (sum(column) for column in zip(*rows, strict=True))
    with open(out, "w") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


class Counter:
    """A collator that notes how many tokens, and trained ones, each batch has."""

    def __init__(self, collate):
        self.collate, self.rows = collate, []

    def __call__(self, examples):
        batch = self.collate(examples)
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        self.rows.append((tokens, int((batch["labels"] != -100).sum())))
        return batch


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
main(json.loads(sys.argv[1]), sys.argv[2])
